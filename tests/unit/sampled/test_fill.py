"""Samples inside of Y(x): no pile on its faces, no violation, and a covering radius that is seen."""

import dataclasses

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
    found = fill(view, X, restore_all(view, X, points), points).y[:, 0]
    assert found.min() >= 0
    assert found.sum(axis=1).max() <= 1 + 1e-12
    on_row = lambda ys: np.mean(np.asarray(ys.sum(axis=-1)) >= 1 - 1e-9)  # noqa: E731
    assert on_row(found) <= 0.05
    assert on_row(projected) >= 0.8
    kept = np.asarray(points[:, 0].sum(axis=1) <= 1)
    np.testing.assert_allclose(found[kept], points[kept, 0], atol=1e-15)


def test_points_are_spread_along_an_equality():
    """On y_1 + y_2 + y_3 = 1 in the box, a triangle: a third of the projections has a zero, and few that go back."""
    m = 3
    view = Blocks.of(problem_of(m, equality=True), jnp.zeros(m))
    assert fills(view)
    points = cover_blocks(view, jax.random.key(0), 128)
    projected = restore_all(view, X, points)
    found = fill(view, X, projected, points)
    np.testing.assert_allclose(found.y.sum(axis=-1), 1, atol=1e-14)
    assert found.y.min() >= -1e-14
    at_face = lambda ys: np.mean(np.asarray(ys.min(axis=-1)) <= 1e-9)  # noqa: E731
    assert at_face(found.y) <= 0.1
    assert at_face(projected.y) >= 0.25
    moved_with_x = found.y[:, 0] + jnp.einsum("kr,krm->km", found.held[:, 0], found.lift)
    np.testing.assert_allclose(moved_with_x.sum(axis=1), 2, atol=1e-12)  # with the bound of the equality, as x would


def on_circle(x, y):
    return y @ y - x[0]


def test_curved_rows_are_left_to_the_projection():
    coupling = bilevel.SmoothCoupling(on_circle)
    assert not fills(Blocks.of(dataclasses.replace(problem_of(2), coupling=coupling), jnp.zeros(2)))
