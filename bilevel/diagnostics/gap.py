"""The true lower-level gap g(x, y) - min over Y(x) of g(x, .), by a search that shares no samples with any solver.

Points of a fixed additive recurrence and of Y's boundary, moved into Y(x), the best of each of `num_starts` interleaved
parts searched along the coordinates and polished by `refine.polish`; for each block apart where the problem is
separable. The minimum found is an upper bound of v(x), so that the gap is a lower bound of the true one: it is reliable
where the points are dense enough for one to fall into the basin of a global minimiser.

The search says itself where it is not. Suppose that a deeper well than the best one drew at least as large a share of
the starts, and that k of n starts came to the best one: then the chance that none came to the deeper one is at most
(1 - k/n)^n < e^-k, 5 % for k = 3. So v(x) is *confirmed* where `REPEATED` starts, which do not know the given y, end
at the same point of least g; or half of them at the least g, wherever: a continuum of minimisers has no point that is
found twice. It is a test of the many-wells kind and no proof: a narrow deep well beside a wide one passes it.

Reference: the share of basins that were not seen, from ends that were seen once and more often: Boender, Rinnooy Kan,
Bayesian stopping rules for multistart global optimization methods. Mathematical Programming 37, 1987.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import oracles
from bilevel.backend.checks import check_like
from bilevel.backend.precision import full_precision
from bilevel.backend.tree import norm
from bilevel.diagnostics import exact
from bilevel.diagnostics.descent import descent_rate
from bilevel.oracles import samples as sample_oracles
from bilevel.parts.reduced import upper_violation
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Measurement, Status
from bilevel.sampled import covering, nets, refine
from bilevel.sampled.blocks import Blocks, pick
from bilevel.sampled.feasible import restore, restore_all
from bilevel.struct import invalid

PyTree = Any
TOL = 1e-6  # violation up to which a point counts as feasible
LINE = 64  # points whose coordinates are tried, one by one
REPEATED = 3  # starts that confirm a minimiser by ending there
AGREE, SAME = 1e-4, 1e-3  # how near ends agree: g in units of its mean above the least, points in diameters of Y(x)
APART = (1 / 4, 1 / 8, 1 / 2, 1 / 16)  # how far starts are from each other, in diameters of Y(x)


class LowerGap(NamedTuple):
    """gap: g(x, y) - v(x), NaN where Y(x) is empty; below zero only for an infeasible y. value: v(x), the least g seen.

    y: where it was seen. violation: distance of the given y to Y plus the norm of its coupling residual.
    least_violation: the least seen over Y, 0 up to the tolerance unless Y(x) is empty. status: CONVERGED; UNCONFIRMED,
    too few of the starts agree on where the least g is; INFEASIBLE_LOWER, Y(x) is empty, or is as far as the search
    sees; NONFINITE. error: how far `value` may be above
    v(x), [], a duality gap, where Y(x) is a polyhedron and g(x, .) convex as far as was seen; else infinite: then
    `value` is an upper bound that a search found.
    """

    gap: Array
    value: Array
    y: PyTree
    violation: Array
    least_violation: Array
    status: Array
    error: Array = np.inf  # pyright: ignore[reportAssignmentType]


@partial(jax.jit, static_argnames=("num_points", "num_starts", "num_steps", "chunk"))
@full_precision
def lower_gap(
    problem: BilevelProblem,
    x: PyTree,
    y: PyTree,
    *,
    num_points: int = 2048,
    num_starts: int = 16,
    num_steps: int = 20,
    tol: Any = 1e-6,
    chunk: int | None = None,
) -> LowerGap:
    """The true lower-level gap at (x, y), on all of the data. Pure; use it under jit and vmap.

    Args:
        problem: with a lower level Minimize(g); y_set should be bounded, since unbounded directions are only sampled.
        x: shaped like init's x0.
        y: shaped like init's y0.
        num_points: how many points of Y are looked at.
        num_starts: how many of them are polished, beside y itself.
        num_steps: Newton or gradient steps of a polish.
        tol: violation up to which a point counts as feasible.
        chunk: how many of the points are in memory at once, where not all.

    Raises:
        InvalidInput: for a fixed point, or where x or y is not shaped like init's.
    """
    if not isinstance(problem.lower, Minimize):
        invalid("problem.lower", type(problem.lower).__name__, "Minimize(g)", "A fixed point has no value to compare.")
    x0, y0 = jax.eval_shape(lambda: problem.init(jax.random.key(0)))
    check_like("x", x, x0, "init's x0")
    check_like("y", y, y0, "init's y0")
    view = Blocks.of(problem, y)
    if exact.suits(problem, x, y):
        starts = _starts(view, x, y, num_points, num_starts, tol, chunk)
        rho, allowed = jnp.ones((), starts.dtype), exact.Allowed(0.0, tol)
        found = jax.vmap(lambda y: exact.minima(view, x, y, rho, allowed, both=False))(starts)
        return _exact_gap(view, x, y, exact.taken(view, x, rho, found)[1], tol)
    return search(view, x, y, num_points, num_starts, num_steps, tol, chunk).gap


class Search(NamedTuple):
    """What `search` finds."""

    gap: LowerGap
    candidates: Array
    """The points that were looked at last, before and after their polish, and the given one, shape [K, n, m]."""
    g: Array
    """g of their blocks, shape [K, n]; infinite where a point is infeasible or g is not finite."""


class Worth(NamedTuple):
    """What points [K, n, m] are worth."""

    g: Array
    """g of their blocks, shape [K, n]."""
    outside: Array
    """Their distance to Y plus the norm of the coupling's residual, shape [K, 1]."""

    def within(self, tol: Any) -> Array:
        """g, infinite outside of Y(x); shape [K, n]."""
        return jnp.where(self.outside <= tol, self.g, jnp.inf)


