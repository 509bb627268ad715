"""The referee: F and the hypergradient norm recomputed from a saved (x, y), by SciPy and dense matrices."""

from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import diagnostics, reference

PyTree = Any
LARGEST = 400  # lower-level unknowns: dense matrices and BFGS stay quick below
TOLERANCE = 1e-6


def judge(instance: Any, x: PyTree, y: PyTree, rows: list[dict[str, float]]) -> dict[str, Any]:
    """What an independent computation says of the last row of a run that ended at (x, y).

    Returns:
        {"verdict": "agrees" | "disagrees" | "skipped", "reason": why or None, "value": F(x), "hypergradient": norm}.
        The tolerance is relative: to |F| (at least 1e-3 of the start's), and to the largest hypergradient norm of the
        run.
    """
    unknowns = ravel_pytree(y)[0].size
    if unknowns > LARGEST:
        return _verdict("skipped", f"{unknowns} lower unknowns, more than {LARGEST}")
    if instance.measure is not diagnostics.measure:
        return _verdict("skipped", "measured in the problem's own way")
    if {str(leaf.dtype) for leaf in jax.tree.leaves((x, y))} != {"float64"}:
        return _verdict("skipped", "the reference needs float64")
    if not rows:
        return _verdict("skipped", "nothing was measured")
    try:
        value, gradient = reference.hypergradient(instance.problem, x, y)
    except (RuntimeError, ArithmeticError, np.linalg.LinAlgError) as error:
        return _verdict("skipped", f"the reference failed: {error}")
    size = float(diagnostics.norm(diagnostics.gradient_mapping(instance.problem, x, gradient)))
    last, scale = rows[-1], max(abs(row["hypergradient"]) for row in rows)
    near = abs(value - last["value"]) <= TOLERANCE * max(abs(value), 1e-3 * abs(rows[0]["value"]))
    near = near and abs(size - last["hypergradient"]) <= TOLERANCE * scale
    return _verdict("agrees" if near else "disagrees", None, value, size)


def _verdict(verdict: str, reason: str | None, value: float | None = None, size: float | None = None) -> dict[str, Any]:
    return {"verdict": verdict, "reason": reason, "value": value, "hypergradient": size}
