"""What a run computes on its devices, for one key or for many lanes at once: `advance` and the compiled functions.

A lane is a key with its own state. `many` below is False for a single one, True for lanes by vmap, or a mesh of devices
over which the lanes are spread: each device then runs its own ones by itself, and nothing moves between devices.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from bilevel.backend import sharding
from bilevel.backend.bounded import Flat, bounded_jit
from bilevel.backend.compilation import COMPILER_OPTIONS
from bilevel.backend.functions import returns_aux
from bilevel.backend.precision import full_precision
from bilevel.backend.tree import strong
from bilevel.problem import BilevelProblem
from bilevel.record import Measurement, Status
from bilevel.solver import Solver
from bilevel.struct import struct

PyTree = Any
Many = bool | Mesh
Start = tuple[PyTree, PyTree]  # (x0, y0); None for what the problem's init gives, x0 `Anywhere` for a drawn one


@struct
class Anywhere:
    """The x0 of a run that starts at a point of X drawn by its key, `x_set.around` init's x0."""


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


class Steps(NamedTuple):
    """What some steps lead to; of one lane, or with a first axis for the lanes."""

    state: PyTree
    info: PyTree
    """What the solver says of the last of them; zeros where there is none."""
    finite: np.ndarray
    """Whether the state after them is finite, shape []."""
    failed: np.ndarray
    """At how many of the steps each of the solver's assumptions failed, shape [assumptions]."""
    numbers: np.ndarray
    """`scalars` of info, shape [columns]."""


class At(NamedTuple):
    """Where a run stands; of one lane, or with a first axis for the lanes."""

    step: int
    """How many steps have been done."""
    state: PyTree
    info: PyTree
    """What the solver says of the last step; zeros before the first."""
    numbers: np.ndarray
    """`scalars` of info, shape [columns]."""
    failed: np.ndarray
    """At how many of the steps each of the solver's assumptions failed, shape [assumptions]."""

    def after(self, num_steps: int, steps: Steps) -> "At":
        """Where the run stands when `steps`, of which there are `num_steps`, are done."""
        return At(self.step + num_steps, steps.state, steps.info, steps.numbers, self.failed + steps.failed)

    def lane(self, many: Many, k: int) -> "At":
        """Where lane k stands."""
        return At(self.step, *lane((self.state, self.info, self.numbers, self.failed), many, k))


class Compiled(NamedTuple):
    """The compiled functions of a run."""

    init: Callable[[], PyTree]
    """() -> the state before the first step, of all lanes like all states here but that of `output`."""
    advance: Callable[[PyTree, int, int], Steps]
    """(state, start, num_steps) -> `Steps`; returns when they are done."""
    measure: Callable[[PyTree], Array]
    """(state) -> the fields of `Measurement`, shape [fields]."""
    output: Callable[[PyTree], tuple[PyTree, PyTree]]
    """(state of one lane) -> (x, y)."""
    aux: Callable[[PyTree, PyTree], PyTree]
    """(x, y) -> what f returns there beside its value, on all of the data; None where it returns nothing."""


def passes_per_step(problem: BilevelProblem, solver: Solver) -> float:
    """What a step costs in passes over the data: `OracleCount.passes` with the sources' fractions; NaN where that is
    not known before the step.
    """
    if solver.adaptive:
        return math.nan
    if solver.full_batch:
        return solver.cost(problem).passes(1.0, 1.0)
    return solver.cost(problem).passes(problem.upper_data.fraction, problem.lower_data.fraction)


def scalars(info: PyTree) -> dict[str, Array]:
    """The numbers among the fields of a step's info: columns of the record."""
    fields = info._asdict() if hasattr(info, "_asdict") else {}
    return {name: value for name, value in fields.items() if getattr(value, "shape", None) == ()}


def numbers_of(info: PyTree) -> np.ndarray:
    """The `scalars` of one lane's info as one vector of floats, shape [columns]: as `Steps` has them."""
    return np.asarray(_vector([*scalars(info).values()]))


def _vector(numbers: list[Any]) -> Array:
    return jnp.stack([jnp.asarray(number, float) for number in numbers]) if numbers else jnp.zeros(0)


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


@bounded_jit(num_static=1, compiler_options=COMPILER_OPTIONS)
@full_precision
def init(problem: BilevelProblem, solver: Solver, key: Array, many: Many) -> PyTree:
    """The state before the first step; never weakly typed, or the first steps would compile again while they count as
    the solver's time.
    """

    def one(problem: BilevelProblem, solver: Solver, key: Array) -> PyTree:
        return strong(solver.init(problem, jax.random.fold_in(key, 0x7FFFFFFF)))

    return _each(one, many, (problem, solver), key)


@bounded_jit(num_static=1, compiler_options=COMPILER_OPTIONS)
@full_precision
def init_at(problem: BilevelProblem, solver: Solver, key: Array, start: Start, many: Many) -> PyTree:
    """`init` from `start` in place of what the problem's init gives, the same for all lanes."""

    def one(problem: BilevelProblem, solver: Solver, start: Start, key: Array) -> PyTree:
        def begin(key: Array) -> tuple[PyTree, PyTree]:
            x, y = problem.init(key)
            if isinstance(start[0], Anywhere):
                x = problem.x_set.around(jax.random.fold_in(key, 1), x)
            elif start[0] is not None:
                x = start[0]
            return x, y if start[1] is None else start[1]

        return strong(solver.init(dataclasses.replace(problem, init=begin), jax.random.fold_in(key, 0x7FFFFFFF)))

    return _each(one, many, (problem, solver, start), key)


