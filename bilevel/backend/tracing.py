"""What a traced program depends on."""

from typing import Any

import jax.extend.core


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
