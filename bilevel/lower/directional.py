"""One-sided derivatives of y(x) and F where the active set of a polyhedral lower level changes.

At y = y(x), with H = g_yy, G = g_yx and rows C y <= hi - B x (or >= lo - B x), p = y'(x; d) solves

    min p'H p/2 + p'G d   over   C_i p  = -B_i d   for active rows with a multiplier,
                                 C_i p <= -B_i d   for the weakly active ones at hi, >= at lo,

and F'(x; d) = f_x'd + f_y'p. Multipliers that are not unique, of rows that depend on each other, are chosen by d: those
that solve the linear program max over multipliers of -(B d)'lam, the dual of min grad_y g'p over all active rows taken
as inequalities. With others the quadratic program has no feasible point, which shows. The right ones are found by the
same program with K grad_y g in place of 0 in its objective, K large: its multipliers are then K lam + O(1).

Reference: Jittorntrum. Solution point differentiability without strict complementarity in nonlinear programming.
Mathematical Programming Studies 21, 1984. Shapiro. Sensitivity analysis of nonlinear programs and differentiability
properties of metric projections. SIAM Journal on Control and Optimization 26, 1988. Ralph, Dempe. Directional
derivatives of the solution of a parametric nonlinear program. Mathematical Programming 70, 1995, theorem 2.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import constraints, oracles
from bilevel.backend.bounded import Flat, bounded_jit
from bilevel.backend.checks import check_like
from bilevel.backend.loops import once_if
from bilevel.backend.precision import full_precision
from bilevel.lower import polyhedral
from bilevel.lower.active_set import ActiveSet
from bilevel.lower.choice import choose
from bilevel.lower.method import Adjoint, start_y
from bilevel.lower.polyhedral import PolyhedralSolution, Settings
from bilevel.lower.polyhedral_gradient import at_solution
from bilevel.problem import BilevelProblem, check_problem
from bilevel.qp.active_set import Factor, Model, Point, Rows, solve_model
from bilevel.record import Status, solved

PyTree = Any


class Directional(NamedTuple):
    """A one-sided derivative of F."""

    value: Array
    """F'(x; d) = lim [F(x + t d) - F(x)]/t as t falls to 0, shape []; NaN where there is none."""
    status: Array
    """[]: UNCHECKED, solved, without a bound of rounding errors; ESTIMATED, the gradient's where F is smooth;
    INFEASIBLE_LOWER, the lower level is infeasible at x, or at once along d; WEAKLY_ACTIVE, a kink that is not resolved
    here; or why the lower level is not solved.
    """


class Local(NamedTuple):
    """The lower level around its solution at one x, all raveled."""

    limits: Rows
    factor: Factor
    """Of H and the rows."""
    grad: Array
    """grad_y g, [n]."""
    fx: Array
    fy: Array
    strong: Array
    """[m], active rows with a multiplier, and equalities."""
    at_hi: Array
    """[m], rows at their upper bound, to rounding; an equality is there and at its lower one."""
    at_lo: Array


def local(problem: BilevelProblem, x: PyTree, found: PolyhedralSolution) -> Local:
    """What derivatives along directions need of the lower level at `found`, whose factors are for its y."""
    limits = constraints.rows(problem, x, found.iterate)
    flat = ravel_pytree(found.iterate)[0]
    at, fixed = limits.C @ flat, limits.lo == limits.hi
    strong = fixed | ((found.active != 0) & ~found.weak)
    near_hi, near_lo = jnp.abs(at - limits.hi) <= found.noise, jnp.abs(at - limits.lo) <= found.noise
    fx, fy = oracles.upper_gradients(problem, x, found.iterate, problem.upper_data.full())
    return Local(
        limits=limits,
        factor=found.factor,
        grad=ravel_pytree(oracles.residual(problem, x, found.iterate, problem.lower_data.full()))[0],
        fx=ravel_pytree(fx)[0],
        fy=ravel_pytree(fy)[0],
        strong=strong,
        at_hi=fixed | near_hi | (found.active > 0),
        at_lo=fixed | near_lo | (found.active < 0),
    )


