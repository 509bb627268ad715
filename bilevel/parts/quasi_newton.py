"""Limited-memory BFGS on vectors of which some entries are fixed.

Reference: Nocedal. Updating quasi-Newton matrices with limited storage. Mathematics of Computation 35, 1980. Two-metric
projection: Bertsekas. Projected Newton methods for optimization problems with simple constraints. SIAM Journal on
Control and Optimization 20, 1982.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Pairs(NamedTuple):
    """The last steps s and changes of the gradient z, newest first; zeros where there are none yet."""

    s: Array
    """Shape [m, n]."""
    z: Array
    """Likewise."""


def none_yet(like: Array, num: int) -> Pairs:
    """No pairs, with room for `num` of them, for vectors like `like` [n]."""
    nothing = jnp.zeros((num, like.size), like.dtype)
    return Pairs(nothing, nothing)


def pushed(pairs: Pairs, s: Array, z: Array) -> Pairs:
    """With a new pair, without the oldest; as it was where s is 0."""
    moved = jnp.any(s != 0)
    push = lambda old, new: jnp.where(moved, jnp.concatenate([new[None], old[:-1]]), old)  # noqa: E731
    return Pairs(push(pairs.s, s), push(pairs.z, z))


def curvatures(pairs: Pairs) -> tuple[Array, Array]:
    """(s'z for each pair, whether it is positive beyond rounding, shapes [m])."""
    products = jnp.sum(pairs.s * pairs.z, axis=1)
    size = jnp.linalg.norm(pairs.s, axis=1) * jnp.linalg.norm(pairs.z, axis=1)
    return products, products > 10 * float(jnp.finfo(size.dtype).eps) * size


def direction(pairs: Pairs, g: Array, free: Array, first: Array) -> Array:
    """-H g [n] on the entries that are `free` [n], 0 on others: H the inverse Hessian of the pairs there.

    Pairs without positive curvature in the free entries are left out; first: H/I where all of them are, [].
    """
    own = Pairs(jnp.where(free, pairs.s, 0), jnp.where(free, pairs.z, 0))
    products, good = curvatures(own)
    rho = jnp.where(good, 1 / jnp.where(good, products, 1), 0)

    def back(q: Array, pair: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        s, z, rho = pair
        weight = rho * (s @ q)
        return q - weight * z, weight

    def forth(r: Array, pair: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        s, z, rho, weight = pair
        return r + s * (weight - rho * (z @ r)), None

    q, weights = lax.scan(back, jnp.where(free, g, 0), (own.s, own.z, rho))
    newest = jnp.argmax(good)
    square = jnp.sum(own.z[newest] ** 2)
    scale = jnp.where(good[newest], products[newest] / jnp.where(square > 0, square, 1), first)
    return -lax.scan(forth, scale * q, (own.s, own.z, rho, weights), reverse=True)[0]
