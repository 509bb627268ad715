"""Points moved into the follower's set Y(x), and how they move with x.

Affine rows: with LinearCoupling and a Y that is described by rows, a point goes to the nearest one of Y(x)
(`qp.projection`). Else the rows of the coupling are linearised at y, a Y that is no polyhedron has its supporting
half-space at its point nearest to y, and y moves to the nearest point of both, again and again. For convex rows every
such step comes nearer to all points of Y(x) at once, and the steps end quadratically; for others they may end at a
local minimum of the violation, and `restore_all` starts again from between there and points that are in Y(x).

For a step of a solver rows that are not affine are met nearly (`near_all`), and their points move by the multipliers
of the active ones (`refine.multipliers`). Affine rows are met exactly, and hold:

As x moves, a point y that rows hold, c_a(x, y) = 0, goes the shortest way that keeps them: c_y dy + c_x dx = 0. So a
function of y with the gradient G changes at the rate lam' c_x, where lam solves min |G + c_y' lam| over the rows that
hold y (`Motion`). Which do: those onto which it was moved, and those that it is on and would be pushed against by
a descent on one of its objectives (`pressed`); for a minimiser lam is then its multiplier, and the rate that of the
envelope theorem.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import constraints
from bilevel.constraints import Region, Rows
from bilevel.problem import LinearCoupling
from bilevel.sampled.blocks import Blocks
from bilevel.sampled.dual import dual
from bilevel.sets import Set

PyTree = Any
STEPS, FEW = 30, 4  # of Newton's, at most: to be in Y(x), and to be near it
RESTARTS = 3
FEASIBLE = 1e-7  # the violation of a point that is said to be in Y(x), where rows are met nearly
GOLDEN = 0.6180339887498949  # the ratio, of an additive recurrence
NEAR = 1e-9  # how near to a row of length one, times 1 + |y|, a point is on it; in float32 at least 100 eps


class Feasible(NamedTuple):
    """A point of Y(x), and what holds it there."""

    y: Array
    """Shape [n, m]; where no point of Y(x) was found, one of little violation."""
    failed: Array
    """Whether none was found, shape []: rows contradict each other, or Newton's steps ended outside."""
    held: Array
    """The rows onto which y was moved, 1 at the upper bound and -1 at the lower, 0 for others; independent. Shape
    [n, rows]: rows of the coupling, inequalities first, then those of Y; [n, 0] where these are not affine.
    """
    lift: Array
    """What a change of the bounds of these rows adds to y, shape [rows, m]: zero for rows that do not hold it."""


class Local(NamedTuple):
    """The rows that describe Y(x) at a point, to first order."""

    limits: Rows
    """On the raveled y: those of the coupling, inequalities first, then those of Y."""
    soft: Array
    """Which rows are the coupling's, shape [rows]."""


def is_affine(view: Blocks) -> bool:
    """Whether Y(x) is a polyhedron with affine rows."""
    problem = view.problem
    return problem.y_set.polyhedral and (problem.coupling is None or isinstance(problem.coupling, LinearCoupling))


def is_near(view: Blocks) -> bool:
    """Whether a step's samples meet the coupling's rows only nearly: see `near_all`."""
    return view.problem.coupling is not None and not is_affine(view)


def affine_rows(view: Blocks, x: PyTree, y: Array) -> Rows:
    """The rows of an affine Y(x); y [n, m] gives shapes only."""
    return constraints.rows(view.problem, x, view.unpack(y))


def restore(view: Blocks, x: PyTree, y: Array) -> Array:
    """The point y [n, m] moved into Y(x): `to_feasible` without what it found out."""
    return to_feasible(view, x, y).y


def to_feasible(view: Blocks, x: PyTree, y: Array, held: Array | None = None) -> Feasible:
    """The point of Y(x) that y [n, m] is moved to: see the module's docstring. For vmap over y at one x.

    Affine rows hold to 1e-9 in float64 and 1e-5 in float32, relative to their lengths times 1 + |y| and to |b|; others
    to 1e3 eps times the same, or `failed` says that they do not. held: as `Feasible.held`, affine rows that y is
    to stay on.
    """
    if view.problem.coupling is None:
        return _on_no_rows(view, view.project(y), jnp.array(False))
    if not is_affine(view):
        return _by_newton(view, x, y)
    limits, soft = local(view, x, y)
    region = Region.of(limits)
    found = region.project(y[0], soft, None if held is None else held[0])
    lift = jnp.where(found.empty, 0, region.d[:, None] * (found.inverse @ region.W))
    return Feasible(found.y[None], ~found.exact, found.active[None], lift)


