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


def solve_lower(problem: BilevelProblem, x: PyTree, y: PyTree) -> PyTree:
    """y(x) from the start y, by SciPy's BFGS (Minimize) and then Newton steps in NumPy.

    Raises:
        RuntimeError: where the residual at the end is above 1e-9 (1 + |R at the start|), with its value.
    """
    from scipy import optimize

    flat, unravel = ravel_pytree(y)
    batch = problem.lower_data.full()
    residual = jax.jit(lambda z: ravel_pytree(oracles.residual(problem, x, unravel(z), batch))[0])
    matrix = jax.jit(jax.jacfwd(residual))
    start = np.asarray(flat, float)
    if isinstance(problem.lower, Minimize):
        value = jax.jit(lambda z: oracles.lower_value(problem, x, unravel(z), batch))
        best = optimize.minimize(
            lambda z: float(value(z)), start, jac=lambda z: np.asarray(residual(z), float), method="BFGS"
        )
        start = best.x
    first = float(np.linalg.norm(residual(np.asarray(flat))))
    root = start
    for _ in range(20):  # Newton in NumPy: quadratic from here
        R = np.asarray(residual(root), float)
        step = np.linalg.solve(np.asarray(matrix(root), float), R)
        shorter = root - step
        if not np.linalg.norm(residual(shorter)) < np.linalg.norm(R):
            break
        root = shorter
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
    flat_y, unravel_y = ravel_pytree(y)
    upper, lower = problem.upper_data.full(), problem.lower_data.full()

    def residual(a: Any, b: Any) -> Any:
        return ravel_pytree(oracles.residual(problem, unravel_x(a), unravel_y(b), lower))[0]

    by_x, by_y = (np.asarray(m, float) for m in jax.jit(jax.jacfwd(residual, argnums=(0, 1)))(flat_x, flat_y))
    value, (fx, fy) = oracles.upper_value_and_gradients(problem, x, y, upper)
    fx, fy = (np.asarray(ravel_pytree(part)[0], float) for part in (fx, fy))
    gradient = fx - by_x.T @ np.linalg.solve(by_y.T, fy)
    return float(value), unravel_x(np.asarray(gradient, flat_x.dtype))


def objective(problem: BilevelProblem, y: PyTree) -> Callable[[PyTree], float]:
    """X -> F(x) by `solve_lower` from y."""
    upper = problem.upper_data.full()
    return lambda x: float(problem.upper(x, solve_lower(problem, x, y), upper))


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
