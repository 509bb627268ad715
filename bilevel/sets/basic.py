"""The closed convex sets that x and y may be confined to.

A set projects, measures violations, draws points, says which of its constraints are active, and describes itself to
the methods that need more: by bounds, by rows lo <= C z <= hi, by the net of points that `fill` spreads over it. Every
set works on any pytree of the structure that it was made for, and is a pytree itself, so that bounds can be traced.
Projections come from `optax.projections` where it has them; that of a polyhedron is a least-distance program, solved
exactly.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.projections
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend import draws
from bilevel.backend.checks import check_numbers, check_prefix, check_rows
from bilevel.backend.columns import by_leaves, check_columns, check_shape, columns
from bilevel.backend.tree import broadcast_like, norm
from bilevel.qp import face as faces
from bilevel.qp.face import Face
from bilevel.qp.least_distance import least_distance
from bilevel.qp.simplex import nearest_on_simplex
from bilevel.struct import invalid, static, struct

PyTree = Any


class Set:
    """A closed convex set. Subclasses define `project`, `sample`, `active`; `z` is a pytree of float arrays.

    What is known of it: that it is `bounded`, or `unbounded` (has an infinite direction; of a polyhedron neither is
    known, of traced bounds it must not be asked); that it is the `whole` space, or `intervals`, one for each entry of
    z; that it is known `by_bounds`, which `bounds` gives; that it is `polyhedral`, described by `rows`, or `curved`,
    by functions, its `values`; or `faced`: `face` knows its faces.
    """

    bounded: bool = True
    unbounded = whole = intervals = by_bounds = polyhedral = curved = faced = False

    def simple(self) -> list["Set"]:
        """The sets that this one is a product of, products of products taken apart: itself, where it is none."""
        return [self]

    def project(self, z: PyTree) -> PyTree:
        """The Euclidean projection of `z`; same structure, shapes and dtypes."""
        raise NotImplementedError

    def sample(self, key: Array, like: PyTree) -> PyTree:
        """A random point of the set, shaped like `like`. The distribution is stated by each set."""
        raise NotImplementedError

    def around(self, key: Array, center: PyTree) -> PyTree:
        """A random point of the set: `sample` where it is `bounded`, else `center` plus a normal step as long as
        1 + |center_i| in entry i, projected.
        """
        if self.bounded:
            return self.sample(key, center)
        flat, unravel = ravel_pytree(center)
        step = (1 + jnp.abs(flat)) * jax.random.normal(key, flat.shape, flat.dtype)
        return self.project(unravel(flat + step))

    def fill(self, uniform: Array, key: Array, like: PyTree) -> PyTree:
        """Points of the set shaped like `like`, stacked, one for each row of `uniform` [num, dim], numbers in (0, 1).

        Bounded boxes, balls and simplices are filled uniformly, as evenly as the rows fill the cube. Sets that know no
        such map take their points from `sample`, with `key`, and leave `uniform` alone.
        """
        return jax.vmap(lambda key: self.sample(key, like))(jax.random.split(key, len(uniform)))

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree] | None:
        """(lo, hi), shaped like z, of a set {z : lo <= z <= hi} that is known by its bounds; else None."""
        return None

    def rows(self, z: PyTree) -> list[tuple[Array, Array, Array]]:
        """Blocks (C [rows, n], lo [rows], hi [rows]), lo <= C z <= hi on the raveled z, of a `polyhedral` set."""
        raise NotImplementedError(f"{type(self).__name__} is not described by rows")

    def values(self, z: PyTree) -> Array:
        """The functions h(z) <= 0 that describe a `curved` set, shape [rows]."""
        raise NotImplementedError(f"{type(self).__name__} is not described by functions")

    def face(self, y: PyTree, R: PyTree, s: Array) -> Face:
        """The face at y = Proj(y - s R), raveled; R is shaped like y, s is []. Only for a set that is `faced`."""
        raise NotImplementedError(f"{type(self).__name__} does not know its faces")

    def stacked(self, n: int, like: PyTree, apart: bool) -> "Set":
        """The set of z with n rows like `like`, each in this set; `apart`: in n sets, the rows of this one's arrays."""
        return Rows(self, apart)

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        """Which constraints hold with equality at `z` to within `tol`; booleans shaped as each set states."""
        raise NotImplementedError

    def violation(self, z: PyTree) -> Array:
        """Euclidean distance of `z` to the set, shape []."""
        return norm(optax.tree.sub(z, self.project(z)))

    def validate(self, name: str, like: PyTree) -> None:
        """Raise `InvalidInput`, naming `name`, if the set is empty or does not fit points shaped like `like`."""


