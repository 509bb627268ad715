"""A loop of at most one pass, and an order between arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.backend.loops import once_if
from bilevel.backend.order import after


@pytest.mark.parametrize("wanted", [True, False])
def test_once_if_updates_once_or_not_at_all(wanted):
    value = {"a": jnp.arange(3.0), "b": jnp.array(1)}
    found = jax.jit(lambda value: once_if(jnp.array(wanted), lambda v: jax.tree.map(lambda x: x + 1, v), value))(value)
    np.testing.assert_array_equal(found["a"], np.arange(3.0) + wanted)
    assert found["b"] == 1 + wanted


def test_once_if_by_lanes():
    wanted = jnp.array([True, False, True])
    found = jax.vmap(lambda w, x: once_if(w, jnp.sin, x))(wanted, jnp.arange(3.0))
    np.testing.assert_allclose(found, np.where(wanted, np.sin(np.arange(3.0)), np.arange(3.0)))


def test_after_changes_nothing():
    later = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    np.testing.assert_array_equal(jax.jit(after)(later, jnp.array(7.0)), later)
