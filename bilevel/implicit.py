"""The implicit objective F(x) = f(x, y(x)) as a differentiable function, by the implicit function theorem.

With R(x, y(x)) = 0 the derivative of y along d is -R_y^-1 R_x d, and its adjoint -R_x' R_y^-T w: one linear system with
the lower level's last factor, or by an iterative solver. Derivatives of F follow, in both modes and again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import lower as lower_level
from bilevel import oracles
from bilevel.backend.precision import full_precision
from bilevel.hypergradient import LowerSettings
from bilevel.linear import LinearSolver, default_solver, refine
from bilevel.lower import Newton, polyhedral, polyhedral_gradient, projected, projected_gradient
from bilevel.problem import BilevelProblem, Minimize, check_problem, start_y
from bilevel.record import Status

PyTree = Any


def implicit_objective(
    problem: BilevelProblem, *, method: LinearSolver | None = None, lower: LowerSettings | None = None
) -> Callable[..., Array]:
    """F: x -> f(x, y(x)), shape [], differentiable in forward and reverse mode, and again.

    Use it under `jax.grad`, `jax.hessian`, `jit`, `vmap`, in any optax loop. `F(x, y)` warm-starts the lower level from
    y, without a derivative with respect to y. F is NaN where the lower level cannot be solved at all; `hypergradient`
    says why, and how exact an answer is.

    Raises:
        NotImplementedError, InvalidInput: as `hypergradient`.
    """
    check_problem(problem)
    if problem.constrained_lower:
        return lambda x, y=None: _implicit_constrained(problem, x, start_y(problem, x, y), method, lower or Newton())
    assert lower is None or isinstance(lower, Newton)
    return lambda x, y=None: _implicit_value(problem, x, y, method, lower)


@jax.jit
@full_precision
def _implicit_constrained(problem: BilevelProblem, x: PyTree, y: PyTree, method: Any, lower: LowerSettings) -> Array:
    large = None if method is not None else projected.settings_for(problem, y, lower)
    if large is not None:
        return projected_gradient.implicit_value(problem, x, y, large)
    settings = polyhedral.settings_for(problem, "implicit_objective", lower, method)
    return polyhedral_gradient.implicit_value(problem, x, y, settings)


@jax.jit
@full_precision
def _implicit_value(
    problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None, lower: Newton | None
) -> Array:
    symmetric = isinstance(problem.lower, Minimize)
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    y = lax.stop_gradient(start_y(problem, x, y))
    found = lower_level.solve(problem, lax.stop_gradient(x), y, lower_batch, lower)
    flat, unravel = ravel_pytree(found.y)
    flat = jnp.where(found.status == Status.NONFINITE, jnp.nan, flat)
    linear = default_solver(flat.size, symmetric, found.sketch) if method is None else method

    def residual(flat: Array) -> Array:
        return ravel_pytree(oracles.residual(problem, x, unravel(flat), lower_batch))[0]

    def solve(transpose: bool, matvec: Callable, b: Array) -> Array:
        if method is None and jax.tree.leaves(found.factor):
            return refine(matvec, partial(lower_level.apply_inverse, found.factor, symmetric, transpose=transpose), b)
        return linear.iterate(matvec, b)[0]

    def tangent(matvec: Callable, b: Array) -> Array:
        return lax.custom_linear_solve(
            matvec, b, partial(solve, False), transpose_solve=partial(solve, True), symmetric=symmetric
        )

    solution = lax.custom_root(residual, lax.stop_gradient(flat), lambda _, y: y, tangent)
    return oracles.upper_value(problem, x, unravel(solution), upper_batch)
