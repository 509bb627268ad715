"""The face of a set on which a point lies, as a step along a gradient would meet it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from bilevel.backend.norms import unit
from bilevel.backend.tree import norm


class Face(NamedTuple):
    """The face of a set at y = Proj(z), z = y - s R: where y may move, and how the face bends; all raveled.

    A minimiser over the set has R = -N' m - D (y - middle) on it, with the normals N and a diagonal D >= 0 that is the
    curvature of the set's boundary times its multiplier.
    """

    free: Array
    """Which coordinates may move, shape [n]."""

    normals: Array
    """Orthonormal, within the free coordinates, one a set, shape [sets, n]; 0 where there is none."""

    mu: Array
    """The diagonal D, shape [n]."""

    margin: Array
    """How far z is from where another face begins, shape []."""

    s: Array
    """The length of the step, shape []."""

    def tangent(self, v: Array) -> Array:
        """The part of v [n] along the face."""
        v = jnp.where(self.free, v, 0)
        return v - (self.normals @ v) @ self.normals


def interior(y: Array, s: Array) -> Face:
    """The face that is all of the space."""
    nothing = jnp.zeros_like(y)
    return Face(jnp.ones(y.size, bool), nothing[None], nothing, _far(y), s)


def _far(y: Array) -> Array:
    """The margin where no other face begins."""
    return jnp.full((), jnp.inf, y.dtype)


def of_box(z: Array, lo: Array, hi: Array, s: Array) -> Face:
    """The face of {lo <= y <= hi}: coordinates at a bound stay; those whose bounds meet never leave."""
    nothing = jnp.zeros_like(z)
    near = jnp.min(jnp.where(lo == hi, _far(z), jnp.minimum(jnp.abs(z - lo), jnp.abs(z - hi))))
    return Face((z > lo) & (z < hi), nothing[None], nothing, near, s)


def of_simplex(y: Array, z: Array, s: Array) -> Face:
    """The face of a simplex: positive coordinates move, and their sum stays."""
    free = y > 0
    count = jnp.maximum(jnp.sum(free), 1).astype(y.dtype)
    level = jnp.sum(jnp.where(free, z - y, 0)) / count
    normal = jnp.where(free, 1 / jnp.sqrt(count), 0)
    margin = jnp.min(jnp.abs(z - level)) if y.size > 1 else _far(y)
    return Face(free, normal[None], jnp.zeros_like(y), margin, s)


def of_ball(y: Array, R: Array, middle: Array, radius: Array, s: Array) -> Face:
    """The face of a ball: its boundary where z is outside, where R = -mu (y - middle); else all of the space."""
    length = norm(y - s * R - middle)
    outside = length > radius
    safe = jnp.where(radius > 0, radius, 1)
    normal = jnp.where(outside, (y - middle) / safe, 0)
    size = unit(jnp.atleast_1d(safe))  # the square of a small radius underflows
    mu = jnp.where(outside, jnp.maximum(-(R @ ((y - middle) / size)), 0) / (safe / size) ** 2 / size, 0)
    free = jnp.ones(y.size, bool) & (radius > 0)
    return Face(free, normal[None], jnp.full_like(y, mu), jnp.abs(length - radius), s)


def widened(rows: Array, offset: int, n: int) -> Array:
    """Rows [R, m] on the entries offset, ..., offset + m - 1 of a vector, as rows on all of its n entries."""
    return jnp.zeros((rows.shape[0], n), rows.dtype).at[:, offset : offset + rows.shape[1]].set(rows)


def of_product(faces: Sequence[Face], s: Array) -> Face:
    """The face of a product of sets, in the order of the faces of its factors."""
    n, offset, rows = sum(face.free.size for face in faces), 0, []
    for face in faces:
        rows.append(widened(face.normals, offset, n))
        offset += face.free.size
    free, mu = (jnp.concatenate([getattr(face, name) for face in faces]) for name in ("free", "mu"))
    return Face(free, jnp.concatenate(rows), mu, jnp.min(jnp.stack([face.margin for face in faces])), s)
