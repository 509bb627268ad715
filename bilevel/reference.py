"""Slow exact answers: the tests' ground truth and the referee's tool.

Nothing here shares an algorithm with the fast path: the lower level by SciPy, matrices formed densely in NumPy,
gradients of F by finite differences of values. Use float64 and problems of a few hundred lower-level unknowns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import constraints, oracles
from bilevel.backend.extras import extra
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any


def _ravel(tree: PyTree) -> tuple[Any, Callable[[Any], PyTree]]:
    """`ravel_pytree`, whose way back takes NumPy's arrays, too."""
    return ravel_pytree(tree)


@jax.jit
def _residual(problem: BilevelProblem, x: PyTree, y: PyTree) -> Any:
    return _ravel(oracles.residual(problem, x, y, problem.lower_data.full()))[0]


@jax.jit
def _lower_value(problem: BilevelProblem, x: PyTree, y: PyTree) -> Any:
    return oracles.lower_value(problem, x, y, problem.lower_data.full())


@jax.jit
def _jacobians(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Any, Any]:
    """(R_x [dim y, dim x], R_y [dim y, dim y])."""
    (flat_x, unravel_x), (flat_y, unravel_y) = _ravel(x), _ravel(y)
    residual = lambda a, b: _residual(problem, unravel_x(a), unravel_y(b))  # noqa: E731
    return jax.jacfwd(residual, argnums=(0, 1))(flat_x, flat_y)


@jax.jit
def _upper(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Any, tuple[PyTree, PyTree]]:
    return oracles.upper_value_and_gradients(problem, x, y, problem.upper_data.full())


@jax.jit
def _coupling(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Any, Any]:
    return oracles.coupling_values(problem, x, y)


def lower_residual(problem: BilevelProblem, x: PyTree, y: PyTree) -> float:
    """|R(x, y)|, or |y - Proj(y - grad_y g)| on a lower level's polyhedron, by a quadratic program."""
    R = np.asarray(_residual(problem, x, y), float)
    if not problem.constrained_lower:
        return float(np.linalg.norm(R))
    reason = constraints.refuse(problem)
    if reason is not None:
        raise RuntimeError(f"reference.lower_residual: {reason}")
    z = np.asarray(_ravel(y)[0], float)
    C, lo, hi, _ = (np.asarray(part, float) for part in constraints.rows(problem, x, y))
    one = np.eye(z.size)
    near = _model(one, R, z, C, lo, hi)
    return float(np.linalg.norm(_polish(near, C, lo, hi, lambda w: R + w - z, lambda w: one)[0] - z))


def lower_gap(problem: BilevelProblem, x: PyTree, y: PyTree, solved: PyTree) -> float:
    """g(x, y) - g(x, solved): how far y is from solving the lower level in g's own unit; only for `Minimize`."""
    return float(_lower_value(problem, x, y)) - float(_lower_value(problem, x, solved))


def solve_lower(problem: BilevelProblem, x: PyTree, y: PyTree) -> PyTree:
    """y(x) from the start y, by SciPy's BFGS (for Minimize; above 100 unknowns L-BFGS, since BFGS costs n^3 a step) and
    then Newton steps in NumPy.

    Raises:
        RuntimeError: where the residual at the end is above 1e-9 (1 + |R at the start|), with its value.
    """
    from scipy import optimize

    flat, unravel = _ravel(y)

    def residual(z: np.ndarray) -> np.ndarray:
        return np.asarray(_residual(problem, x, unravel(np.asarray(z, flat.dtype))), float)

    def value(z: np.ndarray) -> tuple[float, np.ndarray]:
        return float(_lower_value(problem, x, unravel(np.asarray(z, flat.dtype)))), residual(z)

    root = np.asarray(flat, float)
    first = float(np.linalg.norm(residual(root)))
    if isinstance(problem.lower, Minimize):
        root = optimize.minimize(value, root, jac=True, method="BFGS" if root.size <= 100 else "L-BFGS-B").x
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
    flat_x, unravel_x = _ravel(x)
    by_x, by_y = (np.asarray(matrix, float) for matrix in _jacobians(problem, x, y))
    value, (fx, fy) = _upper(problem, x, y)
    fx, fy = (np.asarray(_ravel(part)[0], float) for part in (fx, fy))
    gradient = fx - by_x.T @ np.linalg.solve(by_y.T, fy)
    return float(value), unravel_x(np.asarray(gradient, flat_x.dtype))


def objective(problem: BilevelProblem, y: PyTree) -> Callable[[PyTree], float]:
    """The function x -> F(x), which solves the lower level by `solve_lower` from y."""
    return lambda x: float(_upper(problem, x, solve_lower(problem, x, y))[0])


def finite_differences(function: Callable[[PyTree], float], x: PyTree, step: float = 1e-3) -> PyTree:
    """The gradient by central differences of orders 2, 4, 6 extrapolated (Richardson): error about step^6 + eps/step.

    Three pairs of evaluations a coordinate; `function` must be smooth over +-step (1 + |x_i|).
    """
    flat, unravel = _ravel(x)
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


