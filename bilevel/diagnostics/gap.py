"""The true lower-level gap g(x, y) - min over Y(x) of g(x, .), by a search that shares no samples with any solver.

Points of a fixed additive recurrence and of Y's boundary, moved into Y(x), the best of each of `num_starts` interleaved
parts searched along the coordinates and polished by `refine.polish`; for each block apart where the problem is
separable. The minimum found is an upper bound of v(x), so that the gap is a lower bound of the true one: it is reliable
where the points are dense enough for one to fall into the basin of a global minimiser, that is for blocks of dimension
up to about 10.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.precision import full_precision
from bilevel.oracles import samples as sample_oracles
from bilevel.problem import BilevelProblem, Minimize, check_like
from bilevel.record import Measurement, Status
from bilevel.sampled import covering, nets, refine
from bilevel.sampled.blocks import Blocks, pick
from bilevel.struct import invalid

PyTree = Any
RADII = (1e-2, 1e-3, 1e-4)  # of the search for descent, times 1 + |x|
LINE = 64  # points whose coordinates are tried, one by one
DIRECTIONS, KEPT = 8, 3  # most directions beside the gradient's; minimisers of each kind that follow x


class LowerGap(NamedTuple):
    """gap: g(x, y) - v(x), NaN where Y(x) is empty; below zero only for an infeasible y. value: v(x), the least g seen.

    y: where it was seen. violation: distance of the given y to Y plus the norm of its coupling residual.
    least_violation: the least seen over Y, 0 up to the tolerance unless Y(x) is empty. status: CONVERGED;
    INFEASIBLE_LOWER, Y(x) is empty as far as the search sees; NONFINITE.
    """

    gap: Array
    value: Array
    y: PyTree
    violation: Array
    least_violation: Array
    status: Array


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
    return _search(Blocks.of(problem, y), x, y, num_points, num_starts, num_steps, tol, chunk)[0]


def _search(
    view: Blocks, x: PyTree, y: PyTree, num_points: int = 2048, num_starts: int = 16, num_steps: int = 20,
    tol: Any = 1e-6, chunk: int | None = None,
) -> tuple[LowerGap, Array, Array]:  # fmt: skip
    """(the gap; candidates [K, n, m], before and after their polish; g of their blocks, inf where infeasible)."""
    problem, given = view.problem, view.pack(y)
    uniform = nets.kronecker(num_points, view.m, given.dtype)
    points = covering.cover_blocks(view, jax.random.key(20), num_points, uniform[:, None])

    def look(y: Array) -> tuple[Array, Array]:
        g = sample_oracles.weighted_terms(problem, x, view.unpack(y), None, None, view.upper, view.lower)
        return g, view.violation(x, y)[None]

    # A point of a coupled set is judged where `restore` takes it.
    if problem.coupling is not None:
        points = jax.vmap(lambda y: refine.restore(view, x, y))(points)
    g, outside = oracles.batched(look, chunk)(points)
    score = jnp.where(outside <= tol, g, jnp.inf)
    size = len(g) // num_starts * num_starts
    score, far = (leaf[:size].reshape(-1, num_starts, leaf.shape[1]) for leaf in (score, outside))
    best = jnp.where(jnp.min(score, axis=0) < jnp.inf, jnp.argmin(score, axis=0), jnp.argmin(far, axis=0))
    starts = pick(points, best * num_starts + jnp.arange(num_starts)[:, None])
    starts = jnp.concatenate([starts, given[None]])

    def along(k: Array, y: Array) -> Array:
        """y, or where that lowers g of its block, with another point's k-th coordinate."""
        others = points[:LINE]
        line = jnp.where((jnp.arange(view.m) == k % view.m)[None, None], others, jnp.broadcast_to(y, others.shape))
        line = jnp.concatenate([y[None], jax.vmap(lambda y: refine.restore(view, x, y))(line)])
        g, outside = oracles.batched(look)(line)
        return pick(line, jnp.argmin(jnp.where(outside <= tol, g, jnp.inf), axis=0))

    if view.m > 1:  # wells that a sum has for each coordinate multiply, and points in all of them run out
        starts = jax.vmap(lambda y: jax.lax.fori_loop(0, 2 * view.m, along, y))(starts)
    polished = jax.vmap(lambda y: refine.polish(view, x, y, num_steps))(starts)

    candidates = jnp.concatenate([starts, polished])
    g, outside = jax.vmap(look)(candidates)
    score = jnp.where((outside <= tol) & jnp.isfinite(g), g, jnp.inf)
    value = jnp.sum(jnp.min(score, axis=0))
    least = pick(candidates, jnp.argmin(score, axis=0))
    given, distance = (jnp.sum(part) for part in look(given))
    empty = jnp.minimum(jnp.min(far), jnp.min(outside))
    status = jnp.where(empty > tol, Status.INFEASIBLE_LOWER, Status.CONVERGED)
    bad = ~jnp.isfinite(given) | ((value == jnp.inf) & (empty <= tol))
    found = LowerGap(
        gap=jnp.where(value < jnp.inf, given - value, jnp.nan),
        value=jnp.where(value < jnp.inf, value, jnp.nan),
        y=view.unpack(least),
        violation=distance,
        least_violation=empty,
        status=jnp.where(bad, Status.NONFINITE, status),
    )
    return found, candidates, score


