"""Step rules: a float, an optax schedule or an optax gradient transformation, behind one interface.

A float stays a pytree leaf, so `vmap` over step sizes works; a schedule or a transformation is static.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from bilevel.backend.checks import is_count
from bilevel.struct import invalid, static, struct

PyTree = Any

Scalar: TypeAlias = float | np.number | np.ndarray | Array
"""A setting that is one number and a pytree leaf: shape [], or [runs] below `vmap`."""


@struct
class StepRule:
    """Turns a direction d into an update: -value d, -schedule(count) d, or what an optax transformation makes of d."""

    value: Scalar | None = None
    schedule: Callable | None = static(default=None)
    transformation: optax.GradientTransformation | None = static(default=None)

    def init(self, params: PyTree) -> PyTree:
        """The rule's state: () for a float, the step count for a schedule, optax's own state for a transformation."""
        if self.transformation is not None:
            return self.transformation.init(params)
        return jnp.zeros((), int) if self.schedule is not None else ()

    def apply(self, params: PyTree, direction: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """(params after one step against `direction`, next state)."""
        if self.transformation is not None:
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
                updates, state = self.transformation.update(direction, state, params)
            return jax.tree.map(lambda p, u: p + jnp.asarray(u, p.dtype), params, updates), state
        size, state = self.at(state)
        return move(params, direction, size), state

    def at(self, state: PyTree) -> tuple[Any, PyTree]:
        """(the step size now, next state); for a float or a schedule."""
        if self.schedule is not None:
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
                return self.schedule(state), state + 1
        return self.value, state


Scheduled: TypeAlias = Scalar | Callable[[Any], Any] | StepRule
"""A setting that may change during a run: a number, or a function of the step's index k = 0, 1, …"""

StepSize: TypeAlias = Scheduled | optax.GradientTransformation
"""A step size > 0: a number, an optax schedule, or an optax transformation in place of both step size and direction."""


@functools.cache
def growth(power: float) -> Callable[[Array], Array]:
    """The schedule (k + 1)^power at step k; the same object each time, so that nothing compiles twice."""
    return lambda k: (k + 1.0) ** power


@functools.cache
def decay(value: float, power: float) -> Callable[[Any], Any]:
    """The schedule value/(k + 1)^power at step k = 0, 1, …, for any step size: with it stochastic methods converge.

        bilevel.SOBA(lower_step_size=bilevel.decay(0.5, 0.5), ...)

    On the command line it is `SOBA[lower_step_size=decay(0.5,0.5)]`. The same arguments give the same object, so that
    nothing compiles twice.

    Args:
        value: the first step, > 0.
        power: >= 0; 1/2 for averages and single loops, 1 for strongly convex F.

    Raises:
        InvalidInput: a number out of its range.
    """
    for name, given, least in (("value", value, "> 0"), ("power", power, ">= 0")):
        if not (math.isfinite(given) and (given > 0 if name == "value" else given >= 0)):
            invalid(
                f"{name} (decay)", given, f"a finite number {least}", "A step value/(k + 1)^power must be positive."
            )
    return lambda k: value / (k + 1) ** power


class Stepper(NamedTuple):
    """A rule with its state: what a solver keeps for each of its variables."""

    rule: StepRule
    state: PyTree

    def __call__(self, params: PyTree, direction: PyTree) -> tuple[PyTree, "Stepper"]:
        """(params after one step against `direction`, next stepper)."""
        params, state = self.rule.apply(params, direction, self.state)
        return params, Stepper(self.rule, state)

    def size(self) -> tuple[Any, "Stepper"]:
        """(the step size now, next stepper); for rules without an optax transformation."""
        size, state = self.rule.at(self.state)
        return size, Stepper(self.rule, state)


def move(params: PyTree, direction: PyTree, size: Any) -> PyTree:
    """`params` minus size times direction, in the dtypes of params."""
    return jax.tree.map(lambda p, d: p - jnp.asarray(size, p.dtype) * d, params, direction)


