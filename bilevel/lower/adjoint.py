"""Derivatives of F through a lower level without constraints, at any y that a `LowerMethod` found.

`differentiate` is the hypergradient with its error, as `bilevel.hypergradient` defines it. `implicit_solution` is y(x)
for `jax.grad`: with R(x, y(x)) = 0 the derivative of y along d is -R_y^-1 R_x d, and its adjoint -R_x' R_y^-T w: one
linear system with the lower level's last factor, or by an iterative solver.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.checks import check_like
from bilevel.backend.norms import norms
from bilevel.backend.tree import norm
from bilevel.linear import LinearSolver, default_solver, refine, verified
from bilevel.lower.corrections import Findings, Look, Sizes, correct, start, system_of
from bilevel.lower.directions import apply_inverse
from bilevel.lower.method import Adjoint, LowerSolution, Solved, Unrolled
from bilevel.lower.rounding import underflow
from bilevel.problem import BilevelProblem, Constants, Minimize
from bilevel.record import Hypergradient, Status

PyTree = Any


def differentiate(problem: BilevelProblem, x: PyTree, found: LowerSolution, adjoint: Adjoint) -> Hypergradient:
    """The hypergradient at (x, y) for y = found.iterate, with its error."""
    y, constants = found.iterate, adjoint.constants
    if adjoint.v is not None:
        check_like("v", adjoint.v, y, "init's y0")
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    if isinstance(adjoint.method, Unrolled):
        return _unrolled(problem, x, y, adjoint.method, found.status)

    flat_y, unravel = ravel_pytree(y)
    flat_x, unravel_x = ravel_pytree(x)

    def look(y: Array, v: Array) -> Look:
        value, gradients = oracles.upper_value_and_gradients(problem, x, unravel(y), upper_batch)
        directions = oracles.directions(problem, x, unravel(y), unravel(v), lower_batch)
        fx, fy, R, Hv, cross = (ravel_pytree(part)[0] for part in (*gradients, *directions))
        r_v = fy - Hv
        (size_fx, size_cross), (size_fy, size_r) = norms(fx, cross), norms(fy, r_v)
        return Look(fx - cross, cross, R, r_v, Sizes(value, size_fx, size_fy, size_cross, size_r))

    v = jnp.zeros_like(flat_y) if adjoint.v is None else ravel_pytree(adjoint.v)[0]
    system = system_of(problem, x, found, lower_batch, adjoint.method)
    seen = correct(look, system, found, start(flat_y, v, flat_x.size), adjoint.estimate and constants is None)
    size = seen.sizes
    error, good = _error(x, flat_y, found.residual, adjoint, seen)
    status = jnp.where(found.status == Status.CONVERGED, good, found.status)
    finite = jnp.isfinite(size.fx + size.cross + size.value + found.residual + size.r_v)
    return Hypergradient(
        value=size.value,
        gradient=unravel_x(jnp.where(finite, seen.gradient, jnp.nan)),  # a failure is never a number
        y=y,
        lower_residual=found.residual,
        linear_residual=size.r_v,
        error_bound=jnp.where(finite & ~(jnp.isnan(error) & (constants is not None)), error, jnp.inf),
        active_margin=jnp.full((), jnp.inf, flat_y.dtype),
        status=jnp.where(finite, status, Status.NONFINITE),
        v=unravel(seen.v),
    )


def _error(x: PyTree, y: Array, lower_residual: Array, adjoint: Adjoint, seen: Findings) -> tuple[Array, Array]:
    """(the gradient's error, the status that it gives): proved, estimated or not asked for."""
    size, constants = seen.sizes, adjoint.constants
    rounding = float(jnp.finfo(y.dtype).eps) * (y.size + ravel_pytree(x)[0].size)
    if constants is not None:
        proves = _may_prove(constants, y.dtype)
        error = jnp.where(proves, _proved(constants, x, y, seen, lower_residual, rounding), jnp.inf)
        word = jnp.where(proves, Status.NONFINITE, Status.UNCHECKED)  # the first for a bound that overflows
        return error, jnp.where(jnp.isfinite(error), Status.CONVERGED, word)
    if not adjoint.estimate:
        status = jnp.where(seen.unsolved, Status.UNSOLVED_LINEAR, Status.UNCHECKED)
        return jnp.full((), jnp.nan, y.dtype), status
    slope = seen.moved / jnp.where(seen.shifted > 0, seen.shifted, 1)  # of R_x' v in f_y
    error = 3 * seen.noise * seen.change + rounding * (size.fx + size.cross + slope * size.fy)
    error = error + underflow(size.cross, seen.v)
    error = jnp.where(seen.unsolved, jnp.inf, error)  # an estimate by a solver that has not solved is none
    return error, jnp.where(jnp.isfinite(error), Status.ESTIMATED, Status.UNSOLVED_LINEAR)


def implicit_solution(
    problem: BilevelProblem, x: PyTree, y: PyTree, solve_lower: Callable[..., LowerSolution],
    method: LinearSolver | None,
) -> Solved:  # fmt: skip
    """y(x), differentiable in x and the problem's arrays in both modes and again: `solve_lower`'s from y.

    NaN where the lower level is not solved, and so are derivatives where their linear system is not.
    """
    symmetric = isinstance(problem.lower, Minimize)
    lower_batch = problem.lower_data.full()
    fixed, fixed_x = lax.stop_gradient((problem, x))  # the search has no derivatives, in the problem's arrays either
    found = solve_lower(fixed, fixed_x, lax.stop_gradient(y), fixed.lower_data.full())
    flat, unravel = ravel_pytree(found.y)
    linear = default_solver(flat.size, symmetric, found.sketch) if method is None else method

    def residual(flat: Array) -> Array:
        return ravel_pytree(oracles.residual(problem, x, unravel(flat), lower_batch))[0]

    def solve(transpose: bool, matvec: Callable, b: Array) -> Array:
        if method is None and jax.tree.leaves(found.factor):
            return refine(matvec, partial(apply_inverse, found.factor, symmetric, transpose=transpose), b)
        return verified(matvec, linear.iterate(matvec, b)[0], b)

    def tangent(matvec: Callable, b: Array) -> Array:
        return lax.custom_linear_solve(
            matvec, b, partial(solve, False), transpose_solve=partial(solve, True), symmetric=symmetric
        )

    solution = lax.custom_root(residual, lax.stop_gradient(flat), lambda _, y: y, tangent)
    return Solved(unravel(solution), found.status)


def _proved(c: Constants, x: PyTree, y: Array, seen: Findings, lower_residual: Array, rounding: float) -> Array:
    """The bound of `bilevel.hypergradient`'s docstring, each computed residual raised by what rounding may have hidden
    in it.
    """
    size_x, size_y, size_v = norm(x), norm(y), norm(seen.v)
    R = lower_residual + rounding * (c.L_g * size_y + c.C_gxy * size_x + lower_residual)
    r_v = seen.sizes.r_v + rounding * (c.L_g * size_v + c.L_fy * size_y)
    delta = R / c.mu
    eps_v = (r_v + c.L_fy * delta + c.L_gyy * size_v * delta) / c.mu
    bound = c.L_fx * delta + c.L_gxy * size_v * delta + c.C_gxy * eps_v
    return bound + rounding * (seen.sizes.fx + c.L_fx * size_y + c.C_gxy * size_v)


def _may_prove(c: Constants, dtype: Any) -> Array:
    """Whether these are constants of some problem, []: mu > 0, and no other is negative."""
    others = [jnp.asarray(part, dtype) for part in (c.L_fx, c.L_fy, c.L_gxy, c.L_gyy, c.C_gxy, c.L_g)]
    return (jnp.asarray(c.mu) > 0) & (jnp.min(jnp.stack(others)) >= 0)


def _unrolled(problem: BilevelProblem, x: PyTree, y: PyTree, method: Unrolled, status: Array) -> Hypergradient:
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    (value, last), gradient = oracles.unrolled_objective(
        problem, x, y, method.num_steps, method.step_size, upper_batch, lower_batch
    )
    nan = jnp.full((), jnp.nan, value.dtype)
    finite = jnp.isfinite(ravel_pytree(gradient)[0]).all() & jnp.isfinite(value)
    return Hypergradient(
        value=value,
        gradient=gradient,
        y=last,
        lower_residual=norm(oracles.residual(problem, x, last, lower_batch)),
        linear_residual=nan,
        error_bound=jnp.where(finite, nan, jnp.inf),
        active_margin=jnp.full((), jnp.inf, value.dtype),
        status=jnp.where(finite, jnp.where(status == Status.CONVERGED, Status.UNCHECKED, status), Status.NONFINITE),
        v=jax.tree.map(jnp.zeros_like, last),
    )
