"""Run a solver: `solve` for one key, `solve_many` for many at once, and the `Driver` behind both.

The driver knows the solver's protocol and never a solver. The k-th step uses fold_in(key, k), and the number of steps
of a call is a traced number, so that neither its length nor a resume changes a path, bit for bit, and one compilation
serves every call.
"""

import math
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from bilevel import report
from bilevel.backend import sharding
from bilevel.diagnostics import Measurement, Referee
from bilevel.problem import BilevelProblem
from bilevel.record import Record, Row, Stats, Status
from bilevel.run.arguments import (
    Arguments,
    check_key,
    check_not_traced,
    check_start,
    referee_of,
    solver_of,
)
from bilevel.run.checkpoint import fingerprint, load_checkpoint, run_notes, save_checkpoint
from bilevel.run.kinks import Hull, Points, descent_at_kink, hull_near, may_be_stationary, stands_still
from bilevel.run.lanes import At, Many, advance, compiled, lane, nonfinite_end, numbers_of, passes_per_step, scalars
from bilevel.run.verdicts import ENDS_WELL, last_word, rank, row_of, verdict, worse
from bilevel.solution import Best, Solution, SolveError
from bilevel.solver import Solver, Unsupported, refusal
from bilevel.struct import invalid

__all__ = ["SolveError", "Unsupported", "advance", "passes_per_step", "solve", "solve_many"]
PyTree = Any
PATIENCE = 0.5  # seconds between looks at the clock, the keyboard and the progress bar

_validated: "weakref.WeakSet[BilevelProblem]" = weakref.WeakSet()


