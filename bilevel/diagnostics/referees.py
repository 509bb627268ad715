"""The referees that serve most problems. `bilevel.run.referee_of` says which one a run has."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.diagnostics.checks import check_by_value, check_implicit, check_reduced
from bilevel.diagnostics.gap import measure_global
from bilevel.diagnostics.goldstein import distance_to_hull
from bilevel.diagnostics.kinks import steepest_descent
from bilevel.diagnostics.measures import measure, multipliers
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Referee

LARGEST = 512  # unknowns of y beyond which no Hessian is formed to choose a referee

IMPLICIT = Referee(
    "the lower level solved again from y", measure, 0.5, check_implicit, kink=steepest_descent, hull=distance_to_hull
)
"""F(x) and its gradient at y(x), which is solved again from y (`measure`): where y(x) is unique."""

BY_VALUE = Referee("y as it is, by its value g(x, y)", measure_global, 0.2, check_by_value, at_y=True)
"""f(x, y) and the true lower gap g(x, y) - v(x), `gap.measure_global`: where g(x, .) may have many minimisers, or where
F has no implicit derivative. Default tolerance eps^(1/5): the rate of descent is a difference quotient.
"""


@functools.cache
def by_value(num_points: int = 2048, num_starts: int = 16) -> Referee:
    """`BY_VALUE` with a wider or a narrower search for the least g(x, .): the arguments of `measure_global`. Pass it to
    `solve` as `measure` where a run ended UNCONFIRMED.
    """
    wider = functools.partial(measure_global, num_points=num_points, num_starts=num_starts)
    return dataclasses.replace(BY_VALUE, measure=wider)


REDUCED = Referee("the lower level solved again from y, and the KKT equations of the reduced problem", measure,
                  check=check_reduced, multipliers=multipliers)  # fmt: skip
"""As IMPLICIT, with upper constraints: their violation at y(x), and how far x is from a KKT point (`parts.reduced`)."""


def for_many_minimisers(problem: BilevelProblem) -> Referee | None:
    """BY_VALUE where a constrained g(x, .) may well have many minimisers, or a minimiser without a derivative: where it
    is linear, or its Hessian at init's point is not positive definite. Else None, and where y has more than `LARGEST`
    entries.

    For methods of the penalty family, which solve such problems by values of g: an implicit gradient would call each of
    their ends a saddle. It computes a Hessian, so the problem's arrays must be numbers.
    """
    if not isinstance(problem.lower, Minimize) or not problem.constrained_lower:
        return None
    x, y = problem.init(jax.random.key(0))
    flat, batch = ravel_pytree(y)[0], problem.lower_data.full()
    if flat.size > LARGEST:
        return None
    if oracles.constant_residual(problem, x, y, batch):
        return BY_VALUE
    eigenvalues = np.linalg.eigvalsh(np.asarray(oracles.lower_hessian(problem, x, y, batch)))
    smallest = float(jnp.finfo(flat.dtype).eps) ** 0.5 * np.abs(eigenvalues).max()
    return None if eigenvalues[0] > smallest else BY_VALUE


def as_referee(measure: Referee | Callable) -> Referee:
    """A referee as it is; the one of this file that measures by the given function, or else a new one, whose default
    tolerance is the square root of eps and whose numbers nothing checks.
    """
    if isinstance(measure, Referee):
        return measure
    known = (referee for referee in (IMPLICIT, BY_VALUE) if referee.measure is measure)
    return next(known, Referee("measured in its own way", measure))
