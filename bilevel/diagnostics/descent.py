"""How fast F falls around x where it may jump and has no gradient: the rate of steepest descent of an exact penalty.

With weights rho > 0 of the lower level,

    P(x) = min over Y(x) of (f + rho g)(x, .) - rho v(x),    v(x) = min over Y(x) of g(x, .),

is at most F(x), since a minimiser of g over Y(x) is a point of the first minimum. Both minima are global ones, so that
they are searched from the best points that `gap.search` knows at x, which are then followed to the points x' around x.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.diagnostics import exact
from bilevel.oracles import samples as sample_oracles
from bilevel.sampled import refine
from bilevel.sampled.blocks import Blocks, pick

PyTree = Any
RADII = (1e-2, 1e-3, 1e-4)  # distances from x, times 1 + |x|
DIRECTIONS, KEPT = 8, 3  # most directions beside the gradient's; minimisers of each kind that follow x


class Penalty(NamedTuple):
    """P near x."""

    view: Blocks
    rho: Array
    starts: Array
    """The points that both minima start from, shape [2 KEPT, n, m]: first those of g, then those of f + rho g."""
    a: Array
    """The weight of f at each of them, shape [2 KEPT]: 0 or 1."""
    b: Array
    """The weight of g at each of them, shape [2 KEPT]: 1 or rho."""


class Value(NamedTuple):
    """P at a point."""

    value: Array
    """P, shape []; infinite where no feasible point was found."""
    ends: Array
    """The minimisers of g and of f + rho g, shape [2, n, m]."""
    size: Array
    """The sum over blocks of the least |g|, shape []: what rounding is measured against."""


class AtX(NamedTuple):
    """What is known at x itself; NaN before it was looked at."""

    value: Array
    """P(x), shape []."""
    direction: Array
    """grad P(x), scaled to length 1, shape [dim]."""
    size: Array
    """`Value.size`, shape []."""


class Around(NamedTuple):
    """Where the descent is searched."""

    flat: Array
    """x as one vector, shape [dim]."""
    unravel: Callable[[Array], PyTree]
    """A vector as x."""
    directions: Array
    """Unit vectors that are tried beside the gradient, shape [num, dim]."""


def descent_rate(view: Blocks, x: PyTree, candidates: Array, g: Array) -> tuple[Array, Array]:
    """(rate, resolution) of the steepest descent that a search around x finds for the exact penalty

        P(x) = min over Y(x) of (f + rho g)(x, .) - rho min over Y(x) of g(x, .) <= F(x),      rho = 1e4 std f/std g,

    standard deviations over Y at x: rate = max [P(x) - P(x')]_+/|x' - x| over x' = Proj_X(x + r d), at the distances
    r = `RADII` (1 + |x|) and, both ways, along P's gradient and the coordinates (or eight random directions); a step
    into an edge of X goes along it. It is |grad P| up to curvature where P is smooth and says "no descent" at a kink
    too; 0 where x is a local minimum as far as the search sees. Both minima start at x from the best `candidates`
    [K, n, m], whose g [K, n] is given, and follow x'. resolution: what rounding of the values, eps relative each, may
    make of it.
    """
    flat, unravel = ravel_pytree(x)
    penalty = _penalty_at(view, x, candidates, g)
    around = Around(flat, unravel, _directions(flat.size, flat.dtype))
    far = (1 + jnp.linalg.norm(flat)) * jnp.asarray(RADII, flat.dtype)
    unit = jnp.eye(1 + len(around.directions), dtype=flat.dtype)
    ways = (far[:, None, None] * jnp.concatenate([unit, -unit])[None]).reshape(-1, len(unit))
    ways = jnp.concatenate([0 * ways[:1], ways])  # the first leads to x, so that there is one copy of the search
    nothing = AtX(*(jnp.full_like(like, jnp.nan) for like in (penalty.rho, flat, penalty.rho)))
    at_x, rates = jax.lax.scan(partial(_try_way, penalty, around), nothing, ways)
    eps = float(jnp.finfo(flat.dtype).eps)
    resolution = 4 * eps * (jnp.abs(at_x.value) + 2 * penalty.rho * at_x.size) / far[-1]
    return jnp.maximum(jnp.max(rates), 0), resolution


def _penalty_at(view: Blocks, x: PyTree, candidates: Array, g: Array) -> Penalty:
    """P with its weight from a cover of Y, and its starts from the candidates: for each block the KEPT ones of least g,
    and the KEPT ones of least f + rho g after a descent on it.
    """
    dtype = ravel_pytree(x)[0].dtype
    rho = exact.penalty(view, x, 1e4)
    many = jnp.ones(len(candidates), dtype)
    descended, penalised = _settle(view, x, candidates, many, rho * many, num_steps=8)
    starts = jnp.concatenate([_least(candidates, g), _least(descended, penalised)])
    is_up = jnp.arange(2 * KEPT) >= KEPT
    return Penalty(view, rho, starts, is_up.astype(dtype), jnp.where(is_up, rho, 1))


def _least(points: Array, values: Array) -> Array:
    """For each block the KEPT of points [K, n, m] with the least values [K, n]."""
    return pick(points, jnp.argsort(values, axis=0)[:KEPT])


def _settle(view: Blocks, x: PyTree, points: Array, a: Array, b: Array, num_steps: int) -> tuple[Array, Array]:
    """(points [K, n, m] after a descent of each on its a f + b g, the values there [K, n]); a, b [K]. Values of points
    outside of Y(x) are infinite.
    """

    def one(y: Array, a: Array, b: Array) -> tuple[Array, Array]:
        y = refine.improve(view, x, y, a, b, num_steps)[0]
        value = sample_oracles.weighted_terms(view.problem, x, view.unpack(y), a, b, view.upper, view.lower)
        fits = (view.violation(x, y) <= 1e-6) & jnp.isfinite(value)
        return y, jnp.where(fits, value, jnp.inf)

    return jax.vmap(one)(points, a, b)


def _value(penalty: Penalty, x: PyTree) -> Value:
    """P(x), by a descent from each of the starts."""
    points, values = _settle(penalty.view, x, penalty.starts, penalty.a, penalty.b, num_steps=4)
    low, up = values[:KEPT], values[KEPT:]
    value = jnp.sum(jnp.min(up, axis=0) - penalty.rho * jnp.min(low, axis=0))
    ends = pick(points, jnp.stack([jnp.argmin(low, axis=0), KEPT + jnp.argmin(up, axis=0)]))
    size = jnp.sum(jnp.abs(jnp.min(low, axis=0)))
    return Value(jnp.where(jnp.isfinite(value), value, jnp.inf), ends, size)


def _slope(penalty: Penalty, x: PyTree, ends: Array) -> Array:
    """grad P(x) = f_x(x, u) + rho (g_x(x, u) - g_x(x, y)) + c_x(x, u)'mu - rho c_x(x, y)'lam, shape [dim], at the
    minimisers (y, u) = ends, with the multipliers of a coupling c there, lam of g and mu of f + rho g.
    """
    view = penalty.view
    is_up = jnp.stack([jnp.zeros(view.n, penalty.a.dtype), jnp.ones(view.n, penalty.a.dtype)])
    sign = 2 * is_up - 1
    by_x, by_y = view.gradients(x, ends, is_up, penalty.rho * sign)
    slope = ravel_pytree(by_x)[0]
    if view.problem.coupling is None:
        return slope
    weights = jax.vmap(lambda y, G: refine.multipliers(view, x, y, G)[0])(ends, sign[:, :, None] * by_y)
    return slope + ravel_pytree(view.coupling_pull(x, ends, sign * weights)[0])[0]


def _directions(dim: int, dtype: Any) -> Array:
    """The unit vectors of the coordinates, or random ones where those are too many: shape [num, dim]."""
    if dim <= DIRECTIONS:
        return jnp.eye(dim, dtype=dtype)
    normal = jax.random.normal(jax.random.key(21), (DIRECTIONS, dim), dtype)
    return normal / jnp.linalg.norm(normal, axis=1, keepdims=True)


def _try_way(penalty: Penalty, around: Around, at_x: AtX, way: Array) -> tuple[AtX, Array]:
    """(what is known at x, [P(x) - P(x')]/|x' - x|), x' = Proj_X(x + step), step being the sum of grad P's direction
    and of the other directions with the weights `way`.

    The first way, while nothing is known at x, leads to x, and its rate is 0. So is that of a way along which X leaves
    less than a tenth of the step.
    """
    first = jnp.isnan(at_x.value)
    step = jnp.where(first, 0, way @ jnp.concatenate([at_x.direction[None], around.directions]))
    length, project = jnp.linalg.norm(step), penalty.view.problem.x_set.project
    along = ravel_pytree(project(around.unravel(around.flat + step)))[0] - around.flat  # X's edges turn it
    kept = jnp.linalg.norm(along)
    longer = jnp.where(kept > 1e-3 * length, length / jnp.where(kept > 0, kept, 1), 0)
    there = project(around.unravel(around.flat + longer * along))
    found = _value(penalty, there)
    slope = _slope(penalty, there, found.ends)
    steep = jnp.linalg.norm(slope)
    now = AtX(found.value, slope / jnp.where(steep > 0, steep, 1), found.size)
    moved = jnp.linalg.norm(ravel_pytree(there)[0] - around.flat)
    fall = (at_x.value - found.value) / jnp.where(moved > 0, moved, 1)
    rate = jnp.where(moved > 0.1 * length, fall, 0)
    return jax.tree.map(partial(jnp.where, first), now, at_x), jnp.where(first, 0, rate)
