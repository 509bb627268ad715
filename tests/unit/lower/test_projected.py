"""Lower levels on boxes, balls and simplices against cvxpy, finite differences and the active-set method."""

import dataclasses
from functools import partial

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Ball, Box, Product, Simplex, Status
from bilevel.lower import ProjectedNewton, choose, projected

N, DIM_X = 12, 4
SETTINGS = ProjectedNewton()


def upper(x, y, batch):
    return jnp.sum((y - 0.3) ** 2) + 0.1 * x @ x + jnp.sum(jnp.sin(y))


def lower(x, y, batch):
    H, G, c = batch
    return 0.5 * y @ H @ y + y @ (G @ x + c)


def curved(x, y, batch):
    return lower(x, y, batch) + 0.1 * jnp.sum(jnp.cosh(y))


SETS = {
    "box": Box(-0.4, jnp.linspace(0.1, 1.0, N)),
    "ball": Ball(0.7, 0.1),
    "simplex": Simplex(1.5),
}


def data(seed):
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(N, N)))[0]
    H = (Q * np.geomspace(0.2, 20.0, N)) @ Q.T
    return jnp.asarray(H), jnp.asarray(rng.normal(size=(N, DIM_X))), jnp.asarray(rng.normal(size=N))


def zeros(key):
    return jnp.zeros(DIM_X), jnp.zeros(N)


def make(y_set, g=lower, seed=0):
    data_of_g = bilevel.Full(data(seed))
    return bilevel.BilevelProblem(upper, bilevel.Minimize(g), y_set=y_set, lower_data=data_of_g, init=zeros)


@jax.jit
def run(problem, x):
    y = jnp.zeros(problem.lower_data.arrays[2].shape)
    h = bilevel.hypergradient(problem, x, lower=SETTINGS)
    F = bilevel.implicit_objective(problem, lower=SETTINGS)
    return projected.solve(problem, x, y, problem.lower_data.arrays, SETTINGS), h, jax.value_and_grad(F)(x)


value = jax.jit(lambda problem, x: bilevel.implicit_objective(problem, lower=SETTINGS)(x))


def by_cvxpy(y_set, batch, x):
    H, G, c = map(np.asarray, batch)
    y = cp.Variable(N)
    if isinstance(y_set, Box):
        limits = [y >= np.asarray(y_set.lo), y <= np.asarray(y_set.hi)]
    elif isinstance(y_set, Ball):
        limits = [cp.norm(y - y_set.center) <= y_set.radius]
    else:
        limits = [y >= 0, cp.sum(y) == y_set.scale]
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(y, cp.psd_wrap(H)) + (G @ np.asarray(x) + c) @ y), limits)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return y.value


