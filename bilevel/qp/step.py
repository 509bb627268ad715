"""One step of a regularised Newton method on a polyhedron, as a least-distance program.

    min over p of  r'p + p'M p/2   with  lo <= C (y + p) <= hi,      M = V max(|w|, least) V',   H = V diag(w) V'.

With p = V diag(w)^(-1/2) z it is the projection of z0 on rows. H need not be definite, nor have full rank: with H = 0,
that is for a linear function, the step is the projection of y - r/least.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from bilevel.backend.tree import norm, row_norms
from bilevel.qp.active_set import Rows
from bilevel.qp.least_distance import nearest


class Step(NamedTuple):
    """The step, and what the rows say of it; m rows."""

    p: Array
    """[n], NaN where the rows contradict each other."""
    multipliers: Array
    """[m], lam with M p + r + C'lam = 0, >= 0 at hi, <= 0 at lo. Where the rows contradict each other, weights w of the
    same signs with C'w = 0 and w'bound < 0.
    """
    empty: Array
    """[], whether they do."""
    lowest: Array
    """[], the lowest eigenvalue of H."""


def step(H: Array, r: Array, limits: Rows, y: Array, least: Array) -> Step:
    """The step from y [n] for a gradient r [n] and a symmetric H [n, n]; least > 0, [], the least eigenvalue of M."""
    w, V = jnp.linalg.eigh(H)
    root = V / jnp.sqrt(jnp.maximum(jnp.abs(w), least))[None]
    z0, W, rows = -(root.T @ r), limits.C @ root, limits.C @ y
    finite = lambda end: jnp.where(jnp.isfinite(end), jnp.abs(end), 0)  # noqa: E731
    size = row_norms(limits.C) * norm(y) + jnp.maximum(finite(limits.lo), finite(limits.hi))
    noise = 10 * float(jnp.finfo(y.dtype).eps) * size
    free = rows + W @ z0
    slack = jnp.concatenate([limits.hi - free, free - limits.lo])
    found = nearest(jnp.concatenate([W, -W]), slack, jnp.concatenate([noise, noise]))
    above, below = jnp.split(found.multipliers, 2)
    return Step(root @ (z0 + found.d), above - below, found.empty, w[0])