def search(
    view: Blocks, x: PyTree, y: PyTree, num_points: int = 2048, num_starts: int = 16, num_steps: int = 20,
    tol: Any = 1e-6, chunk: int | None = None,
) -> Search:  # fmt: skip
    """The least g(x, .) over Y(x), from points that cover Y and from the given y; the arguments are `lower_gap`'s.

    The best of the points in each of `num_starts` interleaved parts, and y, are searched along their coordinates and
    polished. All of that is done for each block apart.
    """
    given = view.pack(y)
    points = _cover(view, x, num_points, given.dtype)
    cover = oracles.batched(partial(_worth, view, x), chunk)(points)
    starts, nearest = _best_of_parts(points, cover, num_starts, tol)
    starts = jnp.concatenate([starts, given[None]])
    if view.m > 1:  # wells that a sum has for each coordinate multiply, and points in all of them run out
        tried = partial(_try_coordinate, view, x, points[:LINE], tol)
        starts = jax.vmap(lambda y: jax.lax.fori_loop(0, 2 * view.m, tried, y))(starts)
    polished = jax.vmap(lambda y: refine.polish(view, x, y, num_steps))(starts)
    candidates = jnp.concatenate([starts, polished])
    worth = jax.vmap(partial(_worth, view, x))(candidates)
    g = jnp.where(jnp.isfinite(worth.g), worth.within(tol), jnp.inf)
    least_violation = jnp.minimum(nearest, jnp.min(worth.outside))
    found = _compare(view, x, given, candidates, g, least_violation, tol)
    ends = slice(num_starts + 1, -1)  # those of the starts that do not know y
    fits, best = jnp.isfinite(cover.within(tol)), jnp.min(g, axis=0)
    mean = jnp.mean(cover.g, axis=0, where=fits)  # NaN where none fits
    width = jnp.linalg.norm(jnp.max(points, axis=0) - jnp.min(points, axis=0), axis=1)
    sure = _is_confirmed(candidates[ends], g[ends], best, best + AGREE * jnp.nan_to_num(mean - best), width)
    unsure = (found.status == Status.CONVERGED) & ~sure
    found = found._replace(status=jnp.where(unsure, Status.UNCONFIRMED, found.status))
    return Search(found, candidates, g)


def _is_confirmed(ends: Array, g: Array, least: Array, low: Array, width: Array) -> Array:
    """Whether enough of the ends [K, n, m] of a search, with the values g [K, n], agree on the `least` g of all: what
    is at most `low` is as good, what is nearer than `SAME` of the width is the same point; [n] each. See the module's
    docstring.
    """
    rounding = float(jnp.finfo(least.dtype).eps) ** 0.55 * (1 + jnp.abs(least))
    good = g <= (low + rounding)[None]
    apart = jnp.linalg.norm(ends[:, None] - ends[None], axis=3)
    together = jnp.sum((apart <= SAME * width[None, None]) & good[None], axis=1)
    repeated = jnp.max(jnp.where(good, together, 0), axis=0) >= REPEATED
    return jnp.all(repeated | (2 * jnp.sum(good, axis=0) >= len(g)))


