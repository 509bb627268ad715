"""The line search of a penalised objective whose samples follow x: of lengths tried all at once, the best is taken.

Only the samples near the minimisers at the old x would be near those at a new one by chance: in each trial the best
sample of either kind takes a few truncated Newton steps at the new x first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm, take
from bilevel.sampled.feasible import restore
from bilevel.sampled.penalised import Direction, Penalised
from bilevel.sampled.refine import improve

PyTree = Any
LENGTHS = (8.0, 2.0, 0.5, 0.125, 0.0)  # of the trials, times the last length, beside a random one
TRACK = 2  # descent steps by which the two best samples follow x


class Place(NamedTuple):
    """Where a lane is: x, its samples, and what was computed there."""

    x: PyTree

    points: Array
    """The samples, shape [N, n, m]; of the joint form the last one is y."""

    f: Array
    """Of the samples, shape [N, n]."""

    g: Array
    """Likewise."""

    value: Array
    """P, shape []; infinite where it is not finite."""


class Found(NamedTuple):
    """The end of a search."""

    place: Place

    size: Array
    """The length that the next search starts from, shape []."""


def project(P: Penalised, x: PyTree, last: Array) -> tuple[PyTree, Array]:
    """(x in X, the last sample in Y(x) where it is a variable)."""
    x = P.view.problem.x_set.project(x)
    return x, restore(P.view, x, last) if P.form.joint else last


def attempt(P: Penalised, here: Place, direction: Direction, sizes: Array, length: Array) -> Place:
    """Where `length` along -`direction` leads. sizes [K, n]: the step lengths of the last K samples, the slots."""
    at = here.x, here.points[-1]
    x, last = project(P, *jax.tree.map(lambda p, d: p - length * d, at, tuple(direction)))
    points = here.points.at[-1].set(last) if P.form.joint else here.points
    if not P.form.frozen:
        points = _follow(P, x, points, sizes)
    f, g = P.view.values(x, points, P.chunk)
    value = P.at(f, g).value
    return Place(x, points, f, g, jnp.where(jnp.isfinite(value), value, jnp.inf))


def _follow(P: Penalised, x: PyTree, points: Array, sizes: Array) -> Array:
    """The samples after the first slot has descended g(x, .), and the last one f + rho g where it is no variable."""
    ends = np.array([-len(sizes)] if P.form.joint else [-len(sizes), -1])
    a = jnp.arange(len(ends), dtype=sizes.dtype)
    b = jnp.stack([jnp.ones_like(P.rho), P.rho])[: len(ends)]
    follow = lambda y, a, b, size: improve(P.view, x, y, a, b, TRACK, size).y  # noqa: E731
    return points.at[ends].set(oracles.batched(follow)(points[ends], a, b, sizes[ends]))


def search(P: Penalised, here: Place, direction: Direction, sizes: Array, size: Array, chance: Array) -> Found:
    """The best place along -`direction`, at LENGTHS times `size` and at a random length, which `chance` [1] draws.

    size: the last length, 0 where none is known. No length is beyond (1 + |x|)/|direction|.
    """
    steep = norm(tuple(direction))
    reach = (1 + norm(here.x)) / jnp.where(steep > 0, steep, 1)
    tries = jnp.where(size > 0, size, reach / 80) * jnp.asarray(LENGTHS, size.dtype)
    tries = jnp.concatenate([reach * 10 ** (-6 * chance), tries])
    tried = oracles.batched(lambda length: attempt(P, here, direction, sizes, length))(tries)
    k = jnp.argmin(tried.value)
    # Where staying is best, the next lengths are shorter.
    size = jnp.clip(jnp.where(tries[k] > 0, tries[k], tries[-2] / 8), 1e-9 * reach, reach)
    return Found(take(tried, k), size)