def stepper(rule: StepSize | None, default: StepSize | None, params: PyTree) -> Stepper:
    """The stepper of `rule`, or of `default` where the rule is None."""
    chosen = default if rule is None else rule
    chosen = StepRule() if chosen is None else as_step(chosen)
    return Stepper(chosen, chosen.init(params))


def step_sizes(solver: Any, *names: str) -> None:
    """For a solver's `__post_init__`: turn its fields `names` into step rules and check them.

    What already is a rule stays as it is: `dataclasses.replace` hands over the fields of a solver that was checked.

    Raises:
        InvalidInput: a number that is not positive and finite, or something else than a `StepSize`.
    """
    for name in names:
        given = getattr(solver, name)
        if not isinstance(given, StepRule):
            rule = as_step(given)
            check_step(f"{type(solver).__name__}.{name}", rule)
            object.__setattr__(solver, name, rule)


def schedules(solver: Any, *names: str) -> None:
    """`step_sizes` for fields whose size the method needs: numbers or schedules, no optax transformation."""
    step_sizes(solver, *names)
    for name in names:
        require_size(f"{type(solver).__name__}.{name}", getattr(solver, name))


def require_numbers(solver: Any, *names: str) -> None:
    """For a solver's `__post_init__`: check that its fields `names`, which stay constant, are positive numbers or None.

    Raises:
        InvalidInput: a schedule, an optax transformation, or a number that is not positive and finite.
    """
    for name in names:
        require_number(f"{type(solver).__name__}.{name}", getattr(solver, name))


def require_counts(solver: Any, **least: int) -> None:
    """For a solver's `__post_init__`: check that each field named is a whole number of at least the one given.

    Raises:
        InvalidInput: naming the field.
    """
    for name, low in least.items():
        value = getattr(solver, name)
        if not is_count(value, low):
            do = "Leave it out for the default."
            invalid(f"{type(solver).__name__}.{name}", value, f"a whole number >= {low}", do)


def require_size(name: str, rule: StepSize | None) -> None:
    """Raise `InvalidInput` where a rule must have a size but is an optax transformation."""
    if rule is not None and as_step(rule).transformation is not None:
        invalid(
            name, "an optax transformation", "a number > 0 or an optax schedule", "The method needs the step's size."
        )


def require_number(name: str, given: StepSize | None) -> None:
    """Raise `InvalidInput` where a setting is neither None nor a positive finite number."""
    if given is None:
        return
    rule = as_step(given)
    if rule.transformation is not None or rule.schedule is not None:
        kind = "an optax schedule" if rule.schedule is not None else "an optax transformation"
        invalid(name, kind, "a number > 0", "It stays constant during a run.")
    _check_value(name, rule.value, "a positive finite number")


@overload
def as_step(rule: StepSize) -> StepRule: ...


@overload
def as_step(rule: None) -> None: ...


def as_step(rule: StepSize | None) -> StepRule | None:
    """A `StepRule` from a number, a schedule or an optax transformation; None stays None."""
    if rule is None or isinstance(rule, StepRule):
        return rule
    if isinstance(rule, optax.GradientTransformation):
        return StepRule(transformation=rule)
    if callable(rule):
        return StepRule(schedule=rule)
    return StepRule(rule)


def check_step(name: str, rule: StepRule | None) -> None:
    """Raise `InvalidInput` where a concrete step size is not a positive finite number."""
    if rule is not None:
        _check_value(name, rule.value, "a positive finite number, an optax schedule or an optax transformation")


def _check_value(name: str, value: Any, expected: str) -> None:
    """Raise `InvalidInput` unless `value` is None, traced, or positive and finite."""
    if value is None or isinstance(value, Tracer):
        return
    number = isinstance(value, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not number or not np.all((np.asarray(value) > 0) & np.isfinite(np.asarray(value))):
        invalid(name, repr(value), expected, "Leave it out for the default.")
