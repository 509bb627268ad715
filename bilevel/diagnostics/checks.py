"""Second opinions: `bilevel.reference` computes what a referee measured again, by SciPy, cvxpy and dense matrices."""

import math
from typing import Any

from bilevel import reference
from bilevel.backend.tree import norm
from bilevel.diagnostics.measures import gradient_mapping
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Row

PyTree = Any
Rows = list[Row]
TOLERANCE = 1e-6
KINK = 1e-5  # margin below which F has a kink to the reference, and one-sided gradients do not compare
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