@bounded_jit(num_static=1, compiler_options=COMPILER_OPTIONS)
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
        return strong(state), info, _vector([_all_finite(state), *failed, *scalars(info).values()])

    return _each(one, many, (problem, solver, start, num_steps), state, key)


@bounded_jit(num_static=2, compiler_options=COMPILER_OPTIONS)
@full_precision
def measure_lanes(problem: BilevelProblem, x: PyTree, y: PyTree, many: Many, measure: Callable) -> Array:
    """Of (x, y) alone, so that all solvers share one compilation; in one vector, too."""

    def one(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
        measured = measure(problem, x, y)
        return jnp.stack([jnp.asarray(field, measured.value.dtype) for field in measured])

    return _each(one, many, (problem,), x, y)


@bounded_jit(compiler_options=COMPILER_OPTIONS)
@full_precision
def aux_at(problem: BilevelProblem, x: PyTree, y: PyTree) -> PyTree:
    """`problem.aux` at (x, y)."""
    return problem.aux(x, y)


def compiled(
    problem: BilevelProblem, solver: Solver, key: Array, many: Many, measure: Callable, start: Start = (None, None)
) -> Compiled:
    """The functions of a run of `solver` on `problem` from `start`; `key` is one key, or many of shape [lanes]."""
    flat_problem: Any = Flat(problem)
    flat_solver: Any = Flat(solver)
    output = full_precision(partial(solver.output, problem))
    numbers_begin = 1 + len(solver.assumptions)

    def advanced(state: PyTree, start: int, num_steps: int) -> Steps:
        state, info, summary = advance_lanes(flat_problem, flat_solver, state, key, start, num_steps, many)
        table = np.asarray(summary)  # waits for the steps, whose results come all at once
        failed = table[..., 1:numbers_begin].astype(int)
        return Steps(state, info, table[..., 0] != 0, failed, table[..., numbers_begin:])

    def measured(state: PyTree) -> Array:
        x, y = (jax.vmap(output) if many else output)(state)
        return measure_lanes(flat_problem, x, y, many, measure)

    def begun() -> PyTree:
        if start[0] is None and start[1] is None:
            return init(flat_problem, flat_solver, key, many)
        return init_at(flat_problem, flat_solver, key, start, many)

    def aux(x: PyTree, y: PyTree) -> PyTree:
        return aux_at(flat_problem, x, y) if returns_aux(problem, "upper") else None

    return Compiled(init=begun, advance=advanced, measure=measured, output=output, aux=aux)


def lane(tree: PyTree, many: Many, k: int) -> PyTree:
    """Lane k's part of `tree`.

    Lanes that are split over devices by one program, whose end is waited for: each array's indexing would be a program
    with a collective of its own, and on the CPU many of these at once wait for each other's threads for ever.
    """
    if not many:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    split = [isinstance(leaf, jax.Array) and not leaf.is_fully_replicated for leaf in leaves]
    apart = [leaf for leaf, is_split in zip(leaves, split, strict=True) if is_split]
    taken = iter(jax.block_until_ready(_lane_of_split(apart, k)) if apart else [])
    return treedef.unflatten(
        [next(taken) if is_split else leaf[k] for leaf, is_split in zip(leaves, split, strict=True)]
    )


@bounded_jit
def _lane_of_split(leaves: list[Array], k: Array) -> list[Array]:
    return [leaf[k] for leaf in leaves]


def last_finite(lanes: Compiled, at: At, num_steps: int, many: Many, k: int) -> At:
    """Where lane k stood just before it turned non-finite, within `num_steps` steps after `at`; with the failed
    assumptions of the step that did it, too. By bisection, since every path is repeatable.
    """
    good, bad = 0, num_steps
    best = lanes.advance(at.state, at.step, 0)
    while bad - good > 1:
        middle = (good + bad) // 2
        trial = lanes.advance(at.state, at.step, middle)
        if lane(trial.finite, many, k):
            good, best = middle, trial
        else:
            bad = middle
    failed = lanes.advance(at.state, at.step, bad).failed
    return at.after(good, best._replace(failed=failed)).lane(many, k)


def nonfinite_end(lanes: Compiled, before: At, num_steps: int, many: Many, k: int) -> tuple[Status, At]:
    """How and where lane k ends that turned non-finite within `num_steps` from `before`: NO_FOLLOWER where a single
    lane has an empty Y(x) at its last finite iterate.
    """
    last = last_finite(lanes, before, num_steps, many, k)
    if many is not False:
        return Status.NONFINITE, last
    found = Measurement(*np.asarray(lanes.measure(last.state)).tolist())
    return Status.NO_FOLLOWER if found.status == Status.INFEASIBLE_LOWER else Status.NONFINITE, last
