"""Frozen dataclasses that are JAX pytrees, and the one error for bad input.

Fields are pytree children unless made with `static()`. Static fields are part of the compilation key: loop lengths,
choices, functions. Instances compare by identity, because equality of arrays is not a truth value.
"""

import dataclasses
from typing import Any, NoReturn, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A dataclass field that is compile-time constant: hashable, never traced."""
    return dataclasses.field(default=default, metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, dataclasses.field))
def struct(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass registered as a pytree."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    jax.tree_util.register_dataclass(cls)  # pyright: ignore[reportArgumentType]
    return cls


class InvalidInput(ValueError):
    """Bad input. The message says which argument, what was got, what was expected, and what to do."""


def invalid(argument: str, got: object, expected: str, do: str) -> NoReturn:
    """Raise `InvalidInput` for `argument`."""
    raise InvalidInput(f"{argument}: got {got}; expected {expected}. {do}")
