"""Checks of what users give, shared by the problem, the sets and the sources of data."""

from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.backend.errors import InvalidInput, invalid

PyTree = Any


def is_count(value: object, least: int) -> TypeGuard[int]:
    """Whether a value is a whole number, Python's or NumPy's, of at least `least`; a truth value is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least


def check_prefix(name: str, bound: PyTree, like: PyTree) -> None:
    """Raise `InvalidInput` where `bound` does not broadcast to the leaves of `like`."""
    try:
        full = jax.tree.broadcast(bound, like)
        jax.tree.map(lambda b, leaf: np.broadcast_to(np.asarray(b), np.shape(leaf)), full, like)
    except ValueError:
        got, want = (f"shapes {jax.tree.map(np.shape, tree)}" for tree in (bound, like))
        invalid(name, got, f"a scalar or something that broadcasts to {want}", "Reshape the bound.")


def check_numbers(name: str, value: PyTree, nan: bool = False) -> None:
    """Raise `InvalidInput` where a leaf of `value` is no number, or NaN unless `nan`; infinity passes."""
    for leaf in jax.tree.leaves(value):
        if not jnp.issubdtype(np.asarray(leaf).dtype, jnp.number):
            invalid(name, type(leaf).__name__, "numbers", "Give one number, or an array of them.")
        if not nan and np.isnan(np.asarray(leaf)).any():
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


def check_callable(name: str, value: object, signature: str) -> None:
    """Raise `InvalidInput` where `value` is no function."""
    if not callable(value):
        invalid(name, type(value).__name__, f"a function {signature}", "Pass the function itself.")


def check_dtypes(what: str, x: PyTree, y: PyTree, dense_up_to: int = 0) -> None:
    """Raise `InvalidInput` where x and y are not of one floating-point dtype, weakly typed numbers aside, or of half
    precision where factors of matrices for y are made, for `dense_up_to` unknowns at most: LAPACK has them in single
    and double precision alone.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves((x, y))]
    names = sorted({str(leaf.dtype) for leaf in leaves if not leaf.weak_type})
    do = "Make init return one of these in all leaves; the data may have others."
    if len(names) > 1:
        invalid(f"x and y ({what})", f"dtypes {' and '.join(names)}", "one dtype, float32 or float64", do)
    floating = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
    half = floating and any(np.dtype(leaf.dtype).itemsize < 4 for leaf in leaves)
    if not floating or (half and sum(np.size(leaf) for leaf in jax.tree.leaves(y)) <= dense_up_to):
        got = " and ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        invalid(f"x and y ({what})", f"dtype {got}", "float32 or float64", do)


def check_value(name: str, value: Any, y: PyTree) -> None:
    """Raise `InvalidInput` where an objective's value is not a float, or is of double precision while y is not: loops
    carry values beside y.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        invalid(name, f"dtype {value.dtype}", "a floating-point dtype", "Compute the objective in floats.")
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(y)}
    if value.dtype == jnp.float64 and kinds != {"float64"}:
        do = "Cast the data to float32, or let init return float64."
        invalid(name, f"dtype float64 for y of {' and '.join(sorted(kinds))}", "y's dtype", do)


def check_point(name: str, point: PyTree, may_be_empty: bool = False) -> None:
    """Raise `InvalidInput` unless `point` is a pytree of finite float arrays, with one number at least or, where it
    `may_be_empty`, an array of none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(point)
    if not leaves:
        do = "Return the variables from init, jnp.zeros(0) for an x that has none."
        invalid(name, "an empty pytree", "at least one float array", do)
    for path, leaf in leaves:
        label = f"{name}{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            invalid(label, type(leaf).__name__, "a float array", "Use jnp.asarray(value, float).")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            do = "Convert it: jnp.asarray(value, float)."
            invalid(label, f"dtype {leaf.dtype}", "a floating-point dtype", do)
        if not np.isfinite(np.asarray(leaf)).all():
            invalid(label, "a non-finite entry", "finite numbers", "Start from a finite point.")
    if not may_be_empty and not sum(leaf.size for _, leaf in leaves):
        invalid(name, "no entries", "at least one number", "Return the variables from init.")


def shape_of(name: str, function: Callable, *args: PyTree) -> PyTree:
    """The shapes that `function` gives at `args`; `InvalidInput` where it fails."""
    try:
        return jax.eval_shape(function, *args)
    except InvalidInput:
        raise
    except Exception as error:
        shapes = [jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", arg) for arg in args]
        invalid(
            name, f"{type(error).__name__}: {error}", f"a function of arguments shaped {shapes}",
            "Check the shapes and dtypes of init, of the data and in the function.",
        )  # fmt: skip


def check_map(name: str, T: Callable, x: PyTree, y: PyTree, batch: PyTree) -> None:
    """Raise `InvalidInput` unless T(x, y, batch) is shaped like y."""
    out = shape_of(name, T, x, y, batch)
    if jax.tree.structure(out) != jax.tree.structure(y):
        got, want = jax.tree.structure(out), jax.tree.structure(y)
        invalid(name, f"structure {got}", f"y's structure {want}", "Return a pytree like y.")
    for (path, have), want in zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(y), strict=True):
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            invalid(
                f"{name}{jax.tree_util.keystr(path)}", f"{have.dtype}{list(have.shape)}",
                f"{want.dtype}{list(want.shape)} as y", "Return a pytree like y.",
            )  # fmt: skip


def check_like(name: str, value: PyTree, like: PyTree, source: str) -> None:
    """Raise `InvalidInput` where `value` differs from `like` in structure, shapes or dtypes."""
    got, want = (jax.tree.map(_kind, tree) for tree in (value, like))
    if got != want:
        invalid(name, got, f"{want}, as {source}", "Reshape or convert it.")


def _kind(leaf: Any) -> str:
    """The dtype and shape of a number or an array; the type of anything else."""
    if isinstance(leaf, bool | int | float | complex) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
        return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
    return type(leaf).__name__
