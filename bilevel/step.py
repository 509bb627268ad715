"""Step rules: a float, an optax schedule or an optax gradient transformation, behind one interface.

A float stays a pytree leaf, so `vmap` over step sizes works; a schedule or a transformation is static.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bilevel.struct import invalid, static, struct

PyTree = Any


@struct
class StepRule:
    """Turns a direction d into an update: -value d, -schedule(count) d, or what an optax transformation makes of d."""

    value: Any = None
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

    def at(self, state: PyTree) -> tuple[Array | float, PyTree]:
        """(the step size now, next state); for a float or a schedule."""
        if self.schedule is not None:
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
                return self.schedule(state), state + 1
        return self.value, state


@functools.cache
def growth(power: float) -> Callable[[Array], Array]:
    """The schedule (k + 1)^power at step k; the same object each time, so that nothing compiles twice."""
    return lambda k: (k + 1.0) ** power


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


def stepper(rule: StepRule | None, default: Any, params: PyTree) -> Stepper:
    """The stepper of `rule`, or of the number `default` where the rule is None."""
    rule = StepRule(default) if rule is None else rule
    return Stepper(rule, rule.init(params))


def step_sizes(solver: Any, *names: str) -> None:
    """For a solver's `__post_init__`: turn its fields `names` into step rules and check them.

    What already is a rule stays as it is: JAX rebuilds solvers from tracers and placeholders.
    """
    for name in names:
        given = getattr(solver, name)
        if not isinstance(given, StepRule):
            rule = as_step(given)
            check_step(f"{type(solver).__name__}.{name}", rule)
            object.__setattr__(solver, name, rule)


def require_size(name: str, rule: StepRule | None) -> None:
    """Raise `InvalidInput` where a rule must have a size but is an optax transformation."""
    if rule is not None and rule.transformation is not None:
        invalid(
            name, "an optax transformation", "a number > 0 or an optax schedule", "The method needs the step's size."
        )


def require_number(name: str, rule: StepRule | None) -> None:
    """Raise `InvalidInput` where a setting that was checked by `step_sizes` is a schedule or a transformation."""
    if rule is None:
        return
    if rule.transformation is not None or rule.schedule is not None:
        kind = "an optax schedule" if rule.schedule is not None else "an optax transformation"
        invalid(name, kind, "a number > 0", "It stays constant during a run.")


def as_step(rule: Any) -> Any:
    """A `StepRule` from a float, a schedule (a function of the step count) or an optax transformation; None stays
    None.
    """
    if rule is None or isinstance(rule, StepRule):
        return rule
    if isinstance(rule, optax.GradientTransformation):
        return StepRule(transformation=rule)
    if callable(rule):
        return StepRule(schedule=rule)
    return StepRule(rule)


def check_step(name: str, rule: Any) -> None:
    """Raise `InvalidInput` where a concrete step size is not a positive finite number."""
    value = getattr(rule, "value", None)
    if value is None or isinstance(value, jax.core.Tracer):
        return
    number = isinstance(value, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not number or not np.all((np.asarray(value) > 0) & np.isfinite(np.asarray(value))):
        expected = "a positive finite number, an optax schedule or an optax transformation"
        invalid(name, repr(value), expected, "Leave it out for the default.")
