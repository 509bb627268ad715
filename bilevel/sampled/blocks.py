"""A problem whose y is an array [n, m]: n blocks of m numbers that nothing ties together, and what is asked of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.oracles import samples as sample_oracles
from bilevel.oracles.samples import CouplingRows
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A problem with y as an array [n, m]: n blocks that neither the objectives nor Y(x) tie together, of m numbers.

    n = 1 unless `problem.separable`. upper, lower: all of the data. pack: a y to its array; unpack: back.
    """

    problem: BilevelProblem
    n: int
    m: int
    dtype: Any
    pack: Callable[[PyTree], Array]
    unpack: Callable[[Array], PyTree]
    upper: PyTree
    lower: PyTree

    @classmethod
    def of(cls, problem: BilevelProblem, y: PyTree) -> "Blocks":
        """The view of `problem`, for points shaped like y."""
        flat, unravel = ravel_pytree(y)
        leaves, treedef = jax.tree.flatten(y)
        num = leaves[0].shape[0] if problem.separable else 1
        ends = np.cumsum([leaf.size // num for leaf in leaves])[:-1]

        def pack(y: PyTree) -> Array:
            if num == 1:
                return ravel_pytree(y)[0][None]
            return jnp.concatenate([leaf.reshape(num, -1) for leaf in jax.tree.leaves(y)], axis=1)

        def unpack(z: Array) -> PyTree:
            if num == 1:
                return unravel(z[0])
            parts = jnp.split(z, ends, axis=1)
            return treedef.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])

        data = problem.upper_data.full(), problem.lower_data.full()
        return cls(problem, num, flat.size // num, flat.dtype, pack, unpack, *data)

    def project(self, y: Array) -> Array:
        """The point of Y nearest to y, shape [n, m]."""
        return self.pack(self.problem.y_set.project(self.unpack(y)))

    def stack(self, ys: Array) -> PyTree:
        """Points [N, n, m] as stacked pytrees."""
        return jax.vmap(self.unpack)(ys)

    def values(self, x: PyTree, ys: Array, chunk: int | None = None) -> tuple[Array, Array]:
        """(f, g) of the blocks of points [N, n, m], shapes [N, n]."""
        f, g = sample_oracles.sample_values(self.problem, x, self.stack(ys), self.upper, self.lower, chunk)
        chex.assert_shape([f, g], (len(ys), self.n))
        return f, g

    def gradients(self, x: PyTree, ys: Array, a: Array, b: Array, chunk: int | None = None) -> tuple[PyTree, Array]:
        """Gradients in x and in ys, [N, n, m], of the sum of a f + b g over all samples and blocks."""
        stacked = self.stack(ys)
        by_x, by_y = sample_oracles.sample_gradients(self.problem, x, stacked, a, b, self.upper, self.lower, chunk)
        chex.assert_trees_all_equal_shapes(by_x, x)
        return by_x, jax.vmap(self.pack)(by_y)

    def coupling_rows(self, x: PyTree, y: Array) -> CouplingRows:
        """The coupling at y, linearised in the raveled y."""
        return sample_oracles.coupling_rows(self.problem, x, self.unpack(y))

    def coupling_derivative(self, x: PyTree, y: Array) -> Array:
        """The derivative of the coupling's rows (c, e) in the raveled (x, y), shape [rows, dim x + m]."""
        return oracles.coupling_derivative(self.problem, x, self.unpack(y))

    def coupling_pull(self, x: PyTree, ys: Array, weights: Array) -> tuple[PyTree, Array]:
        """Gradients in x and in ys [N, n, m] of sum_i weights_i' (c, e)(x, y_i), weights [N, rows]."""
        by_x, by_y = sample_oracles.coupling_pull(self.problem, x, self.stack(ys), weights)
        return by_x, jax.vmap(self.pack)(by_y)

    def violation(self, x: PyTree, y: Array) -> Array:
        """The distance of y to Y plus the norm of the coupling's residual, shape []."""
        point = self.unpack(y)
        rows = oracles.coupling_residual(self.problem, x, point)
        return self.problem.y_set.violation(point) + jnp.sqrt(rows @ rows)


class Model(NamedTuple):
    """An objective to second order at one y."""

    terms: Array
    """Its terms, one a block, shape [n]."""

    gradient: Array
    """Of their sum, in y, shape [n, m]."""

    product: Callable[[Array], Array]
    """v [n, m] -> the Hessian times v."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """H = a f + b g at a fixed x, a and b numbers or [n], on the blocks of a problem; g alone where they are None."""

    view: Blocks
    x: PyTree
    a: Any = None
    b: Any = None

    def terms(self, y: Array) -> Array:
        """H of each block at y [n, m], shape [n]; counted as a value of f and of g."""
        view = self.view
        return sample_oracles.weighted_terms(
            view.problem, self.x, view.unpack(y), self.a, self.b, view.upper, view.lower
        )

    def model(self, y: Array) -> Model:
        """H around y [n, m]; counted as a gradient of f and of g, and each product as two HVPs."""
        view = self.view
        found = sample_oracles.weighted_model(
            view.problem, self.x, view.unpack(y), self.a, self.b, view.upper, view.lower
        )
        return Model(found.terms, view.pack(found.gradient), lambda v: view.pack(found.product(view.unpack(v))))


def pick(ys: Array, index: Array) -> Array:
    """Point index[.., j] for block j: from ys [N, n, …] and index [n] or [K, n], shapes [n, …] or [K, n, …]."""
    return ys[index, jnp.arange(ys.shape[1])]


def uncoupled(problem: BilevelProblem, upper_weight: Any, lower_weight: Any) -> BilevelProblem:
    """The problem with penalties on its coupling added, r = ([c]_+, e) the residual of c(x, y) <= 0 and e(x, y) = 0:

        f + (upper_weight/2) |r|^2,        g + (lower_weight/2) |r|^2.

    The coupling itself stays, so that points can still be moved into Y(x). For use inside jit.
    """
    if problem.coupling is None:
        return problem
    assert isinstance(problem.lower, Minimize)
    f, g = problem.upper, problem.lower.g

    def square(x: PyTree, y: PyTree) -> Array:
        rows = oracles.coupling_residual(problem, x, y)
        return rows @ rows / 2

    return dataclasses.replace(
        problem,
        upper=lambda x, y, batch: f(x, y, batch) + upper_weight * square(x, y),
        has_aux=False,
        lower=Minimize(lambda x, y, batch: g(x, y, batch) + lower_weight * square(x, y)),
    )
