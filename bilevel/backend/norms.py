"""Norms of vectors, right for entries of any size, in one pass.

The sum of squares is kept three times, of the entries whose squares are safe, and of the smaller and larger ones in
units of their own: Blue (1978), with the limits of Anderson (2017), "Algorithm 978: Safe scaling in the Level 1 BLAS".
As one reduction it is two kernels; to divide by the largest entry first takes seven, of which each costs some 10 ms
of compilation (jaxlib 0.10.2 on a CPU), and loops have several norms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ONE_PASS = 2**16  # entries up to which one pass, which the compiler does not vectorise, is as fast as two


class _Limits(NamedTuple):
    """Entries from `small` to `large` have safe squares; smaller ones times `up`, larger ones times `down`, too."""

    small: float
    large: float
    up: float
    down: float


def _limits(dtype: np.dtype) -> _Limits:
    """Of Anderson's equations for radix 2, with digits of the fraction beside the leading one."""
    info = jnp.finfo(dtype)
    least, most, digits = info.minexp, info.maxexp, info.nmant + 1
    return _Limits(
        small=2.0 ** -(-least // 2),
        large=2.0 ** ((most - digits) // 2),
        up=2.0 ** -((least - digits) // 2),
        down=2.0 ** -((most + digits + 1) // 2),
    )


def unit(z: Array, axis: int | None = None) -> Array:
    """A power of two near the largest |entry| of z along `axis`, or of all; 1 where that is 0, infinite or NaN.

    Squares of z/unit neither overflow nor underflow where it matters, and a power of two changes no bits of the rest.
    """
    info = jnp.finfo(z.dtype)
    largest = lax.stop_gradient(jnp.max(jnp.abs(z), axis=axis, initial=0))
    power = lax.reduce_precision(largest, exponent_bits=info.nexp, mantissa_bits=0)
    safe = (largest > 0) & (largest < jnp.inf)
    return jnp.where(safe, jnp.minimum(power, float(2 ** (info.maxexp - 2))), 1).astype(z.dtype)


def norms_and_sums(vectors: Sequence[Array], terms: Sequence[Array]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """(the 2-norm of each of `vectors`, the sum of each of `terms`), arrays of one shape and dtype, real floats, along
    their last axis: all in one reduction, since each is a kernel of its own.
    """
    dtype = vectors[0].dtype
    wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)  # half precision has no room for units
    sizes = [jnp.abs(z.astype(wide)) for z in vectors]
    if sizes[0].shape[-1] > ONE_PASS:
        long = [_long_norm(size).astype(dtype) for size in sizes]
        return tuple(long), tuple(jnp.sum(term, -1) for term in terms)
    limits = _limits(wide)
    squares = [part**2 for size in sizes for part in _parts(size, limits)]
    found = _sums([*squares, *(term.astype(wide) for term in terms)])
    triples = zip(found[0 : len(squares) : 3], found[1 : len(squares) : 3], found[2 : len(squares) : 3], strict=True)
    joined = (_join(*triple, limits) for triple in triples)
    return tuple(size.astype(dtype) for size in joined), tuple(part.astype(dtype) for part in found[len(squares) :])


@jax.custom_jvp
def norms(*vectors: Array) -> tuple[Array, ...]:
    """The 2-norm of each of some arrays of one shape and dtype, real floats, along their last axis."""
    return norms_and_sums(vectors, ())[0]


@norms.defjvp
def _norms_jvp(vectors: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """<z, dz>/|z|; NaN at z = 0, where there is no derivative."""
    sizes = norms(*vectors)
    slopes = (jnp.sum(z / size[..., None] * dz, -1) for z, size, dz in zip(vectors, sizes, tangents, strict=True))
    return sizes, tuple(slopes)


def _long_norm(size: Array) -> Array:
    """By a unit first, in two passes that the compiler vectorises."""
    largest = unit(size, -1)
    return jnp.linalg.norm(size / largest[..., None], axis=-1) * largest


def _parts(size: Array, limits: _Limits) -> tuple[Array, Array, Array]:
    """The entries >= 0 with safe squares, and the smaller and the larger ones in their units; 0 for others."""
    small, large = size < limits.small, size > limits.large
    return (
        jnp.where(small | large, 0, size),
        jnp.where(small, size * limits.up, 0),
        jnp.where(large, size * limits.down, 0),
    )


def _sums(parts: Sequence[Array]) -> Sequence[Array]:
    """Along the last axis, all in one reduction.

    Where arrays may be split over devices it is the sum of one array, so that devices exchange partial sums once:
    XLA makes an exchange for each operand of a reduction, and several that do not wait for each other come to a halt
    on a CPU that plays eight devices on two cores (jaxlib 0.10.2).
    """
    if jax.device_count() > 1:
        return list(jnp.sum(jnp.stack(parts), axis=-1))
    nought = jnp.zeros((), parts[0].dtype)
    add = lambda a, b: [p + q for p, q in zip(a, b, strict=True)]  # noqa: E731
    return lax.reduce(list(parts), [nought] * len(parts), add, (parts[0].ndim - 1,))


def _join(middle: Array, low: Array, high: Array, limits: _Limits) -> Array:
    """The norm, of the three sums of squares, in a unit in which what counts is safe, with one root."""
    enough = ONE_PASS * (limits.small / float(jnp.finfo(middle.dtype).eps)) ** 2  # the small entries do not count
    scale = jnp.where(middle > enough, jnp.ones_like(middle), limits.up)
    scale = jnp.where(high > 0, limits.down, scale)
    total = jnp.where(scale > 1, low, high) + middle * scale * scale
    return jnp.sqrt(total) / scale


def gram(rows: Array) -> Array:
    """The products of vectors of one length, shape [k, k], by one matrix product in the precision of its arguments."""
    return jnp.matmul(rows, rows.T, precision=lax.Precision.HIGHEST)
