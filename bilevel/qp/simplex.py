"""The point of a simplex nearest to a given one, with a derivative."""

import jax
import jax.numpy as jnp
import optax.projections
from jax import Array


@jax.custom_jvp
def nearest_on_simplex(flat: Array, scale: Array) -> Array:
    """The point of {z >= 0 : sum z = scale} nearest to `flat` [n]; weights that are rounding errors are 0."""
    flat = flat - jnp.max(flat)  # changes nothing but rounding: far points keep their digits
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer positions and floats, in its derivative as well
        moved = jnp.asarray(optax.projections.projection_simplex(flat, scale), flat.dtype)
    return jnp.where(moved > 8 * jnp.finfo(flat.dtype).eps * scale, moved, 0)  # rounding is no positive weight


@nearest_on_simplex.defjvp
def _jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    moved = nearest_on_simplex(*primals)
    free = (moved > 0).astype(moved.dtype)
    change, by_scale = tangents
    return moved, free * (change + (by_scale - jnp.sum(free * change)) / jnp.sum(free))
