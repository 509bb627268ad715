"""Points moved to a polyhedron in batches: violations, distances, empty sets, and the derivative of where they go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.qp.active_set import Rows
from bilevel.qp.least_distance import least_distance
from bilevel.qp.projection import Region

KINDS = "integer", "scaled", "parallel", "corner", "equal"


def drawn(seed, n, num):
    """(C, lo, hi, points [64, n]): a box and `num` rows of a kind that the seed names, with a point y0 in them."""
    rng, kind = np.random.default_rng(seed), KINDS[seed % len(KINDS)]
    y0, A = np.round(rng.uniform(0, 6, n)), rng.normal(size=(num, n)) * 10 ** rng.uniform(-3, 3, (num, 1))
    if kind in ("integer", "corner"):
        A = rng.integers(-3, 4, (num, n)).astype(float)
    if kind == "parallel":
        A[-1] = 2 * A[0] + 1e-7 * rng.normal(size=n)
    room = 0 if kind == "corner" else 0.3 * rng.uniform(size=num) * np.abs(A).sum(axis=1)
    first = (np.arange(num) == 0) & (kind == "equal")
    hi = A @ y0 + np.where(first, 0, room)
    lo = np.where(first, hi, -np.inf)
    parts = np.concatenate([np.eye(n), A]), np.append(np.zeros(n), lo), np.append(np.full(n, 6.0), hi)
    return (*map(jnp.asarray, parts), jnp.asarray(rng.uniform(-1, 7, (64, n))))


@jax.jit
def both(C, lo, hi, points):
    """The same points moved by sweeps and by `least_distance`, with its QR for every active set."""
    region = Region.of(Rows(C, lo, hi, jnp.zeros((len(lo), 0))))

    def slow(u):
        noise = 4 * jnp.finfo(u.dtype).eps * (jnp.abs(C) @ jnp.abs(u) + 6 + jnp.abs(jnp.where(hi < 1e9, hi, 0)))
        two = jnp.concatenate([noise, noise])
        return u + least_distance(jnp.concatenate([C, -C]), jnp.concatenate([hi - C @ u, C @ u - lo]), two)

    return jax.vmap(lambda u: region.project(u))(points), jax.vmap(slow)(points)


@pytest.mark.parametrize(("dtype", "most"), [(float, 1e-9), (jnp.float32, 1e-5)])
@pytest.mark.parametrize(("n", "num"), [(1, 1), (3, 2), (6, 5)])
@given(st.integers(0, 2**20))
@settings(max_examples=15)
def test_no_point_is_outside_and_none_is_nearer(n, num, dtype, most, seed):
    C, lo, hi, points = (part.astype(dtype) for part in drawn(seed, n, num))
    found, slow = jax.tree.map(np.asarray, both(C, lo, hi, points))
    C, lo, hi, points = map(np.asarray, (C, lo, hi, points))
    at, size = found.y @ C.T, np.linalg.norm(C, axis=1)
    beyond = np.maximum(at - hi, lo - at) / (size + np.abs(hi) + 1e-30)
    assert np.where(size > 0, beyond, 0).max() <= most
    assert found.exact.all()
    assert not found.empty.any()
    np.testing.assert_allclose(found.y - points, -found.multipliers @ C, atol=100 * most)
    away, least = (np.linalg.norm(y - points, axis=1) for y in (found.y, slow))
    assert (away <= least + 100 * most).all()


@given(st.integers(0, 2**20))
@settings(max_examples=15)
def test_the_derivative_in_the_bounds_is_that_of_finite_differences(seed):
    C, lo, hi, points = drawn(5 * seed + 1, 4, 3)
    rng, h = np.random.default_rng(seed), 1e-6
    G, d = rng.normal(size=4), jnp.asarray(rng.normal(size=7))
    region = Region.of(Rows(C, lo, hi, jnp.zeros((7, 0))))
    found, slopes = jax.vmap(lambda u: (lambda p: (p, p.pull(region, jnp.asarray(G))))(region.project(u)))(points)
    up, down, found, slopes = jax.tree.map(
        np.asarray, (*(both(C, lo + s * h * d, hi + s * h * d, points)[0] for s in (1, -1)), found, slopes)
    )
    same = ((up.active == found.active) & (down.active == found.active)).all(axis=1)
    assert same.mean() > 0.9
    np.testing.assert_allclose(slopes[same] @ d, ((up.y - down.y) @ G / (2 * h))[same], rtol=1e-6, atol=1e-5)


def test_rows_that_contradict_each_other_are_empty_and_soft_ones_share_the_violation():
    C = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    lo, hi = jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf]), jnp.array([2.0, 2.0, 1.0, -2.0])  # 2 <= y1 + y2 <= 1
    region = Region.of(Rows(C, lo, hi, jnp.zeros((4, 0))))
    found = region.project(jnp.array([0.3, 0.1]), jnp.array([False, False, True, True]))
    assert found.empty
    assert not found.exact
    np.testing.assert_allclose(found.y, [0.85, 0.65], atol=1e-6)  # on y1 + y2 = 3/2, halfway between
