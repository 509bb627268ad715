"""How a run ends: what the referee's rows say of it, in functions of numbers alone."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bilevel.record import Measurement, Row, Status
from bilevel.solver import Solver

NO_VALUE = (  # F has no value here, but maybe at the next x
    Status.INFEASIBLE_LOWER, Status.SADDLE, Status.UNDETERMINED, Status.STALLED, Status.UNSOLVED_LOWER,
)  # fmt: skip
USABLE = Status.CONVERGED, Status.ESTIMATED, Status.UNCHECKED  # of a row: nothing is wrong with what was measured
JUDGED = (  # of a row: F is what it is said to be
    *USABLE, Status.WEAKLY_ACTIVE, Status.UNSOLVED_LINEAR, Status.UNCONFIRMED,
)  # fmt: skip
SOLVED = Status.CONVERGED, Status.ESTIMATED, Status.WEAKLY_ACTIVE, Status.UNCONFIRMED  # of a row: y(x) was found
ENDS_WELL = (  # to `throw`
    Status.CONVERGED, Status.MAX_STEPS, Status.WEAKLY_ACTIVE, Status.GOLDSTEIN, Status.UNCONFIRMED,
)  # fmt: skip
PROVED = Status.INFEASIBLE, Status.UNBOUNDED  # of a solver that computes a proof: no F can say otherwise
RISE = 1e-3  # part of |F_0| by which F may stay above F_0
CLIMB = 0.1  # part of |F_0| by which F may climb over the last quarter
NOISE = 3.0  # times the noise, beside both
FEW, LONG = 5, 12  # rows from which noise can be told, and from which a last quarter is one


def row_of(found: Measurement, step: int, oracles: float, time: float) -> dict[str, Any]:
    """A row of a record: what the referee found, plain numbers, after how many steps and at what price."""
    return {
        "step": step, "value": found.value, "hypergradient": found.hypergradient,
        "lower_residual": found.lower_residual, "violation": found.violation, "oracles": oracles,
        "time": time, "error_bound": found.error_bound, "status": int(found.status),
    }  # fmt: skip


def verdict(found: Measurement, tol: float, early: bool) -> Status | None:
    """How a run ends at what was found, or None where it goes on: CONVERGED, where the size of the gradient mapping
    plus its error, the lower residual, the relative distance of y to y(x) and the violation are all at most tol, and it
    is not too `early`; NONFINITE, so far out that F overflows.
    """
    error = np.inf if np.isnan(found.error_bound) else found.error_bound
    sizes = found.hypergradient + error, found.lower_residual, found.lower_distance, found.violation
    solved = found.status in (Status.CONVERGED, Status.ESTIMATED)
    if solved and tol > 0 and not early and all(size <= tol for size in sizes):
        return Status.CONVERGED
    if not np.isfinite(found.value) and found.status not in NO_VALUE:
        return Status.NONFINITE
    return None


def last_word(
    solver: Solver, status: Status, failed: dict[str, int], rows: Sequence[Row], tol: float, at_y: bool = False
) -> Status:
    """The status of a run that came to its limit of steps or time. Any other status stays. The first that applies:

    0. A warning of the solver that is a proof, INFEASIBLE or UNBOUNDED: as 3.
    1. DIVERGED, where `diverged` says so.
    2. What the referee says of the last row, where something is wrong with it: a run may pass through such an x, but it
       may not end there with a good word. Where Y(x) is empty that is NO_FOLLOWER.
    3. The solver's warning, at the step limit, where an assumption failed at half of the steps or more.
    """
    if status not in (Status.MAX_STEPS, Status.TIME_LIMIT):
        return status
    last = rows[-1]
    steps = last["step"] if status == Status.MAX_STEPS else 0
    warned = [warning for name, warning in solver.warnings.items() if 0 < steps <= 2 * failed[name]]
    if proved := [warning for warning in warned if warning in PROVED]:
        return proved[0]
    if diverged(rows, tol, at_y):
        return Status.DIVERGED
    if last["status"] in (Status.INFEASIBLE_LOWER,):
        return Status.NO_FOLLOWER
    if last["status"] not in USABLE:
        return Status(last["status"])
    return next(iter(warned), status)


def diverged(rows: Sequence[Row], tol: float, at_y: bool = False) -> bool:
    """Whether F stays above its start, or still climbs, by more than the run's own noise explains.

    F_k is the refereed F at row k of n, v_k the violation there, with the lower residual added where F is measured at
    the solver's own y (`at_y`). F has risen where its last value is above F_0 by RISE |F_0| + tol, and the median of
    its last half by

        RISE |F_0| + NOISE s/sqrt(m) + tol,    s the median distance of the m rows of the last half to their median,

    and is not on its way down, the median of the last quarter being below that of the quarter before by as much noise;
    or, below `FEW` rows, where there is no noise to speak of, where F_{n-1} > F_0 + |F_0| + tol. The run has diverged
    where

    1. the start is feasible, v_0 <= tol, and F has risen;
    2. the start is not, and the violation has more than doubled over the last half; or it has not fallen by a tenth,
       and F has risen: where it has fallen, F may well have risen for it;
    3. of twelve rows or more, F rose at each of the last quarter, by more than CLIMB |F_0| + NOISE s_2 + tol in all,
       s_2 the median of |F_{k+1} - 2 F_k + F_{k-1}|, which is blind to a trend; and the violation did not fall.

    Rows without a finite F are left out. A run whose first row is not solved, or not checked, is never called diverged.
    """
    kept = [row for row in rows if math.isfinite(row["value"])]
    if len(kept) < 2 or kept[0] is not rows[0] or rows[0]["status"] not in SOLVED:
        return False
    F = np.array([row["value"] for row in kept])
    v = np.nan_to_num([infeasibility(row, at_y) for row in kept], nan=np.inf)
    rose, late = _rose(F, tol), min(np.median(v[-(len(v) // 2) :]), v[-1])
    above = rose if v[0] <= tol else bool(late > 2 * v[0]) or (rose and bool(v[-1] >= 0.9 * v[0]))
    return above or _climbs(F, v, tol)


def _rose(F: np.ndarray, tol: float) -> bool:
    """Whether F is above its start at the end and over the last half, beyond noise, and not on its way down."""
    size = abs(float(F[0]))
    if len(F) < FEW:
        return bool(F[-1] - F[0] > size + tol)
    late = F[-(len(F) // 2) :]
    middle = np.median(late)
    noise = np.median(np.abs(late - middle)) / np.sqrt(len(late))
    quarter = (len(late) + 1) // 2
    falls = np.median(late[-quarter:]) < np.median(late[:-quarter]) - NOISE * noise - tol
    above = min(F[-1], middle - NOISE * noise) - F[0]
    return bool(above > RISE * size + tol and not falls)


def _climbs(F: np.ndarray, v: np.ndarray, tol: float) -> bool:
    """Whether F rose throughout the last quarter, beyond noise, and the violation v did not fall for it."""
    if len(F) < LONG:
        return False
    quarter = slice(-(len(F) // 4 + 1), None)
    allowed = CLIMB * abs(float(F[0])) + NOISE * float(np.median(np.abs(np.diff(F, 2)))) + tol
    up = np.all(np.diff(F[quarter]) > 0) and F[-1] - F[quarter][0] > allowed
    return bool(up and v[-1] >= v[quarter][0])


def rank(row: Row, tol: float, at_y: bool = False) -> tuple[bool, float, float]:
    """What a row is worth, the least first: whether its F is in doubt, by how much it is infeasible beyond tol, F."""
    outside, value = infeasibility(row, at_y) - tol, row["value"]
    doubtful = row["status"] not in JUDGED or not math.isfinite(value)
    return doubtful, math.inf if math.isnan(outside) else max(outside, 0.0), value if math.isfinite(value) else math.inf


def worse(row: Row, best: Row, tol: float, at_y: bool = False) -> bool:
    """Whether a row is worth less than the best one by more than rounding: by its verdict, or its violation, or by
    RISE |F| + tol.
    """
    mine, other = rank(row, tol, at_y), rank(best, tol, at_y)
    if mine[0] != other[0] or (mine[1] > 0) != (other[1] > 0):
        return mine > other
    return mine[2] > other[2] + RISE * abs(other[2]) + tol


def infeasibility(row: Row, at_y: bool) -> float:
    """The violation of a row, and its lower residual where F is measured at the solver's own y."""
    return row["violation"] + (row["lower_residual"] if at_y else 0.0)
