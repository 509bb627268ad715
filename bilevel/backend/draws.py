"""Random directions shaped like a pytree."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.struct import invalid

PyTree = Any


DISTRIBUTIONS = ("gaussian", "sphere", "ball")


def perturbation(key: Array, like: PyTree, distribution: str, sigma: Any) -> PyTree:
    """A random q shaped like `like`: N(0, sigma^2 I), or uniform on the sphere or in the ball of radius sigma."""
    flat, unravel = ravel_pytree(like)
    key_direction, key_length = jax.random.split(key)
    q = jax.random.normal(key_direction, flat.shape, flat.dtype)
    if distribution != "gaussian":
        q = q / jnp.linalg.norm(q)
    if distribution == "ball":
        q = q * jax.random.uniform(key_length, (), flat.dtype) ** (1.0 / flat.size)
    return unravel(jnp.asarray(sigma, flat.dtype) * q)


def check_distribution(name: str, distribution: str) -> None:
    """Raise `InvalidInput` for an unknown distribution."""
    if distribution not in DISTRIBUTIONS:
        invalid(name, repr(distribution), f"one of {DISTRIBUTIONS}", "Choose the law of the perturbation q.")
