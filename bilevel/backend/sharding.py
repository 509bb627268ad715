"""One solve on many devices: data and batches are split along their first axis, and XLA's partitioner does the rest.

`solve(..., mesh=...)` lays the leading axis of the data over all devices of the mesh and keeps everything else whole on
each of them. Inside, `split` marks what is independent along its first axis: batches drawn from a source, samples of a
penalty, perturbations q. The partitioner then computes sums over such axes in parts and adds them by one all-reduce, so
no formula changes and no collective is written by hand. An axis that the number of devices does not divide stays whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bilevel.backend.errors import invalid

PyTree = Any


def _active() -> Any:
    """The mesh of `on`, or None; None too where each device runs lanes of its own (`lanes`)."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and mesh.size > 1 and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if ours else None


def _divisible(leaf: Any, size: int) -> bool:
    return bool(np.ndim(leaf)) and np.shape(leaf)[0] > 0 and np.shape(leaf)[0] % size == 0


def several_devices() -> bool:
    """Whether the partitioner spreads what is traced now over the devices of a mesh, as inside of `on`."""
    return _active() is not None


def split(tree: PyTree) -> PyTree:
    """`tree` with the first axis of every array spread over the devices; as it is outside of `on`. For traced code.

    What made it stays whole: the partitioner would otherwise carry the split backwards, into code that nobody meant,
    and it gets some of that wrong (XLA of jaxlib 0.10.2, `x.at[:, -1].set(y)` after a concatenation).
    """
    mesh = _active()
    if mesh is None:
        return tree
    over = PartitionSpec(mesh.axis_names)

    def one(leaf: Any) -> Any:
        if not _divisible(leaf, mesh.size):
            return leaf
        apart = jax.lax.optimization_barrier(whole(leaf))  # or else two constraints in a row are taken for one
        return jax.lax.with_sharding_constraint(apart, over)

    return jax.tree.map(one, tree)


def whole(tree: PyTree) -> PyTree:
    """`tree` with every array whole on each device, so that each process can read it; as it is outside of `on`."""
    if _active() is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


@contextmanager
def on(mesh: Mesh | None) -> Iterator[Mesh | None]:
    """Compute on the devices of `mesh`, with axes that the partitioner decides about; without one, as always.

    Raises:
        InvalidInput: not a mesh of devices.
    """
    if mesh is None:
        yield None
        return
    with jax.set_mesh(automatic(mesh)):
        yield automatic(mesh)


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with axes that the partitioner decides about.

    Raises:
        InvalidInput: not a mesh of devices.
    """
    if not isinstance(mesh, Mesh) or mesh.empty:
        invalid("mesh", type(mesh).__name__, "a jax.sharding.Mesh", 'Make one: jax.make_mesh((8,), ("data",)).')
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def place(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """`tree` on the devices of `mesh`, every array whole on each; as it is without a mesh."""
    return tree if mesh is None else jax.tree.map(lambda leaf: _put(leaf, mesh, PartitionSpec()), tree)


def place_data(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """`tree` on the devices of `mesh`, split along first axes where the number of devices divides them."""
    if mesh is None:
        return tree
    over, size = PartitionSpec(mesh.axis_names), mesh.size
    return jax.tree.map(lambda leaf: _put(leaf, mesh, over if _divisible(leaf, size) else PartitionSpec()), tree)


def _put(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Numbers of Python stay what they are: they have no dtype of their own."""
    if not isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = _put(jax.random.key_data(leaf), mesh, PartitionSpec())
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    here = np.asarray(leaf)  # each process puts the parts of its own devices
    return jax.make_array_from_callback(here.shape, NamedSharding(mesh, spec), lambda index: here[index])


def agreed(number: float) -> float:
    """The first process's `number`, in each process: clocks differ, and decisions must not."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float64(number)))