def _on_no_rows(view: Blocks, y: Array, failed: Array) -> Feasible:
    """The point y [n, m], of which no row is said to hold it."""
    return Feasible(y, failed, jnp.zeros((view.n, 0), y.dtype), jnp.zeros((0, view.m), y.dtype))


def restore_all(view: Blocks, x: PyTree, ys: Array, held: Array | None = None) -> Feasible:
    """The points ys [N, n, m] moved into Y(x), stacked; held: as `Feasible.held`, stacked, rows that they stay on.

    Of rows that are not affine, a point that failed starts again from half of the way to the nearest point that did
    not, up to `RESTARTS` times, and is that point in the end. So one fails only where all do: Y(x) is empty as far as N
    starts can tell.
    """
    first = jax.vmap(lambda y, held: to_feasible(view, x, y, held), (0, None if held is None else 0))(ys, held)
    if view.problem.coupling is None or is_affine(view):
        return first

    def again(at: tuple[Feasible, Array]) -> tuple[Feasible, Array]:
        points, count = at
        near = _nearest_good(ys, points)
        start = jnp.where(points.failed[:, None, None], (points.y + near.y) / 2, points.y)
        tried = jax.vmap(lambda y: to_feasible(view, x, y))(start)
        return _where(points.failed, tried, points)._replace(failed=points.failed & tried.failed), count + 1

    def wanted(at: tuple[Feasible, Array]) -> Array:
        failed, count = at[0].failed, at[1]
        return jnp.any(failed) & ~jnp.all(failed) & (count < RESTARTS)

    points, _ = lax.while_loop(wanted, again, (first, jnp.zeros((), int)))
    some = ~jnp.all(points.failed)
    filled = _where(points.failed & some, _nearest_good(ys, points), points)
    return filled._replace(failed=points.failed & ~some)


def near_all(view: Blocks, x: PyTree, ys: Array, held: Array | None = None) -> Feasible:
    """`restore_all` for a step of a solver whose objectives have the squared violation: rows that are not affine are
    met as well as `FEW` projections on them, linearised, and on Y in turn do it. Points that are beyond them by more
    than `FEASIBLE` have `failed`; none is `held`.

    Newton's steps to rounding would take a hundred times as long where Y(x) is about to be empty: there rows have no
    gradients that count, and each step only halves the violation.
    """
    if not is_near(view):
        return restore_all(view, x, ys, held)

    def step(_: Array, y: Array) -> Array:
        c, J, equality = view.coupling_rows(x, y)
        return view.project(y - (dual(J @ J.T, c, equality) @ J)[None])

    points = jax.vmap(lambda y: lax.fori_loop(0, FEW, step, view.project(y)))(ys)
    failed = jax.vmap(lambda y: view.violation(x, y))(points) > FEASIBLE
    return jax.vmap(partial(_on_no_rows, view))(points, failed)


def fills(view: Blocks) -> bool:
    """Whether `fill` is for this problem: Y is a box, and the coupling's rows are affine."""
    if not isinstance(view.problem.coupling, LinearCoupling):
        return False
    return view.problem.y_set.bounds(view.unpack(jnp.zeros((view.n, view.m), view.dtype))) is not None


