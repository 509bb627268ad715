"""Arithmetic of pytrees."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

PyTree = Any


def unit(z: Array, axis: int | None = None) -> Array:
    """A power of two near the largest |entry| of z along `axis`, or of all; 1 where that is 0, infinite or NaN.

    Squares of z/unit neither overflow nor underflow where it matters, and a power of two changes no bits of the rest.
    """
    info = jnp.finfo(z.dtype)
    largest = lax.stop_gradient(jnp.max(jnp.abs(z), axis=axis, initial=0))
    power = lax.reduce_precision(largest, exponent_bits=info.nexp, mantissa_bits=0)
    safe = (largest > 0) & (largest < jnp.inf)
    return jnp.where(safe, jnp.minimum(power, float(2 ** (info.maxexp - 2))), 1).astype(z.dtype)


def norm(tree: PyTree) -> Array:
    """The 2-norm of all leaves together, shape [], right for entries of any size."""
    flat = ravel_pytree(tree)[0]
    if not jnp.issubdtype(flat.dtype, jnp.floating):
        return jnp.linalg.norm(flat)
    size = unit(flat)
    return jnp.linalg.norm(flat / size) * size


def row_norms(rows: Array) -> Array:
    """The 2-norm of each row of a matrix [m, n], shape [m], right for entries of any size."""
    size = unit(rows, 1)
    return jnp.linalg.norm(rows / size[:, None], axis=1) * size


def distance(a: PyTree, b: PyTree) -> Array:
    """|a - b|_2 over all leaves, shape []."""
    return norm(jax.tree.map(operator.sub, a, b))


def take(tree: PyTree, index: Any) -> PyTree:
    """Entries `index` of the first axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def join(*trees: PyTree) -> PyTree:
    """Stacked points, one after the other."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def repeat(point: PyTree, num: int) -> PyTree:
    """`num` copies of one point, stacked."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num, *leaf.shape)), point)


def poisoned(tree: PyTree, good: Array) -> PyTree:
    """`tree` where `good` [...], else NaN: a number that was not solved for is none. The axes of `good`, as `vmap`
    gives it some, are the first ones of every leaf; leaves are of floats.
    """

    def one(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        return jnp.where(jnp.reshape(good, good.shape + (1,) * (leaf.ndim - good.ndim)), leaf, jnp.nan)

    return jax.tree.map(one, tree)


def broadcast_like(prefix: PyTree, z: PyTree) -> PyTree:
    """`prefix`, of which one leaf may stand for many, broadcast to the structure, shapes and dtypes of z."""
    full = jax.tree.broadcast(prefix, z)
    return jax.tree.map(lambda b, leaf: jnp.broadcast_to(jnp.asarray(b, leaf.dtype), leaf.shape), full, z)


def strong(tree: PyTree) -> PyTree:
    """`tree` without weak types, under which JAX keeps what comes of plain Python numbers, as in jnp.full(2, 0.5).

    A weakly typed array has the same bits, and is another type to `jax.jit`: what is compiled for it is compiled again.
    """
    weak = lambda leaf: getattr(getattr(leaf, "aval", None), "weak_type", False)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype) if weak(leaf) else leaf, tree)
