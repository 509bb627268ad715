"""Points spread over a set: on nets, at its boundary, near points that matter, around a start."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.tree import join, take
from bilevel.sampled.blocks import Blocks, pick
from bilevel.sampled.nets import sobol
from bilevel.sets import Reals, Set

PyTree = Any


def edge(set: Set, points: PyTree) -> PyTree:
    """`points` of the set, stacked, moved away from their mean to three times the distance and projected.

    Most land on the boundary: of a box, on its faces, edges and corners.
    """

    def outwards(leaf: Array) -> Array:
        middle = jnp.mean(leaf, axis=0, keepdims=True)
        return middle + 3 * (leaf - middle)

    return jax.vmap(set.project)(jax.tree.map(outwards, points))


def cover(set: Set, key: Array, num: int, like: PyTree, uniform: Array | None = None) -> PyTree:
    """`num` points of `set` on a scrambled Sobol net, shaped like `like` and stacked; the last eighth at its `edge`.

    uniform: [num, dim] in (0, 1), instead of the net.
    """
    flat = ravel_pytree(like)[0]
    uniform = sobol(key, num, flat.size, flat.dtype) if uniform is None else uniform
    points = set.fill(uniform, key, like)
    inside = num - num // 8
    if inside == num or set.whole:
        return points
    return join(take(points, slice(0, inside)), edge(set, take(points, slice(inside, num))))


def cover_blocks(view: Blocks, key: Array, num: int, uniform: Array | None = None) -> Array:
    """`cover` of Y, shape [num, n, m]: each block has its own scramble of one net in m dimensions.

    uniform: [num, n, m], or the same for all blocks [num, 1, m], instead of the net.
    """
    like = view.unpack(jnp.zeros((view.n, view.m), view.dtype))
    if uniform is None:
        nets = jax.vmap(lambda key: sobol(key, num, view.m, view.dtype), out_axes=1)(jax.random.split(key, view.n))
    else:
        nets = jnp.broadcast_to(uniform, (num, view.n, view.m))
    flat = jax.vmap(lambda z: ravel_pytree(view.unpack(z))[0])(nets)  # each block's row where its numbers are in y
    return jax.vmap(view.pack)(cover(view.problem.y_set, key, num, like, flat))


def near(view: Blocks, u: Array, points: Array, others: Array) -> Array:
    """Points of Y, [num, n, m], in turn near each of `points` [K, n, m]: a refinement that adapts to them.

    u: random numbers, uniform in [0, 1), [num, n, 2 m + 2]. Three of four points are off by up to s times the spread of
    `others` in every coordinate, s log-uniform in [1e-4, 1]; the fourth has about one coordinate of one of `others`
    instead of its own.
    """
    turn, m = np.arange(len(u)), view.m
    parents = points[turn % len(points)]
    spread = jnp.std(others, axis=0)[None] * 10 ** (-4 * u[..., -2:-1])
    shaken = parents + spread * (2 * u[..., :m] - 1)
    donors = pick(others, (u[..., -1] * len(others)).astype(int))
    crossed = jnp.where(u[..., m:-2] * m < 1, donors, parents)
    return jax.vmap(view.project)(jnp.where((turn % 4 == 3)[:, None, None], crossed, shaken))


def starts(set: Set, key: Array, num: int, x0: PyTree) -> PyTree:
    """Stack x0 and num - 1 others: points of a set that is bounded, else normal around x0 and projected."""
    first = jax.tree.map(lambda leaf: leaf[None], x0)
    if num == 1:
        return first
    others = cover(set if set.bounded else Reals(), key, num - 1, x0)
    if not set.bounded:
        around = lambda noise: jax.tree.map(lambda p, d: p + (1 + jnp.abs(p)) * d, x0, noise)  # noqa: E731
        others = jax.vmap(lambda noise: set.project(around(noise)))(others)
    return join(first, others)
