"""What a run computes on its devices, for one key or for many lanes at once: `advance` and the compiled functions.

A lane is a key with its own state. `many` below is False for a single one, True for lanes by vmap, or a mesh of devices
over which the lanes are spread: each device then runs its own ones by itself, and nothing moves between devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from bilevel.backend import sharding
from bilevel.backend.compilation import COMPILER_OPTIONS
from bilevel.backend.precision import full_precision
from bilevel.problem import BilevelProblem
from bilevel.solver import Solver

PyTree = Any
Many = bool | Mesh


def advance(
    problem: BilevelProblem, solver: Solver, state: PyTree, key: Array, start: Array | int, num_steps: Array | int
) -> tuple[PyTree, PyTree]:
    """(state, info of the last step) after steps start, …, start + num_steps - 1.

    Pure: safe under jit, vmap and shard_map. `start` and `num_steps` may be traced. With num_steps = 0 info is zeros.
    """
    return _steps(problem, solver, state, key, start, num_steps, ())[:2]


@full_precision
def _steps(
    problem: BilevelProblem, solver: Solver, state: PyTree, key: Array, start: Array | int, num_steps: Array | int,
    watched: tuple[str, ...],
) -> tuple[PyTree, PyTree, Array]:  # fmt: skip
    """`advance`, and at how many of the steps each `watched` field of info was false, shape [len(watched)]."""
    shapes = jax.eval_shape(lambda s: solver.step(problem, s, key)[1], state)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(k: Array, carry: tuple[PyTree, PyTree, Array]) -> tuple[PyTree, PyTree, Array]:
        state, info = solver.step(problem, carry[0], jax.random.fold_in(key, k))
        return state, info, carry[2] + jnp.array([~getattr(info, name) for name in watched], carry[2].dtype)

    begin = state, nothing, jnp.zeros(len(watched), int)
    return jax.lax.fori_loop(start, start + num_steps, body, begin)


class _Flat:
    """A problem or solver flattened once, as an argument of compiled functions, which see the original: flattening it
    node by node, at each call, is a sixth of what a call takes.
    """

    def __init__(self, tree: PyTree) -> None:
        self.leaves, self.structure = jax.tree.flatten(tree)


jax.tree_util.register_pytree_node(
    _Flat, lambda flat: (flat.leaves, flat.structure), lambda structure, leaves: structure.unflatten(leaves)
)


class Compiled(NamedTuple):
    """The compiled functions of a run."""

    init: Callable
    advance: Callable
    measure: Callable
    output: Callable


def passes_per_step(problem: BilevelProblem, solver: Solver) -> float:
    """What a step costs in passes over the data: `OracleCount.passes` with the sources' fractions."""
    if solver.full_batch:
        return solver.cost(problem).passes(1.0, 1.0)
    return solver.cost(problem).passes(problem.upper_data.fraction, problem.lower_data.fraction)


def scalars(info: PyTree) -> dict[str, Array]:
    """The numbers among the fields of a step's info: columns of the record."""
    fields = info._asdict() if hasattr(info, "_asdict") else {}
    return {name: value for name, value in fields.items() if getattr(value, "shape", None) == ()}


def _all_finite(state: PyTree) -> Array:
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()


def _each(one: Callable, many: Many, shared: tuple, *lanes: PyTree) -> Any:
    """one(*shared, *lanes) of a single lane, or of all of them, their axis then the first of every array."""
    if many is False:
        return sharding.whole(one(*shared, *lanes))
    every = jax.vmap(one, in_axes=(*(None for _ in shared), *(0 for _ in lanes)))
    if many is True:
        return every(*shared, *lanes)
    spread = PartitionSpec(many.axis_names)
    specs = *(PartitionSpec() for _ in shared), *(spread for _ in lanes)
    return jax.shard_map(every, mesh=many, in_specs=specs, out_specs=spread, check_vma=False)(*shared, *lanes)


@partial(jax.jit, static_argnames="many", compiler_options=COMPILER_OPTIONS)
@full_precision
def init(problem: BilevelProblem, solver: Solver, key: Array, many: Many) -> PyTree:
    """The state before the first step."""

    def one(problem: BilevelProblem, solver: Solver, key: Array) -> PyTree:
        return solver.init(problem, jax.random.fold_in(key, 0x7FFFFFFF))

    return _each(one, many, (problem, solver), key)


@partial(jax.jit, static_argnames="many", compiler_options=COMPILER_OPTIONS)
def advance_lanes(
    problem: BilevelProblem, solver: Solver, state: PyTree, key: Array, start: int, num_steps: int, many: Many
) -> tuple[PyTree, PyTree, Array]:
    """(state, info, summary): whether the state is finite, at how many steps each of the solver's assumptions failed,
    and info's `scalars`, as one vector of floats for each lane, since each transfer to the host has its price.
    """
    watched = tuple(solver.assumptions)

    def one(
        problem: BilevelProblem, solver: Solver, start: Array, num_steps: Array, state: PyTree, key: Array
    ) -> tuple[PyTree, PyTree, Array]:
        state, info, failed = _steps(problem, solver, state, key, start, num_steps, watched)
        summary = [_all_finite(state), *failed, *scalars(info).values()]
        return state, info, jnp.stack([jnp.asarray(number, float) for number in summary])

    return _each(one, many, (problem, solver, start, num_steps), state, key)


@partial(jax.jit, static_argnames=("many", "measure"), compiler_options=COMPILER_OPTIONS)
@full_precision
def measure_lanes(problem: BilevelProblem, x: PyTree, y: PyTree, many: Many, measure: Callable) -> Array:
    """Of (x, y) alone, so that all solvers share one compilation; in one vector, too."""

    def one(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
        measured = measure(problem, x, y)
        return jnp.stack([jnp.asarray(field, measured.value.dtype) for field in measured])

    return _each(one, many, (problem,), x, y)


def compiled(problem: BilevelProblem, solver: Solver, key: Array, many: Many, measure: Callable) -> Compiled:
    """The functions of a run: init(), advance(state, start, num_steps), measure(state), output(state of one lane)."""
    flat_problem: Any = _Flat(problem)
    flat_solver: Any = _Flat(solver)
    output = full_precision(partial(solver.output, problem))

    def measured(state: PyTree) -> Array:
        x, y = (jax.vmap(output) if many else output)(state)
        return measure_lanes(flat_problem, x, y, many, measure)

    return Compiled(
        init=lambda: init(flat_problem, flat_solver, key, many),
        advance=lambda state, start, n: advance_lanes(flat_problem, flat_solver, state, key, start, n, many),
        measure=measured,
        output=output,
    )


def lane(tree: PyTree, many: Many, k: int) -> PyTree:
    """Lane k's part of `tree`."""
    return jax.tree.map(lambda leaf: leaf[k], tree) if many else tree


def last_finite(
    lanes: Compiled, state: PyTree, start: int, piece: int, many: Many, k: int
) -> tuple[int, PyTree, PyTree, np.ndarray]:
    """(step, state, info) just before lane k turned non-finite, by bisection, since every path is repeatable; and the
    summary from `start` to the step that did it.
    """
    good, bad = 0, piece
    best, info, *_ = lanes.advance(state, start, 0)
    while bad - good > 1:
        middle = (good + bad) // 2
        trial, trial_info, summary = lanes.advance(state, start, middle)
        if lane(np.asarray(summary), many, k)[0]:
            good, best, info = middle, trial, trial_info
        else:
            bad = middle
    summary = lane(np.asarray(lanes.advance(state, start, bad)[2]), many, k)
    return start + good, *lane((best, info), many, k), summary
