"""Lower levels with an own y for each sample, and Hessians that are given by their diagonal: dense and closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import oracles, run
from bilevel.lower import ProjectedNewton
from bilevel.oracles import per_sample
from bilevel.parts import tracking

N, B, M, D = 6, 2, 3, 4  # samples, batch, entries of y a sample, entries of x


def upper(x, y, batch):
    """The mean over the batch of |y_i - c_i|^2/2 + cos(x_0 c_i0) + y_i0 |x|^2/2."""
    index, (_, c, _) = batch
    rows = y[index]
    each = jnp.sum((rows - c) ** 2, axis=1) / 2 + jnp.cos(x[0] * c[:, 0]) + rows[:, 0] * (x @ x) / 2
    return jnp.mean(each)


def lower(x, y, batch):
    """Sum over the batch of (d_i/2)|y_i|^2 - y_i' tanh(W_i x): the Hessian is d_i I."""
    index, (W, _, d) = batch
    return jnp.sum(d[:, None] / 2 * y[index] ** 2 - y[index] * jnp.tanh(W @ x))


def curved(x, y, batch):
    """`lower` and a quartic, whose Hessian is then only approximated by d_i I."""
    return lower(x, y, batch) + jnp.sum(y[batch[0]] ** 4)


def diagonal(x, y, batch):
    """d_i, at the batch's rows of y."""
    index, (_, _, d) = batch
    return jnp.ones_like(y).at[index].set(jnp.broadcast_to(d[:, None], (len(d), y.shape[1])))


def start(key):
    return jnp.linspace(-0.4, 0.5, D), jnp.zeros((N, M))


def make(g=lower, given=diagonal, seed=0):
    rng = np.random.default_rng(seed)
    arrays = tuple(map(jnp.asarray, (rng.normal(size=(N, M, D)), rng.normal(size=(N, M)), rng.uniform(1, 3, N))))
    lo = jnp.asarray(-rng.uniform(0.02, 0.4, (N, M)))
    return bilevel.BilevelProblem(
        upper, bilevel.Minimize(g, given), y_set=bilevel.Box(lo, 0.3), init=start,
        upper_data=bilevel.PerSample(arrays, B), lower_data=bilevel.PerSample(arrays, B),
    )  # fmt: skip


def closed_form(problem, x, index=slice(None), quartic=0.0):
    """F on some of the samples at the exact y(x) by NumPy; the root of d y + 4 quartic y^3 = tanh(W x) by Newton."""
    W, c, d = (np.asarray(part)[index] for part in problem.upper_data.arrays)
    target, d = np.tanh(W @ x), d[:, None]
    y = target / d
    for _ in range(30 if quartic else 0):
        y = y - (d * y + 4 * quartic * y**3 - target) / (d + 12 * quartic * y**2)
    y = np.clip(y, np.asarray(problem.y_set.lo)[index], 0.3)
    return np.mean(np.sum((y - c) ** 2, axis=1) / 2 + np.cos(x[0] * c[:, 0]) + y[:, 0] * (x @ x) / 2)


def slopes(F, x, h=1e-5):
    return np.array([(F(x + h * e) - F(x - h * e)) / (2 * h) for e in np.eye(len(x))])


@functools.partial(jax.jit, static_argnames="num_steps")
def tracked(problem, x, y, q, batch, num_steps):
    """(y, gradient) on a batch of the data."""
    here = per_sample.view(problem, y, batch)
    active, rows = tracking.no_rows_active(problem, x, y), per_sample.rows_of(problem, q, batch)
    found = tracking.track(here.problem, x, here.y, active, rows, here.lower, num_steps)
    return found.solution.y, tracking.gradient(here.problem, x, found, here.upper, here.lower)


