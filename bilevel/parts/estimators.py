"""Variance-reduced estimators as pure functions of their tables."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any


class SagaTable(NamedTuple):
    """The last value seen of each component, leaves [num_blocks, ...], and their mean.

    The last value is written by the next step, before that reads: where a loop reads an entry and then writes to it,
    XLA copies the whole table at every step, which with 512 blocks of 22 numbers takes longer than the step.
    """

    stored: PyTree
    """The values of all components but the last one looked at, leaves [num_blocks, ...]."""

    mean: PyTree
    """Of all values, leaves [...]."""

    index: Array
    """The component that was looked at last, shape []."""

    last: PyTree
    """Its value, leaves [...]."""

    @property
    def entries(self) -> PyTree:
        """The last value seen of each component, leaves [num_blocks, ...]."""
        return jax.tree.map(lambda leaf, value: leaf.at[self.index].set(value), self.stored, self.last)


def saga_init(entries: PyTree) -> SagaTable:
    """A table from the values of all components at the start, leaves [num_blocks, ...]."""
    mean, first = (jax.tree.map(f, entries) for f in (lambda leaf: leaf.mean(axis=0), lambda leaf: leaf[0]))
    return SagaTable(entries, mean, jnp.zeros((), int), first)


def saga(table: SagaTable, index: Array, new: PyTree) -> tuple[PyTree, SagaTable]:
    """(new - old_index + mean, table with `new` at `index`).

    Unbiased for the mean of the components, with a variance that vanishes as the iterates converge (Defazio, Bach,
    Lacoste-Julien, NeurIPS 2014, arXiv:1407.0202, eq. 1). The mean is updated, not recomputed: O(1) in the blocks.
    """
    entries = table.entries
    old = jax.tree.map(lambda leaf: leaf[index], entries)
    estimate = jax.tree.map(lambda a, b, c: a - b + c, new, old, table.mean)
    blocks = jax.tree.leaves(entries)[0].shape[0]
    mean = jax.tree.map(lambda c, a, b: c + (a - b) / blocks, table.mean, new, old)
    return estimate, SagaTable(entries, mean, index.astype(table.index.dtype), new)
