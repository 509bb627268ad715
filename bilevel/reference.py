"""Slow exact answers: the tests' ground truth and the referee's tool.

Nothing here shares an algorithm with the fast path: the lower level by SciPy, matrices formed densely in NumPy,
gradients of F by finite differences of values. Use float64 and problems of a few hundred lower-level unknowns.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any


@jax.jit
def _residual(problem: BilevelProblem, x: PyTree, y: PyTree) -> Any:
    return ravel_pytree(oracles.residual(problem, x, y, problem.lower_data.full()))[0]


@jax.jit
def _lower_value(problem: BilevelProblem, x: PyTree, y: PyTree) -> Any:
    return oracles.lower_value(problem, x, y, problem.lower_data.full())


@jax.jit
def _jacobians(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Any, Any]:
    """(R_x [dim y, dim x], R_y [dim y, dim y])."""
    (flat_x, unravel_x), (flat_y, unravel_y) = ravel_pytree(x), ravel_pytree(y)
    residual = lambda a, b: _residual(problem, unravel_x(a), unravel_y(b))  # noqa: E731
    return jax.jacfwd(residual, argnums=(0, 1))(flat_x, flat_y)


@jax.jit
def _upper(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Any, tuple[PyTree, PyTree]]:
    return oracles.upper_value_and_gradients(problem, x, y, problem.upper_data.full())


def solve_lower(problem: BilevelProblem, x: PyTree, y: PyTree) -> PyTree:
    """y(x) from the start y, by SciPy's BFGS (Minimize) and then Newton steps in NumPy.

    Raises:
        RuntimeError: where the residual at the end is above 1e-9 (1 + |R at the start|), with its value.
    """
    from scipy import optimize

    flat, unravel = ravel_pytree(y)

    def residual(z: np.ndarray) -> np.ndarray:
        return np.asarray(_residual(problem, x, unravel(np.asarray(z, flat.dtype))), float)

    def value(z: np.ndarray) -> tuple[float, np.ndarray]:
        return float(_lower_value(problem, x, unravel(np.asarray(z, flat.dtype)))), residual(z)

    root = np.asarray(flat, float)
    first = float(np.linalg.norm(residual(root)))
    if isinstance(problem.lower, Minimize):
        root = optimize.minimize(value, root, jac=True, method="BFGS").x
    for _ in range(20):  # Newton in NumPy: quadratic from here
        R = residual(root)
        trial = root - np.linalg.solve(_jacobians(problem, x, unravel(np.asarray(root, flat.dtype)))[1], R)
        if not np.linalg.norm(residual(trial)) < np.linalg.norm(R):
            break
        root = trial
    size = float(np.linalg.norm(residual(root)))
    if not size <= 1e-9 * (1 + first):
        raise RuntimeError(
            f"reference.solve_lower: got residual {size:.2e}; expected <= 1e-9. Start nearer, or rescale g."
        )
    return unravel(np.asarray(root, flat.dtype))


def hypergradient(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[float, PyTree]:
    """(F(x), grad F(x)) from dense matrices: grad F = f_x - R_x' (R_y')^-1 f_y at `solve_lower`'s y."""
    y = solve_lower(problem, x, y)
    flat_x, unravel_x = ravel_pytree(x)
    by_x, by_y = (np.asarray(matrix, float) for matrix in _jacobians(problem, x, y))
    value, (fx, fy) = _upper(problem, x, y)
    fx, fy = (np.asarray(ravel_pytree(part)[0], float) for part in (fx, fy))
    gradient = fx - by_x.T @ np.linalg.solve(by_y.T, fy)
    return float(value), unravel_x(np.asarray(gradient, flat_x.dtype))


def objective(problem: BilevelProblem, y: PyTree) -> Callable[[PyTree], float]:
    """X -> F(x) by `solve_lower` from y."""
    return lambda x: float(_upper(problem, x, solve_lower(problem, x, y))[0])


def finite_differences(function: Callable[[PyTree], float], x: PyTree, step: float = 1e-3) -> PyTree:
    """The gradient by central differences of orders 2, 4, 6 extrapolated (Richardson): error about step^6 + eps/step.

    Three pairs of evaluations a coordinate; `function` must be smooth over +-step (1 + |x_i|).
    """
    flat, unravel = ravel_pytree(x)
    point = np.asarray(flat, float)
    gradient = np.zeros_like(point)
    for i in range(point.size):
        h = step * (1 + abs(point[i]))

        def slope(length: float, i: int = i) -> float:
            ahead, behind = point.copy(), point.copy()
            ahead[i] += length
            behind[i] -= length
            ends = [function(unravel(np.asarray(end, flat.dtype))) for end in (ahead, behind)]
            return (ends[0] - ends[1]) / (ahead[i] - behind[i])

        a, b, c = slope(h), slope(h / 2), slope(h / 4)
        ab, bc = (4 * b - a) / 3, (4 * c - b) / 3
        gradient[i] = (16 * bc - ab) / 15
    return unravel(np.asarray(gradient, flat.dtype))
