"""NumPy inside of compiled functions, in the precision of the arrays themselves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

PyTree = Any


def on_host(function: Callable[..., PyTree], shapes: PyTree, *args: PyTree) -> PyTree:
    """function(*args), of NumPy arrays, with results of the `shapes` (`jax.ShapeDtypeStruct`), whose dtypes they get.

    For pure functions; under vmap they are called once for each lane. A callback of JAX's runs in a thread of its own,
    where `jax.enable_x64(True)` of the caller does not hold, and cuts float64 to float32 on its way in and out (jax
    0.10). So what is larger than four bytes travels as pairs of whole numbers.
    """
    leaves, structure = jax.tree.flatten(args)
    dtypes = [jnp.asarray(leaf).dtype for leaf in leaves]
    expected, out_structure = jax.tree.flatten(shapes)

    def call(*sent: Any) -> tuple[np.ndarray, ...]:
        given = [_unpacked(np.asarray(part), dtype) for part, dtype in zip(sent, dtypes, strict=True)]
        found = jax.tree.leaves(function(*structure.unflatten(given)))
        return tuple(_packed(np.asarray(part, like.dtype)) for part, like in zip(found, expected, strict=True))

    announced = [jax.eval_shape(_bits, like) for like in expected]
    found = jax.pure_callback(call, announced, *map(_bits, leaves), vmap_method="sequential")
    return out_structure.unflatten([_from_bits(part, like.dtype) for part, like in zip(found, expected, strict=True)])


def _bits(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint32) if leaf.dtype.itemsize == 8 else leaf


def _from_bits(part: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(part, dtype) if np.dtype(dtype).itemsize == 8 else part


def _packed(part: np.ndarray) -> np.ndarray:
    return part.reshape(-1).view(np.uint32).reshape(*part.shape, 2) if part.dtype.itemsize == 8 else part


def _unpacked(part: np.ndarray, dtype: Any) -> np.ndarray:
    return part.reshape(-1).view(dtype).reshape(part.shape[:-1]) if np.dtype(dtype).itemsize == 8 else part
