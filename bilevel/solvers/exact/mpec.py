"""MPEC: the follower's KKT conditions as constraints, complementarity relaxed, and at the end decided row by row."""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular

from bilevel.backend.tree import norm
from bilevel.diagnostics import for_convex_followers
from bilevel.oracles import single_level
from bilevel.oracles.single_level import EQUAL, NONE, UNEQUAL, Slopes, Values
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import Rows
from bilevel.qp.projection import Region
from bilevel.record import OracleCount, Referee
from bilevel.solver import About, Solver, refuse_fixed_point
from bilevel.step import Scalar, require_counts, require_numbers
from bilevel.struct import invalid, static, struct

PyTree = Any
DESCENT = 1e-4  # part of the fall of the model that the merit must fall
SMALL = 0.45  # power of eps, 1e-7 in float64: t below which rows are decided, the least eigenvalue beside the largest
STEEPEST = 0.5  # power of 1/eps: the largest nu, beyond which rounding of violations hides f
PATIENCE = 30  # steps at one t, at most
HELD, RELEASED = 1, 0  # sides of a row that is decided: c_i = 0, or lam_i = 0


class State(NamedTuple):
    """What a step of MPEC needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower one: the follower's answer at the end, near it before."""
    multipliers: Array
    """lam, of the follower's rows, shape [k]."""
    at: Values
    """The functions at w = (x, y, lam)."""
    prices: Array
    """Multipliers of the last quadratic program's rows, shape [rows]."""
    t: Array
    """The relaxation, shape []; 0 once rows are decided."""
    sides: Array
    """Where they are decided, HELD or RELEASED for each row, shape [k]."""
    shift: Array
    """What is added to the Hessian, shape []."""
    weight: Array
    """nu, of violations in the merit, shape []."""
    merits: Array
    """(f, violation) of the last points at this t, shape [memory, 2], newest first."""
    points: Array
    """How many they are, shape []."""
    since: Array
    """Steps at this t, shape []."""
    pivots: Array
    """How many rows changed sides, shape []."""
    stationary: Array
    """Whether the point is strongly stationary, by the last program's multipliers, shape []."""


class Info(NamedTuple):
    """What a step of MPEC shows."""

    objective: Array
    """f(x, y), shape []."""
    residual: Array
    """|B d|, how far w is from stationary for the relaxed problem, shape []."""
    constraint_violation: Array
    """The largest violation of a constraint of the single level, the relaxed products among them, shape []."""
    complementarity: Array
    """The largest lam_i |c_i|, shape []."""
    relaxation: Array
    """t, shape []."""
    pivots: Array
    """How many rows changed sides so far, shape []."""


class _Program(NamedTuple):
    """A quadratic program in the step d: lo <= C d <= hi, rows that are linear in w last."""

    C: Array
    lo: Array
    hi: Array
    soft: Array
    """Which rows give way where they contradict each other, [rows]."""