class Constrained(NamedTuple):
    """A lower level on rows lo <= C y <= hi: y(x), F(x), grad F(x), and the margin to a kink.

    margin: the least of the active rows' multipliers (in size) and the other rows' slacks. Near zero F has a kink, or
    one within rounding, and `gradient` is that of one side.
    """

    y: PyTree
    value: float
    gradient: PyTree
    margin: float


def constrained(problem: BilevelProblem, x: PyTree, y: PyTree) -> Constrained:
    """The same for a lower level on a polyhedron: cvxpy's quadratic programs, then dense KKT systems in NumPy.

    Sequential quadratic programming from y with backtracking on g, Clarabel for the models; rows with a slack below
    1e-6 and a multiplier above 1e-6 are taken for active; Newton's method on the equations of the active rows ends it,
    and where it leaves a row violated, or a multiplier of the wrong sign, the row changes sides. Only the reading of
    the sets into rows (`constraints.rows`) is shared with the fast path.

    Raises:
        RuntimeError: not a polyhedron, no convergence, or a residual above 1e-8 at the end.
    """
    reason = constraints.refuse(problem)
    if reason is not None:
        raise RuntimeError(f"reference.constrained: {reason}")
    (flat_x, unravel_x), (flat, unravel) = _ravel(x), _ravel(y)
    C, lo, hi, B = (np.asarray(part, float) for part in constraints.rows(problem, x, y))
    at = lambda z: unravel(np.asarray(z, flat.dtype))  # noqa: E731
    residual = lambda z: np.asarray(_residual(problem, x, at(z)), float)  # noqa: E731
    hessian = lambda z: np.asarray(_jacobians(problem, x, at(z))[1], float)  # noqa: E731
    value = lambda z: float(_lower_value(problem, x, at(z)))  # noqa: E731

    z = _model(
        np.eye(flat.size), np.zeros(flat.size), np.asarray(flat, float), C, lo, hi
    )  # feasible: the nearest point
    for _ in range(100):
        H, R = hessian(z), residual(z)
        step = _model(H, R, z, C, lo, hi) - z
        if np.linalg.norm(step) <= 1e-8 * (1 + np.linalg.norm(z)):
            break
        length, before, slope = 1.0, value(z), R @ step
        while value(z + length * step) > before + 1e-4 * length * slope and length > 1e-9:
            length /= 2
        z = z + length * step
    z, R, active, multipliers, beyond = _polish(z, C, lo, hi, residual, hessian)
    fixed, A, size = lo == hi, C[active], int(active.sum())
    margin = min(np.abs(multipliers[active & ~fixed]).min(initial=np.inf), -beyond[~active].max(initial=-np.inf))
    rest, outside = R + A.T @ multipliers[active], beyond.max(initial=0.0)
    if not max(float(np.linalg.norm(rest)), outside) <= 1e-8 * (1 + float(np.linalg.norm(R))):
        raise RuntimeError(f"reference.constrained: residual {np.linalg.norm(rest):.1e}, outside by {outside:.1e}")
    by_x, by_y = (np.asarray(part, float) for part in _jacobians(problem, x, at(z)))
    F, (fx, fy) = _upper(problem, x, at(z))
    fx, fy = (np.asarray(_ravel(part)[0], float) for part in (fx, fy))
    M = np.block([[by_y, A.T], [A, np.zeros((size, size))]])
    uw = np.linalg.lstsq(M, np.concatenate([fy, np.zeros(size)]), rcond=None)[0]
    gradient = fx - by_x.T @ uw[: flat.size] - B[active].T @ uw[flat.size :]
    return Constrained(at(z), float(F), unravel_x(np.asarray(gradient, flat_x.dtype)), float(margin))


