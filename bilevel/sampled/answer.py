"""The answer of a penalty's lanes: each y polished to a lower solution and checked, and the best lane taken."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.backend.tree import take
from bilevel.sampled.refine import polish, restore
from bilevel.sampled.sampling import Blocks, cover_blocks, pick

PyTree = Any
CHECK, BLOCKS, FEASIBLE = 512, 4, 1e-7  # points of Y where a lower g is looked for; how many of them are polished


def best(view: Blocks, x: PyTree, y: PyTree, samples: Array, lower_tol: Any, chunk: int) -> tuple[PyTree, PyTree]:
    """(x, y) of the lane of least f among those whose y is feasible with a gap within lower_tol; else of least gap.

    x, y: stacked over lanes; samples [lanes, K, n, m]: points of Y(x) to look at, too. Where the polished y is worse by
    more than 1e-3 (1 + |f|), it is the sample before polishing, if its gap is as small.
    """
    check = cover_blocks(view, jax.random.key(0), CHECK)
    tolerance = jnp.asarray(lower_tol, check.dtype) / view.n

    def lane(x: PyTree, y: PyTree, samples: Array) -> tuple[PyTree, Array, Array]:
        def look(ys: Array, allowed: float) -> tuple[Array, Array]:
            f, g = view.values(x, ys, chunk)
            outside = jax.vmap(lambda y: view.violation(x, y))(ys)[:, None]
            return f, jnp.where((outside <= allowed) & jnp.isfinite(g), g, jnp.inf)

        settle = jax.vmap(lambda y: restore(view, x, y))
        points = settle(jnp.concatenate([check, samples, view.pack(y)[None]]))
        g = look(points, 1e-3)[1]
        share = len(g) // BLOCKS * BLOCKS
        best = jnp.argmin(g[:share].reshape(-1, BLOCKS, view.n), axis=0) * BLOCKS + jnp.arange(BLOCKS)[:, None]
        raw = jnp.concatenate([points[-1:], pick(points, best)])
        points = jnp.concatenate([jax.vmap(lambda y: polish(view, x, y))(raw), raw])
        f, g = look(points, FEASIBLE)
        gap = jnp.where(jnp.isfinite(g), g - jnp.min(g, axis=0, keepdims=True), jnp.inf)
        f = jnp.where(gap <= tolerance, f, jnp.inf)
        f = f.at[len(raw) :].add(1e-3 * (1 + jnp.abs(f[len(raw) :])))
        found = jnp.isfinite(jnp.min(f, axis=0))
        k = jnp.where(found, jnp.argmin(f, axis=0), jnp.argmin(gap, axis=0))
        point = pick(points, k)
        return view.unpack(point), jnp.sum(jnp.min(f, axis=0)), view.violation(x, point)

    y, f, outside = jax.vmap(lane)(x, y, samples)
    k = jnp.where(jnp.isfinite(jnp.min(f)), jnp.argmin(f), jnp.argmin(outside))
    return take(x, k), take(y, k)
