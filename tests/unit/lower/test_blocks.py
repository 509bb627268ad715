"""Many lower levels below one x: as one by one, by dense algebra, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Blocks, Status

N, D, M = 5, 4, 3


def reward(x, y, batch):
    return -batch @ y + 0.5 * jnp.sum(y**2) + 0.05 * jnp.sum(x**2)


def risk(x, y, batch):
    H, mean, effect = batch
    return 0.5 * y @ H @ y - (mean + effect @ x) @ y


def start(key):
    return jnp.zeros(M), jnp.zeros(D)


def data(seed=0):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(N, D, D))
    H = A @ np.swapaxes(A, 1, 2) / D + 0.2 * np.eye(D)
    return rng.normal(size=(N, D)), (H, rng.normal(size=(N, D)), rng.normal(size=(N, D, M)))


def blocks(stacked=(), **more):
    upper, lower = (bilevel.Full(jax.tree.map(jnp.asarray, part)) for part in data())
    one = bilevel.BilevelProblem(reward, bilevel.Minimize(risk), upper_data=upper, lower_data=lower, init=start, **more)
    return Blocks(block=one, stacked=("upper_data", "lower_data", *stacked))


X = jnp.array([0.3, -0.2, 0.5])


def by_algebra(rows, ends):
    """F and its gradient at X, with A_i y = b_i in block i: the KKT system of each."""
    b, (H, mean, effect) = data()
    F, gradient = 0.0, np.zeros(M)
    for i in range(N):
        A = rows[i]
        K = np.block([[H[i], A.T], [A, np.zeros((len(A), len(A)))]])
        y = np.linalg.solve(K, np.concatenate([mean[i] + effect[i] @ X, ends[i]]))[:D]
        moves = np.linalg.solve(K, np.concatenate([effect[i], np.zeros((len(A), M))]))[:D]
        F += (-b[i] @ y + 0.5 * y @ y + 0.05 * X @ X) / N
        gradient += ((y - b[i]) @ moves + 0.1 * np.asarray(X)) / N
    return F, gradient


def test_without_constraints():
    problem = blocks().validate()
    found = bilevel.hypergradient(problem, X)
    F, gradient = by_algebra(np.zeros((N, 0, D)), np.zeros((N, 0)))
    assert found.status == Status.ESTIMATED
    np.testing.assert_allclose(found.value, F, rtol=1e-13)
    np.testing.assert_allclose(found.gradient, gradient, atol=1e-13)
    assert np.linalg.norm(found.gradient - gradient) <= found.error_bound <= 1e-9
    np.testing.assert_allclose(jax.grad(bilevel.implicit_objective(problem))(X), gradient, atol=1e-13)
    again = bilevel.hypergradient(problem, X, found.y, v=found.v)  # from where it ended
    np.testing.assert_allclose(again.gradient, gradient, atol=1e-13)
    whole = bilevel.hypergradient(problem.plain(), X)
    for name in ("y", "v", "gradient"):
        np.testing.assert_allclose(getattr(whole, name), getattr(found, name), atol=1e-12)


def test_each_block_has_rows_of_its_own_and_one_without_a_solution_leaves_no_value():
    rng = np.random.default_rng(1)
    rows, ends = rng.normal(size=(N, 2, D)), rng.normal(size=(N, 2))
    F, gradient = by_algebra(rows, ends)

    def coupled(rows):
        coupling = bilevel.LinearCoupling(A_eq=jnp.asarray(rows), b_eq=jnp.asarray(ends))
        return blocks(("coupling",), coupling=coupling).validate()

    found = bilevel.hypergradient(coupled(rows), X)
    np.testing.assert_allclose(found.value, F, rtol=1e-12)
    np.testing.assert_allclose(found.gradient, gradient, atol=1e-12)
    assert np.linalg.norm(found.gradient - gradient) <= found.error_bound <= 1e-9
    rows[3, 1] = 0  # 0 = b
    found = bilevel.hypergradient(coupled(rows), X)
    assert found.status == Status.INFEASIBLE_LOWER
    assert np.isnan(found.checked().value)
    assert np.isnan(found.checked().gradient).all()
    for solver in (bilevel.PIGD(), bilevel.AID()):
        with pytest.raises(bilevel.Unsupported, match=type(solver).__name__):
            bilevel.solve(coupled(rows), solver, key=jax.random.key(0))


def test_sets_of_rows():
    """Of boxes bounds for each entry; of other sets one that projects row by row."""
    z = jax.random.normal(jax.random.key(0), (N, D))
    simplices = blocks(y_set=bilevel.Simplex()).validate().y_set
    projected = simplices.project(z)
    one_by_one = [bilevel.Simplex().project(row) for row in z]
    np.testing.assert_allclose(projected, one_by_one, atol=1e-15)
    assert simplices.violation(projected) <= 1e-15
    assert simplices.violation(z) > 0.1
    sample = simplices.sample(jax.random.key(1), z)
    np.testing.assert_allclose(np.sum(sample, axis=1), 1)
    assert simplices.active(projected).shape == (N, D)
    ends = jnp.linspace(0.1, 0.5, N)
    for problem in (
        blocks(("y_set",), y_set=bilevel.Box(-ends[:, None], ends[:, None])),
        blocks(("y_set",), y_set=bilevel.Box(-ends, ends)),
    ):
        np.testing.assert_allclose(problem.validate().y_set.project(z), jnp.clip(z, -ends[:, None], ends[:, None]))


def test_solvers():
    """The exact gradient's, and one that sees a lower level like any other."""
    problem, key = blocks(), jax.random.key(0)
    solution = bilevel.solve(problem, bilevel.LBFGS(), key=key, max_steps=30, progress=False)
    assert solution.status == Status.CONVERGED
    gradient = jax.grad(bilevel.implicit_objective(problem))(solution.x)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    other = bilevel.SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.002)
    settings = {"key": key, "x0": X, "max_steps": 20, "every": 20, "progress": False}
    both = [bilevel.solve(one, other, **settings) for one in (problem, problem.plain())]
    np.testing.assert_allclose(both[0].x, both[1].x, rtol=1e-12)
    assert np.linalg.norm(both[0].x - X) > 1e-3


