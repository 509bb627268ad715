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

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import constraints, oracles
from bilevel.backend.loops import once_if
from bilevel.backend.tree import norm
from bilevel.data import PerSample
from bilevel.oracles import per_sample
from bilevel.parts.domain import project_upper
from bilevel.problem import BilevelProblem, Minimize
from bilevel.qp.active_set import Factor, Point, kkt_solve, masked_inverse, solve_model, with_rows
from bilevel.record import OracleCount
from bilevel.step import Stepper

PyTree = Any


class Tracked(NamedTuple):
    """A lower solution on its way, and what is seen there of the assumptions, [] each."""

    y: PyTree
    """Shaped like the problem's; NaN where the rows contradict each other."""
    active: Array
    """[rows], as `PolyhedralSolution.active`; [0] where steps need no solve."""
    margin: Array
    """The smallest of slacks and multipliers, rows in the norm of H^-1."""
    feasible: Array
    """Whether the lower level has a point."""
    independent: Array
    """Whether the active rows are linearly independent."""
    definite: Array
    """Whether g_yy was found positive definite."""
    strict: Array
    """Whether the margin is more than rounding error, so that F_q has a derivative."""

    def assumptions(self) -> dict[str, Array]:
        """What is seen of them, by name: fields of a solver's Info."""
        return {name: getattr(self, name) for name in ("margin", *ASSUMPTIONS)}


class ByRows(NamedTuple):
    """What the gradient needs of the last step: factors of g_yy, and the `masked_inverse` of the active rows."""

    factor: Factor
    inverse: Array


class ByDiagonal(NamedTuple):
    """The same with the given diagonal D [n] of g_yy: the coordinates [n] that the last step left inside the box."""

    D: Array
    inside: Array


class Tracking(NamedTuple):
    """What `track` returns, for `gradient`."""

    solution: Tracked
    by: ByRows | ByDiagonal


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
    return given and (problem.y_set.whole or problem.y_set.by_bounds) and problem.coupling is None


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


class _Sqp(NamedTuple):
    """Carry of `track`: y [n] and its multipliers, the factors there, and what the last model said."""

    y: Array
    lam: Array
    active: Array
    inverse: Array
    factor: Factor
    definite: Array
    margin: Array
    feasible: Array
    independent: Array
    weak: Array
    """[rows], whose multiplier or slack is rounding error."""


def track(
    problem: BilevelProblem, x: PyTree, y: PyTree, active: Array, q: PyTree, batch: PyTree, num_steps: int
) -> Tracking:
    """`num_steps` SQP steps on g_q from the warm start (y, active), and the factors at the end, for `gradient`.

    Full steps, without a line search: one is exact for a quadratic g; else Newton's method near the solution. Where the
    rows contradict each other, y is NaN.
    """
    if _diagonal_box(problem):
        return _track_in_box(problem, x, y, active, q, batch, num_steps)
    limits = constraints.rows(problem, x, y)
    chex.assert_equal_shape([active, limits.lo])
    chex.assert_trees_all_equal_shapes(q, y)
    flat, unravel = ravel_pytree(y)
    flat_q = ravel_pytree(q)[0]
    constant = oracles.constant_hessian(problem, x, y, batch)

    def step(_: int, c: _Sqp) -> _Sqp:
        R = ravel_pytree(oracles.residual(problem, x, unravel(c.y), batch))[0] + flat_q + limits.C.T @ c.lam
        model = solve_model(c.factor, limits, Point(c.y, c.factor.down(R), c.lam), c.active, inverse=c.inverse)
        feasible = ~(model.empty | model.unsolved)
        y, inverse, factor, definite = jnp.where(feasible, c.y + model.p, jnp.nan), model.inverse, c.factor, c.definite
        if not constant:
            factor, definite = _factor_at(problem, x, unravel(y), batch, limits.C)
            inverse = masked_inverse(factor.S, model.active)[0]
        return _Sqp(
            y, model.multipliers, model.active, inverse, factor, definite,
            margin=jnp.min(model.room, initial=jnp.inf), feasible=feasible, independent=~model.dependent,
            weak=model.room <= 10 * model.noise,
        )  # fmt: skip

    yes, far = jnp.array(True), jnp.full((), jnp.inf, flat.dtype)
    factor, definite = _factor_at(problem, x, y, batch, limits.C)
    inverse, nothing = masked_inverse(factor.S, active)[0], jnp.zeros_like(active)
    begin = _Sqp(flat, nothing, active, inverse, factor, definite, far, yes, yes, active > 0)
    end = lax.fori_loop(0, num_steps, step, begin)
    solution = Tracked(
        unravel(end.y), end.active, end.margin, end.feasible, _independent(end), end.definite, ~jnp.any(end.weak)
    )
    return Tracking(solution, ByRows(end.factor, end.inverse))


