"""Evenly spread points of the cube (0, 1)^dim: scrambled Sobol nets and an additive recurrence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BITS = 30
LARGEST = 21_201  # dimensions of SciPy's table


def sobol(key: Array, num: int, dim: int, dtype: Any) -> Array:
    """`num` points of a scrambled Sobol sequence in (0, 1)^dim, shape [num, dim]: `shifted` at random."""
    return shifted(jax.random.uniform(key, (dim,), dtype), num)


def shifted(shift: Array, num: int) -> Array:
    """`num` points of a Sobol sequence in (0, 1)^dim, [num, dim], moved by the numbers `shift` [dim] in [0, 1).

    SciPy's linear matrix scramble, fixed and made when the function is traced, and a digital shift, the bits of
    `shift`: the points of a Sobol net stay a net, and each one is uniform where `shift` is. In more than `LARGEST`
    dimensions, where a few points are no more even than random ones, the net is one of random numbers.
    """
    dim, dtype = shift.size, shift.dtype
    if dim > LARGEST:
        net = jax.random.bits(jax.random.key(0), (num, dim), jnp.uint32) >> (32 - BITS)
    else:
        from scipy.stats import qmc

        whole = qmc.Sobol(dim, scramble=True, bits=BITS, rng=0).random_base2(int(np.ceil(np.log2(max(num, 1)))))[:num]
        net = jnp.asarray((whole * 2**BITS).astype(np.uint32))
    digits = jnp.asarray(shift * 2**BITS, jnp.uint32)
    return (jnp.asarray(net ^ digits[None], dtype) + jnp.asarray(0.5, dtype)) / 2**BITS


def kronecker(num: int, dim: int, dtype: Any) -> Array:
    """`num` points of an additive recurrence in (0, 1)^dim, [num, dim]: fixed, evenly spread, and no Sobol points.

    u_i = frac(1/2 + i a), a_j = r^-j with r > 1 the root of r^(dim + 1) = r + 1: the golden ratio for dim = 1.
    """
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (dim + 1))
    steps = root ** -np.arange(1.0, dim + 1)
    return jnp.asarray(np.mod(0.5 + np.arange(1, num + 1)[:, None] * steps, 1.0), dtype)