def _starts(
    view: Blocks, x: PyTree, y: PyTree, num_points: int = 2048, num_starts: int = 7, tol: Any = 1e-6,
    chunk: int | None = None,
) -> Array:  # fmt: skip
    """Where `exact.minima` starts from, [K, n]: y, and below a g that may have several minima the best points of a
    cover, of its parts and far from each other: at a jump of F two minimisers are worth the same, and the points of
    least g may all be near one of them.
    """
    given = view.pack(y)
    if oracles.constant_residual(view.problem, x, y, view.lower):
        return given
    points = _cover(view, x, num_points, given.dtype)
    worth = oracles.batched(partial(_worth, view, x), chunk)(points)
    shares = APART[: max(num_starts - 1, 0)]
    best = _best_of_parts(points, worth, max(num_starts - len(shares), 1), tol)[0][:, 0]
    starts = [given, best]
    if shares:
        starts.append(_best_apart(points[:, 0], worth.within(tol)[:, 0], shares))
    return jnp.concatenate(starts)


def _best_apart(points: Array, g: Array, shares: Sequence[float]) -> Array:
    """Of points [N, m] with the values g [N], in turn the best one of those that are farther from all that were taken
    than a share of the points' diameter; shape [len(shares), m].
    """
    width = norm(jnp.max(points, axis=0) - jnp.min(points, axis=0))

    def take(chosen: Array, share: Array) -> tuple[Array, Array]:
        away = jnp.min(jnp.linalg.norm(points[:, None] - chosen[None], axis=2), axis=1)
        best = points[jnp.argmin(jnp.where(away > share * width, g, jnp.inf))]
        return jnp.concatenate([chosen[1:], best[None]]), best

    nearest = points[jnp.argmin(g)]
    begin = jnp.broadcast_to(nearest, (len(shares), points.shape[1]))
    return jax.lax.scan(take, begin, jnp.asarray(shares, points.dtype))[1]


def _exact_gap(view: Blocks, x: PyTree, y: PyTree, found: exact.Found, tol: Any) -> LowerGap:
    """The gap at y by what is known of v(x)."""
    own, nearest = _worth(view, x, view.pack(y)), _worth(view, x, view.project(view.pack(y)))
    value, good = jnp.sum(own.g), Status.CONVERGED
    if len(found.y) > 1:  # all but the first one do not know the given y
        v, width = found.v[None], 1 + norm(found.y[found.best])[None]
        sure = _is_confirmed(found.y[1:, None], found.g[1:, None], v, v + AGREE * (1 + jnp.abs(v)), width)
        good = jnp.where(sure | jnp.isfinite(found.error), good, Status.UNCONFIRMED)
    bad = ~found.empty & ~jnp.isfinite(value - found.v)
    status = jnp.where(found.empty, Status.INFEASIBLE_LOWER, jnp.where(bad, Status.NONFINITE, good))
    return LowerGap(
        gap=value - found.v,
        value=found.v,
        y=view.unpack(found.y[found.best][None]),
        violation=own.outside[0],
        least_violation=jnp.where(found.empty, jnp.maximum(nearest.outside[0], 2 * tol), 0),
        status=status,
        error=found.error,
    )


def _cover(view: Blocks, x: PyTree, num_points: int, dtype: Any) -> Array:
    """Points of Y and of its boundary, shape [num_points, n, m]; those of a coupled set moved into it."""
    uniform = nets.kronecker(num_points, view.m, dtype)
    points = covering.cover_blocks(view, jax.random.key(20), num_points, uniform[:, None])
    if view.problem.coupling is None:
        return points
    return restore_all(view, x, points).y


def _worth(view: Blocks, x: PyTree, y: Array) -> Worth:
    """What one point [n, m] is worth: shapes [n] and [1]."""
    g = sample_oracles.weighted_terms(view.problem, x, view.unpack(y), None, None, view.upper, view.lower)
    return Worth(g, view.violation(x, y)[None])