def _independent(end: _Sqp) -> Array:
    """Whether the rows that hold with equality are independent: those of the active set are, the weak ones beside it
    may not be.
    """
    holding = jnp.where(end.weak, 1, end.active)
    more = end.independent & jnp.any(holding != end.active)
    return once_if(more, lambda _: masked_inverse(end.factor.S, holding)[1], end.independent)


def _track_in_box(
    problem: BilevelProblem, x: PyTree, y: PyTree, active: Array, q: PyTree, batch: PyTree, num_steps: int
) -> Tracking:
    """`track` with the given diagonal D, by steps without a solve."""
    lo, hi = problem.y_set.bounds(y) or ((), ())
    (lo, _), (hi, _), (flat, unravel) = (ravel_pytree(part) for part in (lo, hi, y))
    flat_q, boxed = ravel_pytree(q)[0], lo.size > 0

    def step(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """(y, the point before it was cut off, D)."""
        y = unravel(carry[0])
        D = ravel_pytree(oracles.lower_diagonal(problem, x, y, batch))[0]
        z = carry[0] - (ravel_pytree(oracles.residual(problem, x, y, batch))[0] + flat_q) / D
        return (jnp.clip(z, lo, hi) if boxed else z), z, D

    flat, z, D = lax.fori_loop(0, num_steps, step, (flat, flat, jnp.ones_like(flat)))
    inside, room = jnp.ones(flat.shape, bool), jnp.full((), jnp.inf, flat.dtype)
    if boxed:
        inside = (z > lo) & (z < hi)
        room = jnp.where(lo == hi, room, jnp.minimum(jnp.abs(z - lo), jnp.abs(z - hi)))
    yes = jnp.array(True)
    margin, noise = jnp.min(room), 100 * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(z))
    solution = Tracked(unravel(flat), active, margin, yes, yes, jnp.all(D > 0), margin > noise)
    return Tracking(solution, ByDiagonal(D, inside))


def gradient(problem: BilevelProblem, x: PyTree, found: Tracking, upper: PyTree, lower: PyTree) -> PyTree:
    """The gradient of F_q at x from `track`'s result, shaped like x, with f on the batch `upper`."""
    y, by = found.solution.y, found.by
    unravel_y = ravel_pytree(y)[1]
    fx, fy = oracles.upper_gradients(problem, x, y, upper)
    if isinstance(by, ByDiagonal):
        u = unravel_y(jnp.where(by.inside, ravel_pytree(fy)[0] / by.D, 0))
        return optax.tree.sub(fx, oracles.cross(problem, x, y, u, lower))
    u, v = kkt_solve(by.factor, by.inverse, found.solution.active, ravel_pytree(fy)[0])
    cross = ravel_pytree(oracles.cross(problem, x, y, unravel_y(u), lower))[0]
    flat, unravel_x = ravel_pytree(fx)
    return unravel_x(flat - cross - constraints.rows(problem, x, y).B.T @ v)


class Info(NamedTuple):
    """What a step along an implicit gradient shows, and what can be seen there of the assumptions, as in `Tracked`."""

    direction: Array
    """|grad F_q(x)|, shape []."""
    margin: Array
    """The least slack or multiplier at y, shape []."""
    feasible: Array
    """Whether the lower level has a point, shape []."""
    independent: Array
    """Whether its active rows are linearly independent (LICQ), shape []."""
    definite: Array
    """Whether g_yy is positive definite, shape []."""
    strict: Array
    """Whether the margin is more than rounding error, shape []."""


class Iterate(NamedTuple):
    """What `implicit_step` moves."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    active: Array
    """The active set at y, shape [rows] or [0], from which the next one starts."""
    step: Stepper
    """The step rule of x, with its state."""


def implicit_step(
    problem: BilevelProblem, at: Iterate, q: PyTree, upper: PyTree, num_steps: int
) -> tuple[Iterate, Info]:
    """The iterate after y = y_q(x), tracked, and x <- Proj_X(x - a grad F_q(x)).

    f on the batch `upper`, g on all of its data; with an own y for each sample, on the batch's rows alone.
    """
    here, q = per_sample.view(problem, at.y, upper), per_sample.rows_of(problem, q, upper)
    found = track(here.problem, at.x, here.y, at.active, q, here.lower, num_steps)
    direction = gradient(here.problem, at.x, found, here.upper, here.lower)
    x, step = at.step(at.x, direction)
    y = per_sample.put_back(problem, at.y, upper, found.solution.y)
    new = Iterate(project_upper(problem, x, y), y, found.solution.active, step)
    return new, Info(norm(direction), **found.solution.assumptions())


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
