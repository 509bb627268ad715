"""Points moved into Y(x): affine rows, smooth ones with a ball for Y, rows that are not convex, empty sets."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel.sampled import Blocks
from bilevel.sampled.feasible import restore_all, to_feasible

KEY = jax.random.key(3)


def no_objective(x, y, batch):
    return jnp.sum(y)


def start(key):
    return jnp.zeros(1), jnp.zeros(2)


def rows_of(coupling, y_set, points, x=0.0):
    problem = bilevel.BilevelProblem(
        no_objective, bilevel.Minimize(no_objective), y_set=y_set, coupling=coupling, init=start
    )
    view, x = Blocks.of(problem, points[0, 0]), jnp.full(1, x)
    return view, x, jax.jit(lambda points: restore_all(view, x, points))(points)


def points_in(lo, hi, num=64):
    return jax.random.uniform(KEY, (num, 1, 2), float, lo, hi)


def lens(x, y):
    """Two discs of radius 1 around (+-0.5 + x, 0)."""
    return jnp.stack([jnp.sum((y - jnp.array([s, 0.0]) - x) ** 2) - 1 for s in (-0.5, 0.5)])


def rings(x, y):
    """Outside of a disc of radius 1, and right of a curve: not convex."""
    return jnp.stack([1 - jnp.sum(y**2), y[0] - jnp.sin(3 * y[1])])


def never(x, y):
    return 0.1 + jnp.sum(y**2)[None]


def test_smooth_rows_hold_inside_a_ball():
    """The points are beyond both discs and the ball, up to five radii away."""
    _, x, (points, failed, *_) = rows_of(bilevel.SmoothCoupling(lens), bilevel.Ball(0.8), points_in(-5.0, 5.0), 0.1)
    assert not failed.any()
    values = jax.vmap(lambda y: lens(x, y))(points[:, 0])
    assert values.max() <= 1e-11
    np.testing.assert_array_less(jnp.linalg.norm(points[:, 0], axis=1), 0.8 + 1e-12)


def test_points_start_again_where_rows_are_not_convex():
    _, x, (points, failed, *_) = rows_of(bilevel.SmoothCoupling(rings), bilevel.Box(-2.0, 2.0), points_in(-0.3, 0.3))
    assert not failed.any()
    assert jax.vmap(lambda y: rings(x, y))(points[:, 0]).max() <= 1e-11


def test_an_empty_set_is_named():
    box = bilevel.Box(-1.0, 1.0)
    *_, (points, failed, *_) = rows_of(bilevel.SmoothCoupling(never), box, points_in(-1.0, 1.0, 8))
    assert failed.all()
    assert jnp.isfinite(points).all()
    contradicting = bilevel.LinearCoupling(jnp.array([[1.0, 1.0]]), b=jnp.array([-3.0]))
    view, x, (points, failed, *_) = rows_of(contradicting, box, points_in(-1.0, 1.0, 8))
    assert failed.all()
    np.testing.assert_allclose(points, -1.0, atol=1e-6)  # the box's corner of least violation
    found = to_feasible(view, x, points[0])
    assert found.failed
    assert found.held.shape == (1, 3)


def circle(x, y, data):
    return jnp.sum(y**2) - data["radius"] ** 2 - x[0]


def left(x, y, data):
    return y[0] - data["end"]


def test_smooth_equalities_with_data_share_a_compile():
    """|y|^2 = r^2 + x and y1 <= end, each one row of shape []: another instance of the family is not traced again."""
    traced = []

    @jax.jit
    def move(problem, points):
        traced.append(1)
        return restore_all(Blocks.of(problem, points[0, 0]), jnp.full(1, 0.5), points)

    for radius, end in ((1.0, 0.3), (0.7, -0.2)):
        data = {"radius": jnp.asarray(radius), "end": jnp.asarray(end)}
        problem = bilevel.BilevelProblem(
            no_objective, bilevel.Minimize(no_objective), y_set=bilevel.Box(-2.0, 2.0),
            coupling=bilevel.SmoothCoupling(left, circle, data), init=start,
        ).validate()  # fmt: skip
        points, failed, *_ = move(problem, points_in(-2.0, 2.0, 16))
        assert not failed.any()
        np.testing.assert_allclose(jnp.sum(points[:, 0] ** 2, axis=1), radius**2 + 0.5, atol=1e-10)
        assert points[:, 0, 0].max() <= end + 1e-10
    assert traced == [1]
