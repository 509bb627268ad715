"""Random orders of the numbers 0, …, n - 1 that are computed where they are asked for and stored nowhere.

A Feistel network, the construction of block ciphers, turns any function into a bijection. Here the numbers stand in a
grid, row by row, the last row as long as it comes out. A round moves each number within its column by a pseudorandom
amount that depends on the column alone, and the next round within its row by one that depends on the row alone:

    row <- (row + F_k(column)) mod (height of the column),   column <- (column + F_k(row)) mod (length of the row).

Each is undone by a subtraction, so that any number of rounds is a permutation of exactly n numbers, whatever F is.
Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), have the network on a full grid a x b >= n
("generalized Feistel cipher") and walk along cycles until they are back below n; here the ragged last row takes the
walk's place, so that every number costs the same and nothing loops. Luby and Rackoff, "How to construct pseudorandom
permutations from pseudorandom functions" (SIAM J. Comput. 17(2), 1988), have the reason why a few rounds do; Mitchell,
Stokes, Frank, Holmes, "Bandwidth-optimal random shuffling for GPUs" (arXiv:2106.06161), shuffle data so, with more
rounds than the cipher's theory asks for. The numbers of rounds here are what tests of the orders ask for
(tests/unit/backend/test_permutation.py), and twice that. No secret is safe behind these permutations.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

SMALL = 100  # numbers up to which the grid has so few lines that it takes more rounds
MANY, FEW = 32, 12
MOST = 2**30  # numbers that an order may have
APART = 0x9E3779B9  # keeps what is drawn here apart from what a caller may draw with the same key


class Grid(NamedTuple):
    """Where n numbers stand: `rows` of `columns` numbers, the last one with `last`."""

    rows: int
    columns: int
    last: int


def grid(n: int) -> Grid:
    """A grid near a square; never an odd square, whose lines are all odd: no move of them is an odd permutation."""
    columns = math.isqrt(n - 1) + 1
    if columns**2 == n and n % 2 and n > 1:
        columns += 1
    rows = -(-n // columns)
    return Grid(rows, columns, n - (rows - 1) * columns)


def num_rounds(n: int) -> int:
    """The number of rounds for n numbers, the length of a key of `permuted`."""
    return MANY if n <= SMALL else FEW


def _below(line: Array, word: Array, bound: Array) -> Array:
    """F: a pseudorandom number in [0, bound), bound < 2^16, from the number of a line and a word of the key.

    Two multiplications scramble the bits, as in C. Wellons, "Prospecting for hash functions" (nullprogram.com, 2018);
    the upper half of a last product is below the bound without a division.
    """
    bits = (line ^ word) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return ((bits >> 16) * bound) >> 16


def permuted(n: int, key: Array, positions: Array) -> Array:
    """The numbers at `positions`, integers in [0, n), of the order that `key` picks; of the positions' shape and dtype.

    Args:
        n: how many numbers there are, at most `MOST`.
        key: 32 random bits a round, uint32, shape [num_rounds(n), ...], broadcasting with the positions behind axis 0.
        positions: any shape.
    """
    rows, columns, last = (jnp.uint32(size) for size in grid(n))
    place = positions.astype(jnp.uint32)
    row, column = place // columns, place % columns
    for k in range(num_rounds(n)):
        if k % 2 == 0:
            height = rows - (column >= last).astype(jnp.uint32)
            moved = row + _below(column, key[k], height)
            row = jnp.minimum(moved, moved - height)  # modulo the height: the difference wraps around where it is < 0
        else:
            length = jnp.where(row == rows - 1, last, columns)
            moved = column + _below(row, key[k], length)
            column = jnp.minimum(moved, moved - length)
    return (row * columns + column).astype(positions.dtype)


class Draws(NamedTuple):
    """Numbers of [0, n) drawn without replacement, `count` at a time, in a fresh order every epoch of n draws.

    The next draw lies ready, computed by the step before: XLA fuses what it computes in place into the gather that
    reads it, and computes it again for every entry of a row (a batch of 64 rows of 22 took 10 us in place of 4).
    """

    ready: Array
    """The numbers that come next, shape [count]."""

    position: Array
    """Where in this epoch the draw after them begins, shape []; n or more where that is in the next one."""

    keys: Array
    """Of this epoch, and where count does not divide n of the next one, for `permuted`, shape [1 or 2, rounds]."""

    epoch: Array
    """The number of this epoch, shape []."""

    seed: Array
    """Two words of 32 bits from which all epochs' keys are made, shape [2]."""


def _key(seed: Array, epoch: Array, n: int) -> Array:
    """The key of an epoch, by threefry under the key (seed[0], seed[1] + epoch).

    By threefry whatever the run's keys are: under other generators `vmap` differs from a loop.
    """
    own = jax.random.wrap_key_data(seed + jnp.stack([jnp.zeros_like(epoch), epoch]), impl="threefry2x32")
    return jax.random.bits(own, (num_rounds(n),), jnp.uint32)


def _numbers(n: int, keys: Array, positions: Array) -> Array:
    """The numbers at `positions` [count] of this epoch, or of the next one from position n on."""
    key = keys[0][:, None]
    if len(keys) > 1:
        beyond = positions >= n
        positions = jnp.where(beyond, positions - n, positions)
        key = jnp.where(beyond, keys[1][:, None], key)
    return permuted(n, key, positions).astype(int)


def start(key: Array, n: int, count: int) -> Draws:
    """The state whose first draw lies ready; count <= n."""
    seed = jax.random.key_data(key)[:2] ^ jnp.uint32(APART)
    nought = jnp.zeros((), jnp.uint32)
    keys = jnp.stack([_key(seed, nought + epoch, n) for epoch in range(2 if n % count else 1)])
    ready = _numbers(n, keys[:1], jnp.arange(count, dtype=jnp.int32))
    return Draws(ready, jnp.asarray(count, jnp.int32), keys, nought, seed)


def following(draws: Draws, n: int) -> Draws:
    """The state after the numbers that lie ready, with the next ones ready."""
    ended = draws.position >= n

    def turn(keys: Array, epoch: Array) -> tuple[Array, Array]:
        fresh = _key(draws.seed, epoch + len(keys), n)
        return jnp.concatenate([keys[1:], fresh[None]]), epoch + 1

    keys, epoch = jax.lax.cond(ended, turn, lambda keys, epoch: (keys, epoch), draws.keys, draws.epoch)
    position, count = jnp.where(ended, draws.position - n, draws.position), len(draws.ready)
    ready = _numbers(n, keys, position + jnp.arange(count, dtype=jnp.int32))
    return Draws(ready, position + count, keys, epoch, draws.seed)
