"""The protocol every solver follows. Read this page first; then copy docs/add-a-solver.md.

A solver is a frozen dataclass (`@struct(kw_only=True)`) of settings that go by name: floats are leaves, loop lengths
and choices are static. It defines `init`, `step` and `cost`; `bilevel.solve` does everything else. A solver file reads
like the paper's algorithm box. Argument order is always (problem, state, key) and (x, y, batch). Solvers never import
each other, nor `run`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from jax import Array

from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import OracleCount, Status

PyTree = Any


class Solver:
    """One algorithm. The state is a NamedTuple with at least `.x` and `.y`: what the next step needs, and no more."""

    full_batch: ClassVar[bool] = False
    """True where every step uses all of the data (`source.full()`) instead of the sources' batches."""

    guarantees: ClassVar[tuple[str, ...]] = ()
    """Names of its theorems in `problems.guarantees`; `bilevax verify` takes the class's name for all of them."""

    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Settings by the names that they had in the last version: {old: new}. Old ones work, with a DeprecationWarning."""

    many_minimisers: ClassVar[bool] = False
    """True where g(x, .) on a set may have many minimisers: `solve` then judges y by its true lower gap."""

    referee: ClassVar[Callable | None] = None
    """(problem, x, y) -> `diagnostics.Measurement`, where `solve` cannot judge by solving the lower level again."""

    assumptions: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What the steps see of the method's assumptions: the name of a boolean field of `info`, true where the assumption
    holds, and a sentence that states it. `solve` counts the steps at which it failed, and the report says so."""

    warnings: ClassVar[Mapping[str, Status]] = MappingProxyType({})
    """The status instead of MAX_STEPS of a run at half of whose steps or more an assumption of that name failed."""

    @property
    def least_steps(self) -> int:
        """Steps before which a run is not called converged: a continuation that has not ended; default 0."""
        return 0

    def init(self, problem: BilevelProblem, key: Array) -> Any:
        """The state before the first step; pure, traced under jit."""
        raise NotImplementedError

    def step(self, problem: BilevelProblem, state: Any, key: Array) -> tuple[Any, Any]:
        """(next state, info). info is a NamedTuple of what people look at; pure, traced under jit."""
        raise NotImplementedError

    def output(self, problem: BilevelProblem, state: Any) -> tuple[PyTree, PyTree]:
        """The (x, y) to report; default the current iterate."""
        return state.x, state.y

    def cost(self, problem: BilevelProblem) -> OracleCount:
        """Oracle calls of one step. A contract test holds it against counted calls."""
        raise NotImplementedError

    def unsupported(self, problem: BilevelProblem) -> str | None:
        """Why the method's theory excludes this problem, or None. Default: refuse a constrained lower level."""
        return refuse_constrained_lower(self, problem)


def refuse_constrained_lower(solver: Solver, problem: BilevelProblem) -> str | None:
    """The reason for methods whose lower level is unconstrained."""
    if problem.coupling is not None:
        return (
            f"{type(solver).__name__} needs a lower level without constraints; got {type(problem.coupling).__name__}."
        )
    if problem.constrained_lower:
        return (
            f"{type(solver).__name__} needs an unconstrained lower level; got y_set = {type(problem.y_set).__name__}."
        )
    return None


def refuse_fixed_point(solver: Solver, problem: BilevelProblem) -> str | None:
    """The reason for methods that compare values of g, on any set and under any coupling."""
    if not isinstance(problem.lower, Minimize):
        got = type(problem.lower).__name__
        return f"{type(solver).__name__} needs a lower level Minimize(g), whose values it compares; got {got}."
    return None


def refuse_without_value(solver: Solver, problem: BilevelProblem) -> str | None:
    """The reason for methods that compare values of g on an unconstrained lower level."""
    return refuse_fixed_point(solver, problem) or refuse_constrained_lower(solver, problem)


def refuse_unbounded_set(solver: Solver, problem: BilevelProblem) -> str | None:
    """The reason for methods that draw points of a bounded set Y and compare values of g there or in Y(x)."""
    if isinstance(problem.lower, Minimize) and problem.y_set.unbounded:
        name, y_set = type(solver).__name__, type(problem.y_set).__name__
        return f"{name} draws points of Y, which must be bounded, below Minimize(g); got y_set = {y_set}, unbounded."
    return refuse_fixed_point(solver, problem)


def refuse_unsampled_set(solver: Solver, problem: BilevelProblem) -> str | None:
    """The reason for methods that do so without coupling."""
    if isinstance(problem.lower, Minimize) and problem.coupling is not None:
        name, coupling = type(solver).__name__, type(problem.coupling).__name__
        return f"{name} compares values of g on a set that does not move with x; got {coupling}."
    return refuse_unbounded_set(solver, problem)


class Unsupported(ValueError):
    """The solver's theory excludes this problem; the message is the solver's reason."""
