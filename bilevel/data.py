"""Sources of data: what a solver sees of the problem's data at each step.

A source is a pytree with `init(key) -> state`, `next(state, key, x, y) -> (batch, state)` and `full() -> batch`. It may
look at the current (x, y), as the rollouts of inverse reinforcement learning do. Everything random comes from `key` and
everything remembered is in `state`, so that a run resumes to the bit.
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel.backend import permutation
from bilevel.backend.checks import check_finite
from bilevel.backend.draws import below
from bilevel.backend.sharding import several_devices, split
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


ORDERS = ("shuffled", "blocks", "independent")


@struct
class Minibatch(Source):
    """Random batches of `batch_size` of n samples.

    By default the samples are reshuffled at random: every epoch of n consecutive indices holds each index exactly once,
    and a batch may straddle two epochs where batch_size does not divide n. No order is stored: each is a keyed
    bijection of [0, n), computed for the samples of a batch alone (`backend.permutation`), so that a batch costs the
    same whatever n is.

    Args:
        arrays: a pytree of arrays with the n samples along axis 0.
        batch_size: samples a batch, from 1 to n.
        order: "shuffled": all samples in a fresh random order each epoch. "blocks": consecutive samples
            k batch_size, …, (k + 1) batch_size - 1 stay together, and the n/batch_size blocks come in a fresh random
            order each epoch; batch_size must divide n. Reading rows that lie side by side is faster, and pays where a
            step is short, but the data must be in no order of their own: sorted by class, say, each block has one
            class. "independent": every sample is drawn uniformly and independently of all others, with replacement.
        replace: deprecated; True is order="independent", False order="shuffled".
    """

    arrays: PyTree
    batch_size: int = static()
    order: str = static(default="shuffled")
    replace: dataclasses.InitVar[bool | None] = None

    def __post_init__(self, replace: bool | None) -> None:
        """Take `replace` by name or in the place of `order`, as version 0.1.0 did."""
        given = self.order if isinstance(self.order, bool) else replace
        if isinstance(given, bool):
            order = "independent" if given else "shuffled"
            message = (
                f'{type(self).__name__}: replace={given} is order="{order}" now. The old way goes in the next version.'
            )
            warnings.warn(message, DeprecationWarning, stacklevel=4)
            object.__setattr__(self, "order", order)

    @property
    def num_samples(self) -> int:
        """The number of samples n."""
        return jax.tree.leaves(self.arrays)[0].shape[0]

    @property
    def fraction(self) -> float:
        return self.batch_size / self.num_samples

    def init(self, key: Array) -> PyTree:
        if self.order == "independent":
            return ()
        if self.order == "blocks":
            return permutation.start(key, self.num_blocks, 1)
        return permutation.start(key, self.num_samples, self.batch_size)

    def indices(self, state: PyTree, key: Array) -> tuple[Array, PyTree]:
        """The next batch's indices, shape [batch_size], and the state after it."""
        if self.order == "independent":
            return below(jax.random.bits(key, (self.batch_size,), jnp.uint32), self.num_samples), state
        if self.order == "blocks":
            return self._members(state.ready[0]), permutation.following(state, self.num_blocks)
        return state.ready, permutation.following(state, self.num_samples)

    def _members(self, block: Array) -> Array:
        return block * self.batch_size + jnp.arange(self.batch_size)

    def take(self, indices: Array) -> PyTree:
        """The samples at `indices`."""
        return split(jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], self.arrays))

    @property
    def num_blocks(self) -> int:
        """Consecutive samples in blocks of batch_size; what is left over where it does not divide n is in no block."""
        return self.num_samples // self.batch_size

    def block(self, index: Array) -> PyTree:
        if several_devices():  # the partitioner would bring all of the data to each of them to cut out a slice
            return self.take(self._members(index))
        begin = index * self.batch_size
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, begin, self.batch_size), self.arrays)

    def next(self, state: PyTree, key: Array, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        if self.order == "blocks":
            return self.block(state.ready[0]), permutation.following(state, self.num_blocks)
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
        if self.order not in ORDERS:
            invalid(f"{name}.order (Minibatch)", repr(self.order), f"one of {ORDERS}", "Leave it out for the default.")
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
        if self.num_samples > permutation.MOST:
            invalid(f"{name}.arrays (Minibatch)", f"{self.num_samples} samples", "2^30 or less", "Split the data.")
        if self.order == "blocks" and self.num_samples % self.batch_size:
            left = self.num_samples % self.batch_size
            invalid(
                f"{name}.batch_size (Minibatch)", self.batch_size,
                f'a divisor of the number of samples, {self.num_samples}, with order="blocks"',
                f'Leave out {left} of the samples, or choose order="shuffled".',
            )  # fmt: skip
        check_finite(f"{name}.arrays", self.arrays)


def _replace(source: Minibatch) -> bool:
    """Whether samples are drawn with replacement: the name that this had in version 0.1.0."""
    return source.order == "independent"


Minibatch.replace = property(_replace)  # pyright: ignore  # after the dataclass has read the argument's default


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

    def block(self, index: Array) -> PyTree:
        if several_devices():
            return super().block(index)
        return self._members(index), super().block(index)

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
