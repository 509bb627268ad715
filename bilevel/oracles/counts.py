"""Counts of oracle calls, and the map over many points that counts each of them.

Every call is counted where it is executed: under `jax.disable_jit()` inside `counting()` the counts are exact, loops
included. Compiled code counts what was traced.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from bilevel.backend.sharding import split, whole
from bilevel.record import OracleCount

PyTree = Any

_counters: list[dict[str, int]] = []
_multiplicity = [1]


@contextmanager
def counting() -> Iterator[Callable[[], OracleCount]]:
    """Count the oracle calls made inside; the value is a function that returns the count so far."""
    counter: dict[str, int] = {}
    _counters.append(counter)
    try:
        yield lambda: OracleCount(**counter)
    finally:
        _counters.remove(counter)


def count(**calls: int) -> None:
    """Add to every open count: fields of `OracleCount` and numbers, once for each entry that `batched` maps over."""
    for counter in _counters:
        for kind, number in calls.items():
            counter[kind] = counter.get(kind, 0) + number * _multiplicity[-1]


def batched(function: Callable, chunk: int | None = None) -> Callable:
    """`jax.vmap(function)` over the first axis of every argument, with the calls inside counted once per entry.

    With `chunk`, at most so many entries are in memory at once.
    """

    def counted(*args: PyTree) -> PyTree:
        _multiplicity.append(_multiplicity[-1] * len(jax.tree.leaves(args)[0]))
        try:
            return whole(jax.vmap(function)(*split(args)))
        finally:
            _multiplicity.pop()

    def mapped(*args: PyTree) -> PyTree:
        size = len(jax.tree.leaves(args)[0])
        part = divisor(size, chunk)
        if part == size:
            return counted(*args)
        pieces = jax.tree.map(lambda leaf: leaf.reshape(size // part, part, *leaf.shape[1:]), args)
        out = jax.lax.map(lambda piece: counted(*piece), pieces)
        return jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), out)

    return mapped


def divisor(size: int, chunk: int | None) -> int:
    """The largest divisor of `size` that is at most `chunk`."""
    if chunk is None or size <= chunk:
        return size
    return next(part for part in range(chunk, 0, -1) if size % part == 0)
