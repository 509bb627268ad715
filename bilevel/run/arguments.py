"""The arguments of a run: whether they make sense, and which referee it has."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.diagnostics import BY_VALUE, IMPLICIT, Referee, as_referee
from bilevel.problem import BilevelProblem, SmoothCoupling, check_problem
from bilevel.solver import Solver
from bilevel.struct import invalid


def referee_of(problem: BilevelProblem, solver: Solver, measure: Referee | Callable | None = None) -> Referee:
    """Who judges a run of `solver` on `problem`. The first that applies:

    1. `measure`, the argument of `solve`, where it is given: a referee, or a function that measures.
    2. What the solver asks for, `solver.referee(problem)`.
    3. BY_VALUE below a `SmoothCoupling`, where F has no implicit derivative.
    4. IMPLICIT.
    """
    if measure is not None:
        return as_referee(measure)
    asked = _asked(problem, solver)
    if asked is not None:
        return asked
    return BY_VALUE if isinstance(problem.coupling, SmoothCoupling) else IMPLICIT


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


def check_arguments(
    problem: object, solver: object, max_steps: object, every: object, tol: object, time_limit: object,
    callback: object, measure: object,
) -> None:  # fmt: skip
    """Raise `InvalidInput` for the first argument of `solve` that makes no sense."""
    check_problem(problem)
    if not isinstance(solver, Solver):
        got = f"the class {solver.__name__}" if isinstance(solver, type) else type(solver).__name__
        invalid("solver", got, "a solver", "Make one: bilevel.AID().")
    for name, count in vars(solver).items():
        if name.startswith("num_") and not (count is None or _is_count(count, 0)):
            invalid(f"{type(solver).__name__}.{name}", count, "a whole number >= 0", "Leave it out for the default.")
    if not _is_count(max_steps, 0) or max_steps >= 2**31 - 1:
        invalid("max_steps", max_steps, "a whole number in [0, 2^31 - 1)", "Give a number of steps.")
    if every is not None and not _is_count(every, 1):
        invalid("every", every, "a whole number >= 1, or None", "It is the number of steps between measurements.")
    if tol is not None and not _not_negative(tol):
        invalid("tol", tol, "a number >= 0, or None", "Use 0 to run all steps.")
    if time_limit is not None and not _not_negative(time_limit):
        invalid("time_limit", time_limit, "seconds >= 0, or None", "Leave it out for no limit.")
    if callback is not None and not callable(callback):
        invalid("callback", type(callback).__name__, "a function, or None", "Pass the function itself.")
    if measure is not None and not (isinstance(measure, Referee) or callable(measure)):
        expected = "a diagnostics.Referee, a function, or None"
        invalid("measure", type(measure).__name__, expected, "Leave it out for the referee of the problem and solver.")


def _not_negative(value: Any) -> bool:
    try:
        return not isinstance(value, str) and float(value) >= 0
    except TypeError:
        return False


def _is_count(value: object, least: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_key(name: str, key: Array, axes: int, expected: str, do: str) -> None:
    """Raise `InvalidInput` unless `key` is a typed key, or an array of them, with `axes` axes."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        invalid(name, type(key).__name__, expected, "Make a typed key: jax.random.key(seed).")
    if key.ndim != axes or key.size == 0:
        invalid(name, f"shape {key.shape}", expected, do)
