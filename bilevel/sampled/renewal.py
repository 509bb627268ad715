"""The samples of a penalty from one step to the next: fresh points of Y, points near the slots, slots that descend.

Slots are the samples that stay: the first half descends g(x, .), the second one f + rho g. Each takes a gradient step
of its own length and moves to the best of its share of the new points where that is lower, so that the minimisers that
matter are followed as x moves, while the fresh points find others. A few slots of the first half have a niche, and
follow other minimisers of g than the least one. The number of points never changes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend.tree import join
from bilevel.sampled.blocks import Blocks, pick
from bilevel.sampled.covering import cover_blocks, near
from bilevel.sampled.feasible import Feasible, fill, fills, near_all
from bilevel.sampled.nets import shifted

PyTree = Any
APART = (1 / 4, 1 / 8, 1 / 2, 1 / 16)  # radii of niches, in turn, in diameters of Y(x)


class Samples(NamedTuple):
    """N points of Y and what f and g are there."""

    points: Array
    """Shape [N, n, m]."""

    f: Array
    """Of their blocks, shape [N, n]."""

    g: Array
    """Likewise."""

    held: Array
    """The rows of a coupled set that hold them, shape [N, n, rows]: `feasible.Feasible.held`."""


class Slots(NamedTuple):
    """K points that stay from step to step, K even."""

    points: Array
    """Shape [K, n, m]."""

    sizes: Array
    """The lengths of their gradient steps, shape [K, n], 0 where none is known."""


class Renewed(NamedTuple):
    """What `renew` returns."""

    samples: Samples
    """All of them; the last K are the slots."""

    sizes: Array
    """The lengths of the slots' next steps, shape [K, n]."""

    lift: Array
    """How the other samples move with the rows that hold them, shape [N - K, rows, m]: `feasible.Feasible.lift`."""

    radius: Array
    """How far a point spread over Y, or inside of Y(x), is at most from the nearest other sample, shape []: about the
    covering radius of the samples.
    """

    outside: Array
    """Whether Y(x) is empty as far as the samples can tell, shape []."""


class Goal(NamedTuple):
    """The slots' objectives a f + b g."""

    a: Array
    """Shape [K, 1]: 0 for slots that descend g, 1 for those that descend f + rho g."""

    b: Array
    """Likewise 1, and rho."""


class Niche(NamedTuple):
    """Balls that are not open to the slots."""

    middle: Array
    """Their middle, shape [n, m]."""

    radius: Array
    """Shape [K, n]: 0 for slots to which all of Y is open."""

    def closed(self, points: Array, values: Array) -> Array:
        """`values` [..., K, n] of points for the slots, [..., K, n, m]; infinite inside of the slot's ball."""
        away = jnp.linalg.norm(points - jnp.broadcast_to(self.middle, points.shape), axis=-1)
        return jnp.where(away < jnp.broadcast_to(self.radius, values.shape), jnp.inf, values)


def fresh(view: Blocks, u: Array, num: int, key: Array) -> Array:
    """`num` points of Y, [num, n, m], on Sobol nets moved by random numbers u [n, m]; key: for sets without nets."""
    return cover_blocks(view, key, num, jax.vmap(lambda u: shifted(u, num), out_axes=1)(u))


