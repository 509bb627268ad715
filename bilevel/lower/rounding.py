"""What rounding may make of the residuals R(x, y) and f_y - R_y' v of a lower level without constraints."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.backend.tree import norm
from bilevel.lower.sides import UNITS, sign

PyTree = Any
SEEN, SEEN_OF_ROWS, SEEN_OF_FACES, SEEN_OF_MAPS = 88.0, 17.5, 6.0, 24.0  # what is supposed, over what one R has
MOST_NOISE = 64.0  # what a step leaves beyond that is g's third derivative, which the gradient at its end knows


class Rounding(NamedTuple):
    """The sizes of the terms that cancel in residuals, from a factor of R_y."""

    h: Array | None
    """[n], the root of the diagonal of g_yy, whose entries are at most h h'; None for a map T with |T_y| about 1."""
    size_x: Array
    """[], |x|."""

    def lower(self, y: Array, v: Array, cross: Array) -> Array:
        """Of R, [n]: the terms of R_y y and of R_x x, |R_x| as seen in cross = R_x' v, [dim x]."""
        size = norm(v)
        by_x = self.size_x * norm(cross) / jnp.where(size > 0, size, 1)
        return self._unit(y) * (self._product(y) + by_x)

    def worst(self, y: Array, v: Array, cross: Array) -> Array:
        """The same with the signs of v, along which f changes, [n]."""
        return sign(v) * self.lower(y, v, cross)

    def adjoint(self, v: Array) -> Array:
        """Of f_y - R_y' v, [n]."""
        return self._unit(v) * self._product(v)

    def _product(self, v: Array) -> Array:
        return jnp.abs(v) + norm(v) if self.h is None else (self.h @ jnp.abs(v)) * self.h

    def _unit(self, v: Array) -> float:
        return UNITS * float(jnp.finfo(v.dtype).eps)


def rounding_of(factor: PyTree, minimize: bool, size_x: Array) -> Rounding | None:
    """By a factor of `lower.newton`; None where there is none."""
    if not jax.tree.leaves(factor):
        return None
    h = None
    if minimize:  # beside the triangle the factor is anything; the sums are g_yy's own diagonal, of safe size
        h = jnp.sqrt(jnp.sum(jnp.triu(factor[0]) ** 2, axis=0))
    return Rounding(h, size_x)


def wrong_lower(rounding: Rounding | None, R: Array, y: Array, v: Array, cross: Array) -> Array:
    """R [n] off by what rounding may make of it, with signs of v, along which f changes."""
    return R if rounding is None else R + rounding.worst(y, v, cross)


def seen_noise(rounding: Rounding, R: Array, y: Array, v: Array, cross: Array) -> Array:
    """By how much more rounding makes of R(x, y) [n] than `wrong_lower` supposes, from 1 to `MOST_NOISE`, [].

    Terms of R that move with neither x nor y, or no longer, as those of a saturated function, are in no derivative. But
    R is seen after a Newton step from `wrong_lower` (R [n], there): it is what that took off, but for rounding, of
    which one residual has about 1/100 of what is supposed of the worst where the terms are known.
    """
    off = rounding.worst(y, v, cross)
    return noise_of(R + off, off, SEEN_OF_MAPS if rounding.h is None else SEEN)


def noise_of(left: Array, off: Array, factor: float = SEEN) -> Array:
    """The same of what a step with R off by `off` [n] left of it, `left` [n], which would be rounding alone, []."""
    size = norm(off)
    return jnp.clip(factor * norm(left) / jnp.where(size > 0, size, 1), 1, MOST_NOISE)


def underflow(size: Array, u: Array) -> Array:
    """What entries of u [n] below the smallest normal number may cost terms R_x' u of this `size`, []."""
    tiny, length = jnp.finfo(u.dtype).tiny, norm(u)
    return jnp.where(length > 0, u.size * tiny / jnp.where(length > 0, length, 1) * size, 0)


def wrong_adjoint(rounding: Rounding | None, r_v: Array, v: Array, moved: Array) -> Array:
    """r_v [n] likewise, with the signs of where y moved, which shows a soft direction, so that it adds to r_v there."""
    if rounding is None:
        return r_v
    return r_v + sign(moved @ r_v) * sign(moved) * rounding.adjoint(v)
