"""Points moved into the follower's set Y(x): exactly where its rows are affine, else by Newton's steps on them.

Affine: with LinearCoupling and a Y that is described by rows, the nearest point of Y(x) (`qp.projection`). Else the
rows of the coupling are linearised at y, a Y that is no polyhedron has its supporting half-space at its point nearest
to y, and y moves to the nearest point of both, again and again. For convex rows every such step comes nearer to all
points of Y(x) at once, and the steps end quadratically; for others they may end at a local minimum of the violation,
and `restore_all` starts again from between there and points that are in Y(x).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import constraints
from bilevel.constraints import Projection, Rows
from bilevel.problem import LinearCoupling
from bilevel.sampled.blocks import Blocks

PyTree = Any
STEPS = 30  # of Newton's, at most
RESTARTS = 3


class Feasible(NamedTuple):
    """A point of Y(x), and what holds it there."""

    y: Array
    """Shape [n, m]; where no point of Y(x) was found, one of little violation."""
    failed: Array
    """Whether none was found, shape []: rows contradict each other, or Newton's steps ended outside."""
    projection: Projection
    """Of the last step: its active rows hold y. The rows are those of the coupling, inequalities after equalities where
    they are affine and before them else, and then those of Y.
    """


def is_affine(view: Blocks) -> bool:
    """Whether Y(x) is a polyhedron with affine rows."""
    problem = view.problem
    sets = all(one.polyhedral for one in problem.y_set.simple())
    return sets and (problem.coupling is None or isinstance(problem.coupling, LinearCoupling))


def affine_rows(view: Blocks, x: PyTree, y: Array) -> Rows:
    """The rows of an affine Y(x); y [n, m] gives shapes only."""
    return constraints.rows(view.problem, x, view.unpack(y))


def restore(view: Blocks, x: PyTree, y: Array) -> Array:
    """The point y [n, m] moved into Y(x): `to_feasible` without what it found out."""
    return view.project(y) if view.problem.coupling is None else to_feasible(view, x, y).y


def to_feasible(view: Blocks, x: PyTree, y: Array) -> Feasible:
    """The point of a coupled Y(x) that y [1, m] is moved to: see the module's docstring. For vmap over y at one x.

    Affine rows hold to 1e-9 in float64 and 1e-5 in float32, relative to their lengths times 1 + |y| and to |b|; others
    to 1e3 eps times the same, or `failed` says that they do not.
    """
    return _nearest(view, x, y) if is_affine(view) else _by_newton(view, x, y)


def restore_all(view: Blocks, x: PyTree, ys: Array) -> tuple[Array, Array]:
    """(points [N, n, m] moved into Y(x); which of them failed, [N]).

    Of rows that are not affine, a point that failed starts again from half of the way to the nearest point that did
    not, up to `RESTARTS` times, and is that point in the end. So one fails only where all do: Y(x) is empty as far as N
    starts can tell.
    """
    found = jax.vmap(lambda y: to_feasible(view, x, y))
    if is_affine(view):
        first = found(ys)
        return first.y, first.failed

    def again(at: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        points, failed, count = at
        near = _nearest_good(ys, points, failed)
        start = jnp.where(failed[:, None, None] & (count > 0), (points + near) / 2, points)
        tried = found(start)
        moved = jnp.where(failed[:, None, None], tried.y, points)
        return moved, failed & tried.failed, count + 1

    def wanted(at: tuple[Array, Array, Array]) -> Array:
        _, failed, count = at
        return jnp.any(failed) & (count < RESTARTS) & ((count == 0) | ~jnp.all(failed))

    points, failed, _ = lax.while_loop(wanted, again, (ys, jnp.ones(len(ys), bool), jnp.zeros((), int)))
    points = jnp.where(failed[:, None, None] & ~jnp.all(failed), _nearest_good(ys, points, failed), points)
    return points, failed & jnp.all(failed)


def _nearest_good(ys: Array, points: Array, failed: Array) -> Array:
    """For each of ys [N, n, m] the nearest of the points [N, n, m] that did not fail."""
    flat, goals = ys.reshape(len(ys), -1), points.reshape(len(ys), -1)
    square = jnp.sum((flat[:, None] - goals[None]) ** 2, axis=2)
    return points[jnp.argmin(jnp.where(failed[None], jnp.inf, square), axis=1)]


def _nearest(view: Blocks, x: PyTree, y: Array) -> Feasible:
    """The nearest point of a polyhedron."""
    limits = affine_rows(view, x, y)
    coupling = view.problem.coupling
    linear = isinstance(coupling, LinearCoupling)
    num = coupling.num_inequalities + coupling.num_equalities if linear else 0
    found = constraints.project_on(limits, y[0], jnp.arange(len(limits.lo)) < num)
    return Feasible(found.y[None], ~found.exact, found)


class _Newton(NamedTuple):
    """Carry."""

    y: Array
    outside: Array
    """[], whether a row is violated beyond rounding."""
    last: Projection
    count: Array


def _by_newton(view: Blocks, x: PyTree, y: Array) -> Feasible:
    """Projections on the rows linearised at y."""

    def look(y: Array) -> tuple[Rows, Array, Array]:
        """(the rows at y, which of them are the coupling's, whether one is violated)."""
        limits, soft = _linearised(view, x, y)
        at = limits.C @ y[0]
        beyond = jnp.maximum(at - limits.hi, limits.lo - at)
        scale = jnp.linalg.norm(limits.C, axis=1) * (1 + jnp.max(jnp.abs(y)))
        return limits, soft, jnp.any(beyond > 1e3 * float(jnp.finfo(y.dtype).eps) * scale)

    def step(c: _Newton) -> _Newton:
        limits, soft, _ = look(c.y)
        found = constraints.project_on(limits, c.y[0], soft)
        y = view.project(found.y[None])
        return _Newton(y, look(y)[2], found, c.count + 1)

    y = view.project(y)
    limits, _, outside = look(y)
    m, nothing = len(limits.lo), jnp.zeros_like(limits.lo)
    none = Projection(y[0], nothing, nothing, jnp.zeros((m, m), y.dtype), jnp.array(False), jnp.array(True))
    end = lax.while_loop(lambda c: c.outside & (c.count < STEPS), step, _Newton(y, outside, none, jnp.zeros((), int)))
    return Feasible(end.y, end.outside | ~jnp.all(jnp.isfinite(end.y)), end.last._replace(y=end.y[0]))


def _linearised(view: Blocks, x: PyTree, y: Array) -> tuple[Rows, Array]:
    """(the rows of the coupling, linearised at y [1, m], and those of Y; which are the coupling's)."""
    c, J, equality = view.coupling_rows(x, y)
    hi = J @ y[0] - c
    lo = jnp.where(equality, hi, -jnp.inf)
    blocks = [(J, lo, hi), *_set_rows(view, y)]
    C, lo, hi = (jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
    return Rows(C, lo, hi, jnp.zeros((len(lo), 0), y.dtype)), jnp.arange(len(lo)) < len(c)


def _set_rows(view: Blocks, y: Array) -> list[tuple[Array, Array, Array]]:
    """The rows of Y; of a Y that is no polyhedron the half-space that supports it at its point nearest to y."""
    y_set, point = view.problem.y_set, view.unpack(y)
    if all(one.polyhedral for one in y_set.simple()):
        return y_set.rows(point)
    nearest = ravel_pytree(y_set.project(point))[0]
    normal = y[0] - nearest
    return [(normal[None], jnp.full(1, -jnp.inf, y.dtype), (normal @ nearest)[None])]