@pytest.mark.parametrize("name", SETS)
def test_against_cvxpy_and_finite_differences(name):
    rng = np.random.default_rng(1)
    for seed in range(4):
        problem, x = make(SETS[name], seed=seed), jnp.asarray(rng.normal(size=DIM_X))
        found, h, (F, gradient) = run(problem, x)
        assert found.status == Status.CONVERGED
        assert h.status == Status.ESTIMATED
        np.testing.assert_allclose(found.y, by_cvxpy(SETS[name], problem.lower_data.arrays, x), atol=1e-4)
        step = min(1e-5, float(h.active_margin) / 100)
        ends = [[float(value(problem, x + s * step * e)) for s in (1, -1)] for e in jnp.eye(DIM_X)]
        differences = np.array([(up - down) / (2 * step) for up, down in ends])
        np.testing.assert_allclose(h.gradient, differences, rtol=1e-5, atol=1e-9 / step * 1e-5)
        np.testing.assert_allclose(gradient, h.gradient, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(F, h.value, rtol=1e-12)
        assert h.error_bound <= 1e-9 * np.linalg.norm(h.gradient)


@pytest.mark.parametrize("g", [lower, curved])
def test_equals_the_active_set_method(g):
    y_set = Product((Box(-0.3, 0.3), Simplex(1.0)))

    def split(x, y, batch):
        return g(x, jnp.concatenate(y), batch)

    def outer(x, y, batch):
        return upper(x, jnp.concatenate(y), batch)

    problem = dataclasses.replace(
        make(y_set, seed=3), upper=outer, lower=bilevel.Minimize(split),
        init=lambda key: (jnp.zeros(DIM_X), (jnp.zeros(N // 2), jnp.zeros(N // 2))),
    )  # fmt: skip
    x = jnp.linspace(-1.0, 1.0, DIM_X)
    ours, exact = (bilevel.hypergradient(problem, x, lower=way) for way in (SETTINGS, bilevel.ActiveSet()))
    assert ours.status == exact.status == Status.ESTIMATED
    np.testing.assert_allclose(np.concatenate(ours.y), np.concatenate(exact.y), atol=1e-12)
    np.testing.assert_allclose(ours.gradient, exact.gradient, rtol=1e-10)


def test_large_lower_levels_take_it_by_themselves_and_use_no_matrix():
    n = 400
    diagonal = jnp.linspace(0.5, 4.0, n)

    def g(x, y, batch):
        return 0.5 * jnp.sum(diagonal * (y - x[0]) ** 2) - 3 * y[0]

    problem = bilevel.BilevelProblem(
        upper, bilevel.Minimize(g), y_set=Box(0.0, 1.0), init=lambda key: (jnp.zeros(1), jnp.zeros(n))
    )
    h = jax.jit(bilevel.hypergradient)(problem, jnp.array([0.25]))
    want = np.full(n, 0.25)
    want[0] = 1.0  # 0.25 + 3/0.5, cut off
    np.testing.assert_allclose(h.y, want, atol=1e-13)
    slope = 0.1 * 2 * 0.25 + (n - 1) * (2 * (0.25 - 0.3) + np.cos(0.25))
    np.testing.assert_allclose(h.gradient[0], slope, rtol=1e-12)
    text = jax.jit(bilevel.hypergradient).lower(problem, jnp.array([0.25])).as_text()
    assert f"{n}x{n}" not in text


def separable(x, y, batch):
    scale, G, c = batch
    return 0.5 * jnp.sum(scale * y**2) + y @ (G @ x + c)


def scales(x, y, batch):
    return batch[0]


@pytest.mark.parametrize("name", SETS)
def test_a_hessian_given_by_its_diagonal_needs_no_solve(name):
    """The same as by products and conjugate gradients, without a loop; such problems take the method by themselves."""
    _, G, c = data(7)
    batch = jnp.linspace(0.5, 4.0, N), G, c
    by_products = dataclasses.replace(make(SETS[name], separable), lower_data=bilevel.Full(batch))
    given = dataclasses.replace(by_products, lower=bilevel.Minimize(separable, scales))
    assert isinstance(choose(given, jnp.zeros(N)), ProjectedNewton)
    if SETS[name].polyhedral:
        assert isinstance(choose(given, jnp.zeros(N), bilevel.ActiveSet()), bilevel.ActiveSet)
    else:
        with pytest.raises(NotImplementedError, match="got Ball"):
            choose(given, jnp.zeros(N), bilevel.ActiveSet())
    x, s, R = jnp.ones(DIM_X), jnp.array(0.2), G @ jnp.ones(DIM_X) + c
    y = SETS[name].project(-10 * R)  # far out: on the boundary
    face = SETS[name].face(y, R, s)
    assert not face.free.all() or jnp.any(face.mu > 0)
    by_diagonal, iterative = (projected.tangent_solve(one, x, y, batch, face) for one in (given, by_products))
    np.testing.assert_allclose(by_diagonal(c), iterative(c), atol=1e-11)
    primitives = {equation.primitive.name for equation in jax.make_jaxpr(by_diagonal)(c).eqns}
    assert not {"while", "cond", "scan"} & primitives


def test_weakly_active_and_failures_are_named():
    def g(x, y, batch):
        return 0.5 * jnp.sum((y - x) ** 2)

    problem = bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum(y), bilevel.Minimize(g), y_set=Ball(1.0),
        init=lambda key: (jnp.zeros(2), jnp.zeros(2)),
    )  # fmt: skip
    hypergradient = jax.jit(bilevel.hypergradient)
    kink = hypergradient(problem, jnp.array([0.6, 0.8]))
    assert kink.status == Status.WEAKLY_ACTIVE
    assert kink.active_margin <= 1e-12
    outside = hypergradient(problem, jnp.array([3.0, 4.0]))  # y = x/|x|, grad of sum = (1 - y sum y)/|x|
    np.testing.assert_allclose(outside.gradient, (1 - np.array([0.6, 0.8]) * 1.4) / 5, rtol=1e-12)
    assert hypergradient(problem, jnp.array([jnp.nan, 0.0])).status == Status.NONFINITE
    with pytest.raises(NotImplementedError, match="expected Box, Ball, Simplex or a Product"):
        bilevel.hypergradient(
            dataclasses.replace(problem, y_set=bilevel.Polyhedron(jnp.eye(2), jnp.ones(2))), jnp.zeros(2),
            lower=ProjectedNewton(),
        )  # fmt: skip


def test_second_derivatives_and_forward_mode_through_a_ball():
    problem = make(SETS["ball"], curved, seed=5)
    x = jnp.linspace(-0.5, 0.5, DIM_X)
    F = partial(value, problem)
    hessian = jax.jit(jax.hessian(F))(x)
    np.testing.assert_allclose(hessian, hessian.T, rtol=0, atol=1e-8)
    gradient, e = jax.jit(jax.grad(F)), jnp.eye(DIM_X)[0] * 1e-5
    np.testing.assert_allclose(hessian[0], (gradient(x + e) - gradient(x - e)) / 2e-5, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(F))(x), gradient(x), rtol=1e-9)
