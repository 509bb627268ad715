"""Arithmetic of pytrees."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.norms import norms

PyTree = Any


def norm(tree: PyTree) -> Array:
    """The 2-norm of all leaves together, shape [], right for entries of any size."""
    flat = ravel_pytree(tree)[0]
    return norms(flat)[0] if jnp.issubdtype(flat.dtype, jnp.floating) else jnp.linalg.norm(flat)


def row_norms(rows: Array) -> Array:
    """The 2-norm of each row of a matrix [m, n], shape [m], right for entries of any size."""
    return norms(rows)[0]


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
