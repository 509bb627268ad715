"""Sources of data: what a solver sees of the problem's data at each step.

A source is a pytree with `init(key) -> state`, `next(state, key, x, y) -> (batch, state)` and `full() -> batch`. It may
look at the current (x, y), as the rollouts of inverse reinforcement learning do. Everything random comes from `key` and
everything remembered is in `state`, so that a run resumes to the bit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend.checks import check_finite
from bilevel.backend.sharding import split
from bilevel.struct import invalid, static, struct

PyTree = Any


class Source:
    """The protocol that every source of data follows."""

    @property
    def fraction(self) -> float:
        """The part of the data that one batch holds, in (0, 1]: what an oracle call on it costs."""
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
        """Into how many blocks the data is divided once and for all: variance reduction keeps a table over them."""
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


class Shuffle(NamedTuple):
    """How far a `Minibatch` without replacement has got."""

    permutation: Array
    """The order of the n indices in this epoch, as far as it is drawn, shape [n]."""

    position: Array
    """Where the next batch begins in it, shape []."""


class Swaps(NamedTuple):
    """Swaps of a `Shuffle` under way."""

    entries: Array
    """The entries of the permutation that the batch touches, shape [2 batch_size]."""

    drawn: Array
    """The batch's indices, shape [batch_size]."""


@struct
class Minibatch(Source):
    """Random batches of `batch_size` of n samples.

    By default the samples are reshuffled at random: every epoch of n consecutive indices holds each index exactly once,
    and a batch may straddle two epochs where batch_size does not divide n. It is an incremental Fisher-Yates shuffle,
    `batch_size` swaps a step, whose state is a `Shuffle`.

    Args:
        arrays: a pytree of arrays with the n samples along axis 0.
        batch_size: samples a batch, from 1 to n.
        replace: draw every index uniformly and independently of all others instead; there is no state then.
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
        return () if self.replace else Shuffle(jnp.arange(self.num_samples), jnp.zeros((), int))

    def indices(self, state: PyTree, key: Array) -> tuple[Array, PyTree]:
        """The next batch's indices, shape [batch_size], and the state after it."""
        n = self.num_samples
        if self.replace:
            return jax.random.randint(key, (self.batch_size,), 0, n), state
        permutation, start = state
        positions = (start + jnp.arange(self.batch_size)) % n
        partners = jax.random.randint(key, (self.batch_size,), positions, n)  # uniform over what the epoch has left

        # The swaps are made on the touched entries alone: XLA would copy the whole permutation at each of them.
        touched = jnp.concatenate([positions, partners])
        order = jnp.argsort(touched)
        slots = order[jnp.searchsorted(touched[order], touched)]  # the same slot for the same place

        def swap(k: Array, swaps: Swaps) -> Swaps:
            entries, drawn = swaps
            here, there = slots[k], slots[self.batch_size + k]
            new = entries.at[here].set(entries[there]).at[there].set(entries[here])
            return Swaps(new, drawn.at[k].set(entries[there]))

        swaps = Swaps(permutation[touched], jnp.zeros(self.batch_size, permutation.dtype))
        entries, drawn = jax.lax.fori_loop(0, self.batch_size, swap, swaps)
        return drawn, Shuffle(permutation.at[touched].set(entries[slots]), (start + self.batch_size) % n)

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
    """A `Minibatch` whose batches are (index [b], rows): for lower levels that have a y of their own for each sample.

    Here y is stacked over the samples, and on a batch f and g touch only the rows y[index], each of which meets only
    its own sample. Such a batch with its rows of y is a bilevel problem of its own, which `oracles.per_sample.view`
    cuts out: methods that know of it need neither the rest of y nor a second batch for g. The problem's `lower_data`
    has the same samples and the same `batch_size`.
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


def check_per_sample(upper: Source, lower: Source, y: PyTree) -> None:
    """Raise `InvalidInput` where one level has `PerSample` data and the other has other data, or y no row a sample."""
    if not isinstance(upper, PerSample) and not isinstance(lower, PerSample):
        return
    for name, source in (("upper_data", upper), ("lower_data", lower)):
        if not isinstance(source, PerSample):
            invalid(name, type(source).__name__, "PerSample, as the other level's data", "Give both levels one source.")
    assert isinstance(upper, PerSample)
    assert isinstance(lower, PerSample)
    sizes = [(source.num_samples, source.batch_size) for source in (upper, lower)]
    if sizes[0] != sizes[1]:
        invalid("lower_data (PerSample)", f"(samples, batch size) {sizes[1]}", f"{sizes[0]}", "Give both one source.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(y):
        if np.shape(leaf)[:1] != (upper.num_samples,):
            label, samples = f"init: y0{jax.tree_util.keystr(path)}", upper.num_samples
            invalid(label, f"shape {np.shape(leaf)}", f"({samples}, …), a row a sample", "Stack y over the samples.")