def _program(here: Local, moved: Array, slope: Array, strong: Array) -> Model:
    """min p'H p/2 + slope'p over the critical cone along d: [m] moved = -B d, rows in `strong` [m] as equalities."""
    inf = jnp.full_like(moved, jnp.inf)
    hi, lo = jnp.where(here.at_hi | strong, moved, inf), jnp.where(here.at_lo | strong, moved, -inf)
    start = jnp.where(strong, jnp.where(here.at_hi, 1, -1), 0).astype(moved.dtype)
    zero = jnp.zeros_like(slope)
    return solve_model(here.factor, here.limits._replace(lo=lo, hi=hi), Point(zero, here.factor.down(slope)), start)


def _with_other_multipliers(here: Local, moved: Array, slope: Array, before: Model) -> Model:
    """The program with the multipliers that d chooses, where those at hand are not these."""
    eps = float(jnp.finfo(moved.dtype).eps)
    fixed, size = here.limits.lo == here.limits.hi, jnp.linalg.norm(here.grad)
    K = eps**-0.5 * (jnp.linalg.norm(slope) + jnp.linalg.norm(moved)) / jnp.where(size > 0, size, 1)
    far = _program(here, moved, K * here.grad + slope, fixed)
    lam = jnp.abs(far.multipliers) / here.factor.d
    strong = fixed | (lam > 10 * eps**0.5 * jnp.max(lam, initial=0))
    found = _program(here, moved, slope, strong)
    return found._replace(empty=found.empty | far.empty, unsolved=found.unsolved | far.unsolved)


def along(here: Local, d: Array, slope: Array) -> Model:
    """The program whose solution `p` is y'(x; d), for d [dim x] and slope = G d [n]; `empty` where there is none."""
    moved = -(here.limits.B @ d)
    first = _program(here, moved, slope, here.strong)
    return once_if(first.empty, partial(_with_other_multipliers, here, moved, slope), first)


def directional_derivative(problem: BilevelProblem, x: PyTree, direction: PyTree, y: PyTree = None) -> Directional:
    """F'(x; d) = lim [F(x + t d) - F(x)]/t as t falls to 0, also where F has a kink. Pure; for jit and vmap.

    Below a polyhedral lower level, by the quadratic program for y'(x; d) of this module's docstring; elsewhere, where F
    is smooth, the hypergradient times d. A ball, and a lower level with more unknowns than `linear.DENSE_LIMIT`, have
    no such program here: there the status is WEAKLY_ACTIVE at a kink, and the value NaN.

    Args:
        problem: any that `hypergradient` takes.
        x: the point, shaped like init's x0.
        direction: d, shaped like x. It need not lead into X: F is taken without it.
        y: warm start of the lower level; default init's y0.

    Raises:
        NotImplementedError, InvalidInput: as `hypergradient`.
    """
    check_problem(problem)
    check_like("direction", direction, jax.eval_shape(lambda: x), "x")
    flat: Any = Flat(problem)
    return _directional(flat, x, direction, y)


@bounded_jit
@full_precision
def _directional(problem: BilevelProblem, x: PyTree, direction: PyTree, y: PyTree) -> Directional:
    y = start_y(problem, x, y)
    method, d = choose(problem, y, None, "directional_derivative"), ravel_pytree(direction)[0]
    if isinstance(method, ActiveSet):
        return _at_kinks(problem, x, direction, y, method)
    h = method.hypergradient(problem, x, y, Adjoint())
    smooth = solved(h.status) & (h.status != Status.WEAKLY_ACTIVE)
    return Directional(jnp.where(smooth, ravel_pytree(h.gradient)[0] @ d, jnp.nan), h.status)


def _at_kinks(problem: BilevelProblem, x: PyTree, direction: PyTree, y: PyTree, settings: Settings) -> Directional:
    """The derivative by the quadratic program."""
    batch, d = problem.lower_data.full(), ravel_pytree(direction)[0]
    found = polyhedral.solve(problem, x, y, batch, settings)
    here = local(problem, x, at_solution(problem, x, found, batch))
    model = along(here, d, ravel_pytree(oracles.cross_forward(problem, x, found.iterate, direction, batch))[0])
    status = jnp.where(model.empty, Status.INFEASIBLE_LOWER, Status.UNCHECKED)
    status = jnp.where(model.unsolved & ~model.empty, Status.STALLED, status)
    status = jnp.where(~solved(found.status), found.status, status)
    value = here.fx @ d + here.fy @ model.p
    return Directional(jnp.where(status == Status.UNCHECKED, value, jnp.nan), status)