def descent_rate(view: Blocks, x: PyTree, candidates: Array, g: Array) -> tuple[Array, Array]:
    """(rate, resolution) of the steepest descent that a search around x finds for the exact penalty

        P(x) = min over Y(x) of (f + rho g)(x, .) - rho min over Y(x) of g(x, .) <= F(x),      rho = 1e4 std f/std g,

    standard deviations over Y at x: rate = max [P(x) - P(x')]_+/|x' - x| over x' = Proj_X(x + r d), at the distances
    r = `RADII` (1 + |x|) and, both ways, along P's gradient and the coordinates (or eight random directions). It is
    |grad P| up to curvature where P is smooth and says "no descent" at a kink too; 0 where x is a local minimum as far
    as the search sees. Both minima start at x from the best candidates [K, n, m], whose g is given, and follow x'.
    resolution: what rounding of the values, eps relative each, may make of it.
    """
    flat, unravel = ravel_pytree(x)
    eps, dim = float(jnp.finfo(flat.dtype).eps), flat.size
    uniform = nets.kronecker(64, view.m, candidates.dtype)
    cover = covering.cover_blocks(view, jax.random.key(22), 64, uniform[:, None])
    spread = [jnp.std(jnp.where(jnp.isfinite(part), part, 0)) for part in view.values(x, cover)]
    rho = 1e4 * jnp.where(spread[0] > 0, spread[0], 1) / jnp.where(spread[1] > 0, spread[1], 1)

    def best(points: Array, values: Array) -> Array:
        return pick(points, jnp.argsort(values, axis=0)[:KEPT])

    def settle(x: PyTree, points: Array, a: Array, b: Array, num_steps: int) -> tuple[Array, Array]:
        """Points and their a f + b g after the descent, inf where infeasible; a, b [K]."""

        def one(y: Array, a: Array, b: Array) -> tuple[Array, Array]:
            y = refine.improve(view, x, y, a, b, num_steps, restores=4)[0]
            value = sample_oracles.weighted_terms(view.problem, x, view.unpack(y), a, b, view.upper, view.lower)
            fits = (view.violation(x, y) <= 1e-6) & jnp.isfinite(value)
            return y, jnp.where(fits, value, jnp.inf)

        return jax.vmap(one)(points, a, b)

    many = jnp.ones(len(candidates), flat.dtype)
    ups = best(*settle(x, candidates, many, rho * many, 8))
    pairs = jnp.concatenate([best(candidates, g), ups])
    is_up = jnp.arange(2 * KEPT) >= KEPT
    a, b = is_up.astype(flat.dtype), jnp.where(is_up, rho, 1)

    def penalised(x: PyTree) -> tuple[Array, Array, Array]:
        points, values = settle(x, pairs, a, b, 4)
        low, up = values[:KEPT], values[KEPT:]
        value = jnp.sum(jnp.min(up, axis=0) - rho * jnp.min(low, axis=0))
        ends = pick(points, jnp.stack([jnp.argmin(low, axis=0), KEPT + jnp.argmin(up, axis=0)]))
        return jnp.where(jnp.isfinite(value), value, jnp.inf), ends, jnp.sum(jnp.abs(jnp.min(low, axis=0)))

    others = jnp.eye(dim, dtype=flat.dtype)
    if dim > DIRECTIONS:
        normal = jax.random.normal(jax.random.key(21), (DIRECTIONS, dim), flat.dtype)
        others = normal / jnp.linalg.norm(normal, axis=1, keepdims=True)
    signs = jnp.stack([jnp.zeros(view.n, flat.dtype), jnp.ones(view.n, flat.dtype)])
    far = (1 + jnp.linalg.norm(flat)) * jnp.asarray(RADII, flat.dtype)
    unit = jnp.eye(1 + len(others), dtype=flat.dtype)
    ways = (far[:, None, None] * jnp.concatenate([unit, -unit])[None]).reshape(-1, len(unit))

    def look(start: tuple[Array, Array, Array], way: Array) -> tuple[tuple[Array, Array, Array], Array]:
        """The rate along `way`, weights of P's gradient at x and of the others.

        start: P, that gradient's direction and the size of g, NaN before the first way, which is 0 and leads to x.
        """
        here, slope, _ = start
        step = way @ jnp.concatenate([slope[None], others])
        first = jnp.isnan(here)
        there = view.problem.x_set.project(unravel(flat + jnp.where(first, 0, step)))
        value, ends, size = penalised(there)
        slope = ravel_pytree(view.gradients(there, ends, signs, rho * (2 * signs - 1))[0])[0]
        length = jnp.linalg.norm(slope)
        found = value, slope / jnp.where(length > 0, length, 1), size
        moved = jnp.linalg.norm(ravel_pytree(there)[0] - flat)
        rate = jnp.where(moved > 0.1 * jnp.linalg.norm(step), (here - value) / jnp.where(moved > 0, moved, 1), 0)
        return jax.tree.map(partial(jnp.where, first), found, start), jnp.where(first, 0, rate)

    nothing = jax.tree.map(lambda part: jnp.full_like(part, jnp.nan), (rho, flat, rho))
    (here, _, size), rates = jax.lax.scan(look, nothing, jnp.concatenate([0 * ways[:1], ways]))  # one copy of `settle`
    return jnp.maximum(jnp.max(rates), 0), 4 * eps * (jnp.abs(here) + 2 * rho * size) / far[-1]


