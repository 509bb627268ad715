"""LBFGS: limited-memory BFGS along the exact gradient of F, with a line search on F."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel.parts import quasi_newton
from bilevel.parts.domain import project_upper
from bilevel.parts.evaluation import LEAST, evaluate, refuse_unsolvable
from bilevel.parts.quasi_newton import Pairs
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import require_counts
from bilevel.struct import static, struct

PyTree = Any
DESCENT, CURVATURE = 1e-4, 0.9  # of the Wolfe conditions
START = 0.1  # the first step's length, in units of 1 + |x|
WORST = 10  # steps over whose values a spectral step may rise


class Look(NamedTuple):
    """F at a point, and how it was found."""

    x: Array
    """Raveled, shape [n]."""
    value: Array
    """F(x), shape []; infinite where the lower level is not solved."""
    gradient: Array
    """Of F, shape [n]."""
    y: PyTree
    """y(x)."""
    v: PyTree
    """The adjoint."""


class State(NamedTuple):
    """What a step of LBFGS needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """y(x); before the first step the start."""
    v: PyTree
    """The adjoint there."""
    known: Array
    """Whether F has been looked at, shape []: not before the first step."""
    value: Array
    """F(x), shape [], where it is known."""
    gradient: Array
    """Of F at x, shape [n], likewise."""
    pairs: Pairs
    """Steps and changes of the gradient."""
    last: Array
    """The last values of F, shape [WORST], newest first; the least number where there are none yet."""
    first: Array
    """The length of a step of which no curvature is known, in units of 1 + |x|, shape []."""


class Info(NamedTuple):
    """What a step of LBFGS shows."""

    direction: Array
    """The norm of x - Proj_X(x - grad F) at the new x, shape []."""
    objective: Array
    """F at the new x, shape []."""
    evaluations: Array
    """Points at which the lower level was solved, shape []."""


class _Search(NamedTuple):
    """Carry of a line search."""

    base: Look
    """x, once it is known."""
    kept: Look
    """The best point so far."""
    known: Array
    """[], whether `base` is."""
    t: Array
    """[], the next length; `below` and `above` bracket a good one."""
    below: Array
    above: Array
    over: Array
    count: Array


