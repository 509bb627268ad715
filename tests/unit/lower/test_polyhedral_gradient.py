"""Hypergradients, F and its derivatives through constrained lower levels: sets, equalities, general g, kinks, ends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import constraints, diagnostics, reference
from bilevel.lower import polyhedral, polyhedral_gradient

Status = bilevel.Status
SIZE = 5
DATA = {name: jnp.asarray(np.random.default_rng(0).normal(size=(SIZE, SIZE))) for name in ("H", "G", "t")}


def upper(x, y, batch):
    return jnp.sum((y["a"] - batch["t"][0, :3]) ** 2) + jnp.sum(jnp.sin(y["b"])) + jnp.sum(x**2 * y["b"])


def lower(x, y, batch):
    """Strongly convex, neither quadratic in y nor in x."""
    z = jnp.concatenate([y["a"], y["b"]])
    quadratic = 0.5 * jnp.sum((batch["H"] @ z) ** 2) + 0.5 * jnp.sum(z**2)
    return quadratic + jnp.sum(jnp.cosh(z)) + 3 * jnp.tanh(x) @ batch["G"][:2] @ z


def start(key):
    return jnp.array([0.3, -0.2]), {"a": jnp.zeros(3), "b": jnp.zeros(2)}


def make(y_set, coupling=None):
    data = bilevel.Full(DATA)
    return bilevel.BilevelProblem(
        upper, bilevel.Minimize(lower), y_set=y_set, coupling=coupling, upper_data=data, lower_data=data, init=start
    ).validate()


rng = np.random.default_rng(3)
A, B = rng.normal(size=(3, SIZE)), rng.normal(size=(3, 2))
EQUAL = rng.normal(size=(1, SIZE)), rng.normal(size=(1, 2)), np.array([0.3])
COUPLING = bilevel.LinearCoupling(A, B, np.array([0.1, -0.1, 0.4]), *EQUAL)
SIMPLEX = bilevel.Product({"a": bilevel.Simplex(), "b": bilevel.Box(-0.2, jnp.array([0.1, jnp.inf]))})
HALVES = bilevel.Polyhedron(rng.normal(size=(2, SIZE)), np.array([-0.3, -0.1]))
CASES = {"box": (bilevel.Box(-0.15, 0.2), None), "simplex": (SIMPLEX, COUPLING), "polyhedron": (HALVES, None)}


@pytest.fixture(params=CASES)
def problem(request):
    return make(*CASES[request.param])


def check_optimal(problem, x, found):
    """The certificate of a minimum of a convex program, in NumPy."""
    C, lo, hi, _ = (np.asarray(part) for part in constraints.rows(problem, x, found.y))
    y = np.asarray(jax.flatten_util.ravel_pytree(found.y)[0])
    gradient = jax.flatten_util.ravel_pytree(jax.grad(lower, 1)(x, found.y, DATA))[0]
    lam, at = np.asarray(found.multipliers), C @ y
    np.testing.assert_allclose(gradient + C.T @ lam, 0, atol=1e-12)
    assert (at <= hi + 1e-12).all()
    assert (at >= lo - 1e-12).all()
    for side, bound in ((lam > 0, hi), (lam < 0, lo)):
        np.testing.assert_allclose(at[side], bound[side], atol=1e-12)
    return np.sum(lam != 0)


@jax.jit
def solve(problem, x, y):
    return polyhedral.solve(problem, x, y, DATA)


def test_solution_and_derivatives(problem):
    x, y = start(None)
    found = solve(problem, x, y)
    assert int(found.status) == Status.CONVERGED
    assert check_optimal(problem, x, found) >= 1
    h = bilevel.hypergradient(problem, x)
    assert int(h.status) == Status.ESTIMATED
    assert 1e-5 < float(h.active_margin) < np.inf
    F = jax.jit(jax.value_and_grad(bilevel.implicit_objective(problem)))
    value, slope = F(x)
    differences = reference.finite_differences(lambda x: float(F(x)[0]), x, 1e-3 * min(1, float(h.active_margin)))
    np.testing.assert_allclose(value, h.value, rtol=1e-13)
    np.testing.assert_allclose(slope, h.gradient, rtol=1e-11)
    np.testing.assert_allclose(slope, differences, rtol=1e-6, atol=1e-7)
    assert np.linalg.norm(slope - h.gradient) <= float(h.error_bound) + 1e-13
    assert float(h.error_bound) <= 1e-10


def test_measure_sees_the_solver_at_its_own_y(problem):
    """The natural residual is zero at y(x) alone; violations of the coupling count."""
    x, y = start(None)
    found, measured = solve(problem, x, y), jax.jit(diagnostics.measure)
    exact = measured(problem, x, found.y)
    assert exact.lower_residual <= 1e-12
    assert exact.violation <= 1e-12
    assert exact.lower_distance <= 1e-12
    off = jax.tree.map(lambda leaf: leaf + 0.5, found.y)
    assert measured(problem, x, off).lower_residual > 0.1
    if problem.coupling is not None:
        assert measured(problem, x, off).violation > 0.1


def kink(x, y, batch):
    return jnp.sum(y) - 0.3 * jnp.sum(x)


def half_square(x, y, batch):
    return 0.5 * jnp.sum((y - x) ** 2)


BOUNDS = {
    "box": (bilevel.Box(0.0, 1.0), None),
    "rows": (bilevel.Reals(), (-jnp.eye(2), jnp.zeros((2, 2)), jnp.zeros(2))),
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_kink_is_named_and_its_one_sided_derivatives_known(kind):
    """F(x) = max(x, 0) - 0.3 x in each coordinate: slopes -0.3 and 0.7 at the kink x = 0."""
    y_set, rows = BOUNDS[kind]
    coupling = None if rows is None else bilevel.LinearCoupling(*rows)
    init = lambda key: (jnp.zeros(2), jnp.zeros(2))  # noqa: E731
    problem = bilevel.BilevelProblem(kink, bilevel.Minimize(half_square), y_set=y_set, coupling=coupling, init=init)
    x = jnp.array([0.0, 0.4])
    h = bilevel.hypergradient(problem, x)
    assert int(h.status) == Status.WEAKLY_ACTIVE
    assert abs(float(h.active_margin)) <= 1e-15
    np.testing.assert_allclose(h.gradient[1], 0.7, rtol=1e-14)
    assert np.min(np.abs(h.gradient[0] - np.array([-0.3, 0.7]))) <= 1e-14
    for d, slope in (((1.0, 0.0), 0.7), ((-1.0, 0.0), 0.3), ((0.0, 2.0), 1.4), ((0.0, -2.0), -1.4)):
        side = bilevel.directional_derivative(problem, x, jnp.array(d))
        assert int(side.status) == Status.UNCHECKED
        np.testing.assert_allclose(side.value, slope, rtol=1e-13)
    quick = bilevel.hypergradient(problem, jnp.array([-0.1, 0.4]), estimate=False)
    assert int(quick.status) == Status.UNCHECKED
    np.testing.assert_allclose(quick.gradient, [-0.3, 0.7], rtol=1e-13)
    inside = bilevel.hypergradient(problem, jnp.array([-0.1, 0.4]))
    assert int(inside.status) == Status.ESTIMATED
    np.testing.assert_allclose(inside.active_margin, 0.1, rtol=1e-12)
    np.testing.assert_allclose(inside.gradient, [-0.3, 0.7], rtol=1e-14)


def quartic(x, y, batch):
    return jnp.sum(y**2) + jnp.sum(jnp.sin(x) * y[:2])


def bent(x, y, batch):
    return jnp.sum(jnp.cosh(y)) + jnp.sum(y**2) + jnp.sum(jnp.exp(x) * y[:2])


def test_second_derivatives_and_vmap():
    """The Hessian of F by both modes against differences of gradients; vmap equals a loop; infeasible x are NaN."""
    coupling = bilevel.LinearCoupling(
        np.array([[1.0, 1, 1], [-1, -1, -1]]), np.array([[1.0, 0], [0, 0]]), np.array([-1.0, 4])
    )
    init = lambda key: (jnp.zeros(2), jnp.zeros(3))  # noqa: E731
    problem = bilevel.BilevelProblem(quartic, bilevel.Minimize(bent), coupling=coupling, init=init)
    F, x = bilevel.implicit_objective(problem), jnp.array([0.2, -0.4])
    hessian = jax.jit(jax.hessian(F))(x)
    slope = jax.jit(jax.grad(F))
    differences = np.stack([(slope(x + d) - slope(x - d)) / 2e-4 for d in 1e-4 * jnp.eye(2)])
    np.testing.assert_allclose(hessian, differences, rtol=1e-6)
    points = jnp.array([[0.2, -0.4], [0.5, 0.1], [9.0, 0.0]])
    many = jax.jit(jax.vmap(lambda x: bilevel.hypergradient(problem, x)))(points)
    assert [int(status) for status in many.status] == [Status.ESTIMATED, Status.ESTIMATED, Status.INFEASIBLE_LOWER]
    assert np.isnan(many.gradient[2]).all()
    assert np.isnan(many.value[2])
    assert np.isnan(F(points[2]))
    for one, point in zip(many.gradient[:2], points[:2], strict=True):
        np.testing.assert_allclose(one, slope(point), rtol=1e-11)


def test_what_is_not_supported_says_so():
    data = CASES["box"]
    ball = dataclasses.replace(make(*CASES["simplex"]), y_set=bilevel.Ball(1.0))
    smooth = dataclasses.replace(make(*data), coupling=bilevel.SmoothCoupling(lambda x, y: x))
    x, _ = start(None)
    for problem, words in ((ball, "Ball"), (smooth, "SmoothCoupling")):
        for function in (bilevel.hypergradient, lambda problem, x: bilevel.implicit_objective(problem)(x)):
            with pytest.raises(NotImplementedError, match=words):
                function(problem, x)
    with pytest.raises(NotImplementedError, match="method must be None"):
        bilevel.hypergradient(make(*data), x, method=bilevel.CG())


def test_a_gradient_whose_error_overflows_is_no_number():
    """As of a draw in float32 at scales of 1e14, which was WEAKLY_ACTIVE with the bound NaN."""
    x, one = jnp.ones(2), jnp.ones(())
    found = polyhedral_gradient.conclude(
        jnp.array(Status.CONVERGED), jnp.array(Status.WEAKLY_ACTIVE), x, one, x, jnp.array(jnp.nan),
        y=x, lower_residual=one, linear_residual=one, active_margin=one, v=x,
    )  # fmt: skip
    assert found.status == Status.NONFINITE
    assert np.isinf(found.error_bound)
    assert np.isnan(found.gradient).all()
