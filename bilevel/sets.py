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

    def project(self, z: PyTree) -> PyTree:
        return optax.projections.projection_box(z, _like(self.lo, z), _like(self.hi, z))

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

    def project(self, z: PyTree) -> PyTree:
        center = _like(self.center, z)
        flat, unravel = ravel_pytree(jax.tree.map(operator.sub, z, center))
        radius, squared = jnp.asarray(self.radius, flat.dtype), flat @ flat
        outside = squared > radius**2
        shrink = jnp.where(outside, radius / jnp.sqrt(jnp.where(outside, squared, 1)), 1)  # finite for radius 0, too
        return jax.tree.map(operator.add, center, unravel(shrink * flat))

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        direction, length = jax.random.split(key)
        normal = jax.random.normal(direction, flat.shape, flat.dtype)
        uniform = jax.random.uniform(length, (), flat.dtype)
        scale = self.radius * uniform ** (1.0 / flat.size) / jnp.linalg.norm(normal)
        return self.project(jax.tree.map(operator.add, _like(self.center, like), unravel(scale * normal)))

    def active(self, z: PyTree, tol: float = 0.0) -> Array:
        return _norm(jax.tree.map(operator.sub, z, _like(self.center, z))) >= self.radius - tol

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
        flat = flat - jnp.max(flat)  # changes nothing but rounding: far points keep their digits
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer positions and floats
            moved = optax.projections.projection_simplex(flat, jnp.asarray(self.scale, flat.dtype))
        return unravel(jnp.asarray(moved, flat.dtype))

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        return unravel(self.scale * jax.random.dirichlet(key, jnp.ones(flat.shape, flat.dtype)))

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return jax.tree.map(lambda leaf: leaf <= tol, z)

    def validate(self, name: str, like: PyTree) -> None:
        if np.ndim(self.scale) != 0 or not np.isfinite(self.scale) or self.scale <= 0:
            invalid(f"{name}.scale (Simplex)", self.scale, "one finite number > 0", "Use the default scale=1.0.")


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
        """The largest row of A z - b, or 0: cheaper than a projection, and zero exactly when z is in the set."""
        flat = ravel_pytree(z)[0]
        A, b = self._rows(flat.dtype)
        return jnp.max(A @ flat - b, initial=0)

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
        return all(factor.bounded for factor in self._factors())

    def _factors(self) -> list[Set]:
        return jax.tree.leaves(self.sets, is_leaf=_is_set)

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


_SEARCHING, _SOLVED, _EMPTY = range(3)


def least_distance(A: Array, slack: Array, noise: Array | None = None) -> Array:
    """The shortest d with A d <= slack, or NaN where there is none. Shapes: A [rows, n], slack [rows] -> [n].

    The dual active-set method of Goldfarb and Idnani (A numerically stable dual method for solving strictly convex
    quadratic programs, Mathematical Programming 27, 1983) with the identity as Hessian: from d = 0 take in the most
    violated row p, moving along its component z orthogonal to the active rows; active rows whose multiplier reaches
    zero on the way leave; where z = 0 and none can leave, the rows contradict each other. Each row taken in lengthens
    d, so that no active set comes twice. d and the multipliers u are computed afresh, by QR, for every new active set.

    A row counts as violated beyond rounding and `noise` [rows], the error that slack already carries, both propagated
    through the active rows. A set whose nearest point is farther than eps^(-2/3) times the largest violation counts as
    empty. Static shapes: jit, vmap.
    """
    rows, n = A.shape
    if rows == 0 or n == 0:
        return jnp.zeros(n, A.dtype)
    eps = float(jnp.finfo(A.dtype).eps)
    length = jnp.linalg.norm(A, axis=1)
    safe = jnp.where(length > 0, length, 1)  # rows of norm one: one tolerance for all
    G, h = A / safe[:, None], slack / safe
    scale = jnp.max(-h)  # |d| >= scale: solve for d/scale
    scale = jnp.where(scale > 0, scale, 1)
    h = h / scale
    allowance = 10 * eps * n * jnp.abs(h) + (0 if noise is None else noise / safe / scale)

    # Slots: W [n] holds the active rows, -1 where free; u [n] their multipliers; p is the row coming in, -1 before one
    # is chosen, and u_p its multiplier.
    def go_on(carry: tuple) -> Array:
        return (carry[-1] == _SEARCHING) & (carry[-2] < 10 * (rows + n))

    def body(carry: tuple) -> tuple:
        d, W, u, p, u_p, count, _ = carry
        used, fresh = W >= 0, p < 0
        N = jnp.where(used[:, None], G[W], 0)
        Q, R = jnp.linalg.qr(jnp.concatenate([N.T, jnp.diag(jnp.where(used, 0, 1).astype(A.dtype))]))
        Q = Q[:n]  # columns of used slots span the active rows, the others are zero
        w = jax.scipy.linalg.solve_triangular(R, jnp.where(used, h[W], 0), trans=1)
        d = jnp.where(fresh, Q @ w, d)
        u = jnp.where(fresh, jnp.where(used, jnp.maximum(-jax.scipy.linalg.solve_triangular(R, w), 0), 0), u)
        size = jnp.linalg.norm(d)
        active = jnp.any(W[:, None] == jnp.arange(rows)[None, :], axis=0)
        # Row i = sum of r_ij times active row j, plus an orthogonal part: errors of active rows reach it through r_ij.
        reach = jnp.abs(jax.scipy.linalg.solve_triangular(R, (G @ Q).T))
        error = allowance + 10 * eps * n * size
        excess = jnp.where(active, -jnp.inf, G @ d - h - error - jnp.where(used, error[W], 0) @ reach)
        p = jnp.where(fresh, jnp.argmax(excess), p)
        u_p = jnp.where(fresh, 0, u_p)
        solved = fresh & (excess[p] <= 0)

        coordinates = Q.T @ G[p]
        z = G[p] - Q @ coordinates
        z = z - Q @ (Q.T @ z)
        independent = (jnp.linalg.norm(z) > 100 * eps * n) & ~jnp.all(used)
        r = jnp.where(used, jax.scipy.linalg.solve_triangular(R, coordinates), 0)
        full = jnp.where(independent, (G[p] @ d - h[p]) / jnp.where(independent, z @ z, 1), jnp.inf)
        ratios = jnp.where(r > 0, u / jnp.where(r > 0, r, 1), jnp.inf)
        leaving = jnp.argmin(ratios)
        t, joins = jnp.minimum(full, ratios[leaving]), full <= ratios[leaving]
        empty = ~jnp.isfinite(t) | (size > eps ** (-2 / 3))
        t = jnp.where(solved | empty, 0, t)
        d = d - jnp.where(independent, t, 0) * z
        u, u_p = jnp.maximum(u - t * r, 0), u_p + t
        slot = jnp.where(joins, jnp.argmin(W), leaving)  # a free slot holds -1
        W, u = W.at[slot].set(jnp.where(joins, p, -1)), u.at[slot].set(jnp.where(joins, u_p, 0))
        status = jnp.where(solved, _SOLVED, jnp.where(empty, _EMPTY, _SEARCHING))
        return d, W, u, jnp.where(joins, -1, p), u_p, count + 1, status

    nothing, nobody = jnp.zeros(n, A.dtype), jnp.array(-1)
    start = (nothing, jnp.full(n, -1), nothing, nobody, jnp.zeros((), A.dtype), jnp.array(0), jnp.array(_SEARCHING))
    d, *_, status = jax.lax.while_loop(go_on, body, start)
    return jnp.where(status == _SOLVED, scale * d, jnp.nan)
