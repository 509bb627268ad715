"""Run cells into a folder (`benchmarks.study.files`): a killed run goes on where it stopped."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bilevel
from benchmarks.judge import referee
from benchmarks.study import formats, processes
from benchmarks.study.files import (
    BROKEN,
    EMPTY,
    ERROR,
    UNSUPPORTED,
    FolderError,
    cell_path,
    instance_path,
    load_point,
    read_cell,
    read_json,
    save_point,
    write_json,
)
from benchmarks.study.registry import Cell, build_instance, build_solver
from bilevel import oracles
from bilevel.backend.schema import LARGEST
from bilevel.run import passes_per_step

PyTree = Any
ACTIVE = 1e-6  # slack up to which a constraint counts as active


@dataclasses.dataclass
class Held:
    """What cells share: solvers by their text, since a second one may compile again, the last instance, curves."""

    solvers: dict[str, bilevel.Solver] = dataclasses.field(default_factory=dict)
    key: tuple[str, int] | None = None
    instance: Any = None
    live: bool = False


def unfinished(folder: Path, cells: list[Cell]) -> list[int]:
    """The numbers of the cells that have no result yet, or an error that is worth another try."""
    results = [read_cell(folder, index, cell) for index, cell in enumerate(cells)]
    return [index for index, result in enumerate(results) if result is None or result["status"] == ERROR]


def execute(folder: Path, cells: list[Cell], on_cell: Callable[[int, Cell], None], live: bool = False) -> bool:
    """Run every cell that is not finished in `folder`; true when all were run, false after Ctrl-C.

    A cell that raised an error is tried again. `on_cell(index, cell)` is called before each cell. `live` shows the
    curves of the running cell, where stderr is a terminal.

    Raises:
        FolderError: a result that is there is damaged (before anything is run), or one cannot be written.
    """
    held = Held({text: build_solver(text) for text in dict.fromkeys(cell.solver for cell in cells)}, live=live)
    for index in processes.share(unfinished(folder, cells) if processes.leads() else None):
        on_cell(index, cells[index])
        try:
            complete = run_cell(folder, index, cells[index], held)
        except KeyboardInterrupt:
            return False
        if not complete:
            return False
    return True


def chosen_settings(folder: Path, cell: Cell) -> str:
    """The solver with the settings that the search of `benchmarks.study.tuning` chose for it.

    Raises:
        FolderError: the search is not finished.
    """
    path = folder / "tuning.json"
    chosen = (read_json(path, formats.TUNING) or {}).get("chosen", {})
    found = chosen.get(cell.problem, {}).get(cell.solver)
    if found is None:
        raise FolderError(f"{path}: {cell.solver} on {cell.problem} is not in it. Repeat the run's command to tune it.")
    return found["solver"]


def run_cell(folder: Path, index: int, cell: Cell, held: Held) -> bool:
    """Run one cell and write its result; false when it was interrupted from the keyboard.

    Args:
        folder: of the run.
        index: the cell's number.
        cell: what to run.
        held: of this process, the same at each call.

    Raises:
        FolderError: the result cannot be written.
    """
    path = cell_path(folder, index, cell)
    text = cell.solver
    if cell.search is not None:
        text = processes.share(chosen_settings(folder, cell) if processes.leads() else None)
    result = EMPTY | ({} if cell.search is None else {"tuned": text})
    try:
        if text not in held.solvers:
            held.solvers[text] = build_solver(text)
        if held.key != (cell.problem, cell.seed):
            held.key, held.instance = None, build_instance(cell.problem, cell.seed)
            held.key = cell.problem, cell.seed
        if processes.leads():
            describe(instance_path(folder, cell.problem, cell.seed), held.instance)
        result |= run_instance(cell, held.instance, held.solvers[text], path, held.live)
    except FolderError:
        raise
    except bilevel.Unsupported as error:
        result |= {"status": UNSUPPORTED, "reason": str(error)}
    except Exception as error:  # a cell that fails is a row with its reason
        result |= {"reason": f"{type(error).__name__}: {error}"}
    if result["status"] == bilevel.Status.INTERRUPTED.name:
        return False
    if processes.leads():
        write_json(path, {"cell": dataclasses.asdict(cell)} | result)
    return True


def describe(path: Path, instance: Any) -> None:
    """Write what is known of an instance: its sizes, optimum and the baselines' metrics."""
    if path.exists():
        return
    x, y = instance.problem.init(jax.random.key(0))
    sizes = {name: sum(np.size(leaf) for leaf in jax.tree.leaves(point)) for name, point in (("x", x), ("y", y))}
    optimum = None if instance.truth is None else float(instance.truth.value)
    baselines = {name: baseline() for name, baseline in instance.baselines.items()}
    write_json(path, {"sizes": sizes, "optimum": optimum, "tags": sorted(instance.tags), "baselines": baselines})