def fill(view: Blocks, x: PyTree, found: Feasible, ys: Array) -> Feasible:
    """Points of Y, ys [N, 1, m], spread inside of Y(x): those that are in it stay, others go back towards the middle of
    the points `found`, to a share of the way that is left to them. Projected, they would pile up on its faces.

    Equalities hold all of them, and they go along these.
    """
    middle, share = jnp.mean(found.y, axis=0), np.mod(0.5 + np.arange(1, len(ys) + 1) * GOLDEN, 1) ** (1 / view.m)
    share = jnp.asarray(share, ys.dtype)
    nothing = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, shape=(len(ys), *leaf.shape[1:])), found)
    limits, d = local(view, x, middle).limits, (ys - middle[None])[:, 0]
    coupling, equal = view.problem.coupling, jnp.zeros(len(limits.lo), bool)
    if isinstance(coupling, LinearCoupling) and coupling.num_equalities:
        equal = limits.lo == limits.hi
        d = _along(jnp.where(equal[:, None], limits.C, 0), d)
        held = jnp.broadcast_to(equal.astype(d.dtype), nothing.held.shape)
        lift = motion(view, x, middle, held[0]).lift
        nothing = nothing._replace(held=held, lift=jnp.broadcast_to(lift, nothing.lift.shape))
    at, speed = limits.C @ middle[0], d @ limits.C.T
    above, below = jnp.maximum(limits.hi - at, 0)[None], jnp.maximum(at - limits.lo, 0)[None]
    room = jnp.where(speed > 0, above, jnp.where(speed < 0, below, jnp.inf))
    left = jnp.where(equal[None], jnp.inf, room / jnp.where(speed == 0, 1, jnp.abs(speed)))
    left = jnp.min(left, axis=1)
    reach = jnp.where(left < 1, share * left, 1)
    return nothing._replace(y=middle[None] + (reach[:, None] * d)[:, None])


def _along(E: Array, d: Array) -> Array:
    """The parts of d [N, m] at right angles to the rows of E [rows, m], which may depend on each other or be zero."""
    K = E @ E.T
    ridge = 10 * float(jnp.finfo(E.dtype).eps) * jnp.trace(K) + jnp.finfo(E.dtype).tiny
    pull = jnp.linalg.solve(K + ridge * jnp.eye(len(E), dtype=E.dtype), E)
    for _ in range(2):  # the second time what the ridge has left
        d = d - (d @ E.T) @ pull
    return d


