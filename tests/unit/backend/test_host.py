"""NumPy inside of compiled functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.backend.host import on_host


def halves(tree, flag):
    """A third of each number, in NumPy; whole numbers and truth values as they come."""
    assert tree["a"].dtype in (np.float64, np.float32)
    return tree["a"] / 3, tree["n"] + 1, ~flag


def through(a, n, flag):
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in (a, n, flag))
    return on_host(halves, shapes, {"a": a, "n": n}, flag)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3)])
def test_values_and_dtypes_are_kept(dtype, shape):
    a, n, flag = jnp.full(shape, 0.1, dtype), jnp.full(shape, 2**40), jnp.array(True)
    for function in (through, jax.jit(through)):
        third, more, no = function(a, n, flag)
        np.testing.assert_array_equal(third, np.full(shape, 0.1, dtype) / 3)
        assert third.dtype == dtype
        np.testing.assert_array_equal(more, np.full(shape, 2**40 + 1))
        assert not no
    lanes = jax.vmap(through, in_axes=(0, None, None))(jnp.stack([a, 2 * a]), n, flag)[0]
    np.testing.assert_array_equal(lanes, np.stack([np.full(shape, k * a.dtype.type(0.1)) / 3 for k in (1, 2)]))


def test_double_precision_that_only_the_caller_has():
    """As the command line has it: off in the threads of the callbacks."""
    jax.config.update("jax_enable_x64", False)
    try:
        with jax.enable_x64(True):
            a, n, flag = jnp.full(3, 0.1, jnp.float64), jnp.full(3, 2**40), jnp.array(True)
            for _ in range(20):
                third, more, _ = jax.block_until_ready(jax.jit(through)(a, n, flag))
                np.testing.assert_array_equal(third, np.full(3, 0.1) / 3)
                np.testing.assert_array_equal(more, np.full(3, 2**40 + 1))
    finally:
        jax.config.update("jax_enable_x64", True)
