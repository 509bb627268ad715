"""Sets for x and y: project, violation, sample, active, validate.

Every set works on any pytree with the structure it was made for, and is itself a pytree, so that bounds can be traced.
Projections come from `optax.projections` where it has them; the polyhedron's is a least-distance program solved
exactly.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax.projections
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.qp.least_distance import least_distance
from bilevel.struct import InvalidInput, invalid, struct

PyTree = Any


def _like(bound: PyTree, z: PyTree) -> PyTree:
    """Broadcast `bound` (a prefix of z's structure) to z's leaves, in z's dtypes."""
    full = jax.tree.broadcast(bound, z)
    return jax.tree.map(lambda b, leaf: jnp.broadcast_to(jnp.asarray(b, leaf.dtype), leaf.shape), full, z)


def _norm(z: PyTree) -> Array:
    return jnp.linalg.norm(ravel_pytree(z)[0])


def _check_prefix(name: str, bound: PyTree, like: PyTree) -> None:
    try:
        full = jax.tree.broadcast(bound, like)
        jax.tree.map(lambda b, leaf: np.broadcast_to(np.asarray(b), np.shape(leaf)), full, like)
    except ValueError:
        got, want = (f"shapes {jax.tree.map(np.shape, tree)}" for tree in (bound, like))
        invalid(name, got, f"a scalar or something that broadcasts to {want}", "Reshape the bound.")


def _check_numbers(name: str, value: PyTree) -> None:
    for leaf in jax.tree.leaves(value):
        if not jnp.issubdtype(np.asarray(leaf).dtype, jnp.number):
            invalid(name, type(leaf).__name__, "numbers", "Give one number, or an array of them.")
        if np.isnan(np.asarray(leaf)).any():
            invalid(name, "NaN", "numbers", "Remove the NaN; use infinity for a missing bound.")


class Set:
    """A closed convex set. Subclasses define `project`, `sample`, `active`; `z` is a pytree of float arrays."""

    bounded: bool = True

    def project(self, z: PyTree) -> PyTree:
        """The Euclidean projection of `z`; same structure, shapes and dtypes."""
        raise NotImplementedError

    def sample(self, key: Array, like: PyTree) -> PyTree:
        """A random point of the set, shaped like `like`. The distribution is stated by each set."""
        raise NotImplementedError

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        """Which constraints hold with equality at `z` to within `tol`; booleans shaped as each set states."""
        raise NotImplementedError

    def violation(self, z: PyTree) -> Array:
        """Euclidean distance of `z` to the set, shape []."""
        return _norm(jax.tree.map(operator.sub, z, self.project(z)))

    def validate(self, name: str, like: PyTree) -> None:
        """Raise `InvalidInput`, naming `name`, if the set is empty or does not fit points shaped like `like`."""


@struct
class Reals(Set):
    """The whole space. Samples are standard normal; nothing is ever active."""

    bounded = False

    def project(self, z: PyTree) -> PyTree:
        return z

    def violation(self, z: PyTree) -> Array:
        return jnp.zeros((), ravel_pytree(z)[0].dtype)

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        return unravel(jax.random.normal(key, flat.shape, flat.dtype))

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), bool), z)


@struct
class Box(Set):
    """{z : lo <= z <= hi}. Bounds are scalars, or pytrees whose leaves broadcast to z's; infinite bounds are allowed.

    Samples are uniform; a coordinate with one infinite bound is exponential from the finite one, with none normal.
    `active` has z's shape.
    """

    lo: PyTree
    hi: PyTree

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """(lo, hi), broadcast to z's leaves."""
        return _like(self.lo, z), _like(self.hi, z)

    def project(self, z: PyTree) -> PyTree:
        return optax.projections.projection_box(z, *self.bounds(z))

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        lo, hi = ravel_pytree(_like(self.lo, like))[0], ravel_pytree(_like(self.hi, like))[0]
        uniform, normal = (draw(key, flat.shape, flat.dtype) for draw in (jax.random.uniform, jax.random.normal))
        far = -jnp.log1p(-uniform)
        finite_lo, finite_hi = jnp.isfinite(lo), jnp.isfinite(hi)
        safe_lo, safe_hi = jnp.where(finite_lo, lo, 0), jnp.where(finite_hi, hi, 0)
        within = jnp.clip(safe_lo + uniform * (safe_hi - safe_lo), safe_lo, jnp.maximum(safe_lo, safe_hi))
        one_sided = jnp.where(finite_lo, safe_lo + far, jnp.where(finite_hi, safe_hi - far, normal))
        return unravel(jnp.where(finite_lo & finite_hi, within, one_sided))

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return jax.tree.map(
            lambda leaf, lo, hi: (leaf <= lo + tol) | (leaf >= hi - tol),
            z,
            _like(self.lo, z),
            _like(self.hi, z),
        )

    def validate(self, name: str, like: PyTree) -> None:
        for end, bound in (("lo", self.lo), ("hi", self.hi)):
            _check_numbers(f"{name}.{end}", bound)
            _check_prefix(f"{name}.{end}", bound, like)
        lo, hi = (np.asarray(ravel_pytree(_like(bound, like))[0]) for bound in (self.lo, self.hi))
        wrong = np.flatnonzero((lo > hi) | (lo == np.inf) | (hi == -np.inf))
        if wrong.size:
            k = wrong[0]
            invalid(
                f"{name} (Box)",
                f"lo = {lo[k]} and hi = {hi[k]} at flat index {k}",
                "lo <= hi everywhere",
                "Swap the bounds.",
            )


