"""The samples of a penalty from one step to the next: fresh points of Y, points near the slots, slots that descend.

Slots are the samples that stay: the first half descends g(x, .), the second one f + rho g. Each takes a gradient step
of its own length and moves to the best of its share of the new points where that is lower, so that the minimisers that
matter are followed as x moves, while the fresh points find others. The number of points never changes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.sampled.nets import shifted
from bilevel.sampled.refine import restore
from bilevel.sampled.sampling import Blocks, cover_blocks, near, pick

PyTree = Any


def fresh(view: Blocks, u: Array, num: int, key: Array) -> Array:
    """`num` points of Y, [num, n, m], on Sobol nets moved by random numbers u [n, m]; key: for sets without nets."""
    return cover_blocks(view, key, num, jax.vmap(lambda u: shifted(u, num), out_axes=1)(u))


def renew(
    view: Blocks,
    x: PyTree,
    slots: Array,
    sizes: Array,
    rho: Array,
    points: Array,
    u: Array,
    keep_last: bool,
    chunk: int,
) -> tuple[Array, Array, Array, Array]:
    """(samples [N, n, m], sizes [K, n], f [N, n], g [N, n]) at x.

    slots: [K, n, m], K even; sizes: the lengths of their steps, 0 where none is known. points: fresh ones; u: random
    numbers of `sampling.near`. keep_last: the last slot is a variable and stays. The new slots are the last K samples.
    """
    count = len(slots)
    is_upper = (jnp.arange(count) >= count // 2)[:, None]
    a, b = is_upper.astype(rho.dtype), jnp.where(is_upper, rho, 1)
    fixed = (jnp.arange(count)[:, None] == count - 1) & keep_last
    by_y = view.gradients(x, slots, a, b, chunk)[1]
    steep = jnp.linalg.norm(by_y, axis=2)
    spread = jnp.linalg.norm(jnp.std(points, axis=0), axis=1)
    sizes = jnp.where(sizes > 0, sizes, 0.1 * spread[None] / jnp.where(steep > 0, steep, 1))
    trial = slots - jnp.where(fixed, 0, sizes)[:, :, None] * by_y
    parts = [points, near(view, u, slots, points), trial, slots]
    points = jax.vmap(lambda y: restore(view, x, y, 4))(jnp.concatenate(parts))
    ends = np.array([len(points) - 2 * count, len(points) - count])
    (new, trial, slots), (f, ft, fs), (g, gt, gs) = (
        jnp.split(part, ends) for part in (points, *view.values(x, points, chunk))
    )
    margin = -1e3 * jnp.finfo(f.dtype).eps * (jnp.abs(a * fs) + jnp.abs(b * gs))  # so that rounding decides nothing
    change = a * (ft - fs) + b * (gt - gs)
    falls = change < margin
    sizes = jnp.where(falls, 2 * sizes, jnp.where(change > -margin, sizes / 4, sizes))
    slots = jnp.where(falls[:, :, None], trial, slots)
    fs, gs = jnp.where(falls, ft, fs), jnp.where(falls, gt, gs)

    share = len(f) // count * count  # slot j is challenged by the new points j, j + count, …
    fold = lambda part: part[:share].reshape(-1, count, *part.shape[1:])  # noqa: E731
    score = a[None] * fold(f) + b[None] * fold(g)
    wins = (jnp.min(score, axis=0) - a * fs - b * gs < margin) & ~fixed
    best = jnp.argmin(score, axis=0) * count + jnp.arange(count)[:, None]
    slots, sizes = jnp.where(wins[:, :, None], pick(new, best), slots), jnp.where(wins, 0, sizes)
    fs, gs = jnp.where(wins, pick(f, best), fs), jnp.where(wins, pick(g, best), gs)
    return jnp.concatenate([new, slots]), sizes, jnp.concatenate([f, fs]), jnp.concatenate([g, gs])
