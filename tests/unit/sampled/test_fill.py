"""Samples inside of Y(x): no pile on its faces, no violation, and a covering radius that is seen."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel.sampled import Blocks
from bilevel.sampled.covering import cover_blocks
from bilevel.sampled.feasible import fill, fills, restore_all

X = jnp.array([0.5])


def no_objective(x, y, batch):
    return jnp.sum(y)


def problem_of(m, rows=1, equality=False):
    """x_1 + y_1 + ... <= 1.5 in [0, 1]^m: a corner of volume 1/m! is left."""
    A, b = np.ones((rows, m)), np.full(rows, 1.5)
    nothing = {"A_eq": A, "B_eq": np.ones((rows, 1)), "b_eq": b} if equality else {}
    coupling = bilevel.LinearCoupling(A, np.ones((rows, 1)), b, **nothing)
    box = bilevel.Box(jnp.zeros(m), jnp.ones(m))
    return bilevel.BilevelProblem(
        no_objective, bilevel.Minimize(no_objective), y_set=box, coupling=coupling,
        init=lambda key: (X, jnp.zeros(m)),
    )  # fmt: skip


def test_points_are_spread_inside():
    """Five of six points of the box are beyond the row, and projected on it; those that go back to the middle are not.
    The points of the box that are on the row are its corners.
    """
    m = 3
    view = Blocks.of(problem_of(m), jnp.zeros(m))
    assert fills(view)
    points = cover_blocks(view, jax.random.key(0), 128)
    projected = restore_all(view, X, points).y
    found = fill(view, X, jnp.mean(projected, axis=0), points)[:, 0]
    assert found.min() >= 0
    assert found.sum(axis=1).max() <= 1 + 1e-12
    on_row = lambda ys: np.mean(np.asarray(ys.sum(axis=-1)) >= 1 - 1e-9)  # noqa: E731
    assert on_row(found) <= 0.05
    assert on_row(projected) >= 0.8
    kept = np.asarray(points[:, 0].sum(axis=1) <= 1)
    np.testing.assert_allclose(found[kept], points[kept, 0], atol=1e-15)


def test_equalities_and_curved_sets_are_left_to_the_projection():
    assert not fills(Blocks.of(problem_of(2, equality=True), jnp.zeros(2)))