@struct(kw_only=True)
class MPEC(Solver):
    """Sequential quadratic programming on the single level that the follower's KKT conditions make,

        min over w = (x, y, lam) of f(x, y)   with   x in X,  G <= 0,  H = 0,  g_y + c_y'lam = 0,
                                                     c <= 0,  lam >= 0,  -lam_i c_i <= t for each row i,

    for t = 1, 1/10, ... 1e-7, each begun where the last one ended. Then each row is decided by what is larger: c_i = 0
    where lam_i is, else lam_i = 0, without a product; at a minimum of that problem a row with lam_i = c_i = 0 changes
    its side where f falls beyond it, by the sign of its multiplier, until there is no such row: then w is strongly
    stationary. A step solves

        min over d of f_w'd + d'(B + s I)d/2   with the constraints linear at w,      w <- w + d,

    B the Hessian of the Lagrangian with the absolute values of its eigenvalues; w stays, and s grows, where the merit
    f + nu |violations|_1 does not fall enough. Where the linear rows contradict each other, d goes to where they are
    violated least. Of several answers of the follower the leader has the choice. It finds a local minimum or another
    stationary point, not the global one; `bilevel.diagnostics.classify` says which kind is shown at its end.

    Assumptions: g(x, .) and the follower's rows convex in y, with a Slater point or linear, so that his KKT conditions
        are his minima; f, g and all rows twice differentiable (g three times); X a polyhedron.
    Cost per step: all functions with their derivatives, third ones of g among them, and a quadratic program of as many
        unknowns as x, y and the follower's rows together, dense: some hundreds at most.

    Args:
        relaxation: t of the first program, > 0. Default: 1.
        shrink: what t is multiplied by from one program to the next, in (0, 1). Default: 0.1.
        memory: points, >= 1, over whose merits a step may rise. Default: 5.

    Reference: Scholtes. Convergence properties of a regularization scheme for mathematical programs with
        complementarity constraints. SIAM Journal on Optimization 11, 2001, the relaxed program. Fukushima, Tseng. An
        implementable active-set algorithm for computing a B-stationary point of a mathematical program with linear
        complementarity constraints. SIAM Journal on Optimization 12, 2002: changing sides. Nocedal, Wright. Numerical
        Optimization, 2nd ed., 2006, section 18.3.
    Differs from the papers: the relaxed programs are solved to an accuracy like t, in at most 30 steps each; one row
        changes its side at a time, at a minimum.
    """

    relaxation: Scalar = 1.0
    shrink: Scalar = 0.1
    memory: int = static(default=5)
    full_batch = adaptive = upper_constraints = True
    about = About(
        idea="the follower's KKT conditions as constraints, complementarity relaxed less and less",
        reference="Scholtes 2001",
        calls="all functions, third derivatives of g",
        memory="a Hessian of x, y and multipliers",
        lower="convex, with convex rows, coupled ones too; many minimisers are fine",
        stops="a strongly stationary point",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        require_numbers(self, "relaxation", "shrink")
        require_counts(self, memory=1)
        if isinstance(self.shrink, int | float) and self.shrink >= 1:
            invalid("MPEC.shrink", self.shrink, "a number in (0, 1)", "Leave it out for 0.1.")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        problem = problem.on_full_data()
        x, y = problem.init(key)
        x = problem.x_set.project(x)
        w, dtype = ravel_pytree((x, y))[0], ravel_pytree(x)[0].dtype
        sizes = single_level.sizes(problem, x, y)
        lam, zero = jnp.zeros(sizes.k, dtype), jnp.zeros((), dtype)
        at = single_level.values(problem, x, y, jnp.append(w, lam))
        rows = at.E.size + 3 * sizes.k + at.G.size + at.H.size + sum(len(C) for C, *_ in problem.x_set.rows(x))
        none = jnp.zeros((self.memory, 2), dtype)
        return State(
            x, y, lam, at, jnp.zeros(rows, dtype), zero + self.relaxation, jnp.zeros(sizes.k, int), zero + 1, zero,
            none, jnp.array(0), jnp.array(0), jnp.array(0), jnp.array(False),
        )  # fmt: skip

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        like, sizes = (state.x, state.y), single_level.sizes(problem, state.x, state.y)
        flat, unravel = ravel_pytree(like)
        w, kinds = jnp.append(flat, state.multipliers), single_level.follower_rows(problem, *like)[1]
        slope = single_level.slopes(problem, *like, w)
        state = state._replace(at=single_level.values(problem, *like, w))
        program = _program(problem, state, slope, kinds, sizes)
        B = _hessian(problem, state, slope, w) + state.shift * jnp.eye(w.size, dtype=w.dtype)
        d, prices = _solved(program, slope.f, B, state.prices)

        there = single_level.values(problem, *like, w + d)
        before, after = (_violation(at, lam, state, kinds) for at, lam in (
            (state.at, state.multipliers), (there, (w + d)[-sizes.k :])))  # fmt: skip
        ratio, accepted, weight, merits = _judged(self, state, slope, program, prices, B, d, there, (before, after))
        curved = norm(B @ d)
        size = 1 + norm(slope.f)
        unit = size / (1 + norm(w))
        grown = jnp.clip(8 * state.shift, 1e-3 * unit, unit / float(jnp.finfo(d.dtype).eps))
        shift = jnp.where(
            accepted,
            jnp.where(
                ratio > 0.75,
                jnp.maximum(state.shift / 4, float(jnp.finfo(d.dtype).eps) ** SMALL),
                state.shift * jnp.where(ratio < 0.25, 2, 1),
            ),
            grown,
        )
        w, at = optax.tree.where(accepted, (w + d, there), (w, state.at))
        x, y = unravel(w[: flat.size])
        new = state._replace(
            x=problem.x_set.project(x), y=y, multipliers=w[flat.size :], at=at, prices=prices, weight=weight,
            shift=shift, merits=merits, points=state.points + jnp.where(accepted, 1, 0), since=state.since + 1,
        )  # fmt: skip
        worst = jnp.where(accepted, after[1], before[1])
        new = _next(self, new, kinds, sizes, curved / size, worst)
        products = jnp.where(kinds == UNEQUAL, jnp.abs(at.c * new.multipliers), 0)
        return new, Info(at.f, curved, worst, jnp.max(products), state.t, new.pivots)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return for_convex_followers(problem)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount()

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if not problem.x_set.polyhedral:
            return f"MPEC needs an x_set described by linear rows; got {type(problem.x_set).__name__}."
        if not (problem.y_set.polyhedral or problem.y_set.curved):
            return f"MPEC needs a y_set described by rows or functions; got {type(problem.y_set).__name__}."
        return refuse_fixed_point(self, problem)


def _program(problem: BilevelProblem, state: State, slope: Slopes, kinds: Array, sizes: single_level.Sizes) -> _Program:
    """The rows of a step: E, c, products, G, H, then lam and X."""
    at, lam, t = state.at, state.multipliers, state.t
    decided, unequal, k = t == 0, kinds == UNEQUAL, sizes.k
    held, released = (decided & unequal & (state.sides == side) for side in (HELD, RELEASED))
    infinite, dtype = jnp.full(k, jnp.inf, lam.dtype), lam.dtype
    multiplier = jnp.pad(jnp.eye(k, dtype=dtype), ((0, 0), (sizes.n + sizes.m, 0)))
    products = -(lam[:, None] * slope.c + at.c[:, None] * multiplier)
    blocks = [
        (slope.E, -at.E, -at.E),
        (slope.c, jnp.where(held | (kinds == EQUAL), -at.c, -infinite), jnp.where(kinds == NONE, infinite, -at.c)),
        (products, -infinite, jnp.where(unequal & ~decided, t + lam * at.c, infinite)),
        (slope.G, jnp.full_like(at.G, -jnp.inf), -at.G),
        (slope.H, -at.H, -at.H),
    ]
    soft = sum(len(C) for C, *_ in blocks)
    pinned = (kinds == NONE) | released
    blocks.append((multiplier, jnp.where(kinds == EQUAL, -infinite, -lam), jnp.where(pinned, -lam, infinite)))
    flat = ravel_pytree(state.x)[0]
    for C, lo, hi in problem.x_set.rows(state.x):
        blocks.append((jnp.pad(C, ((0, 0), (0, sizes.m + k))), lo - C @ flat, hi - C @ flat))
    C, lo, hi = (jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
    return _Program(C, lo, hi, jnp.arange(len(lo)) < soft)


def _parts(prices: Array, at: Values) -> list[Array]:
    """The prices of (E, c, products, G, H, lam, X)."""
    k = at.c.size
    return jnp.split(prices, [*itertools.accumulate((at.E.size, k, k, at.G.size, at.H.size, k))])


def _hessian(problem: BilevelProblem, state: State, slope: Slopes, w: Array) -> Array:
    """The Lagrangian's, with the absolute values of its eigenvalues."""
    at, k = state.at, state.multipliers.size
    E, c, product, G, H, *_ = _parts(state.prices, at)
    weights = Values(jnp.ones_like(at.f), E, c - product * state.multipliers, G, H)
    full = single_level.curvature(problem, state.x, state.y, w, weights)
    cross = jnp.zeros_like(full).at[-k:].set(-product[:, None] * slope.c)
    full = full + cross + cross.T
    eigenvalues, V = jnp.linalg.eigh((full + full.T) / 2)
    sizes = jnp.abs(eigenvalues)
    least = float(jnp.finfo(w.dtype).eps) ** SMALL
    sizes = jnp.maximum(sizes, least * jnp.maximum(1, jnp.max(sizes)))
    return (V * sizes[None]) @ V.T


def _solved(program: _Program, gradient: Array, B: Array, before: Array) -> tuple[Array, Array]:
    """(d, prices): the quadratic program's step and multipliers, those before where rows contradict each other."""
    L = lax.linalg.cholesky(B, symmetrize_input=True)
    C = solve_triangular(L, program.C.T, lower=True).T
    limits = Rows(C, program.lo, program.hi, jnp.zeros((len(C), 0), C.dtype))
    found = Region.of(limits).project(-solve_triangular(L, gradient, lower=True), program.soft)
    most = 1 / float(jnp.finfo(C.dtype).eps)  # where rows have no multipliers those of the programs grow for ever
    prices = jnp.clip(jnp.where(found.empty, before, found.multipliers), -most, most)
    return solve_triangular(L, found.y, lower=True, trans=1), prices


def _violation(at: Values, lam: Array, state: State, kinds: Array) -> tuple[Array, Array]:
    """(sum, largest) of the violations of all rows but the linear ones of lam and X."""
    decided, unequal = state.t == 0, kinds == UNEQUAL
    equal = (kinds == EQUAL) | (decided & unequal & (state.sides == HELD))
    c = jnp.where(kinds == NONE, 0, jnp.where(equal, jnp.abs(at.c), jnp.maximum(at.c, 0)))
    products = jnp.where(unequal & ~decided, jnp.maximum(-lam * at.c - state.t, 0), 0)
    every = jnp.concatenate([jnp.abs(at.E), c, products, jnp.maximum(at.G, 0), jnp.abs(at.H)])
    return jnp.sum(every), jnp.max(every)


def _judged(
    solver: MPEC, state: State, slope: Slopes, program: _Program, prices: Array, B: Array, d: Array, there: Values,
    violations: Any,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """(fall over that of the model, whether w moves, nu, the merits that are kept)."""
    (before, _), (after, _) = violations
    eps = float(jnp.finfo(d.dtype).eps)
    along = program.C @ d
    linear = jnp.sum(
        jnp.where(program.soft, jnp.maximum(along - program.hi, 0) + jnp.maximum(program.lo - along, 0), 0)
    )
    model = slope.f @ d + d @ B @ d / 2
    less = before - linear
    steep = model / jnp.where(less > 0, 0.9 * less, 1)
    needed = jnp.maximum(1.1 * jnp.max(jnp.where(program.soft, jnp.abs(prices), 0)), jnp.where(less > 0, steep, 0))
    weight = jnp.minimum(jnp.where(needed > state.weight, 1.5 * needed, state.weight), eps**-STEEPEST)
    rounding = 10 * eps * (1 + jnp.abs(state.at.f) + norm(slope.f) * (1 + norm(d)) + weight * (1 + before))
    foreseen = jnp.maximum(weight * less - model, 0)
    fall = state.at.f - there.f + weight * (before - after)
    now = jnp.stack([state.at.f, before])
    known = jnp.arange(len(state.merits)) < state.points
    last = jnp.max(jnp.where(known, state.merits[:, 0] + weight * state.merits[:, 1], -jnp.inf))
    highest = jnp.maximum(last, now[0] + weight * now[1])
    finite = jnp.isfinite(there.f) & jnp.isfinite(after)
    accepted = finite & (there.f + weight * after <= highest - DESCENT * foreseen + rounding)
    merits = jnp.where(accepted, jnp.concatenate([now[None], state.merits[:-1]]), state.merits)
    ratio = jnp.where(foreseen > rounding, fall / jnp.where(foreseen > rounding, foreseen, 1), 1)
    return ratio, accepted, weight, merits


def _next(solver: MPEC, state: State, kinds: Array, sizes: single_level.Sizes, residual: Array, worst: Array) -> State:
    """The state with the next t, or rows decided, or a row on its other side, where this program is solved."""
    dtype, eps = state.t.dtype, float(jnp.finfo(state.t.dtype).eps)
    at, lam, unequal = state.at, state.multipliers, kinds == UNEQUAL
    size, room = lam / (1 + jnp.max(jnp.abs(lam))), -at.c / (1 + jnp.max(jnp.abs(at.c)))
    solved = jnp.maximum(residual, worst) <= jnp.maximum(0.1 * state.t, 10 * eps**0.5)
    over = (state.t > 0) & (solved | (state.since >= PATIENCE))
    t = jnp.asarray(state.t * solver.shrink, dtype)
    decide = over & (t < eps**SMALL)
    t = jnp.where(over, jnp.where(decide, 0, t), state.t)
    sides = jnp.where(decide, jnp.where(size > room, HELD, RELEASED), state.sides)

    _, c, _, _, _, own, _ = _parts(state.prices, at)
    ended, tiny, held = (state.t == 0) & solved, 10 * eps**0.5, state.sides == HELD
    gain = jnp.where(held & (size <= tiny), -c, jnp.where(~held & (room <= tiny), own, 0))
    gain = jnp.where(unequal, gain, 0)
    best = jnp.argmax(gain)
    turn = ended & (gain[best] > tiny * (1 + jnp.max(jnp.abs(state.prices))))
    sides = sides.at[best].set(jnp.where(turn, 1 - sides[best], sides[best]))
    fresh = over | turn
    out = unequal & (t == 0) & (sides == RELEASED)  # these rows are linear, which steps take for granted
    return state._replace(
        t=t,
        multipliers=jnp.where(fresh & out, 0, lam),
        sides=sides,
        points=jnp.where(fresh, 0, state.points),
        since=jnp.where(fresh, 0, state.since),
        pivots=state.pivots + jnp.where(turn, 1, 0),
        stationary=ended & ~turn,
    )
