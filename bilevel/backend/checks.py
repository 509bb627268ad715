"""Checks of what users give, shared by the sets and the sources of data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.backend.errors import invalid

PyTree = Any


def check_prefix(name: str, bound: PyTree, like: PyTree) -> None:
    """Raise `InvalidInput` where `bound` does not broadcast to the leaves of `like`."""
    try:
        full = jax.tree.broadcast(bound, like)
        jax.tree.map(lambda b, leaf: np.broadcast_to(np.asarray(b), np.shape(leaf)), full, like)
    except ValueError:
        got, want = (f"shapes {jax.tree.map(np.shape, tree)}" for tree in (bound, like))
        invalid(name, got, f"a scalar or something that broadcasts to {want}", "Reshape the bound.")


def check_numbers(name: str, value: PyTree) -> None:
    """Raise `InvalidInput` where a leaf of `value` is no number, or NaN; infinity passes."""
    for leaf in jax.tree.leaves(value):
        if not jnp.issubdtype(np.asarray(leaf).dtype, jnp.number):
            invalid(name, type(leaf).__name__, "numbers", "Give one number, or an array of them.")
        if np.isnan(np.asarray(leaf)).any():
            invalid(name, "NaN", "numbers", "Remove the NaN; use infinity for a missing bound.")


def check_rows(name: str, A: np.ndarray, b: np.ndarray, like: PyTree) -> None:
    """Raise `InvalidInput` where A z <= b does not suit a raveled z shaped like `like`; name: with %s for A or b."""
    size = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(like))
    if A.ndim != 2 or A.shape[1] != size:
        do = "One column per entry of the raveled point."
        invalid(name % "A", f"shape {A.shape}", f"[rows, {size}]", do)
    if b.shape != A.shape[:1]:
        invalid(name % "b", f"shape {b.shape}", f"[{A.shape[0]}]", "One bound per row of A.")
    for part, value in (("A", A), ("b", b)):
        if not np.isfinite(value).all():
            invalid(name % part, "a non-finite entry", "finite numbers", "Leave out rows without a bound.")


def check_finite(name: str, arrays: PyTree) -> None:
    """Raise `InvalidInput`, naming the leaf, where one holds anything but finite numbers, booleans or random keys."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        label = f"{name}{jax.tree_util.keystr(path)}"
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_, jax.dtypes.extended)):
            do = "Encode it in numbers, and pass them as arrays."
            invalid(label, f"dtype {dtype}", "arrays of numbers or booleans", do)
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact) and not np.isfinite(np.asarray(leaf)).all():
            where = np.argwhere(~np.isfinite(np.asarray(leaf)))[0].tolist()
            invalid(label, f"a non-finite datum at index {where}", "finite numbers", "Clean or drop the sample.")