def _polish(
    z: np.ndarray, C: np.ndarray, lo: np.ndarray, hi: np.ndarray, residual: Callable, hessian: Callable
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(z, R, active rows, signed multipliers, violations) exactly, from a z within 1e-6: tolerances misjudge rows that
    are almost active, so the set is mended, a row at a time, until all signs agree.
    """
    from scipy import optimize

    R = residual(z)
    above, below = hi - C @ z, C @ z - lo
    near = np.minimum(above, below) <= 1e-6
    sign = np.where(above <= below, 1.0, -1.0)
    fixed = lo == hi
    columns = np.concatenate([(C[near] * sign[near, None]).T, -C[near & fixed].T], axis=1)
    found = optimize.nnls(columns, -R, maxiter=100 * len(z))[0] if near.any() else np.zeros(0)
    multipliers = np.zeros(len(C))
    multipliers[near] = found[: near.sum()]
    active = fixed | (multipliers > 1e-6)
    for _ in range(2 * len(C) + 1):
        A, bound, size = C[active], np.where(sign > 0, hi, lo)[active], int(active.sum())
        for _ in range(5):  # Newton in NumPy on the equations of the active rows
            H, R = hessian(z), residual(z)
            M = np.block([[H, A.T], [A, np.zeros((size, size))]])
            z = z + np.linalg.lstsq(M, np.concatenate([-R, bound - A @ z]), rcond=None)[0][: len(z)]
        R, beyond = residual(z), np.maximum(C @ z - hi, lo - C @ z)
        multipliers = np.zeros(len(C))
        multipliers[active] = sign[active] * np.linalg.lstsq(A.T, -R, rcond=None)[0] if size else 0
        tol = 1e-11 * (1 + np.linalg.norm(R) + np.linalg.norm(z))
        missing, wrong = np.where(active, 0, beyond), np.where(active & ~fixed, multipliers, 0)
        if missing.max(initial=0) > tol:
            row = int(np.argmax(missing))
            active[row], sign[row] = True, 1.0 if C[row] @ z > hi[row] else -1.0
        elif wrong.min(initial=0) < -tol:
            active[int(np.argmin(wrong))] = False
        else:
            break
    return z, R, active, sign * multipliers, beyond


def _model(H: np.ndarray, R: np.ndarray, z: np.ndarray, C: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """The minimiser of R'(w - z) + (w - z)'H (w - z)/2 over lo <= C w <= hi, by Clarabel."""
    with extra("reference"):
        import cvxpy as cp

    H = (H + H.T) / 2
    lowest = np.linalg.eigvalsh(H)[0]
    root = np.linalg.cholesky(H + max(0.0, 1e-8 - lowest) * np.eye(len(z)))
    w = cp.Variable(len(z))
    limits = [C[rows] @ w <= hi[rows] for rows in [np.isfinite(hi)] if rows.any()]
    limits += [C[rows] @ w >= lo[rows] for rows in [np.isfinite(lo)] if rows.any()]
    program = cp.Problem(cp.Minimize(cp.sum_squares(root.T @ (w - z)) / 2 + R @ (w - z)), limits)
    tight = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
    program.solve(solver=cp.CLARABEL, **tight)
    if w.value is None or program.status not in ("optimal", "optimal_inaccurate"):
        raise RuntimeError(f"reference.constrained: the quadratic program is {program.status}")
    return np.asarray(w.value, float)


def least_lower_value(problem: BilevelProblem, x: PyTree, y: PyTree, num_starts: int = 20, seed: int = 0) -> float:
    """The least g(x, .) that SciPy's SLSQP finds on Y(x), from y and from random points: an upper bound of v(x).

    Raises:
        RuntimeError: for a y_set that is neither the whole space, a box, a ball nor a `SmoothSet`, or where no start
            ends feasible.
    """
    from scipy import optimize

    flat, unravel = _ravel(y)
    n, lo, hi = flat.size, np.full(flat.size, -np.inf), np.full(flat.size, np.inf)
    at = lambda z: unravel(np.asarray(z, flat.dtype))  # noqa: E731
    limits: list[Any] = []
    bounds = problem.y_set.bounds(y)
    if bounds is not None:
        lo, hi = (np.asarray(_ravel(part)[0], float) for part in bounds)
    elif problem.y_set.curved:
        limits.append({"type": "ineq", "fun": lambda z: -np.asarray(problem.y_set.values(at(z)), float)})
    elif not problem.y_set.whole:
        raise RuntimeError(f"reference.least_lower_value: y_set is a {type(problem.y_set).__name__}")
    if problem.coupling is not None:
        values = lambda z, part: np.asarray(_coupling(problem, x, at(z))[part], float)  # noqa: E731
        if values(np.asarray(flat), 0).size:
            limits.append({"type": "ineq", "fun": lambda z: -values(z, 0)})
        if values(np.asarray(flat), 1).size:
            limits.append({"type": "eq", "fun": lambda z: values(z, 1)})

    def both(z: np.ndarray) -> tuple[float, np.ndarray]:
        return float(_lower_value(problem, x, at(z))), np.asarray(_residual(problem, x, at(z)), float)

    box: Any = optimize.Bounds(lo, hi)  # pyright: ignore[reportArgumentType]
    rng, least = np.random.default_rng(seed), np.inf
    around = np.where(np.isfinite(lo) & np.isfinite(hi), 0.0, 3.0)
    for k in range(num_starts):
        start = np.clip(np.asarray(flat, float), lo, hi)
        if k > 0:
            spread = rng.uniform(np.where(around == 0, lo, -1), np.where(around == 0, hi, 1))
            start = np.clip(np.where(around == 0, spread, start + around * rng.normal(size=n)), lo, hi)
        found = optimize.minimize(both, start, jac=True, method="SLSQP", bounds=box,
                                  constraints=limits, options={"maxiter": 200, "ftol": 1e-12})  # fmt: skip
        z = np.clip(found.x, lo, hi)
        outside = max([0.0, *(-float(np.min(limit["fun"](z))) for limit in limits if limit["type"] == "ineq")])
        outside = max([outside, *(float(np.abs(limit["fun"](z)).max()) for limit in limits if limit["type"] == "eq")])
        if outside <= 1e-7 and np.isfinite(found.fun):
            least = min(least, both(z)[0])
    if not np.isfinite(least):
        raise RuntimeError("reference.least_lower_value: no start ended at a feasible point")
    return least
