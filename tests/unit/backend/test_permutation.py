"""Orders that are computed and not stored: bijections, and as random as permutations drawn at random.

Every test of randomness has fixed seeds and one threshold, p > LEVEL. Some 40 p-values are compared with it, so that
orders drawn truly at random would fail with a probability below 4 %.
"""

from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, chisquare, hypergeom, norm, poisson

from bilevel.backend import permutation

LEVEL = 1e-3


def orders(n, number, seed):
    """`number` orders of 0, …, n - 1 by independent keys, [number, n]."""
    keys = jax.random.bits(jax.random.key(seed), (number, permutation.num_rounds(n), 1), jnp.uint32)
    return np.asarray(jax.jit(jax.vmap(lambda key: permutation.permuted(n, key, jnp.arange(n))))(keys))


def epochs(n, number, seed):
    """The orders of `number` epochs after each other, [number, n]."""
    step = lambda draws, _: (permutation.following(draws, n), draws.ready)  # noqa: E731
    whole = jax.jit(lambda key: jax.lax.scan(step, permutation.start(key, n, n), length=number)[1])
    return np.asarray(whole(jax.random.key(seed)))


@pytest.mark.parametrize("n", [1, 2, 3, 9, 25, 100, 101, 1000, 3001])  # odd squares have another grid; 3001 is prime
def test_every_order_is_a_permutation(n):
    drawn = orders(n, 3, seed=0)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(np.arange(n), (3, 1)))


def test_a_grid_holds_the_numbers():
    for n in range(1, 3000):
        rows, columns, last = permutation.grid(n)
        assert (rows - 1) * columns + last == n
        assert 1 <= last <= columns
        assert n == 1 or rows * columns != n or n % 2 == 0 or rows != columns
    assert max(permutation.grid(permutation.MOST)) < 2**16  # what `_below` asks for


def test_ten_million_numbers():
    """A bijection, and batches anywhere in it are uniform: chi-square over 100 equal parts."""
    n = 10_000_000
    key = jax.random.bits(jax.random.key(3), (permutation.num_rounds(n), 1), jnp.uint32)
    order = jax.jit(lambda positions: permutation.permuted(n, key, positions))
    seen = np.zeros(n, bool)
    drawn = np.asarray(order(jnp.arange(n, dtype=jnp.int32)))
    seen[drawn] = True
    assert seen.all()
    for begin in (0, 5_000_000, n - 20_000):
        assert chisquare(np.bincount(drawn[begin : begin + 20_000] // (n // 100), minlength=100)).pvalue > LEVEL


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_small_orders_are_uniform(n):
    """All n! orders, 40 of each expected: chi-square."""
    drawn = orders(n, 40 * factorial(n), seed=1)
    counts = np.unique(drawn @ n ** np.arange(n), return_counts=True)[1]
    assert len(counts) == factorial(n)
    assert chisquare(counts).pvalue > LEVEL


@pytest.mark.parametrize("n", [12, 101])
def test_pairs_are_uniform(n):
    """Where two positions go, the first two and two in one column of the grid: chi-square over all pairs."""
    drawn, apart = orders(n, 6 * n * n, seed=2), ~np.eye(n, dtype=bool).ravel()
    for i, j in ((0, 1), (1, 1 + permutation.grid(n).columns)):
        assert chisquare(np.bincount(drawn[:, i] * n + drawn[:, j], minlength=n * n)[apart]).pvalue > LEVEL


@pytest.mark.parametrize("n", [64, 513, 3001])
def test_epochs_look_like_orders_drawn_at_random(n):
    """Statistics with known laws, over epochs after each other: steps from a number to the next one are uniform,
    ascents and neighbours' products are normal, numbers in their old place are Poisson (within an epoch, and from one
    to the next), and what two batches of different epochs share is hypergeometric.
    """
    number = 400
    drawn = epochs(n, number, seed=4)
    steps = np.bincount(((drawn[:, 1:] - drawn[:, :-1]) % n).ravel(), minlength=n)[1:]
    assert chi2.sf(np.sum((steps - steps.mean()) ** 2) / steps.mean(), n - 2) > LEVEL

    ascents = np.sum(drawn[:, 1:] > drawn[:, :-1], axis=1)
    assert 2 * norm.sf(abs(ascents.mean() - (n - 1) / 2) / ((n + 1) / 12 / number) ** 0.5) > LEVEL
    centred = (drawn - (n - 1) / 2) / ((n * n - 1) / 12) ** 0.5
    for lag in (1, 2, permutation.grid(n).columns):
        products = np.mean(centred[:, lag:] * centred[:, :-lag], axis=1)
        score = (products.mean() + 1 / (n - 1)) / (products.std() / number**0.5)
        assert 2 * norm.sf(abs(score)) > LEVEL

    laws = np.append(poisson.pmf(range(4), 1), poisson.sf(3, 1))
    for old, new in ((np.arange(n), drawn), (drawn[:-1], drawn[1:])):
        kept = np.minimum(np.sum(old == new, axis=1), 4)
        assert chisquare(np.bincount(kept, minlength=5), laws * len(kept)).pvalue > LEVEL

    batch = round(n**0.5)
    shared = [
        len(np.intersect1d(a[:batch], b[batch : 2 * batch])) for a, b in zip(drawn[::2], drawn[1::2], strict=True)
    ]
    shared = np.minimum(shared, 3)
    laws = np.append(hypergeom.pmf(range(3), n, batch, batch), hypergeom.sf(2, n, batch, batch))
    assert chisquare(np.bincount(shared, minlength=4), laws * len(shared)).pvalue > LEVEL


def test_few_rounds_would_be_seen(monkeypatch):
    """The tests above have power: four rounds leave pairs in one column of the grid together too often."""
    n = 49
    drawn = {}
    for rounds in (4, permutation.MANY):
        monkeypatch.setattr(permutation, "MANY", rounds)
        drawn[rounds] = orders(n, 6 * n * n, seed=2)
    apart = ~np.eye(n, dtype=bool).ravel()
    j = 1 + permutation.grid(n).columns
    found = [np.bincount(got[:, 1] * n + got[:, j], minlength=n * n)[apart] for got in drawn.values()]
    assert [chisquare(counts).pvalue > LEVEL for counts in found] == [False, True]
