"""The face of a set on which a point lies, as a step along a gradient would meet it."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from bilevel.backend.norms import unit
from bilevel.backend.tree import norm, row_norms


class Face(NamedTuple):
    """The face of a set at y = Proj(z), z = y - s R: where y may move, and how the face bends; all raveled.

    A minimiser over the set has R = -N' m - D (y - middle) on it, with the normals N and a diagonal D >= 0 that is the
    curvature of the set's boundary times its multiplier.
    """

    free: Array
    """Which coordinates may move, shape [n]."""

    normals: Array
    """Orthonormal, within the free entries, one a set, shape [sets, n]; 0 where there is none."""

    mu: Array
    """The diagonal D, shape [n]."""

    room: Array
    """How far each entry of z is from where another face begins, shape [n]."""

    s: Array
    """The length of the step, shape []."""

    across: Array
    """The normals, not of length one, with the entries that are not free, shape [sets, n]."""

    inward: Array
    """The sign of the way into the set, for entries at a bound that they can leave; else 0; shape [n]."""

    @property
    def margin(self) -> Array:
        """How far z is from where another face begins, shape []."""
        return jnp.min(self.room, initial=jnp.inf)

    def opened(self, entries: Array) -> "Face":
        """The larger face on which these entries [n], which are at a bound that they can leave, move as well."""
        free = self.free | entries
        return self._replace(free=free, normals=_within(free, self.across))

    def tangent(self, v: Array) -> Array:
        """The part of v [n] along the face."""
        v = jnp.where(self.free, v, 0)
        return v - (self.normals @ v) @ self.normals


def _within(free: Array, across: Array) -> Array:
    """Rows [sets, n] within the free entries, of length one."""
    rows = jnp.where(free, across, 0)
    sizes = row_norms(rows)[:, None]
    return rows / jnp.where(sizes > 0, sizes, 1)


def interior(y: Array, s: Array) -> Face:
    """The face that is all of the space."""
    nothing = jnp.zeros_like(y)
    return Face(jnp.ones(y.size, bool), nothing[None], nothing, jnp.full_like(y, jnp.inf), s, nothing[None], nothing)


def of_box(z: Array, lo: Array, hi: Array, s: Array) -> Face:
    """The face of {lo <= y <= hi}: coordinates at a bound stay; those whose bounds meet never leave."""
    nothing = jnp.zeros_like(z)
    near = jnp.where(lo == hi, jnp.inf, jnp.minimum(jnp.abs(z - lo), jnp.abs(z - hi)))
    inward = jnp.where(lo == hi, 0, jnp.where(z <= lo, 1, jnp.where(z >= hi, -1, 0))).astype(z.dtype)
    return Face((z > lo) & (z < hi), nothing[None], nothing, near, s, nothing[None], inward)


def of_simplex(y: Array, z: Array, s: Array) -> Face:
    """The face of a simplex: positive coordinates move, and their sum stays."""
    free = y > 0
    count, across = jnp.maximum(jnp.sum(free), 1).astype(y.dtype), jnp.ones_like(y)[None]
    level = jnp.sum(jnp.where(free, z - y, 0)) / count
    room = jnp.abs(z - level) if y.size > 1 else jnp.full_like(y, jnp.inf)
    inward = jnp.where(free, 0, 1).astype(y.dtype)
    return Face(free, _within(free, across), jnp.zeros_like(y), room, s, across, inward)


def of_ball(y: Array, R: Array, middle: Array, radius: Array, s: Array) -> Face:
    """The face of a ball: its boundary where z is outside, where R = -mu (y - middle); else all of the space."""
    length = norm(y - s * R - middle)
    outside = length > radius
    safe = jnp.where(radius > 0, radius, 1)
    normal = jnp.where(outside, (y - middle) / safe, 0)
    size = unit(jnp.atleast_1d(safe))  # the square of a small radius underflows
    mu = jnp.where(outside, jnp.maximum(-(R @ ((y - middle) / size)), 0) / (safe / size) ** 2 / size, 0)
    free = jnp.ones(y.size, bool) & (radius > 0)
    room, nothing = jnp.full_like(y, jnp.abs(length - radius)), jnp.zeros_like(y)
    return Face(free, normal[None], jnp.full_like(y, mu), room, s, normal[None], nothing)


def widened(rows: Array, offset: int, n: int) -> Array:
    """Rows [R, m] on the entries offset, ..., offset + m - 1 of a vector, as rows on all of its n entries."""
    return jnp.zeros((rows.shape[0], n), rows.dtype).at[:, offset : offset + rows.shape[1]].set(rows)


def of_product(faces: Sequence[Face], s: Array) -> Face:
    """The face of a product of sets, in the order of the faces of its factors."""
    *offsets, n = itertools.accumulate((face.free.size for face in faces), initial=0)
    each = {name: [getattr(face, name) for face in faces] for name in ("free", "mu", "room", "inward")}
    rows = {
        name: [widened(getattr(face, name), at, n) for face, at in zip(faces, offsets, strict=True)]
        for name in ("normals", "across")
    }
    return Face(**{name: jnp.concatenate(parts) for name, parts in (each | rows).items()}, s=s)
