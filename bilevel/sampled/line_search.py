"""The line search of a penalised objective whose samples follow x: of lengths tried all at once, the best is taken.

Only the samples near the minimisers at the old x would be near those at a new one by chance: in each trial the best
slot of either kind takes a few truncated Newton steps at the new x first. Where Y(x) moves with x, all samples move
with it, on the rows that hold them, and x is moved to where Y(x) is not empty (`arrive`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel import oracles
from bilevel.backend.tree import norm, take
from bilevel.sampled.blocks import pick
from bilevel.sampled.domain import joint_step, most_steps
from bilevel.sampled.feasible import Feasible, moved, near_all, restore_all
from bilevel.sampled.penalised import Direction, Penalised
from bilevel.sampled.refine import improve
from bilevel.sampled.renewal import niches

PyTree = Any
LENGTHS = (8.0, 2.0, 0.5, 0.125, 0.0)  # of the trials, times the last length, beside a random one
TRACK = 2  # descent steps by which the two best samples follow x


class Place(NamedTuple):
    """Where a lane is: x, its samples, and what was computed there."""

    x: PyTree

    points: Array
    """The samples, shape [N, n, m]; of the joint form the last one is y."""

    f: Array
    """Of the samples, shape [N, n]; infinite, like g, for those that were left out."""

    g: Array
    """Likewise."""

    value: Array
    """P, shape []; infinite where it is not finite, and where Y(x) is empty unless it was so before."""

    outside: Array
    """Whether Y(x) is empty as far as the samples can tell, shape []."""


class Found(NamedTuple):
    """The end of a search."""

    place: Place

    size: Array
    """The length that the next search starts from, shape []."""


class Arrival(NamedTuple):
    """The samples at another x."""

    x: PyTree
    """In X, and where Y(x) is not empty if such an x was found."""
    points: Array
    """Shape [N, n, m]; of the joint form the last one is y."""
    fits: Array
    """Which of them are in Y(x), shape [N, 1]."""
    outside: Array
    """Whether Y(x) is empty as far as can be told, shape []."""


def arrive(P: Penalised, here: Place, direction: Direction, x: PyTree, last: Array, slots: int) -> Arrival:
    """The samples at x, and x in X: at its point nearest to `x`, or at that of the domain nearest to `x` where that is
    none of it. That of X alone would not do as a start: what it lost at the faces of X is a part of what leads along
    the domain's edge. last: the last sample there, where it is a variable.

    Of a coupled set all samples move on the rows that hold them, and the first and the last of the `slots`, which are
    the best ones, are moved into Y(x) exactly, or x to where that is not empty. Samples that come to be outside on
    affine rows are left out; rows that are not affine are met nearly, and x takes one step of `joint_step` where no
    sample meets them.
    """
    view, everyone, goal = P.view, jnp.ones((len(here.points), 1), bool), x
    x = view.problem.x_set.project(x)
    start = here.points.at[-1].set(last) if P.form.joint else here.points
    if view.problem.coupling is None:
        points = start.at[-1].set(view.project(last)) if P.form.joint else start
        return Arrival(x, points, everyone, jnp.array(False))
    if direction.motion is None:
        points, failed, *_ = near_all(view, x, start)
        inside = joint_step(view, x, points[-1], goal=goal)
        x = jax.tree.map(partial(jnp.where, jnp.all(failed)), inside, x)
        points, failed, *_ = near_all(view, x, points)
        return Arrival(x, points, everyone, jnp.all(failed))
    ends, motion = np.array([-slots, -1]), direction.motion
    own = motion.held[ends]
    own = own.at[-1].set(0) if P.form.joint else own

    def settle(at: _Settling) -> _Settling:
        to = jax.tree.map(partial(jnp.where, at.count > 1), at.x, goal)
        x = joint_step(view, at.x, at.ends.y[-1], goal=to)
        x = jax.tree.map(partial(jnp.where, at.count > 0), x, at.x)
        return _Settling(x, restore_all(view, x, start[ends], own), at.count + 1)

    begin = Feasible(start[ends], jnp.ones(2, bool), own, jnp.zeros_like(motion.lift[ends]))
    end = lax.while_loop(
        lambda at: jnp.all(at.ends.failed) & (at.count <= most_steps(view)),
        settle,
        _Settling(x, begin, jnp.zeros((), int)),
    )
    points, fits = jax.vmap(lambda y, motion: moved(view, end.x, y, motion))(start, motion)
    outside = jnp.all(end.ends.failed)
    points, fits = points.at[ends].set(end.ends.y), fits.at[ends].set(~end.ends.failed) | (outside & here.outside)
    return Arrival(end.x, points, fits[:, None], outside)


class _Settling(NamedTuple):
    """Carry of a search for an x with a follower."""

    x: PyTree
    ends: Feasible
    count: Array


def attempt(P: Penalised, here: Place, direction: Direction, sizes: Array, length: Array) -> Place:
    """Where `length` along -`direction` leads. sizes [K, n]: the step lengths of the last K samples, the slots."""
    step = jax.tree.map(lambda p, d: p - length * d, (here.x, here.points[-1]), (direction.x, direction.last))
    x, points, fits, outside = arrive(P, here, direction, step[0], step[1], len(sizes))
    f, g = (jnp.where(fits, part, jnp.inf) for part in P.view.values(x, points, P.chunk))
    if not P.form.frozen:
        points, f, g = _follow(P, x, points, f, g, sizes)
    value = P.at(f, g).value
    good = jnp.isfinite(value) & (here.outside | ~outside)
    return Place(x, points, f, g, jnp.where(good, value, jnp.inf), outside)


def _follow(P: Penalised, x: PyTree, points: Array, f: Array, g: Array, sizes: Array) -> tuple[Array, Array, Array]:
    """The samples with f and g there; new are the first slot and, where it is no variable, the last one, after a
    descent on g and on f + rho g.

    The first one is the slot of a niche if g is lower there: where g has another global minimiser than at the old x,
    what v would be too large by, rho would make a descent of P.
    """
    ends = np.array([-len(sizes)] if P.form.joint else [-len(sizes), -1])
    rivals = np.append(0, niches(len(sizes))) - len(sizes)
    lowest = pick(points[rivals], jnp.argmin(g[rivals], axis=0))
    a = jnp.arange(len(ends), dtype=sizes.dtype)
    b = jnp.stack([jnp.ones_like(P.rho), P.rho])[: len(ends)]
    follow = lambda y, a, b, size: improve(P.view, x, y, a, b, TRACK, size).y  # noqa: E731
    found = oracles.batched(follow)(points[ends].at[0].set(lowest), a, b, sizes[ends])
    there = P.view.values(x, found, P.chunk)
    return points.at[ends].set(found), f.at[ends].set(there[0]), g.at[ends].set(there[1])


def search(P: Penalised, here: Place, direction: Direction, sizes: Array, size: Array, chance: Array) -> Found:
    """The best place along -`direction`, at LENGTHS times `size` and at a random length, which `chance` [1] draws.

    size: the last length, 0 where none is known. No length is beyond (1 + |x|)/|direction|.
    """
    steep = norm((direction.x, direction.last))
    reach = (1 + norm(here.x)) / jnp.where(steep > 0, steep, 1)
    tries = jnp.where(size > 0, size, reach / 80) * jnp.asarray(LENGTHS, size.dtype)
    tries = jnp.concatenate([reach * 10 ** (-6 * chance), tries])
    tried = oracles.batched(lambda length: attempt(P, here, direction, sizes, length))(tries)
    k = jnp.argmin(tried.value)
    # Where staying is best, the next lengths are shorter.
    size = jnp.clip(jnp.where(tries[k] > 0, tries[k], tries[-2] / 8), 1e-9 * reach, reach)
    return Found(take(tried, k), size)
