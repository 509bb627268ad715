"""Lower levels with an own y for each sample of the data (`PerSample`): what one step on a batch works on.

    min over x of  mean_i f_i(x, y_i(x)),      y_i(x) = argmin over y_i in Y_i of g_i(x, y_i),

so that a batch of samples with its rows of y is a bilevel problem of its own, and rows can be compared one by one.
Other problems count as one sample, whose batch is all that there is of g.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.data import PerSample
from bilevel.problem import BilevelProblem
from bilevel.sets import Box

PyTree = Any


class View(NamedTuple):
    """What a step works on."""

    problem: BilevelProblem
    """The problem whose y are the rows of the batch's samples, and whose Y is cut to them."""

    y: PyTree
    """These rows."""

    upper: PyTree
    """The batch of f, numbered for these rows."""

    lower: PyTree
    """The batch of g, likewise."""

    size: int
    """How many samples the batch has."""


def view(problem: BilevelProblem, y: PyTree, upper: PyTree) -> View:
    """The problem as a step with the batch `upper` of f sees it: all of y and of g's data, or with `PerSample` data the
    rows of that batch alone.
    """
    source = problem.upper_data
    if not isinstance(source, PerSample):
        return View(problem, y, upper, problem.lower_data.full(), 1)
    y_set = problem.y_set
    bounds = y_set.bounds(y)
    if bounds is not None:
        y_set = Box(*(source.rows(end, upper) for end in bounds))
    batch = source.renumbered(upper)
    return View(dataclasses.replace(problem, y_set=y_set), source.rows(y, upper), batch, batch, len(upper[0]))


def rows_of(problem: BilevelProblem, stacked: PyTree, upper: PyTree) -> PyTree:
    """The entries of something stacked like y that belong to `view`'s y."""
    source = problem.upper_data
    return source.rows(stacked, upper) if isinstance(source, PerSample) else stacked


def put_back(problem: BilevelProblem, y: PyTree, upper: PyTree, rows: PyTree) -> PyTree:
    """All of y, with `view`'s y replaced by `rows`."""
    source = problem.upper_data
    return source.put(y, upper, rows) if isinstance(source, PerSample) else rows


def single(problem: BilevelProblem, function: Any, x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """`function`, f or g, of each sample of a view's batch alone, shape [samples]."""
    if not isinstance(problem.upper_data, PerSample):
        return function(x, y, batch)[None]

    def one(row: PyTree, sample: PyTree) -> Array:
        alone = jax.tree.map(lambda leaf: leaf[None], (row, sample))
        return function(x, alone[0], (jnp.zeros(1, int), alone[1]))

    return jax.vmap(one)(y, batch[1])


def choose(here: View, stacked: PyTree, index: Array) -> PyTree:
    """Of candidates for y, [K, …], the one that `index`, shape [samples], names for each sample."""
    if not isinstance(here.problem.upper_data, PerSample):
        return jax.tree.map(lambda leaf: leaf[index[0]], stacked)
    return jax.tree.map(lambda leaf: leaf[index, jnp.arange(here.size)], stacked)
