"""What a problem file makes: a problem, what is known about it, and how people judge a solution."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bilevel import BilevelProblem, Constants
from bilevel.diagnostics import measure as measure_implicit

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
        measure: (problem, x, y) -> `bilevel.diagnostics.Measurement`, how the run is measured.
        maps: (x, y) -> named arrays [rows, columns] that the report draws, e.g. a reward over a grid.
    """

    problem: BilevelProblem
    truth: Truth | None = None
    constants: Constants | None = None
    tags: frozenset[str] = frozenset()
    metrics: Callable[[PyTree, PyTree], dict[str, float]] | None = None
    baselines: dict[str, Callable[[], dict[str, float]]] = field(default_factory=dict)
    measure: Callable = measure_implicit
    maps: Callable[[PyTree, PyTree], dict[str, Any]] | None = None
