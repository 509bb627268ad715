"""The referee: what a run's last row says is recomputed from the saved (x, y) by SciPy, cvxpy and dense matrices.

F, the size of the hypergradient (`gradient`) and of its projected mapping (stationarity: the run's `hypergradient`, the
same where X is the whole space), the lower residual and the true lower gap, by the `check` of the instance's referee;
and the distance to the sets. `bilevel.reference`, which they use, shares no algorithm with what is judged.
"""

from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import diagnostics, oracles
from bilevel.diagnostics.checks import TOLERANCE
from bilevel.parts.reduced import upper_violation
from bilevel.record import Row

PyTree = Any
LARGEST = 1000  # lower-level unknowns: dense matrices stay quick below, a second at 650
FIELDS = ("value", "gradient", "hypergradient", "lower_residual", "lower_gap", "violation")


def judge(instance: Any, x: PyTree, y: PyTree, rows: list[Row]) -> dict[str, Any]:
    """What an independent computation says of the last row of a run that ended at (x, y).

    Returns:
        {"verdict": "agrees" | "disagrees" | "skipped", "reason": why or what disagrees or None, and `FIELDS`, None
        where they were not computed}. The tolerances are those of `bilevel.diagnostics.checks`.
    """
    unknowns = ravel_pytree(y)[0].size
    if unknowns > LARGEST:
        return _verdict("skipped", f"{unknowns} lower unknowns, more than {LARGEST}")
    if {str(leaf.dtype) for leaf in jax.tree.leaves((x, y))} != {"float64"}:
        return _verdict("skipped", "the reference needs float64")
    if not rows:
        return _verdict("skipped", "nothing was measured")
    if instance.referee.check is None:
        return _verdict("skipped", "measured in the problem's own way")
    try:
        found, wrong = instance.referee.check(instance.problem, x, y, rows)
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


@jax.jit
def _violation(problem: Any, x: PyTree, y: PyTree) -> Any:
    return (
        problem.x_set.violation(x)
        + problem.y_set.violation(y)
        + diagnostics.norm(oracles.coupling_residual(problem, x, y))
        + upper_violation(problem, x, y)
    )


def _verdict(verdict: str, reason: str | None, **found: float) -> dict[str, Any]:
    return {"verdict": verdict, "reason": reason} | {name: found.get(name) for name in FIELDS}