@struct
class Ball(Set):
    """{z : |z - center|_2 <= radius} with the norm of the whole pytree. Samples are uniform; `active` is one
    boolean.
    """

    radius: Any = 1.0
    center: PyTree = 0.0

    def middle(self, z: PyTree) -> PyTree:
        """The center, broadcast to z's leaves."""
        return _like(self.center, z)

    def project(self, z: PyTree) -> PyTree:
        center = self.middle(z)
        flat, unravel = ravel_pytree(jax.tree.map(operator.sub, z, center))
        radius, largest = jnp.asarray(self.radius, flat.dtype), jnp.max(jnp.abs(flat))
        unit = flat / jnp.where(largest > 0, largest, 1)  # squares of far points would overflow
        length = jnp.sqrt(unit @ unit)
        outside = largest * length > radius
        inward = unit * (radius / jnp.where(outside, length, 1))
        return jax.tree.map(operator.add, center, unravel(jnp.where(outside, inward, flat)))

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        direction, length = jax.random.split(key)
        normal = jax.random.normal(direction, flat.shape, flat.dtype)
        uniform = jax.random.uniform(length, (), flat.dtype)
        scale = self.radius * uniform ** (1.0 / flat.size) / jnp.linalg.norm(normal)
        return self.project(jax.tree.map(operator.add, self.middle(like), unravel(scale * normal)))

    def active(self, z: PyTree, tol: float = 0.0) -> Array:
        return _norm(jax.tree.map(operator.sub, z, self.middle(z))) >= self.radius - tol

    def validate(self, name: str, like: PyTree) -> None:
        if np.ndim(self.radius) != 0 or not np.isfinite(self.radius) or self.radius < 0:
            do = "A negative radius is an empty set."
            invalid(f"{name}.radius (Ball)", self.radius, "one finite number >= 0", do)
        _check_numbers(f"{name}.center", self.center)
        _check_prefix(f"{name}.center", self.center, like)


