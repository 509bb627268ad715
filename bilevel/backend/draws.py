"""Random directions and points: of balls, of polyhedra."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.scipy.special import erfinv, gammainc

from bilevel.backend.errors import invalid

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
        q = q * jax.random.uniform(key_length, (), flat.dtype) ** (1.0 / max(flat.size, 1))
    return unravel(jnp.asarray(sigma, flat.dtype) * q)


def check_distribution(name: str, distribution: str) -> None:
    """Raise `InvalidInput` for an unknown distribution."""
    if distribution not in DISTRIBUTIONS:
        invalid(name, repr(distribution), f"one of {DISTRIBUTIONS}", "Choose the law of the perturbation q.")


def below(bits: Array, bound: int) -> Array:
    """Numbers in [0, bound), bound < 2^31, from 32 random bits each, uint32: each of probability 1/bound to 2^-32.

    The number is the upper half of bits x bound, in parts that need no 64 bits. `jax.random.randint` draws twice as
    many bits under two keys of their own, and divides; where a step is short, that is much of it.
    """
    high, low = divmod(bound, 2**16)
    upper, lower = bits >> 16, bits & 0xFFFF
    middle = ((lower * low) >> 16) + upper * low  # < 2^32
    carry = (middle & 0xFFFF) + lower * high  # < 2^32
    return (upper * high + (middle >> 16) + (carry >> 16)).astype(int)


def numbers_below(key: Array, *bounds: int) -> tuple[Array, ...]:
    """A number in [0, bound) for each of `bounds`, drawn together."""
    bits = jax.random.bits(key, (len(bounds),), jnp.uint32)
    return tuple(below(bits[k], bound) for k, bound in enumerate(bounds))


def in_box(lo: Array, hi: Array, uniform: Array, both: Array) -> Array:
    """Points of {z : lo <= z <= hi}, shaped like `uniform`, numbers in (0, 1), with which the bounds broadcast.

    Where one bound is infinite, points are exponential from the other one; where both are, they are `both`.
    """
    far = -jnp.log1p(-uniform)
    finite_lo, finite_hi = jnp.isfinite(lo), jnp.isfinite(hi)
    low, high = jnp.where(finite_lo, lo, 0), jnp.where(finite_hi, hi, 0)
    within = jnp.clip(low + uniform * (high - low), low, jnp.maximum(low, high))
    one_sided = jnp.where(finite_lo, low + far, jnp.where(finite_hi, high - far, both))
    return jnp.where(finite_lo & finite_hi, within, one_sided)


def in_ball(radius: Array, uniform: Array) -> Array:
    """Points of the ball around 0, [num, dim], uniform in it where `uniform` [num, dim] is in the cube (0, 1)^dim."""
    dim = uniform.shape[1]
    normal = erfinv(2 * uniform - 1) * 2**0.5
    square = jnp.sum(normal**2, axis=1, keepdims=True)
    length = gammainc(dim / 2, square / 2) ** (1 / dim)  # uniform in the ball, given the direction
    return radius * length * normal / jnp.sqrt(jnp.where(square > 0, square, 1))


def hit_and_run(key: Array, A: Array, b: Array, point: Array, num_steps: int = 64) -> Array:
    """The end of a random walk in {z : A z <= b} from `point` [n]: each step to a uniform point of a random chord.

    Chords end at 1e3 from where they start.
    """

    def step(point: Array, key: Array) -> tuple[Array, None]:
        towards, along = jax.random.split(key)
        direction = jax.random.normal(towards, point.shape, point.dtype)
        direction = direction / jnp.linalg.norm(direction)
        speed, slack = A @ direction, jnp.maximum(b - A @ point, 0)
        reach = slack / jnp.where(speed == 0, 1, speed)
        high = jnp.min(jnp.where(speed > 0, reach, 1e3), initial=1e3)
        low = jnp.max(jnp.where(speed < 0, reach, -1e3), initial=-1e3)
        return point + (low + jax.random.uniform(along, (), point.dtype) * (high - low)) * direction, None

    return jax.lax.scan(step, point, jax.random.split(key, num_steps))[0]
