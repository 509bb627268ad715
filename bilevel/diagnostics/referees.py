"""The two referees that serve most problems. `bilevel.run.referee_of` says which one a run has."""

from collections.abc import Callable

from bilevel.diagnostics.checks import check_by_value, check_implicit
from bilevel.diagnostics.gap import measure_global
from bilevel.diagnostics.goldstein import distance_to_hull
from bilevel.diagnostics.kinks import steepest_descent
from bilevel.diagnostics.measures import measure
from bilevel.record import Referee

IMPLICIT = Referee(
    "the lower level solved again from y", measure, 0.5, check_implicit, kink=steepest_descent, hull=distance_to_hull
)
"""F(x) and its gradient at y(x), which is solved again from y (`measure`): where y(x) is unique."""

BY_VALUE = Referee("y as it is, by its value g(x, y)", measure_global, 0.2, check_by_value, at_y=True)
"""f(x, y) and the true lower gap g(x, y) - v(x), `gap.measure_global`: where g(x, .) may have many minimisers, or where
F has no implicit derivative. Default tolerance eps^(1/5): the rate of descent is a difference quotient.
"""


def as_referee(measure: Referee | Callable) -> Referee:
    """A referee as it is; the one of this file that measures by the given function, or else a new one, whose default
    tolerance is the square root of eps and whose numbers nothing checks.
    """
    if isinstance(measure, Referee):
        return measure
    known = (referee for referee in (IMPLICIT, BY_VALUE) if referee.measure is measure)
    return next(known, Referee("measured in its own way", measure))
