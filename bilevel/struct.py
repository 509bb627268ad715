"""Frozen dataclasses that are JAX pytrees, and the one error for bad input.

Fields are pytree children unless made with `static()`. Static fields are part of the compilation key: loop lengths,
choices, functions. Instances compare by identity, because equality of arrays is not a truth value.
"""

import dataclasses
import operator
from collections.abc import Callable
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
    names = [(field.name, field.metadata.get("static", False)) for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    data = tuple(name for name, is_static in names if not is_static)
    meta = tuple(name for name, is_static in names if is_static)
    keys = tuple(map(jax.tree_util.GetAttrKey, data))

    of_data, of_meta = _getter(data), _getter(meta)

    def flatten(instance: T) -> tuple[tuple, tuple]:
        fields = vars(instance)
        return of_data(fields), of_meta(fields)

    def flatten_with_keys(instance: T) -> tuple[tuple, tuple]:
        children, constants = flatten(instance)
        return tuple(zip(keys, children, strict=True)), constants

    def unflatten(constants: tuple, children: tuple) -> T:
        instance = object.__new__(cls)
        fields = vars(instance)
        fields.update(zip(data, children, strict=True))
        fields.update(zip(meta, constants, strict=True))
        return instance

    # Not jax.tree_util.register_dataclass: to it two classes with the same fields are the same structure (jaxlib 0.10.2
    # to 0.12.0.1), so that jit may take a compiled SOBA for SABA whenever their hashes collide.
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _getter(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple]:
    """Fields -> the values of `names`; a call of compiled code flattens some ten instances, so its time counts."""
    if len(names) > 1:
        return operator.itemgetter(*names)
    return (lambda fields: (fields[names[0]],)) if names else lambda fields: ()


class InvalidInput(ValueError):
    """Bad input. The message says which argument, what was got, what was expected, and what to do."""


def invalid(argument: str, got: object, expected: str, do: str) -> NoReturn:
    """Raise `InvalidInput` for `argument`."""
    raise InvalidInput(f"{argument}: got {got}; expected {expected}. {do}")