@struct
class Reals(Set):
    """The whole space, which constrains nothing. Samples are standard normal; nothing is ever active."""

    bounded = False
    unbounded = whole = intervals = polyhedral = faced = True

    def rows(self, z: PyTree) -> list[tuple[Array, Array, Array]]:
        return []

    def stacked(self, n: int, like: PyTree, apart: bool) -> Set:
        return self

    def face(self, y: PyTree, R: PyTree, s: Array) -> Face:
        return faces.interior(ravel_pytree(y)[0], s)

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

    Samples are uniform. A coordinate with one finite bound is exponential, as far from that bound; one without any is
    standard normal. `active` has z's shape.
    """

    lo: PyTree
    hi: PyTree
    intervals = by_bounds = polyhedral = faced = True

    @property
    def unbounded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the bounds is infinite."""
        return any(np.isinf(np.asarray(end)).any() for end in jax.tree.leaves((self.lo, self.hi)))

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """(lo, hi), broadcast to z's leaves."""
        return broadcast_like(self.lo, z), broadcast_like(self.hi, z)

    def stacked(self, n: int, like: PyTree, apart: bool) -> Set:
        if apart:
            return Box(*jax.vmap(lambda own: own.bounds(like))(self))
        return Box(
            *(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), end) for end in self.bounds(like))
        )

    def project(self, z: PyTree) -> PyTree:
        return optax.projections.projection_box(z, *self.bounds(z))

    def rows(self, z: PyTree) -> list[tuple[Array, Array, Array]]:
        lo, hi = (ravel_pytree(bound)[0] for bound in self.bounds(z))
        return [(jnp.eye(lo.size, dtype=lo.dtype), lo, hi)]

    def face(self, y: PyTree, R: PyTree, s: Array) -> Face:
        flat, grad, lo, hi = (ravel_pytree(part)[0] for part in (y, R, *self.bounds(y)))
        return faces.of_box(flat - s * grad, lo, hi, s)

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        lo, hi = (ravel_pytree(bound)[0] for bound in self.bounds(like))
        uniform, normal = (draw(key, flat.shape, flat.dtype) for draw in (jax.random.uniform, jax.random.normal))
        return unravel(draws.in_box(lo, hi, uniform, normal))

    def fill(self, uniform: Array, key: Array, like: PyTree) -> PyTree:
        """As stated by `Set.fill`; a coordinate with one infinite bound is exponential, with two it is logistic."""
        lo, hi = (ravel_pytree(bound)[0][None] for bound in self.bounds(like))
        logistic = jnp.log(uniform) - jnp.log1p(-uniform)  # the program of a normal one is ten times as long
        return jax.vmap(ravel_pytree(like)[1])(draws.in_box(lo, hi, uniform, logistic))

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return jax.tree.map(lambda leaf, lo, hi: (leaf <= lo + tol) | (leaf >= hi - tol), z, *self.bounds(z))

    def validate(self, name: str, like: PyTree) -> None:
        for end, bound in (("lo", self.lo), ("hi", self.hi)):
            check_numbers(f"{name}.{end}", bound)
            check_prefix(f"{name}.{end}", bound, like)
        lo, hi = (np.asarray(ravel_pytree(bound)[0]) for bound in self.bounds(like))
        wrong = np.flatnonzero((lo > hi) | (lo == np.inf) | (hi == -np.inf))
        if wrong.size:
            k = wrong[0]
            got = f"lo = {lo[k]} and hi = {hi[k]} at flat index {k}"
            invalid(f"{name} (Box)", got, "lo <= hi everywhere", "Swap the bounds.")


