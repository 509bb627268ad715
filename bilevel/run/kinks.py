"""What a run says where it stands at a kink of F, at which no gradient vanishes: the tests, and when they are made.

Both are for runs whose gradient mapping does not fall while the active set is about to change; both cost more than a
measurement.
"""

import math
from typing import Any, NamedTuple

from bilevel.backend.tree import distance, norm
from bilevel.record import Measurement, Referee, Row, Status

PyTree = Any
FALLS = 0.5  # of the last row's gradient mapping: what is not below that does not fall
SMALL = 0.1  # of the gradient mapping: a distance to the hull of gradients below that is called small


class Hull(NamedTuple):
    """How near zero is to the gradients around x."""

    radius: float
    """The ball around x in which they are drawn."""
    distance: float
    """The distance of zero to their convex hull."""


class Points(NamedTuple):
    """Where a run stands, and where its next step leads."""

    x: PyTree
    y: PyTree
    next_x: PyTree
    next_y: PyTree


def stands_still(rows: list[Row]) -> bool:
    """Whether the gradient mapping has not fallen since the row before."""
    return len(rows) > 1 and rows[-1]["hypergradient"] >= FALLS * rows[-2]["hypergradient"]


def may_be_stationary(found: Measurement, tol: float) -> bool:
    """Whether all but the gradient is within tol, and a change of the active set is, too."""
    sizes = found.lower_residual, found.lower_distance, found.violation, found.margin
    solved = found.status in (Status.CONVERGED, Status.ESTIMATED, Status.WEAKLY_ACTIVE)
    return solved and tol > 0 and all(size <= tol for size in sizes)


def descent_at_kink(referee: Referee, problem: Any, x: PyTree, y: PyTree, tol: float) -> float:
    """The rate of the steepest descent at x, NaN where it is not known."""
    return math.nan if referee.kink is None else float(referee.kink(problem, x, y, tol).descent)


def hull_near(referee: Referee, problem: Any, at: Points, rows: list[Row], margin: float, tol: float) -> Hull | None:
    """Where a change of the active set is within the next step, and zero nearly in the hull of the gradients as far
    around x as two such steps: their radius and its distance. None elsewhere, and where the kink itself was tested.
    """
    last = rows[-1]
    if referee.hull is None or tol <= 0 or not math.isnan(last.get("kink", math.nan)) or not stands_still(rows):
        return None
    step = float(distance(at.next_x, at.x))
    reach = max(step, float(distance(at.next_y, at.y)))
    if not 0 < step < math.inf or not margin * (1 + float(norm(at.y))) <= 2 * reach or last["hypergradient"] <= tol:
        return None
    found = Hull(2 * step, float(referee.hull(problem, at.x, 2 * step)))
    return found if found.distance <= max(tol, SMALL * last["hypergradient"]) else None
