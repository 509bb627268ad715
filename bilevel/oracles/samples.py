"""Oracles at many points of the lower level, counted like those of `oracles`: values, gradients, Hessians of blocks.

The blocks of a separable problem are the n terms of its objectives; other problems have one, the objective itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.sharding import split, whole
from bilevel.oracles.calls import coupling_values
from bilevel.oracles.counts import batched, count, divisor
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any


def _terms(problem: BilevelProblem, function: Any, x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """The terms of a separable problem's objective, shape [n]; else the objective, shape [1]."""
    return function.terms(x, y, batch) if problem.separable else function(x, y, batch)[None]


def _weighted(problem: BilevelProblem, upper: PyTree, lower: PyTree) -> Callable:
    """(x, y, a, b) -> the terms of a f + b g, shape [n]; those of g alone where a and b are None."""
    assert isinstance(problem.lower, Minimize)
    f, g = problem.upper, problem.lower.g

    def terms(x: PyTree, y: PyTree, a: Any, b: Any) -> Array:
        value = _terms(problem, g, x, y, lower)
        return value if a is None else a * _terms(problem, f, x, y, upper) + b * value

    return terms


def sample_values(
    problem: BilevelProblem, x: PyTree, ys: PyTree, upper: PyTree, lower: PyTree, chunk: int | None = None
) -> tuple[Array, Array]:
    """The terms of f and g at (x, y_i), [N, n], n = 1 unless the problem is separable; N values of each are counted.

    y_i are stacked along the first axis of ys. With `chunk`, at most so many samples are in memory at once.
    """
    assert isinstance(problem.lower, Minimize)
    f, g = problem.upper, problem.lower.g

    def both(y: PyTree) -> tuple[Array, Array]:
        count(upper_values=1, lower_values=1)
        return _terms(problem, f, x, y, upper), _terms(problem, g, x, y, lower)

    return batched(both, chunk)(ys)


def sample_gradients(
    problem: BilevelProblem, x: PyTree, ys: PyTree, a: Array, b: Array, upper: PyTree, lower: PyTree,
    chunk: int | None = None,
) -> tuple[PyTree, PyTree]:  # fmt: skip
    """Gradients in x and in ys of sum_ij a_ij f_j(x, y_i) + b_ij g_j(x, y_i), a and b [N, n]; N of each are counted."""
    size, terms = len(a), _weighted(problem, upper, lower)
    count(upper_gradients=size, lower_gradients=size)

    def weighted(x: PyTree, ys: PyTree, a: Array, b: Array) -> Array:
        return jnp.sum(jax.vmap(terms, in_axes=(None, 0, 0, 0))(x, ys, a, b))

    slopes = lambda *parts: whole(jax.grad(weighted, argnums=(0, 1))(x, *split(parts)))  # noqa: E731
    part = divisor(size, chunk)
    if part == size:
        return slopes(ys, a, b)

    def add(total: PyTree, piece: PyTree) -> tuple[PyTree, PyTree]:
        by_x, by_y = slopes(*piece)
        return optax.tree.add(total, by_x), by_y

    pieces = jax.tree.map(lambda leaf: leaf.reshape(size // part, part, *leaf.shape[1:]), (ys, a, b))
    total, by_y = jax.lax.scan(add, optax.tree.zeros_like(x), pieces)
    return total, jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), by_y)


def weighted_terms(
    problem: BilevelProblem, x: PyTree, y: PyTree, a: Any, b: Any, upper: PyTree, lower: PyTree
) -> Array:
    """The terms of a f + b g at (x, y), or of g where a and b are None, shape [n]; counted as a value of each."""
    count(lower_values=1, upper_values=int(a is not None))
    return _weighted(problem, upper, lower)(x, y, a, b)


class WeightedModel(NamedTuple):
    """a f + b g to second order in y."""

    terms: Array
    """One a block, shape [n]."""

    gradient: PyTree
    """Of their sum, shaped like y."""

    product: Callable[[PyTree], PyTree]
    """v -> the Hessian times v, both shaped like y."""


def weighted_model(
    problem: BilevelProblem, x: PyTree, y: PyTree, a: Any, b: Any, upper: PyTree, lower: PyTree
) -> WeightedModel:
    """The function a f + b g around (x, y), or g where a and b are None.

    Counted as a gradient of each; a product as one or two HVPs.
    """
    both = int(a is not None)
    count(lower_gradients=1, upper_gradients=both)
    terms = _weighted(problem, upper, lower)

    def total(y: PyTree) -> tuple[Array, Array]:
        value = terms(x, y, a, b)
        return jnp.sum(value), value

    gradient, forward, value = jax.linearize(jax.grad(total, has_aux=True), y, has_aux=True)

    def product(v: PyTree) -> PyTree:
        count(hvps=1 + both)
        return forward(v)

    return WeightedModel(value, gradient, product)


class CouplingRows(NamedTuple):
    """A coupling c(x, y) <= 0, e(x, y) = 0, linearised in y."""

    values: Array
    """c and e in one vector, shape [rows]."""

    derivative: Array
    """Of the values in the raveled y, shape [rows, dim y]."""

    equality: np.ndarray
    """Which rows are those of e; known when traced, shape [rows]."""


def coupling_rows(problem: BilevelProblem, x: PyTree, y: PyTree) -> CouplingRows:
    """The coupling's rows at (x, y)."""
    flat, unravel = ravel_pytree(y)
    num = [part.shape[0] for part in jax.eval_shape(lambda: coupling_values(problem, x, y))]

    def rows(flat: Array) -> tuple[Array, Array]:
        values = jnp.concatenate(coupling_values(problem, x, unravel(flat)))
        return values, values

    J, values = jax.jacrev(rows, has_aux=True)(flat)
    return CouplingRows(values, J, np.arange(sum(num)) >= num[0])


def coupling_pull(problem: BilevelProblem, x: PyTree, ys: PyTree, weights: Array) -> tuple[PyTree, PyTree]:
    """Gradients in x and in ys of sum_i weights_i' (c, e)(x, y_i), weights [N, rows]."""

    def weighted(x: PyTree, ys: PyTree) -> Array:
        return jnp.sum(weights * jax.vmap(lambda y: jnp.concatenate(coupling_values(problem, x, y)))(ys))

    return jax.grad(weighted, argnums=(0, 1))(x, ys)
