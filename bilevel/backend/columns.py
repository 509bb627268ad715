"""Matrices with a column for each entry of a pytree: one array for its raveled entries, or a block for each leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend.errors import invalid

PyTree = Any


def by_leaves(part: Any, like: PyTree) -> list | None:
    """The leaves of `part`, columns by the names of `like`'s leaves; None where it is one array for all of them."""
    if jax.tree_util.all_leaves([like]):
        return [part]
    try:
        leaves = jax.tree.structure(like).flatten_up_to(part)
    except ValueError:
        return None
    return leaves if all(leaf is None or hasattr(leaf, "shape") for leaf in leaves) else None


def columns(part: Any, like: PyTree, b: Any, dtype: Any) -> Array:
    """`part` as an array [rows, dim like] for the rows of b [rows]."""
    rows, leaves = jnp.shape(b)[0], by_leaves(part, like)
    if leaves is None and part is not None:
        return jnp.asarray(part)
    sizes = [jnp.size(leaf) for leaf in jax.tree.leaves(like)]
    blocks = zip(leaves or [None] * len(sizes), sizes, strict=True)
    full = [
        jnp.zeros((rows, size), dtype) if one is None else jnp.reshape(jnp.asarray(one), (rows, size))
        for one, size in blocks
    ]
    return full[0] if len(full) == 1 else jnp.concatenate([block.astype(dtype) for block in full], axis=1)


def check_columns(label: str, part: Any, like: PyTree, rows: tuple, optional: bool) -> None:
    """Check the columns of a `LinearCoupling` or a `Polyhedron` for the variable `like`."""
    leaves, size = by_leaves(part, like), sum(int(np.size(leaf)) for leaf in jax.tree.leaves(like))
    if part is None or leaves is None:
        if not (part is None and optional):
            check_shape(label, part, (*rows, size))
        return
    for (path, leaf), one in zip(jax.tree_util.tree_leaves_with_path(like), leaves, strict=True):
        whole = len(leaves) == 1 and np.shape(one) == (*rows, size)
        if one is not None and not whole:
            check_shape(f"{label}{jax.tree_util.keystr(path)}", one, (*rows, *np.shape(leaf)))


def check_shape(label: str, part: Any, shape: object) -> None:
    """Raise `InvalidInput` unless `part` is an array of finite numbers of that shape."""
    have = None if part is None else _shape(part)
    if have != shape:
        got = "None" if part is None else f"a {type(part).__name__}" if have is None else f"shape {have}"
        do = "Give A and b together; columns count raveled entries, or have the names of the leaves."
        invalid(label, got, f"shape {shape}, a row for each number of b", do)
    if not np.isfinite(np.asarray(part)).all():
        invalid(label, "a non-finite entry", "finite numbers", "Leave out rows without a bound.")


def _shape(part: Any) -> tuple | None:
    """The shape of an array; None for other pytrees."""
    try:
        return None if isinstance(part, dict) else np.shape(part)
    except ValueError:  # a tuple of arrays of several shapes
        return None
