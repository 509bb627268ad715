"""Products of sets, one for each part of a pytree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.tree import norm
from bilevel.qp import face as faces
from bilevel.qp.face import Face
from bilevel.sets.basic import Set
from bilevel.struct import InvalidInput, invalid, struct

PyTree = Any


def _over(flag: str, taken: Callable = all) -> Any:
    """A property of products: whether `flag` holds for all factors, or for any."""
    return property(lambda self: taken(getattr(factor, flag) for factor in self.factors()))


@struct
class Product(Set):
    """One set for each branch of z: {"w": Reals(), "lam": Box(0, 1)} for z = {"w": ..., "lam": ...}.

    Args:
        sets: a pytree of sets whose structure is a prefix of z's.
    """

    sets: Any

    bounded, intervals, polyhedral, faced = map(_over, ("bounded", "intervals", "polyhedral", "faced"))
    unbounded = _over("unbounded", any)

    def simple(self) -> list[Set]:
        return [one for factor in self.factors() for one in factor.simple()]

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

    def fill(self, uniform: Array, key: Array, like: PyTree) -> PyTree:
        factors, parts = self.factors(), self.parts(like)
        ends = np.cumsum([ravel_pytree(part)[0].size for part in parts])[:-1]
        given = jnp.split(uniform, ends, axis=1), jax.random.split(key, len(parts))
        filled = [factor.fill(*args) for factor, *args in zip(factors, *given, parts, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(filled))

    def rows(self, z: PyTree) -> list[tuple[Array, Array, Array]]:
        blocks, offset, n = [], 0, ravel_pytree(z)[0].size
        for factor, part in zip(self.factors(), self.parts(z), strict=True):
            blocks += [(faces.widened(C, offset, n), lo, hi) for C, lo, hi in factor.rows(part)]
            offset += ravel_pytree(part)[0].size
        return blocks

    def face(self, y: PyTree, R: PyTree, s: Array) -> Face:
        parts = zip(self.factors(), self.parts(y), self.parts(R), strict=True)
        return faces.of_product([factor.face(p, r, s) for factor, p, r in parts], s)

    def active(self, z: PyTree, tol: float = 0.0) -> PyTree:
        return self._map(lambda factor, part: factor.active(part, tol), z)

    def violation(self, z: PyTree) -> Array:
        return norm(self._map(lambda factor, part: factor.violation(part), z))

    def validate(self, name: str, like: PyTree) -> None:
        try:
            self._map(lambda factor, part: factor.validate(name, part), like)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            if isinstance(error, InvalidInput):
                raise
            invalid(f"{name} (Product)", error, "a pytree of sets, a prefix of the point's structure", "Match the two.")


def _is_set(value: object) -> bool:
    return isinstance(value, Set)