def test_a_batch_of_blocks_is_an_unbiased_sample():
    problem = blocks()
    gradients = [bilevel.hypergradient(problem.at(jnp.array([i])), X).gradient for i in range(N)]
    np.testing.assert_allclose(np.mean(gradients, axis=0), bilevel.hypergradient(problem, X).gradient, atol=1e-13)
    assert problem.at(jnp.array([4, 1])).num_blocks == 2


def test_what_does_not_fit_is_named():
    good = blocks()
    wrong = [
        ({"stacked": ("x_set",)}, "names out of upper_data"),
        ({"stacked": ("y_set",)}, "fields with arrays"),
        ({"block": dataclasses.replace(good.block, upper_data=bilevel.Full(jnp.ones((N + 1, D))))}, "leading axis"),
        ({"block": dataclasses.replace(good.block, upper_data=bilevel.Minibatch(jnp.ones((N, D)), 1))}, "Blocks.at"),
        ({"block": dataclasses.replace(good.block, lower_data=bilevel.Full(jnp.full(N, jnp.nan)))}, "lower_data"),
        ({"block": good}, "one block"),
    ]
    for change, message in wrong:
        with pytest.raises(bilevel.InvalidInput, match=message):
            dataclasses.replace(good, init=bilevel.problem.no_init, **change).validate()


def test_every_blocks_own_set_is_looked_at():
    scales = jnp.ones(N).at[3].set(jnp.nan)
    with pytest.raises(bilevel.InvalidInput, match="y_set"):
        bilevel.hypergradient(blocks(("y_set",), y_set=bilevel.Simplex(scales)), X)
