"""Run a solver: `advance` (pure), `solve` (measures, prints, saves, decides), `solve_many` (seeds by vmap).

The driver knows the solver's protocol and never a solver. The k-th step uses fold_in(key, k), and the number of steps
of a chunk is a traced number, so that neither the chunk length nor a resume changes a path, bit for bit, and one
compilation serves every chunk.
"""

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import report, sharding
from bilevel.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from bilevel.diagnostics import Measurement
from bilevel.diagnostics import measure as measure_implicit
from bilevel.gap import measure_global
from bilevel.problem import BilevelProblem, SmoothCoupling
from bilevel.record import Record, Solution, SolveError, Status
from bilevel.solver import Solver, Unsupported
from bilevel.struct import invalid

PyTree = Any
PATIENCE = 0.5  # seconds between looks at the clock, the keyboard and the progress bar


_validated: "weakref.WeakSet[BilevelProblem]" = weakref.WeakSet()


def advance(
    problem: BilevelProblem, solver: Solver, state: PyTree, key: Array, start: Array | int, num_steps: Array | int
) -> tuple[PyTree, PyTree]:
    """(state, info of the last step) after steps start, …, start + num_steps - 1.

    Pure: safe under jit, vmap and shard_map. `start` and `num_steps` may be traced. With num_steps = 0 info is zeros.
    """
    return _steps(problem, solver, state, key, start, num_steps, ())[:2]


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


class Lanes(NamedTuple):
    """The compiled functions of a run: for one key, or for many by vmap."""

    init: Callable
    advance: Callable
    measure: Callable
    output: Callable


def passes_per_step(problem: BilevelProblem, solver: Solver) -> float:
    """What a step costs in passes over the data: `OracleCount.passes` with the sources' fractions."""
    if solver.full_batch:
        return solver.cost(problem).passes(1.0, 1.0)
    return solver.cost(problem).passes(problem.upper_data.fraction, problem.lower_data.fraction)


def _all_finite(state: PyTree) -> Array:
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()


@partial(jax.jit, static_argnames="many")
def _init(problem: BilevelProblem, solver: Solver, key: Array, many: bool) -> PyTree:
    one = lambda key: solver.init(problem, jax.random.fold_in(key, 0x7FFFFFFF))  # noqa: E731
    return sharding.whole(jax.vmap(one)(key) if many else one(key))


@partial(jax.jit, static_argnames="many")
def _advance(
    problem: BilevelProblem, solver: Solver, state: PyTree, key: Array, start: int, num_steps: int, many: bool
) -> tuple[PyTree, PyTree, Array, Array]:
    """(state, info, whether the state is finite, at how many steps each of the solver's assumptions failed)."""

    def one(state: PyTree, key: Array) -> tuple[PyTree, PyTree, Array, Array]:
        watched = tuple(solver.assumptions)
        state, info, failed = _steps(problem, solver, state, key, start, num_steps, watched)
        return state, info, _all_finite(state), failed

    return sharding.whole(jax.vmap(one)(state, key) if many else one(state, key))


@partial(jax.jit, static_argnames=("many", "measure"))
def _measure(problem: BilevelProblem, x: PyTree, y: PyTree, many: bool, measure: Callable) -> Array:
    """Of (x, y) alone, so that all solvers share one compilation; as one vector, since each transfer has its price."""

    def one(x: PyTree, y: PyTree) -> Array:
        measured = measure(problem, x, y)
        return jnp.stack([jnp.asarray(field, measured.value.dtype) for field in measured])

    return sharding.whole(jax.vmap(one)(x, y) if many else one(x, y))


