"""A finished cell as the comparisons read it."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bilevel.record import Status

FEASIBLE = 1e-6  # distance to the sets up to which a measurement counts


SOLVED = 1e-3  # true lower gap up to which one counts where F is measured at the solver's own y


DOUBTFUL = [
    int(status)
    for status in (
        Status.NONFINITE, Status.INFEASIBLE_LOWER, Status.SADDLE, Status.UNDETERMINED, Status.STALLED,
        Status.UNSOLVED_LOWER,
    )
]  # fmt: skip


COLUMNS = {"value": "value", "gradient": "hypergradient"}


@dataclass(frozen=True)
class Trial:
    """One cell: where it comes from, and its result, None where it is unfinished."""

    problem: str
    seed: int
    solver: str
    result: dict[str, Any] | None
    known: dict[str, Any]
    spent: dict[str, float] = field(default_factory=dict)
    """What the search of its settings cost, "oracles" and "time"; empty where there was none."""

    @property
    def instance(self) -> tuple[str, int]:
        """What is solved: the problem's text, and the seed."""
        return self.problem, self.seed

    def column(self, name: str) -> np.ndarray:
        """A column of the record, shape [rows], NaN where a number is not finite."""
        rows = self.result["record"] if self.result else []
        return np.array([math.nan if row[name] is None else row[name] for row in rows], float)

    def inside(self, name: str) -> np.ndarray:
        """The column with infinity where x is outside its sets or nothing finite was measured.

        Nor does a row count of which the referee says that F is not what it is said to be (`DOUBTFUL`). Where no
        hypergradient was measured, F is that of the solver's own y (`gap.measure_global`), which undercuts the
        optimum where the lower level is not solved: there the true lower gap must be at most `SOLVED`.
        """
        values, own = self.column(name), np.isnan(self.column("hypergradient"))
        counts = (self.column("violation") <= FEASIBLE) & (~own | (self.column("lower_residual") <= SOLVED))
        if self.result and self.result["record"]:
            counts &= ~np.isin([row.get("status") or 0 for row in self.result["record"]], DOUBTFUL)
        return np.where(np.isfinite(values) & counts, values, np.inf)

    @property
    def refuted(self) -> bool:
        """Whether the referee disagrees."""
        return bool(self.result and self.result["referee"] and self.result["referee"]["verdict"] == "disagrees")