def _best_of_parts(points: Array, worth: Worth, num_starts: int, tol: Any) -> tuple[Array, Array]:
    """(for each block the point of least g in each of `num_starts` interleaved parts, or where none of a part is
    feasible the nearest to Y(x), shape [num_starts, n, m]; the least distance to Y(x) of all).
    """
    size = len(points) // num_starts * num_starts
    in_parts = lambda leaf: leaf[:size].reshape(-1, num_starts, leaf.shape[1])  # noqa: E731
    g, outside = in_parts(worth.within(tol)), in_parts(worth.outside)
    best = jnp.where(jnp.min(g, axis=0) < jnp.inf, jnp.argmin(g, axis=0), jnp.argmin(outside, axis=0))
    return pick(points, best * num_starts + jnp.arange(num_starts)[:, None]), jnp.min(outside)


def _try_coordinate(view: Blocks, x: PyTree, others: Array, tol: Any, k: Array, y: Array) -> Array:
    """The point y [n, m], or where that lowers g of a block, with the k-th coordinate (modulo m) of another point."""
    line = jnp.where((jnp.arange(view.m) == k % view.m)[None, None], others, jnp.broadcast_to(y, others.shape))
    line = jnp.concatenate([y[None], jax.vmap(partial(restore, view, x))(line)])
    worth = oracles.batched(partial(_worth, view, x))(line)
    return pick(line, jnp.argmin(worth.within(tol), axis=0))


def _compare(
    view: Blocks, x: PyTree, given: Array, candidates: Array, g: Array, least_violation: Array, tol: Any
) -> LowerGap:
    """The gap at `given` [n, m] by the least g [K, n] of `candidates` [K, n, m], each block's own."""
    value = jnp.sum(jnp.min(g, axis=0))
    least = pick(candidates, jnp.argmin(g, axis=0))
    worth = _worth(view, x, given)
    own = jnp.sum(worth.g)
    empty = least_violation > tol
    bad = ~jnp.isfinite(own) | ((value == jnp.inf) & ~empty)
    status = jnp.where(empty, Status.INFEASIBLE_LOWER, Status.CONVERGED)
    return LowerGap(
        gap=jnp.where(value < jnp.inf, own - value, jnp.nan),
        value=jnp.where(value < jnp.inf, value, jnp.nan),
        y=view.unpack(least),
        violation=jnp.sum(worth.outside),
        least_violation=least_violation,
        status=jnp.where(bad, Status.NONFINITE, status),
    )


def measure_global(
    problem: BilevelProblem, x: PyTree, y: PyTree, *, num_points: int = 2048, num_starts: int = 16
) -> Measurement:
    """What `solve` records where g(x, .) may have many minimisers: nothing is solved for y, the given one is judged.

    value: f(x, y). lower_residual: the true lower gap, |g(x, y) - v(x)|. violation: of X, Y and the coupling together,
    and of the upper constraints at y; descent that these forbid is counted as descent, so that no run ends CONVERGED
    where one of them holds it.
    hypergradient and error_bound: the rate of the steepest descent found around x and its resolution, `descent_rate`:
    F may jump and has no gradient. status: ESTIMATED, or UNCONFIRMED, INFEASIBLE_LOWER or NONFINITE, as of `LowerGap`;
    where Y(x) is empty the value is NaN.

    Args:
        problem: as in `lower_gap`.
        x: shaped like init's x0.
        y: shaped like init's y0.
        num_points: how many points of Y are looked at.
        num_starts: how many of them are polished; half as many where minima are taken exactly (`diagnostics.exact`).
    """
    problem = problem.on_full_data()
    view = Blocks.of(problem, y)
    excess: Array | float = 0.0
    if exact.suits(problem, x, y):
        starts = _starts(view, x, y, num_points, max(num_starts // 2 - 1, 1))
        known, rate, resolution = exact.descent(view, x, starts, TOL)
        found = _exact_gap(view, x, y, known, TOL)
        excess = (oracles.upper_value(problem, x, y, view.upper) - known.F) / (1 + jnp.abs(known.F))
    else:
        found, candidates, g = search(view, x, y, num_points, num_starts)
        rate, resolution = descent_rate(view, x, candidates, g)
    value = oracles.upper_value(problem, x, y, view.upper)
    solved = jnp.where(found.status == Status.CONVERGED, Status.ESTIMATED, found.status)
    return Measurement(
        value=jnp.where(jnp.isnan(found.value), jnp.nan, value),
        hypergradient=jnp.where(jnp.isnan(found.value), jnp.nan, rate),
        error_bound=resolution,
        lower_residual=jnp.abs(found.gap),
        violation=problem.x_set.violation(x) + found.violation + upper_violation(problem, x, y),
        status=solved,
        lower_distance=jnp.maximum(excess, 0),
    )
