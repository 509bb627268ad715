"""The answer of a penalty's lanes: each y polished to a lower solution and checked, and the best lane taken."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.backend.tree import take
from bilevel.sampled.blocks import Blocks, pick
from bilevel.sampled.covering import cover_blocks
from bilevel.sampled.feasible import FEASIBLE, restore_all
from bilevel.sampled.refine import polish

PyTree = Any
CHECK, BLOCKS = 512, 4  # points of Y where a lower g is looked for; how many of them are polished


class Answer(NamedTuple):
    """One lane's answer."""

    y: PyTree
    f: Array
    """f(x, y), a bit more where y is not polished; infinite where y's gap is too large; shape []."""

    violation: Array
    """Of Y(x) at y, shape []."""


def best(view: Blocks, x: PyTree, y: PyTree, samples: Array, lower_tol: Any, chunk: int) -> tuple[PyTree, PyTree]:
    """(x, y) of the lane of least f among those whose y is feasible with a gap within lower_tol; else of least gap.

    x, y: stacked over lanes; samples [lanes, K, n, m]: points of Y(x) to look at, too. Where the polished y is worse by
    more than 1e-3 (1 + |f|), it is the sample before polishing, if its gap is as small.
    """
    check = cover_blocks(view, jax.random.key(0), CHECK)
    tolerance = jnp.asarray(lower_tol, check.dtype) / view.n

    def lane(x: PyTree, y: PyTree, samples: Array) -> Answer:
        raw = _lowest(view, x, view.pack(y), jnp.concatenate([check, samples]), chunk)
        polished = jax.vmap(lambda y: polish(view, x, y))(raw)
        return _choose(view, x, polished, raw, tolerance, chunk)

    answers = jax.vmap(lane)(x, y, samples)
    some = jnp.isfinite(jnp.min(answers.f))
    k = jnp.where(some, jnp.argmin(answers.f), jnp.argmin(answers.violation))
    return take(x, k), take(answers.y, k)


def _look(view: Blocks, x: PyTree, ys: Array, allowed: float, chunk: int) -> tuple[Array, Array]:
    """(f, g) at points [N, n, m], shapes [N, n]; g is infinite where the violation is beyond `allowed`."""
    f, g = view.values(x, ys, chunk)
    outside = jax.vmap(lambda y: view.violation(x, y))(ys)[:, None]
    return f, jnp.where((outside <= allowed) & jnp.isfinite(g), g, jnp.inf)


def _lowest(view: Blocks, x: PyTree, y: Array, others: Array, chunk: int) -> Array:
    """y and the points of least g of each of BLOCKS interleaved parts of `others` and y, all moved into Y(x)."""
    points = restore_all(view, x, jnp.concatenate([others, y[None]])).y
    g = _look(view, x, points, 1e-3, chunk)[1]
    share = len(g) // BLOCKS * BLOCKS
    best = jnp.argmin(g[:share].reshape(-1, BLOCKS, view.n), axis=0) * BLOCKS + jnp.arange(BLOCKS)[:, None]
    return jnp.concatenate([points[-1:], pick(points, best)])


def _choose(view: Blocks, x: PyTree, polished: Array, raw: Array, tolerance: Array, chunk: int) -> Answer:
    """Of the points [K, n, m] for each block the one of least f with a gap within the tolerance, else of least gap."""
    points = jnp.concatenate([polished, raw])
    f, g = _look(view, x, points, FEASIBLE, chunk)
    gap = jnp.where(jnp.isfinite(g), g - jnp.min(g, axis=0, keepdims=True), jnp.inf)
    f = jnp.where(gap <= tolerance, f, jnp.inf)
    f = f.at[len(polished) :].add(1e-3 * (1 + jnp.abs(f[len(polished) :])))
    found = jnp.isfinite(jnp.min(f, axis=0))
    point = pick(points, jnp.where(found, jnp.argmin(f, axis=0), jnp.argmin(gap, axis=0)))
    return Answer(view.unpack(point), jnp.sum(jnp.min(f, axis=0)), view.violation(x, point))
