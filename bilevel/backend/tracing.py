"""What a traced program depends on, and whether there is one."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def reached(traced: Any, marks: list[bool]) -> list[bool]:
    """Which outputs of a traced program depend on the marked inputs; inner loops and branches depend as a whole."""
    marked = {var for var, mark in zip(traced.invars, marks, strict=True) if mark}
    seen = lambda atom: not isinstance(atom, jax.extend.core.Literal) and atom in marked  # noqa: E731
    for equation in traced.eqns:
        inner = equation.params.get("jaxpr") if equation.primitive.name in ("jit", "pjit") else None
        inputs = [seen(atom) for atom in equation.invars]
        outputs = reached(inner.jaxpr, inputs) if inner is not None else [any(inputs)] * len(equation.outvars)
        marked |= {var for var, mark in zip(equation.outvars, outputs, strict=True) if mark}
    return [seen(atom) for atom in traced.outvars]


def under_trace(*values: Any) -> bool:
    """Whether JAX is tracing the caller: operations are staged, as under `jax.jit`, or one of `values` has a tracer in
    it, as under `jax.grad` and `jax.vmap`: among its leaves, or in what its functions close over.
    """
    return isinstance(jnp.zeros(()) + 0, Tracer) or any(_holds_tracer(value, set()) for value in values)


def _holds_tracer(value: Any, seen: set[int]) -> bool:
    if isinstance(value, Tracer):
        return True
    if id(value) in seen or isinstance(value, jax.Array | np.ndarray | type | str | bytes):
        return False
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, types.FunctionType):
        parts = [value.__defaults__, value.__kwdefaults__, *(_content(cell) for cell in value.__closure__ or ())]
    elif isinstance(value, types.MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif dataclasses.is_dataclass(value):
        parts = [vars(value)]
    elif isinstance(value, dict):
        parts = [*value.values()]
    elif isinstance(value, tuple | list):
        parts = [*value]
    elif hasattr(value, "__wrapped__"):
        parts = [value.__wrapped__]
    return any(_holds_tracer(part, seen) for part in parts)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None
