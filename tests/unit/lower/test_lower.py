"""The lower-level solver against closed forms, SciPy and value iteration; its certificate; its ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from bilevel import Ball, BilevelProblem, FixedPoint, LinearCoupling, Minimize, Newton, Status, lower, oracles
from bilevel.parts import spectrum

rng = np.random.default_rng(0)
FEATURES = jnp.asarray(rng.normal(size=(40, 5)))
LABELS = jnp.sign(FEATURES @ jnp.asarray(rng.normal(size=5)) + 0.5 * jnp.asarray(rng.normal(size=40)))
BASIS = jnp.asarray(np.linalg.qr(rng.normal(size=(8, 8)))[0])


def nothing(x, y, batch):
    return jnp.zeros((), y.dtype)


def logistic(x, y, batch):
    return jnp.mean(jax.nn.softplus(-LABELS * (FEATURES @ y))) + 0.5 * jnp.exp(x) * y @ y


def quadratic(x, y, batch):
    """Condition number 10^x; minimiser BASIS @ ones."""
    c = jnp.logspace(0.0, -x, 8)
    return 0.5 * jnp.sum(c * (BASIS.T @ y - 1) ** 2)


def quartic(x, y, batch):
    return jnp.sum((y - x) ** 4) / 4 + 0.5e-3 * jnp.sum((y - x) ** 2)


def double_well(x, y, batch):
    """A maximum at 0, minima at +-1 in every coordinate, coupled."""
    return jnp.sum(y**4 / 4 - y**2 / 2) + 0.1 * x * jnp.sum(y[1:] * y[:-1])


def rosenbrock(x, y, batch):
    return jnp.sum(100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2)


def waves(x, y, batch):
    return jnp.sum(jnp.cos(3 * y)) + 0.05 * jnp.sum(y**2) + jnp.prod(jnp.sin(y))


def poison(x, y, batch):
    return jnp.sum(y**2) * jnp.nan


def edge(x, y, batch):
    """-log: infinite outside of y > 0; minimiser 1/x."""
    return jnp.sum(x * y - jnp.log(y))


def shout(x, y, batch):
    """Unbounded below."""
    return jnp.sum(x * y)


def problem_of(g):
    return BilevelProblem(nothing, g if isinstance(g, FixedPoint) else Minimize(g))


@partial(jax.jit, static_argnames=("g", "settings"))
def _solve(g, settings, x, y):
    return lower.solve(problem_of(g), x, y, None, settings)


@partial(jax.jit, static_argnames="g")
def _residual_norm(g, x, y):
    return jnp.linalg.norm(oracles.residual(problem_of(g), x, y, None))


@partial(jax.jit, static_argnames=("g", "num_products"))
def _spectrum(g, x, y, num_products=30):
    return jnp.stack(spectrum.spectrum(problem_of(g), x, y, None, num_products))


def solve(g, x, y, settings=Newton()):  # noqa: B008
    x, y = jnp.asarray(x), jnp.asarray(y)
    found = _solve(g, settings, x, y)
    again = _residual_norm(g, x, found.iterate)  # the certificate, recomputed
    np.testing.assert_allclose(found.residual, again, rtol=1e-6, atol=1e-14 * (1 + jnp.linalg.norm(found.iterate)))
    return found


DENSE, FREE = Newton(), Newton(dense=False)
MODES = pytest.mark.parametrize("settings", [DENSE, FREE], ids=["dense", "matrix-free"])


@MODES
@pytest.mark.parametrize("x", [-8.0, 0.0])
def test_logistic_equals_scipy(settings, x):
    found = solve(logistic, x, jnp.zeros(5), settings)
    value = jax.jit(jax.value_and_grad(lambda y: logistic(x, y, None)))
    want = scipy.optimize.minimize(lambda y: [np.asarray(part) for part in value(y)], np.zeros(5), jac=True,
                                   method="BFGS", options={"gtol": 1e-10})  # fmt: skip
    assert found.status == Status.CONVERGED
    assert found.residual <= 1e-13
    assert found.steps <= 25
    np.testing.assert_allclose(found.y, want.x, rtol=1e-5, atol=1e-6)
    assert value(found.y)[0] <= want.fun + 1e-15


@MODES
@pytest.mark.parametrize("x", [0.0, 3.0, 6.0])
def test_quadratics(settings, x):
    found = solve(quadratic, x, 10 * jnp.ones(8), settings)
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose(found.y, BASIS @ jnp.ones(8), rtol=0, atol=1e-14 * 10**x + 1e-13)
    assert found.steps <= (4 if settings is DENSE else 12)


@MODES
def test_quartic(settings):
    """The Hessian nearly vanishes at the solution: Newton converges linearly until the quadratic term is felt."""
    found = solve(quartic, 2.0, jnp.array([100.0, -3.0, 2.5]), settings)
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose(found.y, 2, atol=1e-10)
    assert found.steps <= 60


NONCONVEX = {
    "double well, saddle": (double_well, 0.5, [0.0, 1e-3, -1e-3, 0.0]),
    "double well, far": (double_well, 0.5, [4.0, -3.0, 0.5, 10.0]),
    "Rosenbrock": (rosenbrock, 0.0, [-1.2, 1.0, -1.2, 1.0]),
    "waves": (waves, 0.0, [0.3, 2.0, -1.0]),
    "barrier": (edge, 2.0, [10.0, 1e-3, 0.4]),
}


@MODES
@pytest.mark.parametrize("name", NONCONVEX)
def test_not_convex_ends_at_a_stationary_point_no_higher_than_the_start(settings, name):
    g, x, y = NONCONVEX[name]
    found = solve(g, x, jnp.asarray(y), settings)
    assert found.status == Status.CONVERGED
    assert found.residual <= 1e-9
    assert g(x, found.y, None) <= g(x, jnp.asarray(y), None)
    if name != "waves":  # minima with a definite Hessian, not just stationary
        hessian = jax.jit(jax.hessian(lambda y: g(x, y, None)))(found.y)
        assert np.linalg.eigvalsh(hessian)[0] > 0 or name == "double well, saddle"


@MODES
@pytest.mark.parametrize("g", [logistic, quadratic, edge])
def test_a_solved_start_stays(settings, g):
    x = jnp.array(2.0)
    start = jnp.ones(8 if g is quadratic else 5)
    first = solve(g, x, start, settings)
    again = solve(g, x, first.y, settings)
    assert again.status == Status.CONVERGED
    assert again.steps <= 3
    assert again.residual <= max(2 * first.residual, 1e-14)
    np.testing.assert_allclose(again.y, first.y, rtol=0, atol=1e-12)
    near = solve(g, x * (1 + 1e-6), first.y, settings)
    assert near.status == Status.CONVERGED
    assert near.steps <= 5


@MODES
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_g_changes_nothing(settings, scale):
    def scaled(x, y, batch):
        return scale * logistic(x, y, batch)

    plain, other = (solve(g, 0.0, jnp.zeros(5), settings) for g in (logistic, scaled))
    assert other.status == Status.CONVERGED
    np.testing.assert_allclose(other.y, plain.y, rtol=0, atol=1e-12)


@MODES
def test_large_offsets_end_at_rounding_level(settings):
    """Values of g near 1e8: its differences say nothing at the end, and the loop must not hang on them."""

    def offset(x, y, batch):
        return logistic(x, y, batch) + 1e8

    found = solve(offset, 0.0, 3 * jnp.ones(5), settings)
    assert found.status == Status.CONVERGED
    assert found.steps <= 30
    np.testing.assert_allclose(found.y, solve(logistic, 0.0, jnp.zeros(5)).y, rtol=0, atol=1e-9)


@MODES
def test_statuses(settings):
    short = Newton(max_steps=2, dense=settings.dense)
    assert solve(rosenbrock, 0.0, jnp.array([-1.2, 1.0]), short).status == Status.MAX_STEPS
    bad = _solve(poison, settings, jnp.array(0.0), jnp.ones(3))
    assert bad.status == Status.NONFINITE
    assert not np.isfinite(bad.residual)
    np.testing.assert_array_equal(bad.iterate, np.ones(3))
    assert bad.steps <= 1
    assert _solve(shout, settings, jnp.array(1.0), jnp.ones(3)).status != Status.CONVERGED
    assert solve(logistic, 0.0, jnp.zeros(5), Newton(tol=1e-3, dense=settings.dense)).residual <= 1e-2


AFFINE = jnp.asarray(0.9 * np.linalg.qr(rng.normal(size=(6, 6)))[0])
KERNEL = jnp.asarray(rng.dirichlet(np.ones(6), size=(6, 3)))  # [state, action, next state]
REWARD = jnp.asarray(rng.normal(size=(6, 3)))


def affine(x, y, batch):
    return AFFINE @ y + x


def saturating(x, y, batch):
    return 0.95 * jnp.tanh(AFFINE @ y) + x


def bellman(x, y, batch):
    """Soft Bellman operator, discount x, y = Q [state, action]."""
    return REWARD + x * jnp.einsum("sat,t->sa", KERNEL, jax.nn.logsumexp(y, axis=1))


AFFINE_MAP, TANH_MAP, BELLMAN_MAP = FixedPoint(affine), FixedPoint(saturating), FixedPoint(bellman)


@MODES
def test_affine_fixed_point(settings):
    found = solve(AFFINE_MAP, 0.3, 100 * jnp.ones(6), settings)
    assert found.status == Status.CONVERGED
    want = np.linalg.solve(np.eye(6) - AFFINE, np.full(6, 0.3))
    np.testing.assert_allclose(found.y, want, rtol=0, atol=1e-12)
    assert found.steps <= 4


@MODES
@pytest.mark.parametrize("kind", ["tanh", "Bellman 0.9", "Bellman 0.99"])
def test_contractions_equal_iteration(settings, kind):
    T, x, y = {
        "tanh": (TANH_MAP, 0.3, 10 * jnp.ones(6)),
        "Bellman 0.9": (BELLMAN_MAP, 0.9, jnp.zeros((6, 3))),
        "Bellman 0.99": (BELLMAN_MAP, 0.99, jnp.zeros((6, 3))),
    }[kind]
    found = solve(T, x, y, settings)
    want = jax.lax.fori_loop(0, 4000, lambda _, y: T.T(x, y, None), y)
    assert found.status == Status.CONVERGED
    assert found.residual <= 1e-11
    np.testing.assert_allclose(found.y, want, rtol=1e-11, atol=1e-11)
    assert found.steps <= 20
    again = solve(T, x, found.y, settings)
    assert again.steps <= 3
    assert again.status == Status.CONVERGED


def test_fixed_point_with_nan():
    bad = _solve(FixedPoint(lambda x, y, batch: y * jnp.nan), DENSE, jnp.array(0.0), jnp.ones(2))
    assert bad.status == Status.NONFINITE
    assert not np.isfinite(bad.residual)


def test_shorter_steps_where_newton_overshoots():
    """R = arctan(y): from 10 the full step goes to -138, a sixteenth of it next to 0, a step of the map to 8.5."""
    found = solve(FixedPoint(lambda x, y, batch: y - jnp.arctan(y) + x), 0.0, jnp.array([10.0]), DENSE)
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose(found.y, 0, atol=1e-12)
    assert found.steps <= 20  # steps of the map between them: 25


def test_picard_rescues_where_newton_overshoots():
    """Slope near 1 at the start, steep bend: the full Newton step goes far away, the contraction does not."""
    T = FixedPoint(lambda x, y, batch: 0.999 * jnp.arctan(y) + x)
    found = solve(T, 0.0, jnp.array([30.0]), DENSE)
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose(found.y, 0, atol=1e-9)


@pytest.mark.parametrize("case", [(logistic, 0.0, jnp.zeros(5)), (BELLMAN_MAP, 0.9, jnp.zeros((6, 3)))])
@MODES
def test_float32(case, settings):
    g, x, y = case
    kind = g.T if isinstance(g, FixedPoint) else g

    def cast(x, y, batch):  # the data in the dtype of y
        return jnp.asarray(kind(x.astype(float), y.astype(float), batch), y.dtype)

    small = FixedPoint(cast) if isinstance(g, FixedPoint) else cast
    found = _solve(small, settings, jnp.asarray(x, jnp.float32), y.astype(jnp.float32))
    assert found.y.dtype == jnp.float32
    assert found.status == Status.CONVERGED
    assert found.steps <= 30
    np.testing.assert_allclose(found.y, solve(g, x, y).y, rtol=1e-4, atol=1e-4)


@MODES
def test_vmap_equals_loop(settings):
    xs, ys = jnp.array([-4.0, 0.0, 2.0]), jnp.stack([jnp.zeros(5), jnp.ones(5), -3 * jnp.ones(5)])
    together = jax.jit(jax.vmap(lambda x, y: lower.solve(problem_of(logistic), x, y, None, settings)))(xs, ys)
    for k in range(3):
        one = solve(logistic, xs[k], ys[k], settings)
        np.testing.assert_allclose(together.y[k], one.y, rtol=0, atol=1e-12)
        assert together.status[k] == one.status == Status.CONVERGED


def test_pytrees():
    def g(x, y, batch):
        return jnp.sum((y["a"] - x["c"]) ** 2) + jnp.sum(jnp.cosh(y["b"][0] - 2))

    x, y = {"c": jnp.array([1.0, 3.0])}, {"a": jnp.zeros(2), "b": (jnp.zeros(()),)}
    found = _solve(g, DENSE, x, y)
    np.testing.assert_allclose(found.y["a"], [1, 3], atol=1e-14)
    np.testing.assert_allclose(found.y["b"][0], 2, atol=1e-14)


def test_a_ball_beside_other_constraints_is_refused():
    row = LinearCoupling(jnp.ones((1, 5)), jnp.ones((1, 1)), jnp.ones(1))
    problem = BilevelProblem(nothing, Minimize(logistic), y_set=Ball(1.0), coupling=row)
    with pytest.raises(NotImplementedError, match=r"lower.solve: y_set must be .*got Ball"):
        lower.solve(problem, jnp.array(0.0), jnp.zeros(5), None)


def test_spectrum_equals_dense_eigenvalues():
    y = jnp.asarray(rng.normal(size=5))
    values = np.linalg.eigvalsh(jax.jit(jax.hessian(lambda y: logistic(0.0, y, None)))(y))
    L, mu = _spectrum(logistic, jnp.array(0.0), y)
    np.testing.assert_allclose([L, mu], values[[-1, 0]], rtol=1e-10)
    y = jnp.asarray(rng.normal(size=(6, 3)))
    jacobian = jax.jit(jax.jacobian(lambda q: q - bellman(0.9, q.reshape(6, 3), None).ravel()))(y.ravel())
    values = np.linalg.eigvalsh((jacobian + jacobian.T) / 2)
    L, mu = _spectrum(BELLMAN_MAP, jnp.array(0.9), y)
    np.testing.assert_allclose([L, mu], values[[-1, 0]], rtol=1e-9)


def test_spectrum_of_a_multiple_of_the_identity_and_from_inside():
    def ball(x, y, batch):
        return 1.5 * jnp.sum(y**2)

    L, mu = _spectrum(ball, jnp.array(0.0), jnp.ones(7))
    np.testing.assert_allclose([L, mu], 3, rtol=1e-12)
    c = jnp.linspace(1.0, 50.0, 200)
    L, mu = _spectrum(lambda x, y, batch: 0.5 * jnp.sum(c * y**2), jnp.array(0.0), jnp.ones(200), 40)
    assert 49 < L <= 50 + 1e-9
    assert 1 - 1e-9 <= mu < 2