def _where(chosen: Array, there: Feasible, here: Feasible) -> Feasible:
    """Of two stacks the first where it is chosen [N]."""
    pick = lambda a, b: jnp.where(chosen.reshape(-1, *(1,) * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, there, here)


def _nearest_good(ys: Array, points: Feasible) -> Feasible:
    """For each of ys [N, n, m] the nearest of the points that did not fail."""
    flat, goals = ys.reshape(len(ys), -1), points.y.reshape(len(ys), -1)
    square = jnp.sum((flat[:, None] - goals[None]) ** 2, axis=2)
    nearest = jnp.argmin(jnp.where(points.failed[None], jnp.inf, square), axis=1)
    return jax.tree.map(lambda leaf: leaf[nearest], points)


class _Newton(NamedTuple):
    """Carry."""

    y: Array
    outside: Array
    """[], whether a row is violated beyond rounding."""
    count: Array


def _by_newton(view: Blocks, x: PyTree, y: Array) -> Feasible:
    """Projections on the rows linearised at y; no row is said to hold y."""

    def outside(y: Array) -> Array:
        limits, _ = local(view, x, y)
        at = limits.C @ y[0]
        scale = jnp.linalg.norm(limits.C, axis=1) * (1 + jnp.max(jnp.abs(y)))
        beyond = jnp.maximum(at - limits.hi, limits.lo - at)
        return jnp.any(beyond > 1e3 * float(jnp.finfo(y.dtype).eps) * scale)

    def step(c: _Newton) -> _Newton:
        limits, soft = local(view, x, c.y)
        y = view.project(constraints.project_on(limits, c.y[0], soft).y[None])
        return _Newton(y, outside(y), c.count + 1)

    y = view.project(y)
    begin = _Newton(y, outside(y), jnp.zeros((), int))
    end = lax.while_loop(lambda c: c.outside & (c.count < STEPS), step, begin)
    failed = end.outside | ~jnp.all(jnp.isfinite(end.y))
    return _on_no_rows(view, end.y, failed)


def _is_on(limits: Rows, y: Array) -> tuple[Array, Array]:
    """Which rows y [1, m] is on: (at their lower bounds, at their upper ones), shapes [rows]."""
    near = max(NEAR, 100 * float(jnp.finfo(y.dtype).eps)) * (1 + jnp.max(jnp.abs(y)))
    at, reach = limits.C @ y[0], near * jnp.linalg.norm(limits.C, axis=1)
    return at - limits.lo <= reach, limits.hi - at <= reach


def local(view: Blocks, x: PyTree, y: Array) -> Local:
    """The rows at y [1, m], the coupling's linearised there; affine ones do not depend on y."""
    y = jnp.zeros_like(y) if is_affine(view) else y
    c, J, equality = view.coupling_rows(x, y)
    hi = J @ y[0] - c
    lo = jnp.where(equality, hi, -jnp.inf)
    blocks = [(J, lo, hi), *_set_rows(view, y)]
    C, lo, hi = (jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
    return Local(Rows(C, lo, hi, jnp.zeros((len(lo), 0), y.dtype)), jnp.arange(len(lo)) < len(c))


def _set_rows(view: Blocks, y: Array) -> list[tuple[Array, Array, Array]]:
    """The rows of Y at y [1, m]."""
    return set_rows(view.problem.y_set, view.unpack(y))


def set_rows(a_set: Set, z: PyTree) -> list[tuple[Array, Array, Array]]:
    """The rows of a set; of one that is no polyhedron the half-space that supports it at its point nearest to z."""
    if a_set.polyhedral:
        return a_set.rows(z)
    flat, nearest = ravel_pytree(z)[0], ravel_pytree(a_set.project(z))[0]
    normal = flat - nearest
    return [(normal[None], jnp.full(1, -jnp.inf, flat.dtype), (normal @ nearest)[None])]


def pressed(view: Blocks, x: PyTree, y: Array, held: Array, gradients: Array) -> Array:
    """`held` [1, rows] with the rows that y [1, m] is on and one of the directions -`gradients` [K, m] leads across.

    The part of a direction along which y may go is its projection on the cone of these rows, those that hold y being
    equalities; the rows with a multiplier in it are the ones in its way.
    """
    limits, _ = local(view, x, y)
    (below, above), on = _is_on(limits, y), held[0]
    lo, hi = jnp.where(below | (on > 0), 0, -jnp.inf), jnp.where(above | (on < 0), 0, jnp.inf)
    cone = Rows(limits.C, lo, hi, limits.B)
    ways = jax.vmap(lambda G: constraints.project_on(cone, -G).active)(gradients)
    found = jnp.where(jnp.any(ways > 0, axis=0), 1, jnp.where(jnp.any(ways < 0, axis=0), -1, 0))
    return jnp.where(on != 0, on, found.astype(on.dtype))[None]


class Motion(NamedTuple):
    """How a point moves with the bounds of the rows that hold it."""

    held: Array
    """Shape [n, rows], as `Feasible.held`."""
    lift: Array
    """What a change of the rows' bounds adds to y, shape [rows, n m]: zero for rows that do not hold it."""

    def multipliers(self, G: Array) -> Array:
        """Those of a gradient G [m] on the rows, shape [rows]."""
        return -self.lift @ G


def motion(view: Blocks, x: PyTree, y: Array, held: Array) -> Motion:
    """How y [1, m] moves that the rows `held` [1, rows] hold, by an independent part of them: on a shift of y by z, of
    which no held row is a tangent, all of them have a multiplier.
    """
    limits = local(view, x, y).limits
    z = jnp.asarray(np.sqrt(2.0 + np.arange(view.m)), y.dtype)
    bound = limits.C @ z
    on = held[0] != 0
    rows = Rows(limits.C, jnp.where(on, bound, -jnp.inf), jnp.where(on, bound, jnp.inf), limits.B)
    region = Region.of(rows)
    found = region.project(jnp.zeros_like(z))
    return Motion(held, region.d[:, None] * (found.inverse @ region.W))


def moved(view: Blocks, x: PyTree, y: Array, motion: Motion) -> tuple[Array, Array]:
    """(where the point y [1, m] of another x moves on affine rows, back to Y where it leaves it; whether that is in
    Y(x), []).
    """
    limits, on = local(view, x, y).limits, motion.held[0]
    bound = jnp.where(on > 0, limits.hi, jnp.where(on < 0, limits.lo, 0))
    y = y + (jnp.where(on != 0, bound - limits.C @ y[0], 0) @ motion.lift)[None]
    y = view.project(y)
    at, size = limits.C @ y[0], jnp.linalg.norm(limits.C, axis=1)
    reach = NEAR / 10 if y.dtype == jnp.float64 else 1e-5
    reach = reach * size * (1 + jnp.max(jnp.abs(y)))
    return y, jnp.all((at <= limits.hi + reach) & (at >= limits.lo - reach))
