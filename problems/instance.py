"""What a problem file makes: a problem, what is known about it, and how people judge a solution."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bilevel import BilevelProblem, Constants
from bilevel.diagnostics import IMPLICIT, Referee, as_referee

PyTree = Any


@dataclass(frozen=True)
class Truth:
    """A known optimum: value F*, and x*, y* where they are unique."""

    value: float
    x: PyTree = None
    y: PyTree = None


@dataclass(frozen=True)
class Instance:
    """One instance of a family. Tests and the referee read truth and constants; solvers never do.

    Attributes:
        problem: the problem. truth: a known optimum or None. constants: for certified hypergradients, or None.
        tags: words for choosing, e.g. "quadratic", "real-data", "strongly-convex", "nonconvex-lower".
        metrics: (x, y) -> named numbers for people, e.g. test accuracy.
        baselines: name -> function without arguments -> the same named numbers, for rows beside the solvers'.
        referee: who measures a run on the problem, whatever the solver, and checks the measurement.
        maps: (x, y) -> named arrays [rows, columns] that the report draws, e.g. a reward over a grid.
    """

    problem: BilevelProblem
    truth: Truth | None = None
    constants: Constants | None = None
    tags: frozenset[str] = frozenset()
    metrics: Callable[[PyTree, PyTree], dict[str, float]] | None = None
    baselines: dict[str, Callable[[], dict[str, float]]] = field(default_factory=dict)
    referee: Referee = IMPLICIT
    maps: Callable[[PyTree, PyTree], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Accept a plain function (problem, x, y) -> `Measurement` as referee, as `solve` does."""
        object.__setattr__(self, "referee", as_referee(self.referee))

    @property
    def measure(self) -> Callable:
        """How the referee measures: the name that version 0.1.0 had."""
        warnings.warn("Instance.measure is Instance.referee.measure now", DeprecationWarning, stacklevel=2)
        return self.referee.measure


def _accepts_measure(init: Callable) -> Callable:
    """The constructor, which also takes `measure=`, a function, as in version 0.1.0: one version, with a warning."""

    @functools.wraps(init)
    def construct(self: Instance, *args: Any, measure: Callable | None = None, **kwargs: Any) -> None:
        if measure is not None:
            text = "Instance(measure=...) is referee=bilevel.diagnostics.Referee(name, measure) now"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            kwargs["referee"] = as_referee(measure)
        init(self, *args, **kwargs)

    return construct


Instance.__init__ = _accepts_measure(Instance.__init__)