def solve(
    problem: BilevelProblem,
    solver: Solver,
    *,
    key: Array,
    max_steps: int = 1000,
    every: int | None = None,
    tol: float | None = None,
    time_limit: float | None = None,
    callback: Callable[[int, PyTree, dict[str, float]], bool | None] | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool | None = None,
    throw: bool = False,
    measure: Callable | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Solution:
    """Run `solver` on `problem`.

    Args:
        problem: what to solve.
        solver: how.
        key: a typed key, `jax.random.key(seed)`; the run is a function of it.
        max_steps: steps at most.
        every: steps between measurements; default max_steps/20, at least 1.
        tol: stop when the referee's gradient mapping norm plus its error (estimated, not proved), the lower residual
            at the solver's y, its relative distance to the referee's y(x), and the violation of the sets are all at
            most tol. Default: the square root of the dtype's eps; its fifth root, 7e-4 in float64, where
            `gap.measure_global` measures; 0 never stops.
        time_limit: seconds of solver time, compiling and measuring left out.
        callback: called with (step, state, row) after each measurement; a true value stops the run.
        checkpoint: a file. Saved after every measurement and on interruption; where it exists already, the run goes on
            from it, to the same bits as a run without a break.
        progress: a bar and the curves of what is measured, live; default only on a terminal, after two seconds.
        throw: raise `SolveError` unless the status is CONVERGED or MAX_STEPS.
        measure: (problem, x, y) -> `diagnostics.Measurement`; default solves the lower level again, or, for solvers
            with `many_minimisers` on a constrained lower level and where h is smooth, looks for its least value, `gap`.
        mesh: devices to compute on together (`bilevel.sharding`): data, batches, samples and perturbations are split
            along their first axis. The result is that of one device up to the rounding of sums. With several
            processes each calls `solve` with the same arguments.

    Returns:
        a `Solution`; printing it gives the report.

    Raises:
        InvalidInput: for bad arguments or a bad problem.
        Unsupported: with the solver's reason.
        CheckpointError: a checkpoint that cannot be used.
        SolveError: with `throw`, unless the run ends well.
    """
    _check_arguments(max_steps, every, tol, time_limit)
    _check_key("key", key, 0, "one typed key, jax.random.key(seed)", "Use solve_many for several keys.")
    with sharding.on(mesh) as devices:
        solutions = _drive(
            problem, solver, key, many=False, max_steps=max_steps, every=every, tol=tol, time_limit=time_limit,
            callback=callback, checkpoint=checkpoint, progress=progress, measure=measure, mesh=devices,
        )  # fmt: skip
    if throw and solutions[0].status not in (Status.CONVERGED, Status.MAX_STEPS):
        raise SolveError(solutions[0])
    return solutions[0]


def solve_many(
    problem: BilevelProblem,
    solver: Solver,
    *,
    keys: Array,
    max_steps: int = 1000,
    every: int | None = None,
    tol: float | None = None,
    time_limit: float | None = None,
    progress: bool | None = None,
    measure: Callable | None = None,
) -> list[Solution]:
    """`solve` for every key of `keys`, shape [n], in one vmapped run; the arguments are those of `solve`.

    A key that converges or turns non-finite is set aside with its record; the others go on. Times are those of all
    keys together.
    """
    _check_arguments(max_steps, every, tol, time_limit)
    _check_key("keys", keys, 1, "typed keys of shape [n], n >= 1", "Use jax.random.split(key, n).")
    return _drive(
        problem, solver, keys, many=True, max_steps=max_steps, every=every, tol=tol, time_limit=time_limit,
        callback=None, checkpoint=None, progress=progress, measure=measure,
    )  # fmt: skip


def _check_arguments(max_steps: int, every: int | None, tol: float | None, time_limit: float | None) -> None:
    if not isinstance(max_steps, int) or not 0 <= max_steps < 2**31 - 1:
        invalid("max_steps", max_steps, "a whole number in [0, 2^31 - 1)", "Give a number of steps.")
    if every is not None and (not isinstance(every, int) or every < 1):
        invalid("every", every, "a whole number >= 1, or None", "It is the number of steps between measurements.")
    if tol is not None and not tol >= 0:
        invalid("tol", tol, "a number >= 0, or None", "Use 0 to run all steps.")
    if time_limit is not None and not time_limit >= 0:
        invalid("time_limit", time_limit, "seconds >= 0, or None", "Leave it out for no limit.")


def _check_key(name: str, key: Array, axes: int, expected: str, do: str) -> None:
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        invalid(name, type(key).__name__, expected, "Make a typed key: jax.random.key(seed).")
    if key.ndim != axes or key.size == 0:
        invalid(name, f"shape {key.shape}", expected, do)


def _lanes(solver: Solver, many: bool, measure: Callable) -> Lanes:
    def measured(problem: BilevelProblem, state: PyTree) -> PyTree:
        output = partial(solver.output, problem)
        x, y = (jax.vmap(output) if many else output)(state)
        return _measure(problem, x, y, many, measure)

    return Lanes(
        init=lambda problem, key: _init(problem, solver, key, many),
        advance=lambda problem, state, key, start, n: _advance(problem, solver, state, key, start, n, many),
        measure=measured,
        output=lambda problem, state: solver.output(problem, state),
    )


def _lane(tree: PyTree, many: bool, k: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[k], tree) if many else tree


def _scalars(info: PyTree) -> dict[str, float]:
    """The numbers among the fields of a step's info, as columns of the record."""
    fields = info._asdict() if hasattr(info, "_asdict") else {}
    return {name: float(value) for name, value in fields.items() if hasattr(value, "shape") and value.shape == ()}


class _Clock:
    """Solver seconds: what compiling, measuring and saving take is kept apart."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self.solve, self.setup, self.measure = elapsed, 0.0, 0.0

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - begin)


def _drive(
    problem: BilevelProblem, solver: Solver, key: Array, *, many: bool, max_steps: int, every: int | None, tol: float |
    None,
    time_limit: float | None, callback: Callable | None, checkpoint: str | os.PathLike | None, progress: bool | None,
    measure: Callable | None, mesh: jax.sharding.Mesh | None = None,
) -> list[Solution]:  # fmt: skip
    if problem not in _validated:  # by identity: a study solves one problem many times
        _validated.add(problem.validate())
    reason = solver.unsupported(problem)
    if reason is not None:
        raise Unsupported(reason)
    if measure is None:
        smooth = isinstance(problem.coupling, SmoothCoupling)  # F has no implicit derivative there
        by_value = smooth or (solver.many_minimisers and problem.constrained_lower)
        measure = solver.referee or (measure_global if by_value else measure_implicit)
    lanes, count = _lanes(solver, many, measure), key.shape[0] if many else 1
    every = max(1, max_steps // 20) if every is None else every
    clock = _Clock()
    owner = fingerprint(problem, solver, key) if checkpoint is not None else ""
    problem, (solver, key) = problem.on_mesh(mesh), sharding.place((solver, key), mesh)

    with clock.on("setup"):  # compiling: the same calls with nothing to do
        state = jax.block_until_ready(lanes.init(problem, key))
        state, info, _, failed = jax.block_until_ready(lanes.advance(problem, state, key, 0, 0))
        failed = np.asarray(failed)
        at_start = jax.block_until_ready(lanes.measure(problem, state))
    if tol is None:
        eps = min(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(lanes.output(problem, state)[0]))
        tol = float(np.power(eps, 0.2 if measure is measure_global else 0.5))
    step, rows = 0, [Record() for _ in range(count)]
    call, passes = solver.cost(problem), passes_per_step(problem, solver)
    if checkpoint is not None and Path(checkpoint).exists():
        saved, notes = load_checkpoint(checkpoint, (state, info), owner=owner)
        state, info = sharding.place(saved, mesh)
        step, clock = int(notes["step"]), _Clock(float(notes["time"]))
        rows, failed = [Record.decode(rows) for rows in notes["rows"]], np.array(notes["failed"], failed.dtype)

    finished: dict[int, tuple] = {}  # lane -> (status, step, state, info, failed), set aside

    def save() -> None:
        if checkpoint is not None:
            notes = {"step": step, "time": clock.solve, "rows": [record.encode() for record in rows]}
            notes["failed"] = failed.tolist()
            save_checkpoint(checkpoint, (state, info), owner=owner, notes=notes)

    def look() -> bool:
        """Measure, record and decide; true when nothing is left to run."""
        with clock.on("measure"):
            measured = np.asarray(at_start if step == 0 else lanes.measure(problem, state))
        for k in range(count):
            if k in finished:
                continue
            m = Measurement(*_lane(measured, many, k).tolist())
            row = {
                "step": step, "value": m.value, "hypergradient": m.hypergradient,
                "lower_residual": m.lower_residual, "violation": m.violation, "oracles": step * passes,
                "time": clock.solve, "error_bound": m.error_bound, "status": int(m.status),
            }  # fmt: skip
            row |= (_scalars(_lane(info, many, k)) if step > 0 else {}) | row  # the referee's numbers win
            if not rows[k].rows or rows[k].rows[-1]["step"] != step:
                rows[k].append(**row)
            gap = m.hypergradient + (np.inf if np.isnan(m.error_bound) else m.error_bound)
            within = all(number <= tol for number in (gap, m.lower_residual, m.lower_distance, m.violation))
            within = within and step >= solver.least_steps
            if within and tol > 0 and m.status in (Status.CONVERGED, Status.ESTIMATED):
                finished[k] = Status.CONVERGED, step, *_lane((state, info, failed), many, k)
            elif not np.isfinite(m.value) and m.status != Status.INFEASIBLE_LOWER:  # so far out that F overflows
                finished[k] = Status.NONFINITE, step, *_lane((state, info, failed), many, k)
        save()
        stop = callback is not None and bool(callback(step, state, rows[0].rows[-1]))
        if stop:
            finished.setdefault(0, (Status.STOPPED, step, state, info, failed))
        return len(finished) == count

    ending = Status.MAX_STEPS
    bar = report.Progress(progress, max_steps, type(solver).__name__)
    pace = 0.0  # seconds a step, the last piece's
    try:
        done = look()  # after a resume too: the run may have been done
        while not done and step < max_steps:
            target = min(max_steps, (step // every + 1) * every)
            while step < target and not done:
                piece = 1 if pace == 0 else max(1, int(PATIENCE / pace))
                piece = min(piece, target - step) if jax.process_count() == 1 else target - step
                with clock.on("solve"):
                    begin = time.perf_counter()
                    *new, finite, seen = jax.block_until_ready(lanes.advance(problem, state, key, step, piece))
                    pace = max((time.perf_counter() - begin) / piece, 1e-9)
                bad = [k for k in np.flatnonzero(~np.atleast_1d(finite)).tolist() if k not in finished]
                if bad:
                    for k in bad:
                        at, last, last_info, more = _last_finite(lanes, problem, state, key, step, piece, many, k)
                        finished[k] = Status.NONFINITE, at, last, last_info, _lane(failed, many, k) + more
                    done = len(finished) == count
                if not done:
                    (state, info), step, failed = new, step + piece, failed + np.asarray(seen)
                bar.update(step, rows[0])
                if time_limit is not None and sharding.agreed(clock.solve) >= time_limit and step < max_steps:
                    ending, done = Status.TIME_LIMIT, True
            if len(finished) < count:
                done = look() or done
    except KeyboardInterrupt:
        ending = Status.INTERRUPTED
        save()
    finally:
        bar.close()

    solutions = []
    for k in range(count):
        so_far = ending, step, *_lane((state, info, failed), many, k)
        status, at, at_state, at_info, times = finished.get(k, so_far)
        x, y = lanes.output(problem, at_state)
        if status == Status.MAX_STEPS and rows[k].rows[-1]["status"] in (Status.INFEASIBLE_LOWER, Status.SATURATED):
            status = Status(rows[k].rows[-1]["status"])  # a run may pass through such x, but not end there
        stats = {
            "solver": type(solver).__name__, "steps": at, "tol": tol, "setup_time": clock.setup,
            "solve_time": clock.solve, "measure_time": clock.measure, "oracles": at * passes,
            "cost": call.as_dict(),
            "failed": {text: n for text, n in zip(solver.assumptions.values(), times.tolist(), strict=True) if n},
        }  # fmt: skip
        solutions.append(Solution(x, y, status, rows[k], stats, at_state, at_info))
    return solutions


def _last_finite(
    lanes: Lanes, problem: BilevelProblem, state: PyTree, key: Array, start: int, piece: int, many: bool, k: int
) -> tuple[int, PyTree, PyTree, Array]:
    """(step, state, info) just before lane k turned non-finite, by bisection, since every path is repeatable; and what
    `_advance` counted from `start` to the step that did it.
    """
    good, bad = 0, piece
    best, info, *_ = lanes.advance(problem, state, key, start, 0)
    while bad - good > 1:
        middle = (good + bad) // 2
        trial, trial_info, finite, _ = lanes.advance(problem, state, key, start, middle)
        if np.atleast_1d(finite)[k]:
            good, best, info = middle, trial, trial_info
        else:
            bad = middle
    failed = np.asarray(lanes.advance(problem, state, key, start, bad)[3])
    return start + good, *_lane((best, info, failed), many, k)
