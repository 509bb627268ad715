"""Tolls on a network: travellers take the cheapest way, the leader earns what they pay, and the best tolls are known.

The network is a grid of width x height corners with streets to the right and down, each with a cost in 1, …, 9. The
leader chooses tolls T in [0, top] on some of the streets, such that every pair of corners has a way without a toll.
d_k travellers go from a corner to one that is right of it or below, by flows y_k:

    max over T of  sum_k d_k T'y_k    with   y in argmin { sum_k d_k (c + T)'y_k : y_k a unit flow, y >= 0 }.

The follower is a linear program with the term T'y, which f has as well. Of several cheapest ways the leader may choose.

The optimum is found with the instance, by looking at one way for each pair, in all combinations: that these are the
cheapest ones is a linear condition on T, and the earnings are linear, so that each is a small linear program. It is
enough, since f is linear in y: among a follower's best answers a best one for the leader consists of single ways.

    make(width=3, height=3, pairs=2, seed=0)

Settings that work: `BranchAndBound()`.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import BilevelProblem, Box, Full, LinearCoupling, Minimize
from bilevel.diagnostics import GLOBAL
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

PyTree = Any
MOST = 20_000  # combinations of ways that are looked at


class Network(NamedTuple):
    """Streets, costs and travellers."""

    streets: list[tuple[int, int]]
    """From a corner to a corner."""
    cost: np.ndarray
    """[streets]."""
    tolled: np.ndarray
    """[streets], whether the leader has it."""
    ends: list[tuple[int, int]]
    """Of each pair of corners, from and to."""
    demand: np.ndarray
    """[pairs]."""
    top: float
    """The highest toll."""


def upper(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """Minus what the travellers pay: x [tolled streets], y [pairs, streets]."""
    return -batch["demand"] @ (y[:, batch["where"]] @ x)


def lower(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """What the travellers spend, tolls and costs."""
    return batch["demand"] @ (y @ batch["cost"]) + batch["demand"] @ (y[:, batch["where"]] @ x)


@functools.cache
def _init(tolls: int, pairs: int, streets: int) -> Any:
    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.random.uniform(key, (tolls,)), jnp.zeros((pairs, streets))

    return init


def make(width: int = 3, height: int = 3, pairs: int = 2, seed: int = 0) -> Instance:
    """The network with a number.

    Args:
        width: corners in a row, >= 2.
        height: corners in a column, >= 2.
        pairs: pairs of corners between which people travel, >= 1.
        seed: >= 0.

    Raises:
        InvalidInput: for numbers out of range, or more than 20,000 combinations of ways.
    """
    if width < 2 or height < 2 or pairs < 1:
        invalid("width, height, pairs (tolls)", (width, height, pairs), "at least 2, 2 and 1", "Take more.")
    if math.comb(width + height - 2, width - 1) ** pairs > MOST:
        got = f"up to {math.comb(width + height - 2, width - 1)} ways for each of {pairs} pairs"
        invalid("width, height, pairs (tolls)", got, f"at most {MOST} combinations", "Take a smaller grid.")
    network, value = _earning(width, height, pairs, seed)
    corners, (tail, head) = width * height, np.array(network.streets).T
    incidence = (tail == np.arange(corners)[:, None]).astype(float) - (head == np.arange(corners)[:, None])
    A = np.kron(np.eye(pairs), incidence[:-1])  # one of the equations follows from the others
    b = np.concatenate(
        [((np.arange(corners) == s).astype(float) - (np.arange(corners) == t))[:-1] for s, t in network.ends]
    )
    where = np.flatnonzero(network.tolled)
    batch = {"demand": floats(network.demand), "cost": floats(network.cost), "where": jnp.asarray(where)}
    problem = BilevelProblem(
        upper,
        Minimize(lower),
        x_set=Box(floats(np.asarray(0.0)), floats(np.asarray(network.top))),
        y_set=Box(floats(np.asarray(0.0)), floats(np.asarray(np.inf))),
        coupling=LinearCoupling(A_eq=floats(A), b_eq=floats(b)),
        upper_data=Full(batch),
        lower_data=Full(batch),
        init=_init(len(where), pairs, len(network.streets)),
    )
    tags = frozenset({"known-optimum", "lp-follower", "tolls", "exact"})
    return Instance(problem, Truth(-value), tags=tags, referee=GLOBAL)


@functools.cache
def _earning(width: int, height: int, pairs: int, seed: int) -> tuple[Network, float]:
    """(the first draw on which something can be earned, how much)."""
    for k in range(1000):
        network = draw(width, height, pairs, np.random.default_rng([width, height, pairs, seed, k]))
        value = best(network)[0]
        if value > 0:
            return network, value
    raise AssertionError("1000 draws without earnings")  # pragma: no cover


def draw(width: int, height: int, pairs: int, rng: np.random.Generator) -> Network:
    """A random network."""
    corner = lambda i, j: i * width + j  # noqa: E731
    right = [(corner(i, j), corner(i, j + 1)) for i in range(height) for j in range(width - 1)]
    down = [(corner(i, j), corner(i + 1, j)) for i in range(height - 1) for j in range(width)]
    streets = right + down
    cost = rng.integers(1, 10, len(streets)).astype(float)
    ends = []
    for _ in range(pairs):
        i, j = rng.integers(0, height - 1), rng.integers(0, width - 1)
        ends.append((corner(i, j), corner(rng.integers(i + 1, height), rng.integers(j + 1, width))))
    tolled = rng.random(len(streets)) < 0.5
    for s, t in ends:  # one way each stays free
        found = ways(streets, s, t)
        tolled[found[rng.integers(len(found))]] = False
    return Network(streets, cost, tolled, ends, rng.integers(1, 5, pairs).astype(float), 20.0)


def ways(streets: list[tuple[int, int]], start: int, end: int) -> list[list[int]]:
    """All ways from a corner to another, as lists of streets."""
    if start == end:
        return [[]]
    return [[k, *rest] for k, (a, b) in enumerate(streets) if a == start for rest in ways(streets, b, end)]


def best(network: Network) -> tuple[float, np.ndarray]:
    """(the highest earnings, tolls [streets] that earn them)."""
    from scipy.optimize import linprog

    choices = []
    for s, t in network.ends:
        rows = np.zeros((0, len(network.streets)))
        for way in ways(network.streets, s, t):
            rows = np.concatenate([rows, np.isin(np.arange(len(network.streets)), way).astype(float)[None]])
        choices.append(rows)
    found, tolls = -np.inf, network.cost * 0
    limits = [(0, network.top if own else 0) for own in network.tolled]
    for picked in itertools.product(*(range(len(rows)) for rows in choices)):
        chosen = [rows[k] for rows, k in zip(choices, picked, strict=True)]
        A = np.concatenate([way - rows for rows, way in zip(choices, chosen, strict=True)])
        solved = linprog(-network.demand @ np.array(chosen), A, -A @ network.cost, bounds=limits)
        if solved.status == 0 and -solved.fun > found:
            found, tolls = float(-solved.fun), solved.x
    return found, tolls
