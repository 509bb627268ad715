"""Frozen dataclasses that are JAX pytrees, and the one error for bad input.

Fields are pytree children unless made with `static()`. Static fields are part of the compilation key: loop lengths,
choices, functions. Instances compare by identity, because equality of arrays is not a truth value.
"""

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, dataclass_transform, overload

import jax
import numpy as np

from bilevel.backend.errors import InvalidInput as InvalidInput
from bilevel.backend.errors import invalid as invalid

T = TypeVar("T")


def static(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A dataclass field that is compile-time constant: hashable, never traced."""
    return dataclasses.field(default=default, metadata={"static": True}, **kwargs)


def derived(compute: Callable[[Any], Any], *, init: Literal[False] = False) -> Any:
    """An inherited field that this class computes from its other ones: neither an argument nor a leaf of it.

    Args:
        compute: instance -> the field's value, called at every access.
        init: False, for type checkers, which then leave the field out of the constructor.
    """
    return dataclasses.field(init=init, repr=False, metadata={"derived": compute})


@overload
@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, derived, dataclasses.field))
def struct(cls: type[T], /) -> type[T]: ...


@overload
@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, derived, dataclasses.field))
def struct(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]: ...


def struct(cls: type[T] | None = None, /, *, kw_only: bool = False) -> Any:
    """Make `cls` a frozen dataclass registered as a pytree.

    With `kw_only` its arguments go by name: the settings of a solver, whose order nobody should have to know.
    """
    if cls is None:
        return functools.partial(_make, kw_only=kw_only)
    return _make(cls, kw_only=kw_only)


def _make(cls: type[T], kw_only: bool) -> type[T]:
    cls = dataclasses.dataclass(frozen=True, eq=False, kw_only=kw_only)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    if counts := [field.name for field in fields if field.metadata.get("static", False)]:
        _plain_numbers(cls, counts)
    if fields and all(field.kw_only for field in fields):
        _accept_old(cls)
    for field in fields:
        if "derived" in field.metadata:
            setattr(cls, field.name, property(field.metadata["derived"]))
    _register(cls)
    return cls


def _plain_numbers(cls: type, names: list[str]) -> None:
    """Let the static fields `names` of `cls` be given as NumPy's whole numbers: they become Python's, since NumPy's
    have a dtype of their own that a promotion would have to respect.
    """
    init: Any = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        init(self, *args, **settings)
        for name in names:
            value = vars(self).get(name)
            if isinstance(value, np.integer):
                object.__setattr__(self, name, int(value))

    cls.__init__ = __init__


def _register(cls: type) -> None:
    """Register the dataclass `cls` as a pytree."""
    own = [field for field in dataclasses.fields(cls) if "derived" not in field.metadata]
    names = [(field.name, field.metadata.get("static", False)) for field in own]
    data = tuple(name for name, is_static in names if not is_static)
    meta = tuple(name for name, is_static in names if is_static)
    keys = tuple(map(jax.tree_util.GetAttrKey, data))

    of_data, of_meta = _getter(data), _getter(meta)

    def flatten(instance: Any) -> tuple[tuple, tuple]:
        fields = vars(instance)
        return of_data(fields), of_meta(fields)

    def flatten_with_keys(instance: Any) -> tuple[tuple, tuple]:
        children, constants = flatten(instance)
        return tuple(zip(keys, children, strict=True)), constants

    def unflatten(constants: tuple, children: Iterable[Any]) -> Any:
        instance = object.__new__(cls)
        fields = vars(instance)
        fields.update(zip(data, children, strict=True))
        fields.update(zip(meta, constants, strict=True))
        return instance

    # Not jax.tree_util.register_dataclass: to it two classes with the same fields are the same structure (jaxlib 0.10.2
    # to 0.12.0.1), so that jit may take a compiled SOBA for SABA whenever their hashes collide.
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


def _accept_old(cls: type) -> None:
    """Let `cls` take its arguments as version 0.1.0 did, by position and by old names, with a `DeprecationWarning`.

    Old names are in its class attribute `renamed`, {old: new}; they are attributes of the instances, too.
    """
    init: Any = cls.__init__
    order = tuple(field.name for field in dataclasses.fields(cls))
    renamed: Mapping[str, str] = getattr(cls, "renamed", {})

    @functools.wraps(init)  # inspect.signature then sees the arguments that are keyword-only
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        if len(args) > len(order):
            raise TypeError(f"{cls.__name__} has {len(order)} settings, all by name; got {len(args)} by position.")
        by_position = dict(zip(order, args, strict=False))
        if twice := by_position.keys() & settings.keys():
            raise TypeError(f"{cls.__name__} got {', '.join(sorted(twice))} twice, by position and by name.")
        if by_position:
            _deprecated(f"{cls.__name__} takes its settings by name: {', '.join(f'{name}=' for name in by_position)}.")
        by_old_name = {renamed[name]: settings.pop(name) for name in renamed if name in settings}
        for old, new in renamed.items():
            if new in by_old_name:
                _deprecated(f"{cls.__name__}.{old} is {new} now.")
        # The old name wins: `dataclasses.replace(solver, old=...)` hands over the present value under the new one.
        init(self, **by_position, **{**settings, **by_old_name})

    cls.__init__ = __init__
    for old, new in renamed.items():
        setattr(cls, old, property(functools.partial(_old_attribute, old=old, new=new)))


def _old_attribute(instance: Any, old: str, new: str) -> Any:
    _deprecated(f"{type(instance).__name__}.{old} is {new} now.")
    return getattr(instance, new)


def _deprecated(what: str) -> None:
    """Warn in the caller's caller's name."""
    warnings.warn(f"{what} The old way goes in the next version.", DeprecationWarning, stacklevel=3)


def _getter(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple]:
    """Fields -> the values of `names`; a call of compiled code flattens some ten instances, so its time counts."""
    if len(names) > 1:
        return operator.itemgetter(*names)
    return (lambda fields: (fields[names[0]],)) if names else lambda fields: ()