def step_limit(cell: Cell, problem: bilevel.BilevelProblem, solver: bilevel.Solver) -> int:
    """Steps at most: the cell's max_steps, and as many as its max_passes pay for; 1000 where it has no limit at all.

    Raises:
        Unsupported: one step costs more than the whole budget.
    """
    limits = [] if cell.max_steps is None else [cell.max_steps]
    if cell.max_passes is not None:
        price = passes_per_step(problem, solver)
        if price > cell.max_passes:
            raise bilevel.Unsupported(
                f"a step costs {price:g} passes, more than the whole budget of {cell.max_passes:g}."
            )
        limits.append(int(min(cell.max_passes / price, LARGEST)))
    return min(limits, default=1000 if cell.time_limit is None else LARGEST)


class Active:
    """A callback that counts, at each measurement, the lower constraints that hold with equality, and what changed."""

    def __init__(self, problem: bilevel.BilevelProblem, solver: bilevel.Solver) -> None:
        """Of the runs of `solver` on `problem`."""
        self.problem, self.solver, self.rows, self.last = problem, solver, [], None

    def __call__(self, step: int, state: PyTree, row: bilevel.Row) -> None:
        """Add a row: oracles, time, count, changed."""
        now = np.asarray(_active(self.problem, *self.solver.output(self.problem, state)))
        changed = 0 if self.last is None else int((now != self.last).sum())
        self.rows.append({"oracles": row["oracles"], "time": row["time"], "count": int(now.sum()), "changed": changed})
        self.last = now


@jax.jit
def _active(problem: bilevel.BilevelProblem, x: PyTree, y: PyTree) -> jax.Array:
    """Which rows of the coupling and constraints of y_set are active at (x, y) to within ACTIVE, as one vector."""
    near = jax.tree.leaves(problem.y_set.active(y, ACTIVE))
    values = oracles.coupling_values(problem, x, y)[0]
    return jax.numpy.concatenate([*(jax.numpy.ravel(part) for part in near), values >= -ACTIVE])


def run_instance(cell: Cell, instance: Any, solver: bilevel.Solver, path: Path, live: bool) -> dict[str, Any]:
    """Solve one cell and judge the end: what its file holds; the end itself goes beside it, as a .npz."""
    active = Active(instance.problem, solver) if instance.problem.constrained_lower else None
    solution = bilevel.solve(
        instance.problem, solver, key=jax.random.key(cell.seed), max_steps=step_limit(cell, instance.problem, solver),
        every=cell.every, tol=cell.tol, time_limit=cell.time_limit, progress=None if live else False,
        measure=instance.referee, mesh=processes.mesh(), callback=active,
    )  # fmt: skip
    result = {"status": solution.status.name, "stats": solution.stats, "record": solution.record.rows}
    if active is not None:
        result["active"] = active.rows
    if solution.status == bilevel.Status.INTERRUPTED or not processes.leads():
        return result
    points = path.with_suffix(".npz")
    save_point(points, solution.x, solution.y)
    x, y = load_point(points, solution.x, solution.y)
    last = solution.record.rows[-1]
    with np.errstate(all="ignore"):  # a diverged run overflows in the metrics too: its numbers say so
        metrics = {} if instance.metrics is None else instance.metrics(x, y)
        if solution.status in BROKEN or not math.isfinite(last["value"]):
            status = solution.status if solution.status in BROKEN else bilevel.Status.NONFINITE
            return result | {"status": status.name, "reason": status.advice, "metrics": metrics}
        verdict = referee.judge(instance, x, y, solution.record.rows)
    if instance.maps is not None:
        result["maps"] = {name: np.asarray(values).tolist() for name, values in instance.maps(x, y).items()}
    return result | {"metrics": metrics, "referee": verdict}
