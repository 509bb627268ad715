"""Run a solver: `advance` (pure), `solve` (measures, prints, saves, decides), `solve_many` (seeds as lanes).

The driver knows the solver's protocol and never a solver. The k-th step uses fold_in(key, k), and the number of steps
of a chunk is a traced number, so that neither the chunk length nor a resume changes a path, bit for bit, and one
compilation serves every chunk.
"""

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from bilevel import report
from bilevel.backend import sharding
from bilevel.diagnostics import Measurement, Referee
from bilevel.problem import BilevelProblem
from bilevel.record import Record, Solution, SolveError, Status
from bilevel.run.arguments import check_arguments, check_key, referee_of
from bilevel.run.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from bilevel.run.lanes import Many, advance, compiled, lane, last_finite, passes_per_step, scalars
from bilevel.solver import Solver, Unsupported
from bilevel.struct import invalid

__all__ = ["SolveError", "Unsupported", "advance", "passes_per_step", "solve", "solve_many"]
PyTree = Any
PATIENCE = 0.5  # seconds between looks at the clock, the keyboard and the progress bar
NO_VALUE = Status.INFEASIBLE_LOWER, Status.SADDLE  # F has no value at this x, but may have one at the next

_validated: "weakref.WeakSet[BilevelProblem]" = weakref.WeakSet()


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
    measure: Referee | Callable | None = None,
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
            most tol. Default: the referee's, eps the dtype's: sqrt(eps), or eps^(1/5), 7e-4 in float64, by value.
            0 never stops.
        time_limit: seconds of solver time, compiling and measuring left out.
        callback: called with (step, state, row) after each measurement; a true value stops the run.
        checkpoint: a file. Saved after every measurement and on interruption; where it exists already, the run goes on
            from it, to the same bits as a run without a break.
        progress: a bar and the curves of what is measured, live; default only on a terminal, after two seconds.
        throw: raise `SolveError` unless the status is CONVERGED or MAX_STEPS.
        measure: the referee, a `diagnostics.Referee`, or a function (problem, x, y) -> `diagnostics.Measurement`.
            Default, `run.referee_of`: the one that the solver asks for; where it asks for none, `diagnostics.IMPLICIT`,
            which solves the lower level again from y, or `diagnostics.BY_VALUE`, which looks for its least value, below
            a `SmoothCoupling`.
        mesh: devices to compute on together (`bilevel.backend.sharding`): data, batches, samples and perturbations
            are split along their first axis. The result is that of one device up to the rounding of sums. With several
            processes each calls `solve` with the same arguments.

    Returns:
        a `Solution`; printing it gives the report.

    Raises:
        InvalidInput: for bad arguments or a bad problem.
        Unsupported: with the solver's reason.
        CheckpointError: a checkpoint that cannot be used.
        SolveError: with `throw`, unless the run ends well.
    """
    check_arguments(problem, solver, max_steps, every, tol, time_limit, callback, measure)
    check_key("key", key, 0, "one typed key, jax.random.key(seed)", "Use solve_many for several keys.")
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
    measure: Referee | Callable | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> list[Solution]:
    """`solve` for every key of `keys`, shape [n], in one vmapped run.

    The arguments are those of `solve`, but for `mesh`: devices of this process over which the keys are spread, n a
    multiple of their number. Each runs its own keys by itself: nothing moves between devices, and each holds all data.

    A key that converges or turns non-finite is set aside with its record; the others go on. Times are those of all
    keys together.

    Raises:
        InvalidInput, Unsupported: as of `solve`; keys that the devices do not divide.
    """
    check_arguments(problem, solver, max_steps, every, tol, time_limit, None, measure)
    check_key("keys", keys, 1, "typed keys of shape [n], n >= 1", "Use jax.random.split(key, n).")
    many: Many = True if mesh is None else sharding.automatic(mesh)
    if mesh is not None and keys.shape[0] % mesh.size:
        invalid("keys", f"shape {keys.shape}", f"a multiple of the mesh's {mesh.size} devices", "Add or drop keys.")
    return _drive(
        problem, solver, keys, many=many, max_steps=max_steps, every=every, tol=tol, time_limit=time_limit,
        callback=None, checkpoint=None, progress=progress, measure=measure,
    )  # fmt: skip


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
    problem: BilevelProblem, solver: Solver, key: Array, *, many: Many, max_steps: int, every: int | None, tol: float |
    None,
    time_limit: float | None, callback: Callable | None, checkpoint: str | os.PathLike | None, progress: bool | None,
    measure: Referee | Callable | None, mesh: jax.sharding.Mesh | None = None,
) -> list[Solution]:  # fmt: skip
    if problem not in _validated:  # by identity: a study solves one problem many times
        _validated.add(problem.validate())
    reason = solver.unsupported(problem)
    if reason is not None:
        raise Unsupported(reason)
    referee = referee_of(problem, solver, measure)
    count = key.shape[0] if many else 1
    every = max(1, max_steps // 20) if every is None else every
    clock = _Clock()
    owner = fingerprint(problem, solver, key) if checkpoint is not None else ""
    if isinstance(many, jax.sharding.Mesh):
        problem, solver, key = sharding.place((problem, solver, key), many)
    else:
        problem, (solver, key) = problem.on_mesh(mesh), sharding.place((solver, key), mesh)
    lanes = compiled(problem, solver, key, many, referee.measure)

    with clock.on("setup"):  # compiling: the same calls with nothing to do
        state = jax.block_until_ready(lanes.init())
        state, info, summary = jax.block_until_ready(lanes.advance(state, 0, 0))
        summary = np.asarray(summary)
        at_start = jax.block_until_ready(lanes.measure(state))
    if tol is None:
        tol = referee.default_tol(lanes.output(state)[0])
    step, rows = 0, [Record() for _ in range(count)]
    columns, after = list(scalars(lane(info, many, 0))), 1 + len(solver.assumptions)  # info's numbers come last
    failed, numbers = np.zeros_like(summary[..., 1:after], int), summary[..., after:]
    call, passes = solver.cost(problem), passes_per_step(problem, solver)
    if checkpoint is not None and Path(checkpoint).exists():
        saved, notes = load_checkpoint(checkpoint, (state, info), owner=owner)
        state, info = sharding.place(saved, mesh)
        step, clock = int(notes["step"]), _Clock(float(notes["time"]))
        rows, failed = [Record.decode(rows) for rows in notes["rows"]], np.array(notes["failed"], int)
        numbers = np.array([float(np.asarray(value)) for value in scalars(info).values()])

    finished: dict[int, tuple] = {}  # lane -> (status, step, state, info, failed), set aside

    def save() -> None:
        if checkpoint is not None:
            notes = {"step": step, "time": clock.solve, "rows": [record.encode() for record in rows]}
            notes["failed"] = failed.tolist()
            save_checkpoint(checkpoint, (state, info), owner=owner, notes=notes)

    def look() -> bool:
        """Measure, record and decide; true when nothing is left to run."""
        with clock.on("measure"):
            measured = np.asarray(at_start if step == 0 else lanes.measure(state))
        for k in range(count):
            if k in finished:
                continue
            m = Measurement(*lane(measured, many, k).tolist())
            row = {
                "step": step, "value": m.value, "hypergradient": m.hypergradient,
                "lower_residual": m.lower_residual, "violation": m.violation, "oracles": step * passes,
                "time": clock.solve, "error_bound": m.error_bound, "status": int(m.status),
            }  # fmt: skip
            mine = dict(zip(columns, lane(numbers, many, k).tolist(), strict=True)) if step > 0 else {}
            row |= mine | row  # the referee's numbers win
            if not rows[k].rows or rows[k].rows[-1]["step"] != step:
                rows[k].append(**row)
            gap = m.hypergradient + (np.inf if np.isnan(m.error_bound) else m.error_bound)
            within = all(number <= tol for number in (gap, m.lower_residual, m.lower_distance, m.violation))
            within = within and step >= solver.least_steps
            if within and tol > 0 and m.status in (Status.CONVERGED, Status.ESTIMATED):
                finished[k] = Status.CONVERGED, step, *lane((state, info, failed), many, k)
            elif not np.isfinite(m.value) and m.status not in NO_VALUE:  # so far out that F overflows
                finished[k] = Status.NONFINITE, step, *lane((state, info, failed), many, k)
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
                    *new, summary = lanes.advance(state, step, piece)
                    summary = np.asarray(summary)  # waits for the chunk, whose results come all at once
                    pace = max((time.perf_counter() - begin) / piece, 1e-9)
                if not summary[..., 0].all():
                    bad = np.flatnonzero(summary[..., :1] == 0).tolist()
                    for k in (k for k in bad if k not in finished):
                        at, last, last_info, to_it = last_finite(lanes, state, step, piece, many, k)
                        times = lane(failed, many, k) + to_it[1:after].astype(int)
                        finished[k] = Status.NONFINITE, at, last, last_info, times
                    done = len(finished) == count
                if not done:
                    (state, info), step, numbers = new, step + piece, summary[..., after:]
                    failed = failed + summary[..., 1:after].astype(int) if failed.size else failed
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
        so_far = ending, step, *lane((state, info, failed), many, k)
        status, at, at_state, at_info, times = finished.get(k, so_far)
        x, y = lanes.output(at_state)
        last = rows[k].rows[-1]
        unusable = (Status.SATURATED,) if np.isfinite(last["value"]) else NO_VALUE
        if status == Status.MAX_STEPS and last["status"] in unusable:
            status = Status(last["status"])  # a run may pass through such x, but not end there
        counts = dict(zip(solver.assumptions, times.tolist(), strict=True))
        if status == Status.MAX_STEPS:
            warned = (warning for name, warning in solver.warnings.items() if 0 < at <= 2 * counts[name])
            status = next(warned, status)
        stats = {
            "solver": type(solver).__name__, "steps": at, "tol": tol, "setup_time": clock.setup,
            "solve_time": clock.solve, "measure_time": clock.measure, "oracles": at * passes,
            "cost": call.as_dict(),
            "failed": {solver.assumptions[name]: n for name, n in counts.items() if n},
        }  # fmt: skip
        solutions.append(Solution(x, y, status, rows[k], stats, at_state, at_info))
    return solutions