def measure_global(problem: BilevelProblem, x: PyTree, y: PyTree) -> Measurement:
    """What `solve` records where g(x, .) may have many minimisers: nothing is solved for y, the given one is judged.

    value: f(x, y). lower_residual: the true lower gap, |g(x, y) - v(x)|. violation: of X, Y and the coupling together.
    hypergradient and error_bound: the rate of the steepest descent found around x and its resolution, `descent_rate`:
    F may jump and has no gradient. status: ESTIMATED, or INFEASIBLE_LOWER or NONFINITE; where Y(x) is empty the value
    is NaN.
    """
    problem = problem.on_full_data()
    view = Blocks.of(problem, y)
    found, candidates, g = _search(view, x, y)
    rate, resolution = descent_rate(view, x, candidates, g)
    value = oracles.upper_value(problem, x, y, view.upper)
    solved = jnp.where(found.status == Status.CONVERGED, Status.ESTIMATED, found.status)
    return Measurement(
        value=jnp.where(jnp.isnan(found.value), jnp.nan, value),
        hypergradient=jnp.where(jnp.isnan(found.value), jnp.nan, rate),
        error_bound=resolution,
        lower_residual=jnp.abs(found.gap),
        violation=problem.x_set.violation(x) + found.violation,
        status=solved,
    )
