"""What solvers for polyhedral lower levels share: a lower solution tracked from step to step, and smoothing.

With a perturbation q, g_q(x, y) = g(x, y) + q'y and F_q(x) = f(x, y_q(x)). For a random q with a density, strict
complementarity holds at each fixed x with probability one, so that F_q is differentiable there, and the mean of F_q is
smooth, with |mean F_q - F| <= L_f sup|q|/mu.

On a box with a given diagonal D of g_yy (`Minimize.diagonal`) an SQP step and the implicit gradient need no solve,

    y <- Proj(y - (R + q)/D),       grad F_q = f_x - g_yx' u,   u_i = (f_y)_i/D_i where the step left y_i inside,
                                                                u_i = 0 where it was cut off,

and where each sample of the data has an own y, `per_sample.view` gives the problem in a batch's rows of y.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import constraints, oracles
from bilevel.data import PerSample
from bilevel.lower import polyhedral
from bilevel.oracles import per_sample
from bilevel.problem import BilevelProblem, Minimize
from bilevel.qp.active_set import Factor, kkt_solve, masked_inverse, solve_model, with_rows
from bilevel.record import OracleCount
from bilevel.sets import Box, Reals
from bilevel.step import Stepper

PyTree = Any


class Tracked(NamedTuple):
    """Shaped like y; [rows]; scalars. active: as `PolyhedralSolution.active`. margin: the smallest of slacks and
    multipliers, rows in the norm of H^-1. independent: the active rows are. definite: g_yy was found positive definite.
    strict: the margin is more than rounding error, so that F_q has a derivative.
    """

    y: PyTree
    active: Array
    margin: Array
    feasible: Array
    independent: Array
    definite: Array
    strict: Array


ASSUMPTIONS = {
    "feasible": "the lower level has a feasible point",
    "independent": "active rows are linearly independent (LICQ)",
    "definite": "g_yy is positive definite (strong convexity)",
    "strict": "active rows have multipliers, inactive ones slack, beyond rounding error (strict complementarity)",
}
"""Of the methods that track: `Solver.assumptions`."""


def _diagonal_box(problem: BilevelProblem) -> bool:
    """Whether steps and gradients need no solve: a box, and a diagonal given for g_yy."""
    given = isinstance(problem.lower, Minimize) and problem.lower.diagonal is not None
    return given and isinstance(problem.y_set, Box | Reals) and problem.coupling is None


def no_rows_active(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
    """The active set to start from: equalities only; empty where none is remembered."""
    if _diagonal_box(problem):
        return jnp.zeros(0, ravel_pytree(y)[0].dtype)
    limits = constraints.rows(problem, x, y)
    return (limits.lo == limits.hi).astype(limits.lo.dtype)


def _factor_at(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, C: Array) -> tuple[Factor, Array]:
    """(factor of g_yy, or of its absolute row sums where it is not positive definite; whether it is)."""
    H = oracles.lower_hessian(problem, x, y, batch)
    L = lax.linalg.cholesky(H, symmetrize_input=False)
    definite = jnp.isfinite(L[-1, -1])
    size = jnp.sum(jnp.abs(H), axis=1)
    size = jnp.where(size > 0, size, 1)
    trace = jnp.where(definite, jnp.sum(jnp.diagonal(H)), jnp.sum(size))
    return with_rows(jnp.where(definite, L, jnp.diag(jnp.sqrt(size))), trace, C), definite


def track(
    problem: BilevelProblem, x: PyTree, y: PyTree, active: Array, q: PyTree, batch: PyTree, num_steps: int
) -> tuple[Tracked, Any, Array]:
    """`num_steps` SQP steps on g_q from the warm start (y, active), and the factors at the end, for `gradient`.

    Full steps, without a line search: one is exact for a quadratic g; else Newton's method near the solution. Where the
    rows contradict each other, y is NaN.
    """
    if _diagonal_box(problem):
        return _track_in_box(problem, x, y, active, q, batch, num_steps)
    limits = constraints.rows(problem, x, y)
    flat, unravel = ravel_pytree(y)
    flat_q = ravel_pytree(q)[0]
    constant = oracles.constant_hessian(problem, x, y, batch)
    factor, definite = _factor_at(problem, x, y, batch, limits.C)

    def body(_: int, carry: tuple) -> tuple:
        flat, active, lam, inverse, factor, definite = carry[:6]
        R = ravel_pytree(oracles.residual(problem, x, unravel(flat), batch))[0] + flat_q + limits.C.T @ lam
        z = factor.down(R)
        model = solve_model(factor, limits, flat, z, lam, active, polyhedral.Settings().max_changes, inverse)
        feasible = ~(model.empty | model.unsolved)
        flat, inverse = jnp.where(feasible, flat + model.p, jnp.nan), model.inverse
        if not constant:
            factor, definite = _factor_at(problem, x, unravel(flat), batch, limits.C)
            inverse = masked_inverse(factor.S, model.active)[0]
        weak = model.room <= 10 * model.noise
        seen = jnp.min(model.room, initial=jnp.inf), feasible, ~model.dependent, weak
        return flat, model.active, model.multipliers, inverse, factor, definite, *seen

    yes, far = jnp.array(True), jnp.full((), jnp.inf, flat.dtype)
    inverse = masked_inverse(factor.S, active)[0]
    carry = flat, active, jnp.zeros_like(active), inverse, factor, definite, far, yes, yes, active > 0
    flat, active, _, inverse, factor, definite, *seen = lax.fori_loop(0, num_steps, body, carry)
    margin, feasible, independent, weak = seen
    holding = jnp.where(weak, 1, active)  # the active set has rows that are independent; those without slack may not be

    def holding_independent(_: tuple) -> tuple[Array, Array]:
        return masked_inverse(factor.S, holding)[1], ~yes

    more = independent & jnp.any(holding != active)
    independent, _ = lax.while_loop(lambda c: c[1], holding_independent, (independent, more))  # one pass or none
    seen = margin, feasible, independent, definite, ~jnp.any(weak)
    return Tracked(unravel(flat), active, *seen), factor, inverse


def _track_in_box(
    problem: BilevelProblem, x: PyTree, y: PyTree, active: Array, q: PyTree, batch: PyTree, num_steps: int
) -> tuple[Tracked, Array, Array]:
    """`track` with the given diagonal D: (what was found, D [n], which coordinates the last step left inside [n])."""
    lo, hi = problem.y_set.bounds(y) if isinstance(problem.y_set, Box) else ((), ())
    (lo, _), (hi, _), (flat, unravel) = (ravel_pytree(part) for part in (lo, hi, y))
    flat_q, inf = ravel_pytree(q)[0], jnp.full((), jnp.inf, flat.dtype)

    def body(_: int, carry: tuple) -> tuple:
        flat, y = carry[0], unravel(carry[0])
        D = ravel_pytree(oracles.lower_diagonal(problem, x, y, batch))[0]
        z = flat - (ravel_pytree(oracles.residual(problem, x, y, batch))[0] + flat_q) / D
        if not lo.size:
            return z, z, D
        return jnp.clip(z, lo, hi), z, D

    start = flat, flat, jnp.ones_like(flat)
    flat, z, D = lax.fori_loop(0, num_steps, body, start)
    inside = (z > lo) & (z < hi) if lo.size else jnp.ones(flat.shape, bool)
    room = jnp.where(lo == hi, inf, jnp.minimum(jnp.abs(z - lo), jnp.abs(z - hi))) if lo.size else inf
    yes = jnp.array(True)
    margin, noise = jnp.min(room), 100 * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(z))
    return Tracked(unravel(flat), active, margin, yes, yes, jnp.all(D > 0), margin > noise), D, inside


def gradient(
    problem: BilevelProblem, x: PyTree, found: tuple[Tracked, Any, Array], upper: PyTree, lower: PyTree
) -> PyTree:
    """Grad F_q(x) of `track`'s result, shaped like x, with f on the batch `upper`."""
    tracked, factor, inverse = found
    unravel_y = ravel_pytree(tracked.y)[1]
    fx, fy = oracles.upper_gradients(problem, x, tracked.y, upper)
    if _diagonal_box(problem):
        D, inside = factor, inverse
        u = unravel_y(jnp.where(inside, ravel_pytree(fy)[0] / D, 0))
        return jax.tree.map(jnp.subtract, fx, oracles.cross(problem, x, tracked.y, u, lower))
    u, v = kkt_solve(factor, inverse, tracked.active, ravel_pytree(fy)[0])
    cross = ravel_pytree(oracles.cross(problem, x, tracked.y, unravel_y(u), lower))[0]
    flat, unravel_x = ravel_pytree(fx)
    return unravel_x(flat - cross - constraints.rows(problem, x, tracked.y).B.T @ v)


