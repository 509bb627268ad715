"""Limited-memory BFGS against the dense inverse Hessian of the same pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.parts import quasi_newton


def dense(pairs, scale, n):
    """H of the pairs, oldest first: (I - rho s z') H (I - rho z s') + rho s s'."""
    H = scale * np.eye(n)
    for s, z in pairs:
        V = np.eye(n) - np.outer(z, s) / (s @ z)
        H = V.T @ H @ V + np.outer(s, s) / (s @ z)
    return H


@pytest.mark.parametrize("num", [0, 1, 3, 6])
def test_directions_are_those_of_the_dense_formula_in_the_free_entries(num):
    """Room for four pairs; the second one has negative curvature and is left out."""
    rng, n = np.random.default_rng(num), 7
    root = rng.normal(size=(n, n))
    steps, free = rng.normal(size=(num, n)), np.arange(n) != 2
    changes = steps @ (root @ root.T + np.eye(n))
    changes[1:2] *= -1
    pairs = quasi_newton.none_yet(jnp.zeros(n), 4)
    for s, z in zip(steps, changes, strict=True):
        pairs = quasi_newton.pushed(pairs, jnp.asarray(s), jnp.asarray(z))
    g = rng.normal(size=n)
    found = quasi_newton.direction(pairs, jnp.asarray(g), jnp.asarray(free), jnp.asarray(0.3))
    own = [(s * free, z * free) for s, z in zip(steps[-4:], changes[-4:], strict=True)]
    own = [(s, z) for s, z in own if s @ z > 0]
    s, z = own[-1] if own else (0.3 * np.eye(n)[0], np.eye(n)[0])
    np.testing.assert_allclose(found, -dense(own, s @ z / (z @ z), n) @ (g * free) * free, rtol=1e-10, atol=1e-12)


def test_a_step_of_no_length_is_no_pair():
    pairs = quasi_newton.pushed(quasi_newton.none_yet(jnp.zeros(2), 3), jnp.ones(2), 2 * jnp.ones(2))
    same = quasi_newton.pushed(pairs, jnp.zeros(2), jnp.ones(2))
    np.testing.assert_array_equal(same.s, pairs.s)
    np.testing.assert_array_equal(same.z, pairs.z)
