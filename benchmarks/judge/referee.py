"""The referee: what a run's last row says is recomputed from the saved (x, y) by SciPy, cvxpy and dense matrices.

F, the size of the hypergradient (`gradient`) and of its projected mapping (stationarity: the run's `hypergradient`, the
same where X is the whole space), the lower residual and the true lower gap, and the distance to the sets;
`bilevel.reference` shares no algorithm with what is judged.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import diagnostics, oracles, reference
from bilevel.diagnostics import gap
from bilevel.problem import Minimize

PyTree = Any
LARGEST = 1000  # lower-level unknowns: dense matrices stay quick below, a second at 650
TOLERANCE = 1e-6
KINK = 1e-5  # margin below which F has a kink to the reference, and one-sided gradients do not compare
MISSED = 1e-4  # relative to 1 + |g|: how much lower SciPy may find the lower level than the measurement did
FIELDS = ("value", "gradient", "hypergradient", "lower_residual", "lower_gap", "violation")


def judge(instance: Any, x: PyTree, y: PyTree, rows: list[dict[str, float]]) -> dict[str, Any]:
    """What an independent computation says of the last row of a run that ended at (x, y).

    Returns:
        {"verdict": "agrees" | "disagrees" | "skipped", "reason": why or what disagrees or None, and `FIELDS`, None
        where they were not computed}. Tolerances are relative: of F to |F| (at least 1e-3 of the start's), of the
        hypergradient and the lower residual to the largest of the run.
    """
    unknowns = ravel_pytree(y)[0].size
    if unknowns > LARGEST:
        return _verdict("skipped", f"{unknowns} lower unknowns, more than {LARGEST}")
    if {str(leaf.dtype) for leaf in jax.tree.leaves((x, y))} != {"float64"}:
        return _verdict("skipped", "the reference needs float64")
    if not rows:
        return _verdict("skipped", "nothing was measured")
    kinds = {diagnostics.measure: _implicit, gap.measure_global: _global}
    if instance.measure not in kinds:
        return _verdict("skipped", "measured in the problem's own way")
    try:
        found, wrong = kinds[instance.measure](instance.problem, x, y, rows)
    except (RuntimeError, ArithmeticError, np.linalg.LinAlgError) as error:
        return _verdict("skipped", f"the reference failed: {error}")
    found["violation"] = float(_violation(instance.problem, x, y))
    if abs(found["violation"] - rows[-1]["violation"]) > TOLERANCE:
        wrong.append("violation")
    reason = ", ".join(
        f"{name} {found[name]:.6g} by the reference, {rows[-1][_column(name)]:.6g} in the run" for name in wrong
    )
    return _verdict("disagrees" if wrong else "agrees", reason or None, **found)


def _column(name: str) -> str:
    return "lower_residual" if name == "lower_gap" else name


def _implicit(problem: Any, x: PyTree, y: PyTree, rows: list[dict[str, float]]) -> tuple[dict[str, float], list[str]]:
    """Where y(x) is unique: (what was found, the fields that disagree)."""
    margin = math.inf
    if problem.constrained_lower:
        exact = reference.constrained(problem, x, y)
        value, gradient, solved, margin = exact.value, exact.gradient, exact.y, exact.margin
    else:
        solved = reference.solve_lower(problem, x, y)
        value, gradient = reference.hypergradient(problem, x, solved)
    found = {
        "value": value,
        "gradient": float(diagnostics.norm(gradient)),
        "hypergradient": float(diagnostics.norm(diagnostics.gradient_mapping(problem, x, gradient))),
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


def _global(problem: Any, x: PyTree, y: PyTree, rows: list[dict[str, float]]) -> tuple[dict[str, float], list[str]]:
    """Where g(x, .) may have many minimisers: F at the given y, and a second search for the least g."""
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


@jax.jit
def _violation(problem: Any, x: PyTree, y: PyTree) -> Any:
    return (
        problem.x_set.violation(x)
        + problem.y_set.violation(y)
        + diagnostics.norm(oracles.coupling_residual(problem, x, y))
    )


def _verdict(verdict: str, reason: str | None, **found: float) -> dict[str, Any]:
    return {"verdict": verdict, "reason": reason} | {name: found.get(name) for name in FIELDS}
