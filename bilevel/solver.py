"""The protocol that every solver follows. Read this page first; then copy the file in docs/add-a-solver.md.

A solver is a frozen dataclass of settings that go by name, registered as a pytree by `@struct(kw_only=True)`. Numbers
are its leaves, so that `vmap` runs a range of step sizes at once; lengths of loops and choices are static, part of what
is compiled. It defines three functions,

    init(problem, key) -> state                     the state before the first step
    step(problem, state, key) -> (state, info)      one step of the method, as in the paper's algorithm box
    cost(problem) -> OracleCount                    the oracle calls of a step

and `bilevel.solve` does everything else: data, compiling, measuring, printing, checkpoints, stopping. All three are
pure functions: `init` and `step` are traced by JAX, and randomness comes from `key` alone. The order of arguments is
always (problem, state, key), and (x, y, batch) for the user's functions. Solvers import neither each other nor
`bilevel.run`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from jax import Array

from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import OracleCount, Referee, Status

PyTree = Any


KNOWN: dict[str, type["Solver"]] = {}
"""Every solver that discovery found, by name (`bilevel.solvers.discover`), those made around another one, too."""


class About(NamedTuple):
    """What the tables of solvers say of a method, in a few words each."""

    idea: str
    """What a step does."""
    reference: str
    """Authors and year."""
    calls: str = ""
    """Calls per step: upper gradients, residuals, Hessian products, cross products."""
    stops: str = ""
    """Where the iterates end, or what keeps them from an optimum."""
    lower: str = ""
    """What is asked of the lower level."""
    smoothing: str = ""
    """How F is smoothed."""
    memory: str = ""
    """What is stored besides x, y and v."""
    data: str = ""
    """Which data a step uses, where `full_batch` does not say it."""


class Solver:
    """One algorithm: the base of all solvers.

    Its state is a NamedTuple of arrays, with fields `x` and `y` at least. It holds what the next step needs and no
    more; what people want to look at goes into `info`.
    """

    about: ClassVar[About | None] = None
    """The method's row in the tables of the documentation, which are written from the classes."""

    full_batch: ClassVar[bool] = False
    """Whether every step uses all of the data, `source.full()`, in place of the sources' batches."""

    adaptive: ClassVar[bool] = False
    """Whether a step makes as many calls as it turns out to need: `cost` then gives the least of them, and what the
    record says of oracle calls is NaN.
    """

    upper_constraints: ClassVar[bool] = False
    """Whether the method holds `problem.upper_constraints`; `solve` refuses problems with some to all others."""

    guarantees: ClassVar[tuple[str, ...]] = ()
    """Names of its theorems in `problems.guarantees`; `bilevax verify` takes the class's name for all of them."""

    experimental: ClassVar[str] = ""
    """Why the method may not be the one of its paper: what was written from an abstract or from memory, as a sentence
    without capital and full stop. Empty for all others."""

    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Settings by the names that they had in the last version: {old: new}. Old ones work, with a DeprecationWarning."""

    assumptions: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The assumptions of the method that a step can check on its way. A key is the name of a boolean field of `info`,
    true where the assumption holds; its value is a sentence that states the assumption. `solve` counts the steps at
    which one failed, and the report says so."""

    warnings: ClassVar[Mapping[str, Status]] = MappingProxyType({})
    """The status of a run that comes to its step limit after the assumption of that name failed at half of its steps or
    more, in place of MAX_STEPS."""

    @property
    def least_steps(self) -> int:
        """The number of steps before which no run is called converged; default 0.

        A method whose penalty grows over the first steps solves another problem until then.
        """
        return 0

    def init(self, problem: BilevelProblem, key: Array) -> Any:
        """The state before the first step, from `problem.init(key)`; pure, and traced by JAX."""
        raise NotImplementedError

    def step(self, problem: BilevelProblem, state: Any, key: Array) -> tuple[Any, Any]:
        """The next state, and a NamedTuple `info` of scalars that people look at; pure, and traced by JAX."""
        raise NotImplementedError

    def output(self, problem: BilevelProblem, state: Any) -> tuple[PyTree, PyTree]:
        """The (x, y) that `solve` measures and returns, shaped like those of `problem.init`; default the iterate."""
        return state.x, state.y

    def cost(self, problem: BilevelProblem) -> OracleCount:
        """The oracle calls of one step, by kind; where the solver is `adaptive`, the least that it makes. A contract
        test compares them with the calls that a step makes.
        """
        raise NotImplementedError

    def referee(self, problem: BilevelProblem) -> Referee | None:
        """Who judges runs of this method on `problem`, where a lower level solved again from y would say little of y.

        A residual says little, for example, where g(x, .) may have many minimisers: `diagnostics.BY_VALUE` judges y by
        its lower gap, g(x, y) - min g(x, .). The default, None, lets `solve` choose.
        """
        return None

    def unsupported(self, problem: BilevelProblem) -> str | None:
        """The reason, a sentence, for which the method's theory excludes this problem; None where it does not.

        By default a constrained lower level is refused.
        """
        return refuse_constrained_lower(self, problem)


def complete(kind: type[Solver]) -> bool:
    """Whether the class has a default for each of its settings: not where it is made around another solver."""
    fields = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]  # every solver is a dataclass
    return all((f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING) for f in fields)


def refusal(solver: Solver, problem: BilevelProblem) -> str | None:
    """Why `solver` is not run on this problem, a sentence, or None: its own reason, the problem's, or constraints."""
    name = type(solver).__name__
    if problem.upper_constraints is not None and not solver.upper_constraints:
        return f"{name} does not see upper constraints. Use bilevel.SQP(), or bilevel.AugmentedLagrangian({name}())."
    return problem.refuses(solver) or solver.unsupported(problem)


def refuse_constrained_lower(solver: Solver, problem: BilevelProblem) -> str | None:
    """Why a method for unconstrained lower levels cannot take this problem, or None."""
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
    """Why a method that compares values of g cannot take this problem, or None; any set and coupling will do."""
    if not isinstance(problem.lower, Minimize):
        got = type(problem.lower).__name__
        return f"{type(solver).__name__} needs a lower level Minimize(g), whose values it compares; got {got}."
    return None


def refuse_without_value(solver: Solver, problem: BilevelProblem) -> str | None:
    """Why a method that compares values of g without constraints cannot take this problem, or None."""
    return refuse_fixed_point(solver, problem) or refuse_constrained_lower(solver, problem)


def refuse_unbounded_set(solver: Solver, problem: BilevelProblem) -> str | None:
    """Why a method that compares values of g at points of a bounded Y cannot take this problem, or None."""
    if isinstance(problem.lower, Minimize) and problem.y_set.unbounded:
        name, y_set = type(solver).__name__, type(problem.y_set).__name__
        return f"{name} draws points of Y, which must be bounded, below Minimize(g); got y_set = {y_set}, unbounded."
    return refuse_fixed_point(solver, problem)


def refuse_unsampled_set(solver: Solver, problem: BilevelProblem) -> str | None:
    """Why a method that compares values of g at points of a bounded, fixed Y cannot take this problem, or None."""
    if isinstance(problem.lower, Minimize) and problem.coupling is not None:
        name, coupling = type(solver).__name__, type(problem.coupling).__name__
        return f"{name} compares values of g on a set that does not move with x; got {coupling}."
    return refuse_unbounded_set(solver, problem)


class Unsupported(ValueError):
    """The solver's theory excludes this problem; the message is the solver's reason."""
