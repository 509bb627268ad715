"""The implicit objective F(x) = f(x, y(x)), and y(x) itself, as functions with derivatives (implicit function theorem).

The lower level's method brings the derivative of y(x) (`lower.adjoint`, `lower.polyhedral_gradient`,
`lower.projected_gradient`). Derivatives of F follow, in both modes and again.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from bilevel.backend.bounded import Flat, bounded_jit
from bilevel.backend.precision import full_precision
from bilevel.hypergradient import check_method, check_y_set
from bilevel.linear import LinearSolver
from bilevel.lower import LowerMethod, check_lower, choose_for_derivatives
from bilevel.lower.method import spoilt, start_y
from bilevel.problem import BilevelProblem, check_problem

PyTree = Any


def implicit_objective(
    problem: BilevelProblem, *, method: LinearSolver | None = None, lower: LowerMethod | None = None
) -> Callable[..., Array]:
    """F: x -> f(x, y(x)), shape [], differentiable in forward and reverse mode, and again.

    Use it under `jax.grad`, `jax.hessian`, `jit`, `vmap`, in any optax loop. `F(x, y)` warm-starts the lower level from
    y, without a derivative with respect to y. F and its derivatives are NaN where the lower level is not solved, the
    derivatives also where their linear system is not; `hypergradient` says why, and how exact an answer is. `method`
    and `lower` as in `hypergradient`; None is the default.

    Raises:
        NotImplementedError, InvalidInput: as `hypergradient`.
    """
    flat = _checked(problem, method, lower, "implicit_objective")
    return lambda x, y=None: _implicit_value(flat, x, y, method, lower)


def solution_map(
    problem: BilevelProblem, *, method: LinearSolver | None = None, lower: LowerMethod | None = None
) -> Callable[..., PyTree]:
    """The map x -> y(x) on all of the data, shaped like the problem's y, differentiable as `implicit_objective` is.

    Use it under `jax.jacfwd`, `jax.jacrev`, `jit`, `vmap`. `y(x, start)` warm-starts the lower level from `start`,
    without a derivative with respect to it. y and its derivatives are NaN where the lower level is not solved.

    Raises:
        NotImplementedError, InvalidInput: as `hypergradient`.
    """
    flat = _checked(problem, method, lower, "solution_map")
    return lambda x, y=None: _solution(flat, x, y, method, lower)


def _checked(problem: BilevelProblem, method: LinearSolver | None, lower: LowerMethod | None, what: str) -> Any:
    """The problem, flattened once for all calls, where it and the settings of `what` are what they should be."""
    check_problem(problem)
    check_method(method, what)
    check_lower(lower, what)
    check_y_set(problem)
    return Flat(problem)


@bounded_jit
@full_precision
def _solution(
    problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None, lower: LowerMethod | None
) -> PyTree:
    y = start_y(problem, x, y)
    found = choose_for_derivatives(problem, x, y, lower, "solution_map").solved(problem, x, y, method)
    return jax.tree.map(lambda leaf: spoilt(leaf, found.status), found.y)  # its derivatives, too


@bounded_jit
@full_precision
def _implicit_value(
    problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None, lower: LowerMethod | None
) -> Array:
    y = start_y(problem, x, y)
    return choose_for_derivatives(problem, x, y, lower, "implicit_objective").objective(problem, x, y, method)
