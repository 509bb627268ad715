"""Counts of oracle calls, and the map over many points that counts each of them.

Every call is counted where it is executed: under `jax.disable_jit()` inside `counting()` the counts are exact, loops
included. Compiled code counts what was traced there. Inside `counting_runs` what is traced tells the host of each call
when it runs: exact for compiled code, too, and slower.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax

from bilevel.backend.sharding import split, whole
from bilevel.record import OracleCount

PyTree = Any

_counters: list[dict[str, int]] = []
_live: list[dict[str, int]] = []
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


@contextmanager
def counting_runs(counter: dict[str, int]) -> Iterator[None]:
    """Let what is traced inside add its calls to `counter`, {kind: number}, whenever it runs, also after the block.

    For one run at a time, not for lanes of `vmap`. What was compiled before stays as it is. Wait with
    `jax.effects_barrier()` before you read the counter.
    """
    _live.append(counter)
    try:
        yield
    finally:
        _live.pop()


def count(**calls: int) -> None:
    """Add to every open count: fields of `OracleCount` and numbers, once for each entry that `batched` maps over."""
    now = {kind: number * _multiplicity[-1] for kind, number in calls.items()}
    for counter in _counters:
        _add(counter, now)
    for counter in _live:
        jax.debug.callback(partial(_add, counter, now))


@contextmanager
def times(number: int) -> Iterator[None]:
    """Count what is traced inside `number` times: for a `jax.vmap` over so many entries."""
    _multiplicity.append(_multiplicity[-1] * number)
    try:
        yield
    finally:
        _multiplicity.pop()


def _add(counter: dict[str, int], calls: dict[str, int]) -> None:
    for kind, number in calls.items():
        counter[kind] = counter.get(kind, 0) + number


def batched(function: Callable, chunk: int | None = None) -> Callable:
    """`jax.vmap(function)` over the first axis of every argument, with the calls inside counted once per entry.

    With `chunk`, at most so many entries are in memory at once.
    """

    def counted(*args: PyTree) -> PyTree:
        with times(len(jax.tree.leaves(args)[0])):
            return whole(jax.vmap(function)(*split(args)))

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
