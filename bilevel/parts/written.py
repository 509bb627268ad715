"""Linear and quadratic levels that were written elsewhere, as numbers: from them a `BilevelProblem`.

f(x, y) = z'H z/2 + c'z + c0,    g(x, y) = z'G z/2 + d'z,    lo <= C z <= hi at either level,    z = (x, y) raveled.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.errors import invalid
from bilevel.data import Full
from bilevel.problem import BilevelProblem, Minimize
from bilevel.sets import Box, Polyhedron, Reals, Set
from bilevel.sets.coupling import LinearCoupling, UpperConstraints

PyTree = Any


class Quadratic(NamedTuple):
    """z'H z/2 + c'z + c0."""

    H: np.ndarray
    c: np.ndarray
    c0: float = 0.0

    def full(self) -> Full:
        """Its numbers as data of `quadratic`."""
        parts = {"H": self.H, "c": self.c, "c0": self.c0}
        return Full({name: jnp.asarray(part, float) for name, part in parts.items()})


class Rows(NamedTuple):
    """lo <= C z <= hi; equalities where both ends agree, infinite ones where there is none."""

    C: np.ndarray
    lo: np.ndarray
    hi: np.ndarray

    def of(self, chosen: Any) -> "Rows":
        """Some of them."""
        return Rows(*(part[chosen] for part in self))

    def joined(self, *others: "Rows") -> "Rows":
        """These and others."""
        return Rows(*(np.concatenate(parts) for parts in zip(self, *others, strict=True)))

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """(A, b) with A z <= b for all ends that are finite."""
        above, below = np.isfinite(self.hi), np.isfinite(self.lo)
        C = np.concatenate([self.C[above], -self.C[below]])
        return C, np.concatenate([self.hi[above], -self.lo[below]])

    def split(self, chosen: Any) -> tuple["Rows", "Rows"]:
        """(those that are chosen, the others)."""
        return self.of(chosen), self.of(~chosen)


class Levels(NamedTuple):
    """Both levels; x and y are the variables' values at the start, pytrees of NumPy arrays."""

    x: PyTree
    y: PyTree
    f: Quadratic
    g: Quadratic
    upper: Rows
    lower: Rows


def quadratic(x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """z'H z/2 + c'z + c0 at the raveled z = (x, y)."""
    z = ravel_pytree((x, y))[0]
    return z @ batch["H"] @ z / 2 + batch["c"] @ z + batch["c0"]


def inequality(x: PyTree, y: PyTree, data: PyTree) -> Array:
    """A z - b."""
    return data["A"] @ ravel_pytree((x, y))[0] - data["b"]


def equality(x: PyTree, y: PyTree, data: PyTree) -> Array:
    """E z - e."""
    return data["E"] @ ravel_pytree((x, y))[0] - data["e"]


@dataclasses.dataclass(frozen=True)
class Start:
    """An `init` that returns the same point each time; equal for equal points, so that nothing compiles again."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]

    @classmethod
    def of(cls, point: PyTree) -> "Start":
        """That of a pytree of arrays."""
        leaves, structure = jax.tree.flatten(point)
        kept = tuple((np.shape(leaf), tuple(np.ravel(leaf).tolist())) for leaf in leaves)
        return cls(structure, kept)

    def __call__(self, key: Array) -> PyTree:
        """(x0, y0)."""
        leaves = [jnp.asarray(np.reshape(values, shape), float) for shape, values in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


def statement(levels: Levels) -> BilevelProblem:
    """The problem: bounds of one unknown become boxes, rows of x alone the x_set, the leader's rows with y the upper
    constraints, and the follower's the coupling.
    """
    n = ravel_pytree(levels.x)[0].size
    upper, lower = (_checked(rows) for rows in (levels.upper, levels.lower))
    of_x, upper = upper.split(~upper.C[:, n:].any(axis=1))
    mute, lower = lower.split(~lower.C[:, n:].any(axis=1))  # without y: where one fails there is no answer, so x is out
    of_x = of_x.joined(mute)
    bounds, lower = lower.split(_single(lower.C) & ~lower.C[:, :n].any(axis=1))
    return BilevelProblem(
        quadratic,
        Minimize(quadratic),
        x_set=_set(of_x._replace(C=of_x.C[:, :n]), levels.x),
        y_set=_set(bounds._replace(C=bounds.C[:, n:]), levels.y),
        coupling=_coupling(lower, n),
        upper_constraints=_leader(upper),
        upper_data=levels.f.full(),
        lower_data=levels.g.full(),
        init=Start.of((levels.x, levels.y)),
    ).validate()


def _checked(rows: Rows) -> Rows:
    """The rows without those of zeros alone and those without ends.

    Raises:
        InvalidInput: a row of zeros that no point fulfils.
    """
    empty = ~rows.C.any(axis=1)
    if (empty & ((rows.lo > 0) | (rows.hi < 0))).any():
        invalid("constraints", "a row without variables that no point fulfils", "rows that hold somewhere", "Drop it.")
    return rows.of(~empty & (np.isfinite(rows.lo) | np.isfinite(rows.hi)))


def _single(C: np.ndarray) -> np.ndarray:
    return (C != 0).sum(axis=1) == 1


def _set(rows: Rows, like: PyTree) -> Set:
    """A box where each row has one unknown, the whole space without rows, else a polyhedron."""
    if not len(rows.C):
        return Reals()
    if not _single(rows.C).all():
        A, b = rows.ends()
        return Polyhedron(jnp.asarray(A, float), jnp.asarray(b, float))
    lo, hi = np.full(rows.C.shape[1], -np.inf), np.full(rows.C.shape[1], np.inf)
    for row, *ends in zip(*rows, strict=True):
        j = int(np.argmax(row != 0))
        below, above = sorted(end / row[j] for end in ends)
        lo[j], hi[j] = max(lo[j], below), min(hi[j], above)
    unravel = ravel_pytree(jax.tree.map(jnp.asarray, like))[1]
    return Box(*(unravel(jnp.asarray(end, float)) for end in (lo, hi)))


def _coupling(rows: Rows, n: int) -> LinearCoupling | None:
    if not len(rows.C):
        return None
    same, other = rows.split(rows.lo == rows.hi)
    A, b = other.ends()
    parts = [(A[:, n:], A[:, :n], b), (same.C[:, n:], same.C[:, :n], same.hi)]
    given = [[jnp.asarray(part, float) for part in kind] if len(kind[2]) else [None] * 3 for kind in parts]
    return LinearCoupling(*given[0], *given[1])


def _leader(rows: Rows) -> UpperConstraints | None:
    if not len(rows.C):
        return None
    same, other = rows.split(rows.lo == rows.hi)
    A, b = other.ends()
    data = {"A": A, "b": b, "E": same.C, "e": same.hi}
    return UpperConstraints(
        inequality=inequality if len(b) else None,
        equality=equality if len(same.hi) else None,
        data={name: jnp.asarray(part, float) for name, part in data.items()},
    )