def solve(
    problem: BilevelProblem,
    solver: Solver | None = None,
    *,
    key: Array,
    x0: PyTree = None,
    y0: PyTree = None,
    max_steps: int = 1000,
    every: int | None = None,
    tol: float | None = None,
    time_limit: float | None = None,
    callback: Callable[[int, PyTree, Row], bool | None] | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool | None = None,
    throw: bool = False,
    measure: Referee | Callable | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Solution:
    """Run `solver` on `problem`.

    Args:
        problem: what to solve.
        solver: how. Default: the one that `bilevel.recommend(problem)` names first; the report says which and why.
        key: a typed key, `jax.random.key(seed)`; the run is a function of it.
        x0: where to start, shaped like init's x0; default what the problem's init gives. In `solve_many` all keys start
            there.
        y0: likewise, shaped like init's y0.
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
        throw: raise `SolveError` unless the status is CONVERGED, MAX_STEPS, or one of a run that stands at a kink of F,
            WEAKLY_ACTIVE or GOLDSTEIN.
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
        InvalidInput: for bad arguments or a bad problem, and inside of `jax.jit`, `grad` or `vmap`: derivatives are
            those of `implicit_objective`, and `advance` runs under all of them.
        Unsupported: with the solver's reason.
        CheckpointError: a checkpoint that cannot be used.
        SolveError: with `throw`, unless the run ends well.
    """
    check_not_traced("solve", problem, solver, key, x0, y0)
    solver, why = solver_of(problem, solver)
    arguments = Arguments(max_steps, every, tol, time_limit, callback, checkpoint, progress, measure, (x0, y0), why)
    arguments.check()
    check_key("key", key, 0, "one typed key, jax.random.key(seed)", "Use solve_many for several keys.")
    with sharding.on(mesh) as devices:
        solution = Driver(problem, solver, key, arguments, mesh=devices).run()[0]
    if throw and solution.status not in ENDS_WELL:
        raise SolveError(solution)
    return solution


def solve_many(
    problem: BilevelProblem,
    solver: Solver | None = None,
    *,
    keys: Array,
    x0: PyTree = None,
    y0: PyTree = None,
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
    check_not_traced("solve_many", problem, solver, keys, x0, y0)
    solver, why = solver_of(problem, solver)
    arguments = Arguments(max_steps, every, tol, time_limit, None, None, progress, measure, (x0, y0), why)
    arguments.check()
    check_key("keys", keys, 1, "typed keys of shape [n], n >= 1", "Use jax.random.split(key, n).")
    many: Many = True if mesh is None else sharding.automatic(mesh)
    if mesh is not None and keys.shape[0] % mesh.size:
        invalid("keys", f"shape {keys.shape}", f"a multiple of the mesh's {mesh.size} devices", "Add or drop keys.")
    return Driver(problem, solver, keys, arguments, many=many).run()


class Clock:
    """Seconds by what they went into: `solve`, the solver's own; `setup`, compiling; `measure`, the referee's."""

    def __init__(self) -> None:
        """All at zero."""
        self.solve = self.setup = self.measure = 0.0

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Book what happens inside under `name`, also where it raises."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - begin)


class End(NamedTuple):
    """How and where a lane ended."""

    status: Status
    at: At


class Driver:
    """A run of a solver for one key, or for many as lanes.

    `run` prepares, restores, looks, then advances and looks in turn until every lane has ended, and finishes. A lane
    that ends is set aside with its record, and the others go on.
    """

    def __init__(
        self, problem: BilevelProblem, solver: Solver, key: Array, arguments: Arguments, *, many: Many = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:  # fmt: skip
        """Everything that costs no time. `many`: how the lanes of several keys are spread (`run.lanes`); `mesh`: the
        devices that one key's run is spread over.

        Raises:
            InvalidInput: the problem's functions or shapes do not fit.
            Unsupported: the solver's reason.
        """
        if problem not in _validated:  # by identity: a study solves one problem many times
            _validated.add(problem.validate())
        reason = refusal(solver, problem)
        if reason is not None:
            raise Unsupported(reason)
        self.arguments, self.many, self.mesh = arguments, many, mesh
        self.referee = referee_of(problem, solver, arguments.measure)
        start = check_start(problem, arguments.start)
        given = [start] if jax.tree.leaves(start) else []  # so that checkpoints without one keep their owner
        self.owner = fingerprint(problem, solver, key, *given) if arguments.checkpoint is not None else ""
        self.every = max(1, arguments.max_steps // 20) if arguments.every is None else arguments.every
        if isinstance(many, jax.sharding.Mesh):
            problem, solver, key, start = sharding.place((problem, solver, key, start), many)
        else:
            problem, (solver, key, start) = problem.on_mesh(mesh), sharding.place((solver, key, start), mesh)
        self.problem, self.solver = problem, solver
        self.lanes = compiled(problem, solver, key, many, self.referee.measure, start)
        self.cost, self.passes = solver.cost(problem), passes_per_step(problem, solver)
        self.clock, self.pace = Clock(), 0.0  # pace: seconds a step, those of the last call; 0: none yet
        self.records = [Record() for _ in range(key.shape[0] if many else 1)]
        self.best: dict[int, Best] = {}  # by lane
        self.margins: dict[int, float] = {}  # by lane, at its last row: to a change of the active set
        self.ended: dict[int, End] = {}
        self.ending = Status.MAX_STEPS  # of the lanes that do not end by themselves

    def run(self) -> list[Solution]:
        """The solutions of all lanes."""
        self.prepare()
        self.restore()
        self.bar = report.Progress(self.arguments.progress, self.arguments.max_steps, type(self.solver).__name__)
        try:
            self.look()  # after a resume too: the run may have been done
            while not self.over and self.at.step < self.arguments.max_steps:
                self.advance()
                if len(self.ended) < len(self.records):
                    self.look()
        except KeyboardInterrupt:
            self.ending = Status.INTERRUPTED
            self.save()
        finally:
            self.bar.close()
        return [self.finish(k) for k in range(len(self.records))]

    @property
    def over(self) -> bool:
        """Whether nothing is left to run."""
        return len(self.ended) == len(self.records) or self.ending == Status.TIME_LIMIT

    def prepare(self) -> None:
        """Compile, by the same calls with nothing to do, and measure the start."""
        with self.clock.on("setup"):
            state = jax.block_until_ready(self.lanes.init())
            steps = jax.block_until_ready(self.lanes.advance(state, 0, 0))
            self.at_start = jax.block_until_ready(self.lanes.measure(steps.state))
        self.at = At(0, steps.state, steps.info, steps.numbers, steps.failed)
        self.columns = list(scalars(lane(steps.info, self.many, 0)))
        tol = self.arguments.tol
        default = self.referee.default_tol(self.lanes.output(lane(self.at.state, self.many, 0))[0])
        self.tol = default if tol is None else tol
        self.allowed = max(self.tol, default)  # of violations and of F: tol=0 asks for all steps, not for exactness

    def restore(self) -> None:
        """Go on from the checkpoint, where there is one."""
        path = self.arguments.checkpoint
        if path is None or not Path(path).exists():
            return
        like = self.at.state, self.at.info, self.lanes.output(self.at.state)
        saved, notes = load_checkpoint(path, like, owner=self.owner, notes=run_notes(self.at.failed.size))
        state, info, best = sharding.place(saved, self.mesh)
        self.at = At(int(notes["step"]), state, info, numbers_of(info), np.array(notes["failed"], int))
        self.records = [Record.decode(rows) for rows in notes["rows"]]
        self.best[0] = Best(best[0], best[1], self.records[0].rows[notes["best"]])
        self.clock.solve = float(notes["time"])

    def save(self) -> None:
        """Write the checkpoint, where one is asked for."""
        path = self.arguments.checkpoint
        if path is not None and self.best:  # else nothing has been measured
            notes: dict[str, Any] = {"step": self.at.step, "time": self.clock.solve, "failed": self.at.failed.tolist()}
            notes["rows"] = [record.encode() for record in self.records]
            best = self.best[0]
            notes["best"] = self.records[0].rows.index(best.row)
            tree = self.at.state, self.at.info, (best.x, best.y)
            save_checkpoint(path, tree, owner=self.owner, notes=notes)

    def look(self) -> None:
        """Measure, record and decide; save, and ask the callback."""
        with self.clock.on("measure"):
            measured = np.asarray(self.at_start if self.at.step == 0 else self.lanes.measure(self.at.state))
        for k, record in enumerate(self.records):
            if k in self.ended:
                continue
            found = Measurement(*lane(measured, self.many, k).tolist())
            if not record.rows or record.rows[-1]["step"] != self.at.step:
                record.append(**self.row(found, k))
                self.remember(k)
            early = self.at.step < self.solver.least_steps
            status = verdict(found, self.tol, early)
            if status is None and not early:
                status = self.at_kink(found, k)
            if status is not None:
                self.ended[k] = End(status, self.at.lane(self.many, k))
        self.save()
        callback = self.arguments.callback
        if callback is not None and callback(self.at.step, self.at.state, self.records[0].rows[-1]):
            self.ended.setdefault(0, End(Status.STOPPED, self.at))

    def remember(self, k: int) -> None:
        """Keep lane k's point where its last row is the best so far."""
        row, value = self.records[k].rows[-1], self.worth
        if k not in self.best or value(row) < value(self.best[k].row):
            self.best[k] = Best(*self.lanes.output(lane(self.at.state, self.many, k)), row)

    def at_kink(self, found: Measurement, k: int) -> Status | None:
        """CONVERGED where lane k stands at a kink of F and no direction leads down; costly, so where it may be."""
        rows, self.margins[k] = self.records[k].rows, float(found.margin)
        if not (may_be_stationary(found, self.tol) and stands_still(rows)):
            return None
        x, y = self.lanes.output(lane(self.at.state, self.many, k))
        rows[-1]["kink"] = descent_at_kink(self.referee, self.problem, x, y, self.tol)
        return Status.CONVERGED if rows[-1]["kink"] <= self.tol else None

    def near_kink(self, k: int) -> Hull | None:
        """What is known of a kink within lane k's next step, where the lane came to its limit of steps or time."""
        if k in self.ended or self.ending not in (Status.MAX_STEPS, Status.TIME_LIMIT) or self.tol <= 0:
            return None
        if not math.isfinite(self.margins.get(k, math.inf)) or not stands_still(self.records[k].rows):
            return None
        ahead = self.lanes.advance(self.at.state, self.at.step, 1).state
        here, there = (self.lanes.output(lane(state, self.many, k)) for state in (self.at.state, ahead))
        rows = self.records[k].rows
        return hull_near(self.referee, self.problem, Points(*here, *there), rows, self.margins[k], self.tol)

    def worth(self, row: Row) -> tuple[bool, float, float]:
        """What a row is worth, the least first."""
        return rank(row, self.allowed, self.referee.at_y)

    def row(self, found: Measurement, k: int) -> dict[str, Any]:
        """Lane k's row of the record: what the referee found, what it cost, and the solver's own numbers."""
        row = row_of(found, self.at.step, self.at.step * self.passes, self.clock.solve)
        row |= {} if math.isnan(found.multiplier) else {"multiplier": found.multiplier}
        if self.at.step > 0:
            own = zip(self.columns, lane(self.at.numbers, self.many, k).tolist(), strict=True)
            row |= {name: number for name, number in own if name not in row}  # the referee's numbers win
        return row

    def advance(self) -> None:
        """Run to the next measurement, with looks at the clock, the keyboard and the progress bar on the way."""
        limit = self.arguments.time_limit
        target = min(self.arguments.max_steps, (self.at.step // self.every + 1) * self.every)
        while self.at.step < target and not self.over:
            self.call(self.length(target - self.at.step))
            rows = self.records[0].rows
            self.bar.update(self.at.step, self.records[0], Status(rows[-1]["status"]).name if rows else "")
            unfinished = self.at.step < self.arguments.max_steps
            if limit is not None and sharding.agreed(self.clock.solve) >= limit and unfinished:
                self.ending = Status.TIME_LIMIT

    def length(self, most: int) -> int:
        """How many of the next `most` steps to do in one call: as many as take `PATIENCE` at the last call's pace."""
        if jax.process_count() > 1:  # clocks differ, and all processes must do the same
            return most
        return min(1 if self.pace == 0 else max(1, int(PATIENCE / self.pace)), most)

    def call(self, num_steps: int) -> None:
        """Do `num_steps` steps, and set lanes aside that turned non-finite on the way."""
        before = self.at
        with self.clock.on("solve"):
            begin = time.perf_counter()
            steps = self.lanes.advance(before.state, before.step, num_steps)
            self.pace = max((time.perf_counter() - begin) / num_steps, 1e-9)
        if not steps.finite.all():
            for k in np.flatnonzero(~steps.finite).tolist():
                if k not in self.ended:
                    self.ended[k] = End(*nonfinite_end(self.lanes, before, num_steps, self.many, k))
        if len(self.ended) < len(self.records):
            self.at = before.after(num_steps, steps)

    def finish(self, k: int) -> Solution:
        """Lane k's solution."""
        status, at = self.ended.get(k) or End(self.ending, self.at.lane(self.many, k))
        failed = dict(zip(self.solver.assumptions, at.failed.tolist(), strict=True))
        status = last_word(self.solver, status, failed, self.records[k].rows, self.allowed, self.referee.at_y)
        hull = self.near_kink(k) if status in (Status.MAX_STEPS, Status.TIME_LIMIT, Status.WEAKLY_ACTIVE) else None
        status, best = status if hull is None else Status.GOLDSTEIN, self.best[k]
        x, y = self.lanes.output(at.state)
        stats: Stats = {
            "solver": type(self.solver).__name__, "referee": self.referee.name, "steps": at.step, "tol": self.tol,
            "setup_time": self.clock.setup, "solve_time": self.clock.solve, "measure_time": self.clock.measure,
            "oracles": at.step * self.passes, "cost": self.cost.as_dict(), "recommended": self.arguments.recommended,
            "best_step": best.step, "best_value": best.row["value"],
            "end_is_worse": worse(self.records[k].rows[-1], best.row, self.allowed, self.referee.at_y),
            "kink": self.records[k].rows[-1].get("kink"), "goldstein": None if hull is None else hull._asdict(),
            "failed": {self.solver.assumptions[name]: number for name, number in failed.items() if number},
        }  # fmt: skip
        weights = partial(self.referee.multipliers or (lambda *_: None), self.problem, x, y)
        return Solution(x, y, status, self.records[k], stats, at.state, at.info, best, self.lanes.aux(x, y), weights)
