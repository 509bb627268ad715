"""Functions of users that return more than the library asks for."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import Array

PyTree = Any


@dataclasses.dataclass(frozen=True)
class WithAux:
    """What `has_aux=True` makes of a function that returns (value, aux): one that returns the value."""

    function: Callable[[PyTree, PyTree, PyTree], tuple[Array, PyTree]]

    def __call__(self, x: PyTree, y: PyTree, batch: PyTree) -> Array:
        """The value, shape []."""
        return self.function(x, y, batch)[0]


def keep_value(instance: Any, name: str, has_aux: bool) -> None:
    """For a `__post_init__`: let the function in field `name` return its value alone."""
    if has_aux and not returns_aux(instance, name):
        object.__setattr__(instance, name, WithAux(getattr(instance, name)))


def returns_aux(instance: Any, name: str) -> bool:
    """Whether the function in field `name` returns an aux; one that follows from other fields does not."""
    return isinstance(vars(instance).get(name), WithAux)
