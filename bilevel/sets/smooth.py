"""Sets {z : h(z) <= 0} of convex functions, and intersections of sets.

The projection of u solves min |z - u|^2/2 over rows and convex functions. It is found by sequential quadratic
programming: with the multipliers lam of the last step, H = I + sum_i lam_i h_i''(z) and h linearised at z, the step p
solves

    min (z - u)'p + p'H p/2  with  h_i(z) + h_i'(z) p <= 0,    lo <= C (z + p) <= hi,

which in L'p, H = L L', is a projection on a polyhedron (`qp.projection`). Since H >= I the steps are short, and near
the solution they converge quadratically.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular

from bilevel.backend.checks import check_callable, shape_of
from bilevel.qp.active_set import Rows
from bilevel.qp.projection import Region
from bilevel.sets.basic import Set
from bilevel.struct import invalid, static, struct

PyTree = Any
STEPS = 60  # at most


class _Search(NamedTuple):
    """Carry."""

    z: Array
    lam: Array
    """Of the functions, shape [rows of h]."""
    last: Array
    """[], the length of the last step."""
    count: Array


def _nearest(u: Array, limits: Rows, h: Callable[[Array], Array]) -> Array:
    """The point of {h(z) <= 0, lo <= C z <= hi} nearest to u [n]; h of shape [rows]."""
    eps, n = float(jnp.finfo(u.dtype).eps), u.size
    weighted = lambda z, lam: lam @ h(z)  # noqa: E731

    def step(c: _Search) -> _Search:
        value, J = h(c.z), jax.jacfwd(h)(c.z)
        H = jnp.eye(n, dtype=u.dtype) + jax.hessian(weighted)(c.z, c.lam)
        L = jnp.linalg.cholesky((H + H.T) / 2)
        C = jnp.concatenate([J, limits.C])
        scaled = jax.scipy.linalg.solve_triangular(L, C.T, lower=True).T
        at = limits.C @ c.z
        lo = jnp.concatenate([jnp.full_like(value, -jnp.inf), limits.lo - at])
        hi = jnp.concatenate([-value, limits.hi - at])
        start = -solve_triangular(L, c.z - u, lower=True)
        found = Region.of(Rows(scaled, lo, hi, limits.B[:0])).project(start)
        p = solve_triangular(L, found.y, lower=True, trans=1)
        lam = jnp.maximum(found.multipliers[: len(value)], 0)
        return _Search(c.z + p, lam, jnp.linalg.norm(p), c.count + 1)

    def goes_on(c: _Search) -> Array:
        return (c.last > 10 * eps * (1 + jnp.linalg.norm(c.z))) & (c.count < STEPS)

    inside = jnp.all(h(u) <= 0) & jnp.all((limits.C @ u <= limits.hi) & (limits.C @ u >= limits.lo))
    begin = _Search(u, jnp.zeros_like(h(u)), jnp.where(inside, 0, jnp.inf).astype(u.dtype), jnp.zeros((), int))
    return jax.lax.while_loop(goes_on, step, begin).z


@struct
class Intersection(Set):
    """The points that are in all of the given sets: boxes, simplices, polyhedra, balls, `SmoothSet`s.

    Where all of them are described by rows the projection is exact; else it is found to rounding error, by steps that
    need the intersection to have an inner point. Samples are points of the first bounded set (else of the first),
    projected. `active` is a tuple with what each set says.

    Args:
        sets: a tuple of sets, each for all of z; a product of sets is one of them.
    """

    sets: Any

    @property
    def bounded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the sets is bounded."""
        return any(one.bounded for one in self.sets)

    @property
    def polyhedral(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all of them are described by rows."""
        return all(one.polyhedral for one in self.sets)

    def rows(self, z: PyTree) -> list[tuple[Array, Array, Array]]:
        """The rows of the polyhedral ones."""
        return [block for one in self.sets if one.polyhedral for block in one.rows(z)]

    def project(self, z: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(z)
        limits = _stacked(self.rows(z), flat)
        curved = [one for one in self.sets if not one.polyhedral]
        if not curved:
            return unravel(Region.of(limits).project(flat).y)
        return unravel(_nearest(flat, limits, lambda z: jnp.concatenate([one.values(unravel(z)) for one in curved])))

    def sample(self, key: Array, like: PyTree) -> PyTree:
        return self.project(self._first.sample(key, like))

    def fill(self, uniform: Array, key: Array, like: PyTree) -> PyTree:
        return jax.vmap(self.project)(self._first.fill(uniform, key, like))

    @property
    def _first(self) -> Set:
        return next((one for one in self.sets if one.bounded), self.sets[0])

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return tuple(one.active(z, tol) for one in self.sets)

    def validate(self, name: str, like: PyTree) -> None:
        if not isinstance(self.sets, tuple) or not self.sets:
            got = type(self.sets).__name__
            invalid(f"{name} (Intersection)", got, "a tuple of sets", "Write Intersection((Box(0.0, 1.0), other)).")
        for one in self.sets:
            if not isinstance(one, Set) or not (one.polyhedral or one.curved):
                got, do = type(one).__name__, "Use boxes, simplices, polyhedra, balls and SmoothSets."
                invalid(f"{name} (Intersection)", got, "a set with rows, or with functions", do)
            one.validate(name, like)


@struct
class SmoothSet(Set):
    """{z : h(z) <= 0 in every row}, of convex and twice differentiable functions: nonlinear constraints of x alone.

        x_set = bilevel.Intersection((bilevel.Box(0.0, 1.0), bilevel.SmoothSet(h, data=weights)))

    Args:
        h: z -> [rows] or [], or (z, data) -> the same where data are given. A module-level function, so that another
            instance compiles nothing.
        data: arrays that h takes, leaves. Default: None, h takes z alone.

    Whether the set is bounded is not known. Samples are standard normal and projected; `active` has shape [rows].
    """

    bounded, curved = False, True
    h: Callable[..., Array] = static()
    data: PyTree = None

    def values(self, z: PyTree) -> Array:
        """h at z, shape [rows]."""
        return jnp.atleast_1d(self.h(z) if self.data is None else self.h(z, self.data))

    def project(self, z: PyTree) -> PyTree:
        return Intersection((self,)).project(z)

    def sample(self, key: Array, like: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(like)
        return self.project(unravel(jax.random.normal(key, flat.shape, flat.dtype)))

    def active(self, z: PyTree, tol: float = 0.0) -> Array:
        return self.values(z) >= -tol

    def validate(self, name: str, like: PyTree) -> None:
        check_callable(f"{name}.h (SmoothSet)", self.h, "h(z) -> [rows]")
        out = shape_of(f"{name}.h (SmoothSet)", self.values, like)
        if not isinstance(out, jax.ShapeDtypeStruct) or len(out.shape) != 1:
            got = jax.tree.map(lambda leaf: f"shape {list(leaf.shape)}", out)
            invalid(f"{name}.h (SmoothSet)", got, "h(z) of shape [rows] or []", "Stack the constraints in one vector.")
        value, point = self.values(like), self.values(self.project(like))
        if not bool(jnp.all(point <= 1e-6 * (1 + jnp.abs(value)))):
            do = "Check the signs: h(z) <= 0 must have a solution, and h must be convex."
            invalid(f"{name} (SmoothSet)", f"h = {point} at the projection of the start", "a set with points", do)


def _stacked(blocks: list[tuple[Array, Array, Array]], flat: Array) -> Rows:
    """Blocks of rows as one, with a row that never binds where there is none."""
    never = jnp.full(1, jnp.inf, flat.dtype)
    blocks = blocks or [(jnp.zeros((1, flat.size), flat.dtype), -never, never)]
    C, lo, hi = (jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
    return Rows(C, lo, hi, jnp.zeros((len(lo), 0), flat.dtype))
