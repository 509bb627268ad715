"""How the optimal value moves with the problem's data: the envelope theorem through the lower level.

At a KKT point x of the reduced problem with multipliers (lam, mu), and p any array of the problem,

    dF*/dp = d/dp [f + lam'G + mu'H](x, y(x; p); p)    with x, lam and mu held:

x itself moves only along directions in which the Lagrangian is flat. y(x; p) is differentiated by the implicit function
theorem, as in `implicit_objective`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.bounded import bounded_jit
from bilevel.backend.precision import full_precision
from bilevel.diagnostics.measures import multipliers
from bilevel.lower import choose_for_derivatives
from bilevel.lower.method import start_y
from bilevel.problem import BilevelProblem, check_problem

PyTree = Any


def sensitivity(problem: BilevelProblem, x: PyTree, y: PyTree = None) -> BilevelProblem:
    """dF*/dp for every array p of the problem: the problem's own pytree, with a derivative in place of each array.

        bilevel.sensitivity(problem, solution.x).lower_data.arrays

    The data, sets, coupling and upper constraints' `data` are such arrays. It is right at a KKT point x of the reduced
    problem whose y(x) is differentiable; elsewhere it is the derivative of the Lagrangian at fixed x. NaN where the
    lower level is not solved. Arrays of whole numbers get zeros; the sets of x count for nothing, since they are not
    seen by the Lagrangian.

    Args:
        problem: with or without upper constraints, whose multipliers are those of `diagnostics.multipliers`.
        x: the solution.
        y: a warm start of the lower level; default init's y0.

    Raises:
        NotImplementedError, InvalidInput: as `hypergradient`.
    """
    check_problem(problem)
    weights = None if problem.upper_constraints is None else jnp.concatenate(multipliers(problem, x, y))
    return _sensitivity(problem, x, y, weights)


@bounded_jit
@full_precision
def _sensitivity(problem: BilevelProblem, x: PyTree, y: PyTree, weights: Array | None) -> BilevelProblem:
    y = start_y(problem, x, y)
    leaves, structure = jax.tree.flatten(problem)
    floats = [jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) for leaf in leaves]

    def lagrangian(numbers: list[Array]) -> Array:
        """Of those leaves that are floats."""
        left = iter(numbers)
        parts = [next(left) if is_float else leaf for is_float, leaf in zip(floats, leaves, strict=True)]
        below = structure.unflatten(parts)
        f, constraints = below.upper, below.upper_constraints

        def upper(x: PyTree, y: PyTree, batch: PyTree) -> Array:
            if constraints is None or weights is None:
                return f(x, y, batch)
            return f(x, y, batch) + weights @ jnp.concatenate(constraints.values(x, y))

        below = dataclasses.replace(below.plain(), upper=upper, upper_constraints=None)
        return choose_for_derivatives(below, x, y, None, "sensitivity").objective(below, x, lax.stop_gradient(y), None)

    moved = iter(jax.grad(lagrangian)([leaf for is_float, leaf in zip(floats, leaves, strict=True) if is_float]))
    zeros = (next(moved) if is_float else jnp.zeros_like(leaf) for is_float, leaf in zip(floats, leaves, strict=True))
    return structure.unflatten(list(zeros))