@struct
class Ball(Set):
    """{z : |z - center|_2 <= radius}, in the norm of all leaves together. Samples are uniform; `active` is one boolean.

    Args:
        radius: a number >= 0. center: a scalar, or a pytree whose leaves broadcast to z's.
    """

    radius: Any = 1.0
    center: PyTree = 0.0
    faced = curved = True

    def middle(self, z: PyTree) -> PyTree:
        """The center, broadcast to z's leaves."""
        return broadcast_like(self.center, z)

    def values(self, z: PyTree) -> Array:
        """|z - center|^2 - radius^2."""
        away = ravel_pytree(optax.tree.sub(z, self.middle(z)))[0]
        return (away @ away - jnp.asarray(self.radius, away.dtype) ** 2)[None]

    def project(self, z: PyTree) -> PyTree:
        center = self.middle(z)
        flat, unravel = ravel_pytree(optax.tree.sub(z, center))
        radius, largest = jnp.asarray(self.radius, flat.dtype), jnp.max(jnp.abs(flat))
        unit = flat / jnp.where(largest > 0, largest, 1)  # squares of far points would overflow
        length = jnp.sqrt(unit @ unit)
        outside = largest * length > radius
        inward = unit * (radius / jnp.where(outside, length, 1))
        return optax.tree.add(center, unravel(jnp.where(outside, inward, flat)))

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        direction, length = jax.random.split(key)
        normal = jax.random.normal(direction, flat.shape, flat.dtype)
        uniform = jax.random.uniform(length, (), flat.dtype)
        scale = self.radius * uniform ** (1.0 / flat.size) / jnp.linalg.norm(normal)
        return self.project(optax.tree.add(self.middle(like), unravel(scale * normal)))

    def fill(self, uniform: Array, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        offsets = jax.vmap(unravel)(draws.in_ball(jnp.asarray(self.radius, flat.dtype), uniform))
        return jax.vmap(lambda offset: self.project(optax.tree.add(self.middle(like), offset)))(offsets)

    def face(self, y: PyTree, R: PyTree, s: Array) -> Face:
        flat, grad, middle = (ravel_pytree(part)[0] for part in (y, R, self.middle(y)))
        return faces.of_ball(flat, grad, middle, jnp.asarray(self.radius, flat.dtype), s)

    def active(self, z: PyTree, tol: float = 0.0) -> Array:
        return norm(optax.tree.sub(z, self.middle(z))) >= self.radius - tol

    def validate(self, name: str, like: PyTree) -> None:
        check_numbers(f"{name}.radius (Ball)", self.radius, nan=True)
        if np.ndim(self.radius) != 0 or not np.isfinite(self.radius) or self.radius < 0:
            invalid(f"{name}.radius (Ball)", self.radius, "one finite number >= 0", "A negative one is an empty set.")
        check_numbers(f"{name}.center", self.center)
        check_prefix(f"{name}.center", self.center, like)


@struct
class Simplex(Set):
    """{z >= 0 : sum z = scale} over all leaves of the pytree together. Samples are uniform (Dirichlet(1)).

    `active` has z's shape: which coordinates are zero.
    """

    scale: Any = 1.0
    polyhedral = faced = True

    def project(self, z: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(z)
        return unravel(nearest_on_simplex(flat, jnp.asarray(self.scale, flat.dtype)))

    def rows(self, z: PyTree) -> list[tuple[Array, Array, Array]]:
        flat, _ = ravel_pytree(z)
        n, dtype = flat.size, flat.dtype
        scale = jnp.asarray(self.scale, dtype)[None]
        positive = jnp.eye(n, dtype=dtype), jnp.zeros(n, dtype), jnp.full(n, jnp.inf, dtype)
        return [(jnp.ones((1, n), dtype), scale, scale), positive]

    def face(self, y: PyTree, R: PyTree, s: Array) -> Face:
        flat, grad = ravel_pytree(y)[0], ravel_pytree(R)[0]
        return faces.of_simplex(flat, flat - s * grad, s)

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        return unravel(self.scale * jax.random.dirichlet(key, jnp.ones(flat.shape, flat.dtype)))

    def fill(self, uniform: Array, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        far = -jnp.log1p(-uniform)
        points = jnp.asarray(self.scale, flat.dtype) * far / jnp.sum(far, axis=1, keepdims=True)
        return jax.vmap(unravel)(points)

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return jax.tree.map(lambda leaf: leaf <= tol, z)

    def validate(self, name: str, like: PyTree) -> None:
        check_numbers(f"{name}.scale (Simplex)", self.scale)
        if np.ndim(self.scale) != 0 or not np.isfinite(self.scale) or self.scale <= 0:
            invalid(f"{name}.scale (Simplex)", self.scale, "one finite number > 0", "Use the default scale=1.0.")


@struct
class Polyhedron(Set):
    """{z : A z <= b}, A of shape [rows, n] and b of shape [rows].

    Columns of A belong to the entries of the raveled z, or they have the names of its leaves: A is a pytree like z with
    a leaf [rows, *shape] for each leaf of that shape, and None for one that no row holds.

    A sample is where 64 hit-and-run steps end that start at the projection of a normal point and whose chords are cut
    at length 1e3. Where an equality is written as two inequalities there is no chord, and the sample is the projection
    itself. `active` has shape [rows].
    """

    bounded, polyhedral = False, True
    A: Any
    b: Any

    def _sides(self, z: PyTree) -> tuple[Array, Array]:
        """(A, b) with a column for each raveled entry of z, in its dtype."""
        dtype = ravel_pytree(z)[0].dtype
        return jnp.asarray(columns(self.A, z, self.b, dtype), dtype), jnp.asarray(self.b, dtype)

    def rows(self, z: PyTree) -> list[tuple[Array, Array, Array]]:
        A, b = self._sides(z)
        return [(A, jnp.full_like(b, -jnp.inf), b)]

    def project(self, z: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(z)
        A, b = self._sides(z)
        noise = 4 * jnp.finfo(flat.dtype).eps * (jnp.abs(b) + jnp.abs(A) @ jnp.abs(flat))  # of the subtraction below
        return unravel(flat + least_distance(A, b - A @ flat, noise))

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        A, b = self._sides(like)
        start, walk = jax.random.split(key)
        point = ravel_pytree(self.project(unravel(jax.random.normal(start, flat.shape, flat.dtype))))[0]
        return unravel(draws.hit_and_run(walk, A, b, point))

    def active(self, z: PyTree, tol: float = 0.0) -> Array:
        flat = ravel_pytree(z)[0]
        A, b = self._sides(z)
        return A @ flat >= b - tol

    def violation(self, z: PyTree) -> Array:
        """The distance to the farthest half-space, or 0: at most the distance to the set, and cheaper."""
        flat = ravel_pytree(z)[0]
        A, b = self._sides(z)
        length = jnp.linalg.norm(A, axis=1)
        return jnp.max((A @ flat - b) / jnp.where(length > 0, length, 1), initial=0)

    def validate(self, name: str, like: PyTree) -> None:
        A, b = self.A, np.asarray(self.b)
        if not jax.tree_util.all_leaves([like]) and by_leaves(A, like) is not None:
            check_shape(f"{name}.b (Polyhedron)", b, b.shape if b.ndim == 1 else "(rows,)")
            check_columns(f"{name}.A (Polyhedron)", A, like, b.shape, optional=False)
            A = columns(A, like, b, ravel_pytree(like)[0].dtype)
        A = np.asarray(A)
        check_rows(f"{name}.%s (Polyhedron)", A, b, like)
        if not np.isfinite(np.asarray(least_distance(jnp.asarray(A, float), jnp.asarray(b, float)))).all():
            invalid(f"{name} (Polyhedron)", "an empty set", "some z with A z <= b", "Two rows contradict each other.")


@struct
class Rows(Set):
    """A set for each row of z, whose leaves have shape [n, ...]: row i of all leaves is in the i-th set.

    Args:
        set: one set, which holds every row; or n of them, its arrays with a leading axis [n].
        apart: whether they are n.
    """

    set: Set
    apart: bool = static(default=False)

    bounded: ClassVar = property(lambda self: self.set.bounded)  # pyright: ignore[reportAssignmentType]
    unbounded: ClassVar = property(lambda self: self.set.unbounded)

    def _map(self, function: Any, *args: PyTree) -> PyTree:
        return jax.vmap(function, in_axes=(0 if self.apart else None, *[0] * len(args)))(self.set, *args)

    def project(self, z: PyTree) -> PyTree:
        return self._map(lambda own, row: own.project(row), z)

    def sample(self, key: Array, like: PyTree) -> PyTree:
        keys = jax.random.split(key, jax.tree.leaves(like)[0].shape[0])
        return self._map(lambda own, key, row: own.sample(key, row), keys, like)

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return self._map(lambda own, row: own.active(row, tol), z)

    def validate(self, name: str, like: PyTree) -> None:
        one, numbers = jax.tree.map(lambda leaf: leaf[0], like), jax.tree.map(np.asarray, self.set)  # read once
        for i in range(jax.tree.leaves(like)[0].shape[0] if self.apart else 1):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], numbers) if self.apart else self.set
            own.validate(name, one)
