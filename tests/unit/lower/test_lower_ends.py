"""Where the lower-level solve may say CONVERGED: not at a maximum, nor where a scale or a direction hides an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Status, lower

MIXED = 4000.0


def mixed_scales(x, y, batch):
    return jnp.exp(y[0]) - 2 * y[0] + 0.5 * (y[1] - MIXED) ** 2


def hilltop(x, y, batch):
    return jnp.sum(-0.5 * y**2 + 0.25 * y**4)


def soft(x, y, batch):
    return 0.5 * jnp.sum(batch * y**2)


def cosh_at_scale(x, y, batch):
    return jnp.sum(jnp.cosh((y - batch) / batch))


def plain(g, y, batch=None):
    y = jnp.asarray(y)
    return bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum(y**2), bilevel.Minimize(g), init=lambda key: (jnp.zeros(1, y.dtype), y)
    ), (jnp.zeros(1, y.dtype), y, batch)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_large_entry_does_not_hide_a_small_one(dtype):
    """One entry near 4000 set the scale, and the other was called converged at y0 = 18."""
    problem, point = plain(mixed_scales, jnp.array([20.0, 0.0], dtype))
    solution = lower.solve(problem, *point)
    assert solution.status == Status.CONVERGED
    np.testing.assert_allclose(solution.y[0], np.log(2), atol=2e3 * MIXED * float(jnp.finfo(dtype).eps))


def test_a_soft_direction_is_not_forgotten_by_the_inexact_newton():
    H, start = np.ones(300), np.zeros(300)
    H[1], start[0], start[1] = 1e-8, 1e-10, 1e-5
    problem, (x, y, _) = plain(soft, start)
    solution = lower.solve(problem, x, y, jnp.asarray(H))
    assert solution.status == Status.CONVERGED
    assert np.abs(solution.y).max() < 1e-15


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8])
def test_the_end_does_not_depend_on_the_scale_of_y(scale):
    problem, (x, y, _) = plain(cosh_at_scale, np.zeros(1))
    solution = lower.solve(problem, x, y, jnp.asarray(scale))
    assert solution.status == Status.CONVERGED
    np.testing.assert_allclose(solution.y, scale, rtol=1e-12)


def test_a_maximum_is_not_converged_and_is_left_where_possible():
    for start in (1e-10, 0.3):
        problem, point = plain(hilltop, [start])
        solution = lower.solve(problem, *point)
        assert solution.status == Status.CONVERGED
        np.testing.assert_allclose(solution.y, 1, rtol=1e-10)
    problem, point = plain(hilltop, [0.0])
    assert lower.solve(problem, *point).status == Status.SADDLE
    assert bilevel.hypergradient(problem, *point[:2]).status == Status.SADDLE


def test_hopeless_conditioning_is_stalled_not_converged():
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0]
    M = (Q * np.geomspace(1, 1e12, 20)) @ Q.T

    def g(x, y, batch):
        return 0.5 * y @ jnp.asarray(M) @ y - jnp.sum(y)

    problem, point = plain(g, np.zeros(20))
    solution = lower.solve(problem, *point)
    assert solution.status == Status.STALLED
    assert solution.steps < 200


def tilted(x, y, batch):
    H, b = batch
    return 0.5 * y @ H @ y - b @ y


def test_a_start_that_is_right_but_for_rounding_is_converged():
    """The one step from there may halve the distance and not |R|, which is rounding already."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    H = basis @ np.diag(np.geomspace(1, 3e3, 5)) @ basis.T
    problem, (x, *_) = plain(tilted, np.zeros(5))
    offsets = np.random.default_rng(1).normal(size=(2, 200, 5))
    exact = 27 * offsets[0] / np.linalg.norm(offsets[0], axis=1)[:, None]
    starts = exact * (1 + 1e-14 * offsets[1])

    def end(y, b):
        found = lower.solve(problem, x, y, (jnp.asarray(H), b))
        return found.status, found.iterate

    status, found = jax.jit(jax.vmap(end))(starts, exact @ H)
    assert (np.asarray(status) == Status.CONVERGED).all()
    np.testing.assert_allclose(found, exact, atol=1e-10)
