"""Sources: every epoch a permutation, uniform, resumable; named errors."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from bilevel import Full, InvalidInput, Minibatch, PerSample


def run(source, key, steps):
    """Indices [steps, batch_size] drawn one after the other."""

    def body(state, k):
        indices, state = source.indices(state, jax.random.fold_in(key, k))
        return state, indices

    return jax.lax.scan(body, source.init(key), jnp.arange(steps))[1]


SIZES = [(1, 1), (2, 1), (5, 1), (5, 2), (5, 5), (7, 3), (12, 4), (12, 11), (10, 10)]


@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_every_epoch_holds_each_index_once(n, batch_size, key):
    source = Minibatch(jnp.arange(n), batch_size)
    steps = 4 * n  # 4 batch_size epochs
    drawn = np.asarray(jax.jit(run, static_argnums=2)(source, key, steps)).reshape(-1, n)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(np.arange(n), (len(drawn), 1)))


def test_permutations_are_uniform():
    """3 samples, 3,000 keys, first and second epoch: chi-square over the 6 orders, level 1e-3 each."""
    source = Minibatch(jnp.arange(3), 2)
    keys = jax.random.split(jax.random.key(1), 3000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: run(source, key, 3)))(keys)).reshape(3000, 2, 3)
    for epoch in range(2):
        orders, counts = np.unique(drawn[:, epoch], axis=0, return_counts=True)
        np.testing.assert_array_equal(orders, list(permutations(range(3))))
        assert chisquare(counts).pvalue > 1e-3
    # The second epoch does not depend on the first: all 36 pairs, level 1e-3.
    pairs = np.unique(drawn.reshape(3000, 6), axis=0, return_counts=True)[1]
    assert len(pairs) == 36
    assert chisquare(pairs).pvalue > 1e-3


def test_with_replacement_is_uniform(key):
    drawn = np.asarray(run(Minibatch(jnp.arange(7), 4, order="independent"), key, 1000))
    assert drawn.shape == (1000, 4)
    assert chisquare(np.bincount(drawn.ravel(), minlength=7)).pvalue > 1e-3
    assert np.mean([len(set(row)) < 4 for row in drawn]) > 0.5  # 1 - 7*6*5*4/7^4 = 0.65: repetitions occur


@pytest.mark.parametrize(("order", "batch_size"), [("shuffled", 3), ("blocks", 2), ("independent", 3)])
def test_resumes_exactly(order, batch_size, key):
    """From the middle of an epoch, from what a checkpoint stores."""
    source = Minibatch({"a": jnp.arange(10.0), "b": jnp.arange(20).reshape(10, 2)}, batch_size, order)
    keys = jax.random.split(key, 9)

    draw = jax.jit(lambda state, one: source.next(state, one, None, None))

    def go(state, keys):
        batches = []
        for one in keys:
            batch, state = draw(state, one)
            batches.append(batch)
        return batches, state

    whole, _ = go(source.init(key), keys)
    first, state = go(source.init(key), keys[:4])
    stored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)  # as a checkpoint does
    second, _ = go(stored, keys[4:])
    jax.tree.map(np.testing.assert_array_equal, whole, first + second)
    for batch in whole:
        np.testing.assert_array_equal(batch["b"][:, 0], 2 * batch["a"])  # rows stay together


@pytest.mark.parametrize(("order", "batch_size", "impl"), [("shuffled", 5, "rbg"), ("blocks", 4, "threefry2x32")])
def test_jit_and_vmap_equal_loop(order, batch_size, impl):
    source = Minibatch(jnp.arange(12), batch_size, order)
    keys = jax.random.split(jax.random.key(0, impl=impl), 3)
    whole = jax.jit(run, static_argnums=2)
    loop = np.stack([whole(source, one, 5) for one in keys])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda one: run(source, one, 5)))(keys), loop)
    assert len({tuple(row) for row in loop.reshape(3, -1)}) == 3


def test_blocks_stay_together_and_come_once_an_epoch(key):
    source = Minibatch(jnp.arange(24), 4, order="blocks")
    source.validate("data")
    drawn = np.asarray(run(source, key, 60)).reshape(10, 6, 4)
    np.testing.assert_array_equal(drawn, drawn[..., :1] + np.arange(4))
    np.testing.assert_array_equal(np.sort(drawn[..., 0], axis=1), np.tile(np.arange(0, 24, 4), (10, 1)))
    assert len({tuple(epoch) for epoch in drawn[..., 0]}) > 5  # in a fresh order each


@pytest.mark.parametrize("kind", [Minibatch, PerSample])
def test_a_batch_of_blocks_is_its_indices(kind, key):
    source = kind({"a": jnp.arange(12.0), "b": np.arange(24).reshape(12, 2)}, 3, order="blocks")
    state = source.init(key)
    batch, after = source.next(state, key, None, None)
    indices, same = source.indices(state, key)
    jax.tree.map(np.testing.assert_array_equal, batch, source.take(indices))
    jax.tree.map(np.testing.assert_array_equal, after, same)


def test_the_state_is_small_and_a_step_needs_no_key(key):
    source = Minibatch(jnp.zeros(10_000_000, jnp.int8), 64)
    state = source.init(key)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 200
    jax.tree.map(np.testing.assert_array_equal, source.indices(state, key), source.indices(state, None))


def test_old_name_of_the_order():
    for new, old in (("independent", True), ("shuffled", False)):
        with pytest.warns(DeprecationWarning, match=f'order="{new}"'):
            by_name = Minibatch(jnp.arange(4), 2, replace=old)
        with pytest.warns(DeprecationWarning, match=f'order="{new}"'):
            by_position = PerSample(jnp.arange(4), 2, old)  # pyright: ignore[reportArgumentType]
        assert (by_name.order, by_position.order) == (new, new)
        assert [source.replace for source in (by_name, by_position)] == [old, old]  # pyright: ignore
    assert not Minibatch(jnp.arange(4), 2).replace  # pyright: ignore


def test_full(key):
    arrays = {"a": jnp.ones(3), "b": np.zeros((2, 2))}
    source = Full(arrays)
    batch, state = source.next(source.init(key), key, None, None)
    assert batch is arrays
    assert source.full() is arrays
    assert (state, source.fraction, source.num_blocks) == ((), 1.0, 1)
    assert source.block(0) is arrays
    source.validate("upper_data")
    Full().validate("upper_data")


def test_blocks_and_fraction():
    source = Minibatch(jnp.arange(10), 3)
    assert source.fraction == 0.3
    assert source.num_blocks == 3
    np.testing.assert_array_equal([source.block(k) for k in range(3)], np.arange(9).reshape(3, 3))
    np.testing.assert_array_equal(source.full(), np.arange(10))


BAD = {
    "no arrays": (Minibatch({}, 1), "data.arrays", "at least one array"),
    "scalar": (Minibatch(jnp.array(1.0), 1), "data.arrays", "one number of samples"),
    "two lengths": (Minibatch({"a": jnp.ones(3), "b": jnp.ones(4)}, 1), "['b']", "one number of samples"),
    "no samples in a batch": (Minibatch(jnp.ones(3), 0), "data.batch_size", "[1, 3]"),
    "too many in a batch": (Minibatch(jnp.ones(3), 4), "data.batch_size", "[1, 3]"),
    "part of a sample": (Minibatch(jnp.ones(3), 1.5), "data.batch_size", "whole number"),
    "an unknown order": (Minibatch(jnp.ones(3), 1, "sorted"), "data.order", "'shuffled', 'blocks', 'independent'"),
    "blocks and a rest": (
        Minibatch(jnp.ones(7), 3, "blocks"),
        "data.batch_size",
        "divisor of the number of samples, 7",
    ),
    "true as a number": (Minibatch(jnp.ones(3), True), "data.batch_size", "whole number"),
    "no samples": (Minibatch(jnp.ones((0, 2)), 1), "data.arrays", "at least one sample"),
    "NaN": (Minibatch({"a": jnp.array([[1.0], [jnp.nan]])}, 1), "data.arrays['a']", "finite numbers"),
    "infinity": (Full((jnp.ones(2), jnp.array([jnp.inf]))), "data[1]", "finite numbers"),
    "words": (Full({"names": np.array(["a", "b"])}), "data['names']", "arrays of numbers or booleans"),
    "objects": (Minibatch(np.array([None, 1]), 1), "data.arrays", "arrays of numbers or booleans"),
    "complex NaN": (Full(jnp.array([1j, jnp.nan])), "data", "finite numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_named_errors(name):
    source, argument, expected = BAD[name]
    with pytest.raises(InvalidInput) as caught:
        source.validate("data")
    for word in (argument, "got", "expected", expected):
        assert word in str(caught.value)


def test_the_message_says_where_the_bad_datum_is():
    with pytest.raises(InvalidInput, match=r"index \[1, 2\]"):
        Full({"features": np.array([[0, 0, 0], [0, 0, np.inf]])}).validate("lower_data")
