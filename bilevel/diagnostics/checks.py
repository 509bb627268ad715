"""Second opinions: `bilevel.reference` computes what a referee measured again, by SciPy, cvxpy and dense matrices."""

import dataclasses
import math
from typing import Any

import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import reference
from bilevel.backend.tree import norm
from bilevel.diagnostics.measures import gradient_mapping
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Row

PyTree = Any
Rows = list[Row]
TOLERANCE = 1e-6
KINK = 1e-5  # margin below which F has a kink to the reference, and one-sided gradients do not compare
NEAR = 1e-6  # of a bound, to hold a point of a reduced problem
MISSED = 1e-4  # relative to 1 + |g|: how much lower SciPy may find the lower level than the measurement did


def check_implicit(problem: BilevelProblem, x: PyTree, y: PyTree, rows: Rows) -> tuple[dict[str, float], list[str]]:
    """What `measure` records, where y(x) is unique: (what was found, the names that disagree with the last row).

    Tolerances are relative: of F to |F| (at least 1e-3 of the start's), of the hypergradient and the lower residual to
    the largest of the run. The hypergradient is not compared at a kink of F.

    Returns:
        value F(x), gradient |grad F(x)|, hypergradient: the norm of the gradient mapping, lower_residual, and lower_gap
        g(x, y) - g(x, y(x)) of a Minimize.
    """
    margin = math.inf
    if problem.constrained_lower:
        exact = reference.constrained(problem, x, y)
        value, gradient, solved, margin = exact.value, exact.gradient, exact.y, exact.margin
    else:
        solved = reference.solve_lower(problem, x, y)
        value, gradient = reference.hypergradient(problem, x, solved)
    found = {
        "value": value,
        "gradient": float(norm(gradient)),
        "hypergradient": float(norm(gradient_mapping(problem, x, gradient))),
        "lower_residual": reference.lower_residual(problem, x, y),
    }
    if isinstance(problem.lower, Minimize):
        found["lower_gap"] = reference.lower_gap(problem, x, y, solved)
    scales = {name: max(abs(row[name]) for row in rows) for name in ("hypergradient", "lower_residual")}
    scales["value"] = max(abs(value), 1e-3 * abs(rows[0]["value"]))
    if margin < KINK:
        del scales["hypergradient"]
    wrong = [
        name for name, scale in scales.items() if not abs(found[name] - rows[-1][name]) <= TOLERANCE * scale + 1e-12
    ]
    return found, wrong


def check_reduced(problem: BilevelProblem, x: PyTree, y: PyTree, rows: Rows) -> tuple[dict[str, float], list[str]]:
    """What `measure` records with upper constraints: F and the violation at y(x), by dense matrices, and the least
    |grad F + J_G'lam + J_H'mu + nu| over lam >= 0 of active rows, mu, and nu normal to X, by SciPy's least squares: it
    disagrees where the last row's is small and this one is not.

    Returns:
        value, violation of the upper constraints, hypergradient: that least norm.
    """
    from scipy.optimize import nnls

    constraints = problem.upper_constraints
    assert constraints is not None

    def of(function: Any) -> tuple[float, np.ndarray]:
        below = dataclasses.replace(problem.plain(), upper=function, upper_constraints=None)
        if problem.constrained_lower:
            exact = reference.constrained(below, x, y)
            return exact.value, np.asarray(ravel_pytree(exact.gradient)[0], float)
        value, gradient = reference.hypergradient(below, x, y)
        return value, np.asarray(ravel_pytree(gradient)[0], float)

    value, gradient = of(problem.upper)
    sizes = [part.size for part in constraints.values(x, y)]
    row = constraints.values
    G, H = ([of(lambda x, y, _, k=k, i=i: row(x, y)[k][i]) for i in range(sizes[k])] for k in (0, 1))
    violation = float(np.linalg.norm([*(max(g, 0.0) for g, _ in G), *(h for h, _ in H)]))
    flat = np.asarray(ravel_pytree(x)[0], float)
    normals = [*(row for g, row in G if g >= -NEAR), *(sign * row for _, row in H for sign in (1, -1))]
    for C, lo, hi in problem.x_set.rows(x):
        C, lo, hi = (np.asarray(part, float) for part in (C, lo, hi))
        at, near = C @ flat, NEAR * (1 + np.abs(C) @ np.abs(flat))
        normals += [*C[at >= hi - near], *-C[at <= lo + near]]
    left = nnls(np.array(normals).T, -gradient)[1] if normals else float(np.linalg.norm(gradient))
    found, last = {"value": value, "violation": violation, "hypergradient": float(left)}, rows[-1]
    wrong, scale = [], float(np.linalg.norm(gradient))
    if not abs(value - last["value"]) <= TOLERANCE * max(abs(value), 1e-3 * abs(rows[0]["value"])) + 1e-12:
        wrong.append("value")
    if violation > last["violation"] + TOLERANCE * (1 + violation):
        wrong.append("violation")
    if left > 1e-3 * scale + 10 * last["hypergradient"]:
        wrong.append("hypergradient")
    return found, wrong


def check_by_value(problem: BilevelProblem, x: PyTree, y: PyTree, rows: Rows) -> tuple[dict[str, float], list[str]]:
    """What `gap.measure_global` records, where g(x, .) may have many minimisers: F at the given y, and a second search
    for the least g: (value and lower_gap as found, the names of those that disagree with the last row).
    """
    assert isinstance(problem.lower, Minimize)
    value = float(problem.upper(x, y, problem.upper_data.full()))
    own = float(problem.lower.g(x, y, problem.lower_data.full()))
    least = reference.least_lower_value(problem, x, y)
    found = {"value": value, "lower_gap": own - least}
    last, wrong = rows[-1], []
    if not abs(value - last["value"]) <= TOLERANCE * max(abs(value), 1e-3 * abs(rows[0]["value"])) + 1e-12:
        wrong.append("value")
    if found["lower_gap"] > last["lower_residual"] + MISSED * (1 + abs(own)):
        wrong.append("lower_gap")
    return found, wrong