@pytest.mark.parametrize("batch", [(0, 1, 2, 3, 4, 5), (4, 1)])
def test_gradient_without_a_solve_is_that_of_finite_differences_where_the_diagonal_is_exact(batch):
    problem = make()
    x, y = problem.init(jax.random.key(0))
    index = np.array(batch)
    data = problem.upper_data.take(jnp.asarray(index))
    rows, gradient = tracked(problem, x, y, jnp.zeros_like(y), data, 1)
    W, _, d = (np.asarray(part)[index] for part in problem.upper_data.arrays)
    raw = np.tanh(W @ np.asarray(x)) / d[:, None]
    lo = np.asarray(problem.y_set.lo)[index]
    assert 0 < np.sum((raw < lo) | (raw > 0.3)) < raw.size  # some are cut off, some are not
    np.testing.assert_allclose(rows, np.clip(raw, lo, 0.3), atol=1e-14)
    expected = slopes(lambda x: closed_form(problem, x, index), np.asarray(x))
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("settings", [bilevel.Newton(), ProjectedNewton()])
def test_hypergradient_by_the_diagonal_is_that_of_finite_differences(settings):
    problem, x = make(), jnp.array([0.3, -0.2, 0.7, 0.1])
    expected = slopes(lambda x: closed_form(problem, x), np.asarray(x))
    found = bilevel.hypergradient(problem, x, lower=settings, estimate=False)
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-7)
    if isinstance(settings, ProjectedNewton):
        through_root = jax.grad(bilevel.implicit_objective(problem, lower=settings))(x)
        np.testing.assert_allclose(through_root, found.gradient, rtol=1e-9, atol=1e-11)


def test_where_the_diagonal_is_an_approximation_the_formula_is_the_papers():
    """f_x - G' (mask f_y)/d with the dense G = d grad_y g/dx, at the y that was found: Hessian-free."""
    problem = make(curved)
    x, y = problem.init(jax.random.key(0))
    data = problem.upper_data.full()
    found, gradient = tracked(problem, x, y, jnp.zeros_like(y), data, 40)
    fx, fy = jax.grad(upper, argnums=(0, 1))(x, found, data)
    cross = jax.jacfwd(lambda x: jax.grad(curved, argnums=1)(x, found, data))(x)  # [N, M, D]
    inside = (found > problem.y_set.lo) & (found < 0.3)
    d = problem.upper_data.arrays[2][:, None]
    np.testing.assert_allclose(gradient, fx - jnp.einsum("ij,ijk->k", jnp.where(inside, fy / d, 0), cross), rtol=1e-12)
    residual = jax.grad(curved, argnums=1)(x, found, data)
    np.testing.assert_allclose(found, problem.y_set.project(found - residual), atol=1e-9)  # y is right all the same
    exact = slopes(lambda x: closed_form(problem, x, quartic=1.0), np.asarray(x))
    assert np.linalg.norm(gradient - exact) > 1e-3  # but the gradient is that of the approximation


def test_perturbation_moves_the_solution_by_q_over_d():
    problem = make()
    x, y = problem.init(jax.random.key(0))
    q = 0.01 * jnp.arange(N * M, dtype=float).reshape(N, M) / (N * M)
    rows, _ = tracked(problem, x, y, q, problem.upper_data.full(), 1)
    W, _, d = map(np.asarray, problem.upper_data.arrays)
    np.testing.assert_allclose(rows, np.clip((np.tanh(W @ x) - q) / d[:, None], problem.y_set.lo, 0.3), atol=1e-14)


SOLVERS = [kind(num_lower_steps=1) for kind in (bilevel.SSIGD, bilevel.DSBLO, bilevel.PIGD)]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_solvers_touch_their_batch_alone_count_no_hessians_and_descend(solver, key):
    problem = make()
    state = jax.jit(solver.init)(problem, key)
    with oracles.counting() as count:  # one lower step: no loop hides calls from what is traced
        jax.eval_shape(solver.step, problem, state, key)
    assert count().as_dict() == solver.cost(problem).as_dict()
    assert count().hvps == 0
    advance = jax.jit(run.advance)
    moved = np.any(np.asarray(advance(problem, solver, state, key, 0, 1)[0].y) != np.asarray(state.y), axis=1)
    assert moved.sum() == (N if solver.full_batch else B)
    x = advance(problem, solver, state, key, 0, 300)[0].x
    assert closed_form(problem, np.asarray(x)) < closed_form(problem, np.asarray(state.x))


def test_bad_input_is_named():
    problem = make()
    with pytest.raises(bilevel.InvalidInput, match="lower_data: got Full"):
        dataclasses.replace(problem, lower_data=bilevel.Full(problem.lower_data.arrays)).validate()
    other = bilevel.PerSample(problem.lower_data.arrays, 3)
    with pytest.raises(bilevel.InvalidInput, match="batch size"):
        dataclasses.replace(problem, lower_data=other).validate()
    with pytest.raises(bilevel.InvalidInput, match="row a sample"):
        dataclasses.replace(problem, init=lambda key: (jnp.zeros(D), jnp.zeros((N - 1, M)))).validate()
    with pytest.raises(bilevel.InvalidInput, match="diagonal"):
        make(given=lambda x, y, batch: y[:1]).validate()
    assert "diagonal" in bilevel.SSIGD().unsupported(make(given=None))
