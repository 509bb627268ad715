"""One compilation for what an algorithm evaluates at several of its stages."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

PyTree = Any


class _Turn(NamedTuple):
    """The stage that comes next, where `function` stands, what it is asked for, and what the stages hand on."""

    stage: Array
    point: PyTree
    request: PyTree
    carry: PyTree


def in_turn(function: Callable, point: PyTree, request: PyTree, carry: PyTree, stages: Sequence[Callable]) -> PyTree:
    """The carry after all `stages`, with `function` compiled once for all of them.

    Means: point = function(point, request), then request, carry, done = stage(point, carry), and again with the next
    stage where `done`, else with the same one. Written out, `function` would be compiled once a stage, and once more
    for a stage that repeats itself.
    """

    def body(turn: _Turn) -> _Turn:
        point = function(turn.point, turn.request)
        branches = [lambda stage=stage: stage(point, turn.carry) for stage in stages]
        request, carry, done = lax.switch(turn.stage, branches) if len(stages) > 1 else branches[0]()
        return _Turn(jnp.where(done, turn.stage + 1, turn.stage), point, request, carry)

    begin = _Turn(jnp.array(0), point, request, carry)
    return lax.while_loop(lambda turn: turn.stage < len(stages), body, begin).carry
