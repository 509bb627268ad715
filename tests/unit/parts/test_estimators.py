"""SAGA's table against the loop of its paper in NumPy, and the blocks that are drawn for it."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chisquare

from bilevel.backend.draws import numbers_below
from bilevel.parts.estimators import saga, saga_init

BLOCKS, DIM, STEPS = 5, 3, 40


def test_saga_is_the_loop_of_its_paper():
    """The same component twice in a row among them: what was stored last is what is read."""
    rng = np.random.default_rng(0)
    start, values = rng.normal(size=(BLOCKS, DIM)), rng.normal(size=(STEPS, DIM))
    indices = np.concatenate([[2, 2, 0, 0, 0], rng.integers(BLOCKS, size=STEPS - 5)])

    @jax.jit
    def whole(start, indices, values):
        def step(table, seen):
            estimate, table = saga(table, seen[0], seen[1])
            return table, (estimate["a"], table.entries["a"], table.mean["a"])

        return jax.lax.scan(step, saga_init({"a": start}), (indices, {"a": values}))[1]

    estimates, entries, means = map(np.asarray, whole(jnp.asarray(start), jnp.asarray(indices), jnp.asarray(values)))
    table = start.copy()
    for k, (i, value) in enumerate(zip(indices, values, strict=True)):
        np.testing.assert_allclose(estimates[k], value - table[i] + table.mean(axis=0), rtol=0, atol=1e-13)
        table[i] = value
        np.testing.assert_array_equal(entries[k], table)
        np.testing.assert_allclose(means[k], table.mean(axis=0), rtol=0, atol=1e-13)


def test_numbers_are_the_upper_half_of_a_product():
    keys = jax.random.split(jax.random.key(1), 500)
    bounds = (1, 7, 2**16 - 1, 2**16 + 1, 10**6, 2**31 - 1)
    drawn = jax.jit(jax.vmap(lambda key: jnp.stack(numbers_below(key, *bounds))))(keys)
    bits = jax.vmap(lambda key: jax.random.bits(key, (len(bounds),), jnp.uint32))(keys)
    np.testing.assert_array_equal(drawn, np.asarray(bits).astype(np.uint64) * np.array(bounds, np.uint64) >> 32)
    assert chisquare(np.bincount(np.asarray(drawn)[:, 1], minlength=7)).pvalue > 1e-3