@struct
class Simplex(Set):
    """{z >= 0 : sum z = scale} over all leaves of the pytree together. Samples are uniform (Dirichlet(1)).

    `active` has z's shape: which coordinates are zero.
    """

    scale: Any = 1.0

    def project(self, z: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(z)
        return unravel(_on_simplex(flat, jnp.asarray(self.scale, flat.dtype)))

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        return unravel(self.scale * jax.random.dirichlet(key, jnp.ones(flat.shape, flat.dtype)))

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return jax.tree.map(lambda leaf: leaf <= tol, z)

    def validate(self, name: str, like: PyTree) -> None:
        if np.ndim(self.scale) != 0 or not np.isfinite(self.scale) or self.scale <= 0:
            invalid(f"{name}.scale (Simplex)", self.scale, "one finite number > 0", "Use the default scale=1.0.")


@jax.custom_jvp
def _on_simplex(flat: Array, scale: Array) -> Array:
    flat = flat - jnp.max(flat)  # changes nothing but rounding: far points keep their digits
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer positions and floats, in its derivative as well
        moved = jnp.asarray(optax.projections.projection_simplex(flat, scale), flat.dtype)
    return jnp.where(moved > 8 * jnp.finfo(flat.dtype).eps * scale, moved, 0)  # rounding is no positive weight


@_on_simplex.defjvp
def _on_simplex_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    moved = _on_simplex(*primals)
    free = (moved > 0).astype(moved.dtype)
    change, by_scale = tangents
    return moved, free * (change + (by_scale - jnp.sum(free * change)) / jnp.sum(free))


@struct
class Polyhedron(Set):
    """{z : A z <= b} on the raveled pytree; A has shape [rows, n], b [rows].

    Samples come from 64 hit-and-run steps started at a projected normal point, chords cut at length 1e3; an equality
    written as two inequalities leaves no chord and the sample is the projected point. `active` has shape [rows].
    """

    bounded = False
    A: Any
    b: Any

    def _rows(self, dtype: Any) -> tuple[Array, Array]:
        return jnp.asarray(self.A, dtype), jnp.asarray(self.b, dtype)

    def project(self, z: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(z)
        A, b = self._rows(flat.dtype)
        noise = 4 * jnp.finfo(flat.dtype).eps * (jnp.abs(b) + jnp.abs(A) @ jnp.abs(flat))  # of the subtraction below
        return unravel(flat + least_distance(A, b - A @ flat, noise))

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        A, b = self._rows(flat.dtype)
        start, walk = jax.random.split(key)
        point = ravel_pytree(self.project(unravel(jax.random.normal(start, flat.shape, flat.dtype))))[0]

        def hit_and_run(point: Array, key: Array) -> tuple[Array, None]:
            towards, along = jax.random.split(key)
            direction = jax.random.normal(towards, flat.shape, flat.dtype)
            direction = direction / jnp.linalg.norm(direction)
            speed, slack = A @ direction, jnp.maximum(b - A @ point, 0)
            reach = slack / jnp.where(speed == 0, 1, speed)
            high = jnp.min(jnp.where(speed > 0, reach, 1e3), initial=1e3)
            low = jnp.max(jnp.where(speed < 0, reach, -1e3), initial=-1e3)
            return point + (low + jax.random.uniform(along, (), flat.dtype) * (high - low)) * direction, None

        return unravel(jax.lax.scan(hit_and_run, point, jax.random.split(walk, 64))[0])

    def active(self, z: PyTree, tol: float = 0.0) -> Array:
        flat = ravel_pytree(z)[0]
        A, b = self._rows(flat.dtype)
        return A @ flat >= b - tol

    def violation(self, z: PyTree) -> Array:
        """The distance to the farthest half-space, or 0: at most the distance to the set, and cheaper."""
        flat = ravel_pytree(z)[0]
        A, b = self._rows(flat.dtype)
        length = jnp.linalg.norm(A, axis=1)
        return jnp.max((A @ flat - b) / jnp.where(length > 0, length, 1), initial=0)

    def validate(self, name: str, like: PyTree) -> None:
        size = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(like))
        A, b = np.asarray(self.A), np.asarray(self.b)
        if A.ndim != 2 or A.shape[1] != size:
            invalid(
                f"{name}.A (Polyhedron)",
                f"shape {A.shape}",
                f"[rows, {size}]",
                "One column per entry of the raveled point.",
            )
        if b.shape != A.shape[:1]:
            invalid(f"{name}.b (Polyhedron)", f"shape {b.shape}", f"[{A.shape[0]}]", "One bound per row of A.")
        for part, value in (("A", A), ("b", b)):
            if not np.isfinite(value).all():
                do = "Leave out rows without a bound."
                invalid(f"{name}.{part} (Polyhedron)", "a non-finite entry", "finite numbers", do)
        if not np.isfinite(np.asarray(least_distance(jnp.asarray(A, float), jnp.asarray(b, float)))).all():
            invalid(
                f"{name} (Polyhedron)",
                "an empty set",
                "some z with A z <= b",
                "Two of the rows contradict each other.",
            )


@struct
class Product(Set):
    """One set per branch: `sets` is a pytree of sets whose structure is a prefix of z's, e.g. {"w": Reals(), "lam":
    Box(0, 1)}.
    """

    sets: Any

    @property
    def bounded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every factor is bounded."""
        return all(factor.bounded for factor in self.factors())

    def factors(self) -> list[Set]:
        """The sets, in the order of z's raveled entries."""
        return jax.tree.leaves(self.sets, is_leaf=_is_set)

    def parts(self, z: PyTree) -> list[PyTree]:
        """The part of z that each of `factors` constrains."""
        return jax.tree.structure(self.sets, is_leaf=_is_set).flatten_up_to(z)

    def _map(self, function: Any, *trees: PyTree) -> PyTree:
        return jax.tree.map(function, self.sets, *trees, is_leaf=_is_set)

    def project(self, z: PyTree) -> PyTree:
        return self._map(lambda factor, part: factor.project(part), z)

    def sample(self, key: Array, like: PyTree) -> PyTree:
        treedef = jax.tree.structure(self.sets, is_leaf=_is_set)
        keys = treedef.unflatten(list(jax.random.split(key, treedef.num_leaves)))
        return self._map(lambda factor, part, key: factor.sample(key, part), like, keys)

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return self._map(lambda factor, part: factor.active(part, tol), z)

    def violation(self, z: PyTree) -> Array:
        return _norm(self._map(lambda factor, part: factor.violation(part), z))

    def validate(self, name: str, like: PyTree) -> None:
        try:
            self._map(lambda factor, part: factor.validate(name, part), like)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            if isinstance(error, InvalidInput):
                raise
            invalid(f"{name} (Product)", error, "a pytree of sets, a prefix of the point's structure", "Match the two.")


def _is_set(value: object) -> bool:
    return isinstance(value, Set)


def unbounded(set: Set) -> bool:
    """Whether the set is known to have an infinite direction; a polyhedron is taken at its word. Not for tracers."""
    if isinstance(set, Product):
        return any(map(unbounded, set.factors()))
    ends = jax.tree.leaves((set.lo, set.hi)) if isinstance(set, Box) else []
    return isinstance(set, Reals) or any(np.isinf(np.asarray(end)).any() for end in ends)