@struct(kw_only=True)
class LBFGS(Solver):
    """Limited-memory BFGS on F(x) = f(x, y(x)), with the lower level solved at every point, on all of the data:

        x <- Proj_X(x + t d),    d = -H grad F(x) on the entries of x that are not held by a bound, 0 on others,

    H the inverse Hessian of the last `memory` pairs. The length t meets the weak Wolfe conditions, found by bisection;
    F is infinite where the lower level has no solution. Where X is neither the whole space nor made of bounds, a
    quasi-Newton step must not be projected: there d = Proj_X(x - a grad F) - x with the spectral length a = s's/s'z,
    0 < t <= 1, and F may rise above its last value, not above the largest of the last ten.

    Assumptions: g(x, .) strongly convex, or as the lower level's method needs it (`bilevel.lower`); F differentiable,
        bounded below.
    Cost per step: 1 to 20 evaluations of F and its gradient, mostly 1, each with as many steps of the lower level's
        method as its tolerance takes, from the last y. The number of oracle calls is not known before.

    Args:
        memory: pairs, >= 1. Default: 20.
        max_evaluations: >= 2, of F in a step. Default: 20.

    Reference: Liu, Nocedal. On the limited memory BFGS method for large scale optimization. Mathematical Programming
        45, 1989. Bounds: Bertsekas 1982 (`parts.quasi_newton`). Line search: Lewis, Overton. Nonsmooth optimization via
        quasi-Newton methods. Mathematical Programming 141, 2013, Algorithm 2.6. Other sets: Birgin, Martinez, Raydan.
        Nonmonotone spectral projected gradient methods on convex sets. SIAM Journal on Optimization 10, 2000.
    Differs from the papers: for bounds, H is that of the pairs in the free entries; what rounding hides does not count
        as a rise of F.
    """

    memory: int = static(default=20)
    max_evaluations: int = static(default=20)
    full_batch = adaptive = True
    about = About(
        idea="quasi-Newton steps along the exact gradient",
        reference="Liu and Nocedal 1989",
        calls="as many as the lower level needs",
        memory="2 memory copies of x",
        lower="what `bilevel.lower` solves: strongly convex; boxes, balls, simplices, linear rows, coupled ones",
        stops="grad F = 0",
    )

    def __post_init__(self) -> None:
        """Check the counts."""
        require_counts(self, memory=1, max_evaluations=2)

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        x = project_upper(problem, x, y)
        flat = ravel_pytree(x)[0]
        zero, least = jnp.zeros((), flat.dtype), float(jnp.finfo(flat.dtype).min)
        return State(
            x, y, optax.tree.zeros_like(y), jnp.array(False), zero, jnp.zeros_like(flat),
            quasi_newton.none_yet(flat, self.memory), jnp.full(WORST, least, flat.dtype), zero + START,
        )  # fmt: skip

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        base = Look(ravel_pytree(state.x)[0], state.value, state.gradient, state.y, state.v)
        end = self._search(problem, state, base)
        old, new = end.base, end.kept
        moved = jnp.any(new.x != old.x)
        pairs = quasi_newton.pushed(state.pairs, new.x - old.x, new.gradient - old.gradient)
        nothing = quasi_newton.none_yet(old.x, self.memory)
        pairs = Pairs(*(jnp.where(moved, *both) for both in zip(pairs, nothing, strict=True)))  # begin again
        last = jnp.where(jnp.isfinite(new.value), jnp.concatenate([new.value[None], state.last[:-1]]), state.last)
        first = jnp.where(moved, jnp.asarray(START, old.x.dtype), state.first / 16)
        x = ravel_pytree(state.x)[1](new.x)
        known = jnp.isfinite(new.value)
        value = jnp.where(known, new.value, 0)
        state = State(x, new.y, new.v, known, value, new.gradient, pairs, last, first)
        mapped = jnp.linalg.norm(new.x - _projected(problem, state.x, new.x - new.gradient))
        return state, Info(mapped, new.value, end.count)

    def _search(self, problem: BilevelProblem, state: State, base: Look) -> _Search:
        """From x, whose F may not be known yet, to a point that meets the conditions, or to the best one seen."""
        by_bounds, unravel = problem.x_set.intervals, ravel_pytree(state.x)[1]
        highest = -jnp.inf if by_bounds else jnp.max(state.last)
        rounding = 10 * float(jnp.finfo(base.x.dtype).eps)

        def look(x: Array, near: Look) -> Look:
            found = evaluate(problem, unravel(x), near.y, near.v, "LBFGS")
            return Look(x, found.value.astype(x.dtype), ravel_pytree(found.gradient)[0], found.y, found.v)

        def step(c: _Search) -> _Search:
            way = _direction(problem, state, c.base)
            target = _projected(problem, state.x, c.base.x + c.t * way)
            there = look(jnp.where(c.known, target, c.base.x), c.kept)
            return optax.tree.where(c.known, judge(c, there), _began(c, there))

        def judge(c: _Search, there: Look) -> _Search:
            fall = c.base.gradient @ (there.x - c.base.x)
            allowed = jnp.maximum(c.base.value, highest) + DESCENT * fall + rounding * jnp.abs(c.base.value)
            lower_enough = (there.value <= allowed) & (fall < 0)
            better = lower_enough & ((there.value <= c.kept.value) | (not by_bounds) | (c.kept.value >= c.base.value))
            steep = (there.gradient @ (there.x - c.base.x) < CURVATURE * fall) & by_bounds
            below = jnp.where(lower_enough, c.t, c.below)
            above = jnp.where(lower_enough, c.above, c.t)
            bend = there.value - c.base.value - fall  # of the parabola through both values and the slope
            least = jnp.where(jnp.isfinite(bend) & (bend > 0), -fall / (2 * jnp.where(bend > 0, bend, 1)), 0.25)
            shorter = jnp.where(below > 0, (below + above) / 2, c.t * jnp.clip(least, 0.1, 0.5))
            t = jnp.where(jnp.isfinite(above), shorter, 4 * c.t)
            still = jnp.all(there.x == c.kept.x) & (c.below > 0)  # bounds let x go no further
            over = (lower_enough & ~steep) | (fall >= 0) | still
            return _Search(c.base, optax.tree.where(better, there, c.kept), c.known, t, below, above, over, c.count + 1)

        zero = jnp.zeros((), base.x.dtype)
        begin = _Search(base, base, state.known, zero + 1, zero, zero + jnp.inf, jnp.array(False), jnp.zeros((), int))
        return lax.while_loop(lambda c: ~c.over & (c.count < self.max_evaluations), step, begin)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return LEAST

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_unsolvable(self, problem)


def _began(c: _Search, there: Look) -> _Search:
    """The search after its first look, at x itself: over, where F has no value there."""
    return c._replace(base=there, kept=there, known=jnp.array(True), over=~jnp.isfinite(there.value), count=c.count + 1)


def _projected(problem: BilevelProblem, like: PyTree, x: Array) -> Array:
    """Proj_X of the raveled x [n]."""
    return ravel_pytree(problem.x_set.project(ravel_pytree(like)[1](x)))[0]


def _direction(problem: BilevelProblem, state: State, base: Look) -> Array:
    """Where a step from `base` leads, shape [n]."""
    x, g = base.x, base.gradient
    size = jnp.linalg.norm(g)
    first = state.first * (1 + jnp.linalg.norm(x)) / jnp.where(size > 0, size, 1)
    if not problem.x_set.intervals:
        products, good = quasi_newton.curvatures(state.pairs)
        length = jnp.where(good[0], jnp.sum(state.pairs.s[0] ** 2) / jnp.where(good[0], products[0], 1), first)
        return _projected(problem, state.x, x - length * g) - x
    lo, hi = (_projected(problem, state.x, jnp.full_like(x, end)) for end in (-jnp.inf, jnp.inf))
    gap = jnp.linalg.norm(x - jnp.clip(x - g, lo, hi))
    near = jnp.minimum(1e-3, gap)  # so that bounds a little ahead do not shorten the step
    held = ((x <= lo + near) & (g > 0)) | ((x >= hi - near) & (g < 0))
    return quasi_newton.direction(state.pairs, g, ~held, first)
