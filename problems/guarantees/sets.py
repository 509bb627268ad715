"""Projections: feasible, idempotent, firmly non-expansive, and the variational inequality, for each set."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import Ball, Box, Polyhedron, Simplex
from bilevel.guarantees import Guarantee
from problems import strategies
from problems.guarantees.instances import EPS, normal

SIZE, ROWS = 4, 5


class Points(NamedTuple):
    """The size of the numbers."""

    size: Array


class Projections(NamedTuple):
    """A set and two points z, w; u is a point of the set."""

    set: Any
    z: Array
    w: Array
    u: Array
    constants: Points


def _box(key: Array, size: Array, flat: Array) -> Box:
    """Some coordinates are fixed where `flat`."""
    low, width = normal(key, 2, SIZE)
    width = jnp.where(flat & (jnp.arange(SIZE) < 2), 0, jnp.abs(width))
    return Box(size * low, size * (low + width))


def _ball(key: Array, size: Array, flat: Array) -> Ball:
    """A point where `flat`."""
    return Ball(jnp.where(flat, 0, size), normal(key, SIZE))


def _simplex(key: Array, size: Array, flat: Array) -> Simplex:
    return Simplex(size)


def _polyhedron(key: Array, size: Array, flat: Array) -> Polyhedron:
    """Rows with the origin feasible; where `flat`, the second row turns the first into an equality."""
    A = normal(key, ROWS, SIZE)
    b = jnp.abs(normal(jax.random.fold_in(key, 1), ROWS)) * size
    A, b = jnp.where(flat, A.at[1].set(-A[0]), A), jnp.where(flat, b.at[1].set(-b[0]), b)
    return Polyhedron(A, b)


def outside(chosen: Any, z: Array) -> Array:
    """How far z violates the set's definition, by hand: at most the distance to it times a constant of the set."""
    if isinstance(chosen, Box):
        return jnp.max(jnp.maximum(chosen.lo - z, z - chosen.hi))
    if isinstance(chosen, Ball):
        return jnp.linalg.norm(z - chosen.center) - chosen.radius
    if isinstance(chosen, Simplex):
        return jnp.maximum(jnp.max(-z), jnp.abs(jnp.sum(z) - chosen.scale))
    assert isinstance(chosen, Polyhedron)
    return jnp.max((chosen.A @ z - chosen.b) / jnp.linalg.norm(chosen.A, axis=1))


def projection(make: Callable[[Array, Array, Array], Any], name: str) -> Guarantee:
    """The four statements, as ratios of squares."""

    def points(key: Array, size: Array, far: Array, near: Array, flat: Array) -> Projections:
        keys = jax.random.split(key, 4)
        chosen = make(keys[0], size, flat)
        z = far * normal(keys[1], SIZE)
        w = z + near * far * normal(keys[2], SIZE)
        u = chosen.sample(keys[3], z)
        return Projections(chosen, z, w, u, Points(1 + size + jnp.linalg.norm(z) + jnp.linalg.norm(w)))

    points.__name__ = name

    def measure(instance: Projections, horizon: tuple[int, ...]) -> Array:
        square = lambda a: a @ a  # noqa: E731
        z, w, u = instance.z, instance.w, instance.u
        pz, pw = instance.set.project(z), instance.set.project(w)
        size = instance.constants.size
        floor = 1e3 * EPS * size**2
        firm = square(pz - pw) / ((pz - pw) @ (z - w) + floor)
        variational = (square(z - pz) + square(u - pz)) / (square(z - u) + floor)
        idempotent = jnp.linalg.norm(instance.set.project(pz) - pz) / (1e3 * EPS * size)
        feasible = outside(instance.set, pz) / (1e3 * EPS * size)
        return jnp.stack([firm, variational, idempotent, feasible])[None, :]

    return Guarantee(
        f"project-{name}", "Bauschke, Combettes 2017", (),
        strategies.recipes(
            points, size=strategies.scales(), far=strategies.scales(), near=strategies.sizes(), flat=strategies.booleans
        ),
        measure, lambda constants, k: jnp.ones(4), (1,), lambda constants: 0.0,
        "|Pz - Pw|^2 <= (Pz - Pw)'(z - w); |z - Pz|^2 + |u - Pz|^2 <= |z - u|^2, u in the set; P P z = P z is in it",
    )  # fmt: skip


BOX = projection(_box, "box")
BALL = projection(_ball, "ball")
SIMPLEX = projection(_simplex, "simplex")
POLYHEDRON = projection(_polyhedron, "polyhedron")