def renew(
    view: Blocks, x: PyTree, slots: Slots, rho: Array, points: Array, u: Array, keep_last: bool, chunk: int
) -> Renewed:
    """The next samples, moved into Y(x), with f and g there.

    points: fresh ones [num, n, m]; u: random numbers of `covering.near`. keep_last: the last slot is a variable and
    stays.
    """
    count, num = len(slots.points), len(points)
    is_upper = (jnp.arange(count) >= count // 2)[:, None]
    goal = Goal(is_upper.astype(rho.dtype), jnp.where(is_upper, rho, 1))
    fixed = (jnp.arange(count)[:, None] == count - 1) & keep_last
    sizes, trial = _gradient_step(view, x, slots, goal, points, fixed, chunk)
    open_ones = np.setdiff1d(np.arange(count), niches(count))
    parts = [near(view, u, slots.points[open_ones], points), trial, slots.points]
    points, failed, held, lift = _moved(view, x, points, jnp.concatenate(parts))
    ends = np.array([len(points) - 2 * count, len(points) - count])
    all_parts = (jnp.split(part, ends) for part in (points, *view.values(x, points, chunk), held))
    new, trial, here = (Samples(*parts) for parts in zip(*all_parts, strict=True))
    # so that rounding decides nothing
    margin = -1e3 * jnp.finfo(here.f.dtype).eps * (jnp.abs(goal.a * here.f) + jnp.abs(goal.b * here.g))
    here, sizes = _keep_lower(here, trial, sizes, goal, margin)
    niche = _niche(here, new)
    here, sizes = _challenge(here, new, sizes, goal, jnp.where(fixed, -jnp.inf, margin), niche)
    outside = jnp.all(failed) & (view.problem.coupling is not None)
    half, all_samples = num // 2, join(new, here)
    radius = _radius(view, all_samples.points[:half], all_samples.points[half:])
    return Renewed(all_samples, sizes, lift[: len(new.f)], radius, outside)


def _moved(view: Blocks, x: PyTree, spread: Array, others: Array) -> Feasible:
    """The points [N, n, m] moved into Y(x), those that are spread over Y first. Every second one of these is spread
    inside of Y(x), where that can be (`feasible.fill`), and comes first.
    """
    if not fills(view):
        return near_all(view, x, jnp.concatenate([spread, others]))
    found = near_all(view, x, jnp.concatenate([spread[1::2], others]))
    inside = fill(view, x, found, spread[::2])
    return join(inside._replace(failed=inside.failed | jnp.all(found.failed)), found)


def _radius(view: Blocks, new: Array, others: Array) -> Array:
    """How far the farthest of `new` [N, n, m] is from the nearest of `others` [K, n, m], the farthest of all blocks."""
    square = jnp.sum((new[:, None] - others[None]) ** 2, axis=3)
    return jnp.sqrt(jnp.max(jnp.min(square, axis=1)))


def _gradient_step(
    view: Blocks, x: PyTree, slots: Slots, goal: Goal, points: Array, fixed: Array, chunk: int
) -> tuple[Array, Array]:
    """(the slots' step lengths, a tenth of the spread of `points` where none is known; where the steps lead)."""
    by_y = view.gradients(x, slots.points, goal.a, goal.b, chunk)[1]
    steep = jnp.linalg.norm(by_y, axis=2)
    spread = jnp.linalg.norm(jnp.std(points, axis=0), axis=1)
    sizes = jnp.where(slots.sizes > 0, slots.sizes, 0.1 * spread[None] / jnp.where(steep > 0, steep, 1))
    return sizes, slots.points - jnp.where(fixed, 0, sizes)[:, :, None] * by_y


def _keep_lower(here: Samples, trial: Samples, sizes: Array, goal: Goal, margin: Array) -> tuple[Samples, Array]:
    """(the slots, at the trial where it is lower; their sizes, longer after a fall and shorter after a rise)."""
    change = goal.a * (trial.f - here.f) + goal.b * (trial.g - here.g)
    falls = change < margin
    sizes = jnp.where(falls, 2 * sizes, jnp.where(change > -margin, sizes / 4, sizes))
    return _where(falls, trial, here), sizes


def niches(count: int) -> np.ndarray:
    """Which of `count` slots have a niche: every fourth one of those that descend g, and one of two or three."""
    return np.arange(1, count // 2, 4)


def _niche(here: Samples, new: Samples) -> Niche:
    """The part of Y that is not open to the slots: those with a niche keep away from the point of least g, so that at a
    jump, where two minimisers of g are worth the same, both are at hand.
    """
    own, nearby = niches(len(here.f)), np.zeros(len(here.f))
    nearby[own] = np.resize(APART, len(own))
    both = join(new, here)
    best = pick(both.points, jnp.argmin(both.g, axis=0))
    width = jnp.linalg.norm(jnp.max(both.points, axis=0) - jnp.min(both.points, axis=0), axis=1)
    return Niche(best, jnp.asarray(nearby, width.dtype)[:, None] * width[None])


def _challenge(
    here: Samples, new: Samples, sizes: Array, goal: Goal, margin: Array, niche: Niche
) -> tuple[Samples, Array]:
    """(the slots, slot j at the best of the new points j, j + K, … where that is lower; their sizes, 0 after it)."""
    count = len(here.f)
    share = len(new.f) // count * count
    rivals = jax.tree.map(lambda part: part[:share].reshape(share // count, count, *part.shape[1:]), new)
    score = niche.closed(rivals.points, goal.a[None] * rivals.f + goal.b[None] * rivals.g)
    own = niche.closed(here.points, goal.a * here.f + goal.b * here.g)
    wins = jnp.min(score, axis=0) - own < margin
    best = jnp.argmin(score, axis=0) * count + jnp.arange(count)[:, None]
    return _where(wins, Samples(*(pick(part, best) for part in new)), here), jnp.where(wins, 0, sizes)


def _where(chosen: Array, there: Samples, here: Samples) -> Samples:
    """Of two samples the first, for each slot and block that is `chosen` [K, n]."""
    by_row = lambda there, here: jnp.where(chosen[:, :, None], there, here)  # noqa: E731
    by_block = lambda there, here: jnp.where(chosen, there, here)  # noqa: E731
    return Samples(
        by_row(there.points, here.points), by_block(there.f, here.f), by_block(there.g, here.g),
        by_row(there.held, here.held),
    )  # fmt: skip
