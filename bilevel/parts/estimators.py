"""Variance-reduced estimators as pure functions of their tables."""

from typing import Any, NamedTuple

import jax
from jax import Array

PyTree = Any


class SagaTable(NamedTuple):
    """The last value seen of each component, leaves [num_blocks, ...], and their mean."""

    entries: PyTree
    mean: PyTree


def saga_init(entries: PyTree) -> SagaTable:
    """A table from the values of all components at the start, leaves [num_blocks, ...]."""
    return SagaTable(entries, jax.tree.map(lambda leaf: leaf.mean(axis=0), entries))


def saga(table: SagaTable, index: Array, new: PyTree) -> tuple[PyTree, SagaTable]:
    """(new - old_index + mean, table with `new` at `index`).

    Unbiased for the mean of the components, with a variance that vanishes as the iterates converge (Defazio, Bach,
    Lacoste-Julien, NeurIPS 2014, arXiv:1407.0202, eq. 1). The mean is updated, not recomputed: O(1) in the blocks.
    """
    old = jax.tree.map(lambda leaf: leaf[index], table.entries)
    estimate = jax.tree.map(lambda a, b, c: a - b + c, new, old, table.mean)
    entries = jax.tree.map(lambda leaf, a: leaf.at[index].set(a), table.entries, new)
    blocks = jax.tree.leaves(table.entries)[0].shape[0]
    mean = jax.tree.map(lambda c, a, b: c + (a - b) / blocks, table.mean, new, old)
    return estimate, SagaTable(entries, mean)
