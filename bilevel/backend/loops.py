"""Loops that stand for something else."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax

T = TypeVar("T")


def once_if(wanted: Array, update: Callable[[T], T], value: T) -> T:
    """`update(value)` where `wanted` [], else `value`: a loop of at most one pass.

    In place of `lax.cond`, which under vmap becomes a select, so that what is rarely wanted is always computed, for
    every lane; the loop's body runs where some lane wants it.
    """

    def body(carry: tuple[Array, T]) -> tuple[Array, T]:
        return jnp.zeros_like(wanted), update(carry[1])

    return lax.while_loop(lambda carry: carry[0], body, (wanted, value))[1]