class Info(NamedTuple):
    """|grad F_q(x)|, and what can be seen of the assumptions, as in `Tracked`; all []."""

    direction: Array
    margin: Array
    feasible: Array
    independent: Array
    definite: Array
    strict: Array


def implicit_step(
    problem: BilevelProblem, x: PyTree, y: PyTree, active: Array, step: Stepper, q: PyTree, upper: PyTree,
    num_steps: int,
) -> tuple[tuple[PyTree, PyTree, Array, Stepper], Info]:  # fmt: skip
    """((x, y, active, stepper), info) after y = y_q(x), tracked, and x <- Proj_X(x - a grad F_q(x)).

    f on the batch `upper`, g on all of its data; with an own y for each sample, on the batch's rows alone.
    """
    here, q = per_sample.view(problem, y, upper), per_sample.rows_of(problem, q, upper)
    found = track(here.problem, x, here.y, active, q, here.lower, num_steps)
    direction = gradient(here.problem, x, found, here.upper, here.lower)
    x, step = step(x, direction)
    rows, active, *seen = found[0]
    y = per_sample.put_back(problem, y, upper, rows)
    return (problem.x_set.project(x), y, active, step), Info(jnp.linalg.norm(ravel_pytree(direction)[0]), *seen)


def implicit_cost(problem: BilevelProblem, num_steps: int) -> OracleCount:
    """Oracle calls of one `implicit_step`."""
    lower = track_cost(problem, num_steps)
    return OracleCount(upper_gradients=1, lower_gradients=lower.lower_gradients, hvps=lower.hvps, jvps=1)


def track_cost(problem: BilevelProblem, num_steps: int) -> OracleCount:
    """Oracle calls of one `track`: the Hessian is formed once where it is constant, else after each step again, and
    never where its diagonal is given.
    """
    if _diagonal_box(problem):
        return OracleCount(lower_gradients=num_steps)
    x, y = jax.eval_shape(lambda: problem.init(jax.random.key(0)))
    x, y = (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), part) for part in (x, y))
    hessians = 1 if oracles.constant_hessian(problem, x, y, problem.lower_data.full()) else 1 + num_steps
    return OracleCount(lower_gradients=num_steps, hvps=hessians * ravel_pytree(y)[0].size)


def refuse_not_polyhedral(solver: Any, problem: BilevelProblem) -> str | None:
    """The reason for methods that differentiate through the active rows."""
    if isinstance(problem.upper_data, PerSample) and not _diagonal_box(problem):
        return (
            f"{type(solver).__name__} with PerSample data needs a box and Minimize(g, diagonal=…); got "
            f"y_set = {type(problem.y_set).__name__}, lower = {type(problem.lower).__name__}."
        )
    reason = constraints.refuse(problem)
    return None if reason is None else f"{type(solver).__name__} needs a polyhedral lower level: {reason}."
