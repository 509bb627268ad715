"""The arguments of a run: whether they make sense, and which referee it has."""

import inspect
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend.checks import check_like, check_point, is_count
from bilevel.backend.tracing import under_trace
from bilevel.diagnostics import BY_VALUE, IMPLICIT, REDUCED, Referee, as_referee
from bilevel.problem import BilevelProblem, SmoothCoupling, check_problem
from bilevel.recommend import recommend
from bilevel.record import Row
from bilevel.run.lanes import Anywhere
from bilevel.solver import Solver
from bilevel.struct import invalid

PyTree = Any


def referee_of(problem: BilevelProblem, solver: Solver, measure: Referee | Callable | None = None) -> Referee:
    """Who judges a run of `solver` on `problem`. The first that applies:

    1. `measure`, the argument of `solve`, where it is given: a referee, or a function that measures.
    2. What the solver asks for, `solver.referee(problem)`.
    3. BY_VALUE below a `SmoothCoupling`, where F has no implicit derivative.
    4. REDUCED, with upper constraints.
    5. IMPLICIT.
    """
    if measure is not None:
        return as_referee(measure)
    asked = _asked(problem, solver)
    if asked is not None:
        return asked
    if isinstance(problem.coupling, SmoothCoupling):
        return BY_VALUE
    return IMPLICIT if problem.upper_constraints is None else REDUCED


def _asked(problem: BilevelProblem, solver: Solver) -> Referee | None:
    """What the solver asks for, by its method or by the two class attributes of version 0.1.0."""
    name, member = type(solver).__name__, solver.referee
    if not inspect.ismethod(member) and member is not None:  # was a function (problem, x, y) -> Measurement
        _warn(f"{name}.referee is a function that measures")
        return as_referee(member)
    if getattr(solver, "many_minimisers", False):
        _warn(f"{name}.many_minimisers")
        return BY_VALUE if problem.constrained_lower else None
    return None if member is None else member(problem)


def _warn(what: str) -> None:
    text = f"{what}; define the method referee(self, problem) -> bilevel.diagnostics.Referee | None instead"
    warnings.warn(text, DeprecationWarning, stacklevel=2)


@dataclass(frozen=True)
class Arguments:
    """What a caller of `solve` asks of the driver, beside the problem, the solver and the key; `solve` says what each
    means.
    """

    max_steps: int = 1000
    every: int | None = None
    tol: float | None = None
    time_limit: float | None = None
    callback: Callable[[int, PyTree, Row], bool | None] | None = None
    checkpoint: str | os.PathLike | None = None
    progress: bool | None = None
    measure: Referee | Callable | None = None
    start: tuple[PyTree, PyTree] = (None, None)
    recommended: str = ""
    """Why the solver runs, where nobody named it."""

    def __post_init__(self) -> None:
        """NumPy's whole numbers become Python's, which a checkpoint can write."""
        for name in ("max_steps", "every"):
            if isinstance(getattr(self, name), np.integer):
                object.__setattr__(self, name, int(getattr(self, name)))

    def check(self) -> None:
        """Raise `InvalidInput` for the first one that makes no sense."""
        if not is_count(self.max_steps, 0) or self.max_steps >= 2**31 - 1:
            invalid("max_steps", self.max_steps, "a whole number in [0, 2^31 - 1)", "Give a number of steps.")
        if self.every is not None and not is_count(self.every, 1):
            do = "It is the number of steps between measurements."
            invalid("every", self.every, "a whole number >= 1, or None", do)
        if self.tol is not None and not (_not_negative(self.tol) and math.isfinite(self.tol)):
            invalid("tol", self.tol, "a finite number >= 0, or None", "Use 0 to run all steps.")
        if self.time_limit is not None and not _not_negative(self.time_limit):
            invalid("time_limit", self.time_limit, "seconds >= 0, or None", "Leave it out for no limit.")
        if not isinstance(self.checkpoint, str | os.PathLike | None):
            do = "Give the file's name, or leave it out."
            invalid("checkpoint", type(self.checkpoint).__name__, "a path, or None", do)
        if self.callback is not None and not callable(self.callback):
            invalid("callback", type(self.callback).__name__, "a function, or None", "Pass the function itself.")
        if self.measure is not None and not (isinstance(self.measure, Referee) or callable(self.measure)):
            expected, do = "a diagnostics.Referee, a function, or None", "Leave it out for the problem's and solver's."
            invalid("measure", type(self.measure).__name__, expected, do)


def solver_of(problem: BilevelProblem, solver: Solver | None) -> tuple[Solver, str]:
    """(the solver of a run, why it is that one: "" where it was named).

    Raises:
        InvalidInput: as `check_problem_and_solver` and `recommend`.
        Unsupported: none was named, and none takes the problem.
    """
    if solver is None:
        first = recommend(problem)[0]
        return first.solver, f"{first.name}: {first.why}"
    check_problem_and_solver(problem, solver)
    return solver, ""


def check_problem_and_solver(problem: object, solver: object) -> None:
    """Raise `InvalidInput` where one of them is something else, or a number of the solver's is no whole number."""
    check_problem(problem)
    if not isinstance(solver, Solver):
        got = f"the class {solver.__name__}" if isinstance(solver, type) else type(solver).__name__
        invalid("solver", got, "a solver", "Make one: bilevel.AID().")
    if jax.tree_util.all_leaves([solver]):
        do = "Put @bilevel.struct.struct(kw_only=True) before its class."
        invalid("solver", f"{type(solver).__name__}, which JAX takes for a number", "a pytree of its settings", do)
    for name, count in vars(solver).items():
        if isinstance(count, type):
            do = f"Make one: {count.__name__}()."
            invalid(f"{type(solver).__name__}.{name}", f"the class {count.__name__}", "an instance of it", do)
        if name.startswith("num_") and not (count is None or is_count(count, 0)):
            invalid(f"{type(solver).__name__}.{name}", count, "a whole number >= 0", "Leave it out for the default.")


def _not_negative(value: Any) -> bool:
    try:
        return not isinstance(value, str) and float(value) >= 0
    except (TypeError, ValueError):
        return False


def check_key(name: str, key: Array, axes: int, expected: str, do: str) -> None:
    """Raise `InvalidInput` unless `key` is a typed key, or an array of them, with `axes` axes."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        invalid(name, type(key).__name__, expected, "Make a typed key: jax.random.key(seed).")
    if key.ndim != axes or key.size == 0:
        invalid(name, f"shape {key.shape}", expected, do)


def check_start(problem: BilevelProblem, start: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    """(x0, y0) of `start` as arrays, None staying None; raises `InvalidInput` where they are not finite and like those
    of the problem's init.
    """
    likes = jax.eval_shape(lambda: problem.init(jax.random.key(0)))
    found = []
    for name, given, like in zip(("x0", "y0"), start, likes, strict=True):
        if given is not None and not isinstance(given, Anywhere):
            check_like(name, given, like, f"init's {name}")
            given = jax.tree.map(lambda leaf, want: jnp.asarray(leaf, want.dtype), given, like)
            check_point(name, given, may_be_empty=name == "x0")
        found.append(given)
    return found[0], found[1]


def check_not_traced(name: str, *values: Any) -> None:
    """Raise `InvalidInput` where JAX traces the call of `name` with `values`."""
    if under_trace(*values):
        got, expected = "a call inside of jax.jit, grad or vmap", "numbers, since it looks at them between the steps"
        do = "Use implicit_objective or advance: the one has derivatives, the other runs under jit and vmap."
        invalid(name, got, expected, do)
