"""Sources of data: what the solver sees of the problem's data at each step.

A source is a pytree with `init(key) -> state`, `next(state, key, x, y) -> (batch, state)` and `full() -> batch`. A
source
may look at the current (x, y): rollouts of inverse reinforcement learning do. Everything random comes from `key`, and
everything remembered is in `state`, so a run resumes to the bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend.checks import check_finite
from bilevel.backend.sharding import split
from bilevel.struct import invalid, static, struct

PyTree = Any


class Source:
    """The protocol. `fraction` is the part of the data that one batch holds: what one oracle call costs."""

    @property
    def fraction(self) -> float:
        """Batch size over number of samples, in (0, 1]."""
        return 1.0

    def init(self, key: Array) -> PyTree:
        """The state before the first batch."""
        return ()

    def next(self, state: PyTree, key: Array, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        """The next batch and state."""
        raise NotImplementedError

    def full(self) -> PyTree:
        """All the data as one batch: for measuring, and for solvers that are not stochastic."""
        raise NotImplementedError

    @property
    def num_blocks(self) -> int:
        """How many blocks of a fixed partition the data has: what variance reduction keeps tables over."""
        return 1

    def block(self, index: Array) -> PyTree:
        """Block `index` of the fixed partition, as a batch."""
        return self.full()

    def validate(self, name: str) -> None:
        """Raise `InvalidInput`, naming `name`, where the data cannot be used."""


@struct
class Full(Source):
    """All of `arrays` (any pytree, None where there is no data) as the batch of every step."""

    arrays: PyTree = None

    def next(self, state: PyTree, key: Array, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        return self.arrays, state

    def full(self) -> PyTree:
        return self.arrays

    def validate(self, name: str) -> None:
        check_finite(name, self.arrays)


@struct
class Minibatch(Source):
    """Random batches of `batch_size` samples; every leaf of `arrays` has the samples along axis 0.

    `replace=True` draws each index uniformly and independently. `replace=False` (default) is random reshuffling: an
    incremental Fisher-Yates shuffle of the indices, `batch_size` swaps a step, so that every epoch of n consecutive
    indices holds each index exactly once; a batch may straddle two epochs where batch_size does not divide n. The
    state is then (permutation [n], position).
    """

    arrays: PyTree
    batch_size: int = static()
    replace: bool = static(default=False)

    @property
    def num_samples(self) -> int:
        """The number of samples n."""
        return jax.tree.leaves(self.arrays)[0].shape[0]

    @property
    def fraction(self) -> float:
        return self.batch_size / self.num_samples

    def init(self, key: Array) -> PyTree:
        return () if self.replace else (jnp.arange(self.num_samples), jnp.zeros((), int))

    def indices(self, state: PyTree, key: Array) -> tuple[Array, PyTree]:
        """The next batch's indices, shape [batch_size], and the state after it."""
        n = self.num_samples
        if self.replace:
            return jax.random.randint(key, (self.batch_size,), 0, n), state
        permutation, start = state
        positions = (start + jnp.arange(self.batch_size)) % n
        partners = jax.random.randint(
            key, (self.batch_size,), positions, n
        )  # each uniform over what the epoch has left

        # The swaps are made on the touched entries alone: XLA would copy the whole permutation at each of them.
        touched = jnp.concatenate([positions, partners])
        order = jnp.argsort(touched)
        slots = order[jnp.searchsorted(touched[order], touched)]  # the same slot for the same place

        def swap(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            entries, drawn = carry
            here, there = slots[k], slots[self.batch_size + k]
            new = entries.at[here].set(entries[there]).at[there].set(entries[here])
            return new, drawn.at[k].set(entries[there])

        drawn = jnp.zeros(self.batch_size, permutation.dtype)
        entries, drawn = jax.lax.fori_loop(0, self.batch_size, swap, (permutation[touched], drawn))
        return drawn, (permutation.at[touched].set(entries[slots]), (start + self.batch_size) % n)

    def take(self, indices: Array) -> PyTree:
        """The samples at `indices`."""
        return split(jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], self.arrays))

    @property
    def num_blocks(self) -> int:
        """Consecutive samples in blocks of batch_size; what is left over where it does not divide n is in no block."""
        return self.num_samples // self.batch_size

    def block(self, index: Array) -> PyTree:
        return self.take(index * self.batch_size + jnp.arange(self.batch_size))

    def next(self, state: PyTree, key: Array, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        indices, state = self.indices(state, key)
        return self.take(indices), state

    def full(self) -> PyTree:
        return self.arrays

    def validate(self, name: str) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(self.arrays)
        if not leaves:
            invalid(
                f"{name}.arrays (Minibatch)",
                "no arrays",
                "at least one array",
                "Use Full() where there is no data.",
            )
        if not isinstance(self.replace, bool):
            invalid(f"{name}.replace (Minibatch)", repr(self.replace), "True or False", "True draws with replacement.")
        lengths = {jax.tree_util.keystr(path): np.shape(leaf)[:1] for path, leaf in leaves}
        if len(set(lengths.values())) != 1 or () in lengths.values():
            invalid(
                f"{name}.arrays (Minibatch)",
                f"leading sizes {lengths}",
                "one number of samples",
                "Put samples on axis 0.",
            )
        if self.num_samples == 0:
            invalid(f"{name}.arrays (Minibatch)", "0 samples", "at least one sample", "Load the data first.")
        whole = isinstance(self.batch_size, int | np.integer) and not isinstance(self.batch_size, bool)
        if not whole or not 1 <= self.batch_size <= self.num_samples:
            invalid(
                f"{name}.batch_size (Minibatch)", self.batch_size, f"a whole number in [1, {self.num_samples}]",
                "Use Full for all of the data at once.",
            )  # fmt: skip
        check_finite(f"{name}.arrays", self.arrays)


@struct
class PerSample(Minibatch):
    """A `Minibatch` whose batches are (index [b], rows): for lower levels with an own y for each sample.

    y is then stacked over the samples, and a problem's f and g touch, on a batch, only y[index], of which each entry
    meets only its own row. `split` turns such a batch into a problem in those rows alone; methods that know of it need
    neither the rest of y nor a second batch for g. `lower_data` has the same samples and the same `batch_size`.
    """

    def take(self, indices: Array) -> PyTree:
        """(indices, the samples at them)."""
        return indices, super().take(indices)

    def full(self) -> PyTree:
        """All of the samples, numbered."""
        return jnp.arange(self.num_samples), self.arrays

    @staticmethod
    def rows(y: PyTree, batch: PyTree) -> PyTree:
        """The entries of y, or of anything stacked like it, that the batch is about."""
        return jax.tree.map(lambda leaf: leaf[batch[0]], y)

    @staticmethod
    def put(y: PyTree, batch: PyTree, rows: PyTree) -> PyTree:
        """The whole y, with `rows` in the places of the batch's samples."""
        return jax.tree.map(lambda leaf, new: leaf.at[batch[0]].set(new), y, rows)

    @staticmethod
    def renumbered(batch: PyTree) -> PyTree:
        """The same batch for a y that consists of its rows alone."""
        return jnp.arange(len(batch[0])), batch[1]
