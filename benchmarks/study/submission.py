"""`bilevax submit`: a program as a solver of a study. It tells points; what they are worth is measured here.

Every line's (x, y) is measured by the instance's referee, after the program has ended, so that nobody shares the
machine with it; the last one is judged as that of any run, and the word for it is found by the same rules. The first
row is the start, at 0 seconds. The folder is one of a run, which `show`, `compare`, `report` and `site` read.
"""

import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel
from benchmarks.errors import UsageError
from benchmarks.judge import referee
from benchmarks.study import instances, programs
from benchmarks.study.files import BROKEN, EMPTY, ERROR, cell_path, instance_path, save_point, write_file, write_json
from benchmarks.study.registry import Cell, build_instance
from benchmarks.study.runner import describe, unfinished
from bilevel.backend.bounded import Flat
from bilevel.record import Measurement, Row, Status, solved
from bilevel.run.kinks import descent_at_kink, may_be_stationary, stands_still
from bilevel.run.lanes import measure_lanes
from bilevel.run.verdicts import last_word, rank, row_of, verdict, worse
from bilevel.solver import Solver

PyTree = Any
PROTOCOL = 1
WRONG = 1e-3  # part of the longest gradient of a run by which a told one may be off
LOGS = "programs"  # the folder of what programs wrote on stderr


def name_of(command: str, name: str | None) -> tuple[list[str], str]:
    """(the words of a command, the program's name): by default that of the first file in it, or of the program.

    Raises:
        UsageError: a command that is no line of words, or a name that could not stand in a table.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--command: got {command!r} ({error}); expected a program and its arguments.") from error
    if not words:
        raise UsageError("--command: got nothing; expected a program and its arguments, as 'julia solver.jl'.")
    if shutil.which(words[0]) is None:
        raise UsageError(f"--command: there is no program {words[0]!r}; expected one that can be run here. Install it.")
    if name is None:
        stem = next((Path(word).stem for word in words[1:] if Path(word).is_file()), Path(words[0]).stem)
        name = re.sub(r"[^\w-]+", "_", stem)
    if not re.fullmatch(r"[\w-]+", name):
        raise UsageError(f"--name: got {name!r}; expected letters, digits, _ and -.")
    return words, name


def fingerprints(words: list[str]) -> dict[str, str]:
    """The files that a command names, with what they hold: another version of a program is another run."""
    files = [Path(word) for word in words if Path(word).is_file()]
    return {f"program {path.name}": f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" for path in files}


def again(settings: dict[str, Any]) -> str:
    """The command that repeats a submission, from the settings of its folder."""
    cells = [Cell.of(cell) for cell in settings["cells"]]
    chosen = " ".join(f"-p {shlex.quote(text)}" for text in dict.fromkeys(cell.problem for cell in cells))
    suite = settings.get("suite")
    what = chosen if suite is None else f"--suite {suite.partition(',')[0].replace(' ', '@')}"
    seeds = max(cell.seed for cell in cells) + 1
    return (
        f"bilevax submit --command {shlex.quote(settings['program'])} --name {cells[0].solver} {what} "
        f"--seeds {seeds} --time-limit {cells[0].time_limit:g}"
    )


def execute(folder: Path, cells: list[Cell], words: list[str], on_cell: Callable[[int, Cell], None]) -> bool:
    """Run the program on every cell that is not finished; true when all were run, false after Ctrl-C.

    Raises:
        UsageError: there is no such program.
        FolderError: a result is damaged, or cannot be written.
    """
    try:
        (folder / LOGS).mkdir(exist_ok=True)
        for index in unfinished(folder, cells):
            on_cell(index, cells[index])
            _run_cell(folder, index, cells[index], words)
    except KeyboardInterrupt:
        return False
    return True


def _run_cell(folder: Path, index: int, cell: Cell, words: list[str]) -> None:
    """Run the program on one cell, judge what it said, write the result."""
    assert cell.time_limit is not None
    path = cell_path(folder, index, cell)
    instance = build_instance(cell.problem, cell.seed)
    describe(instance_path(folder, cell.problem, cell.seed), instance)
    seen, arrays = instances.describe(cell.problem, cell.seed, instance, secrets=False)
    sizes = seen["dimensions"]["x"], seen["dimensions"]["y"]
    budget = {"seconds": cell.time_limit, "lines": programs.most_lines(sizes)}
    message: dict[str, Any] = {"protocol": PROTOCOL, "budget": budget, "instance": seen, "arrays_file": None}
    if arrays and "data" not in seen["arrays"][0]:  # too many to stand in the line
        file = (folder / LOGS / f"{path.stem}.npz").resolve()
        write_file(file, instances.packed(arrays))
        message["arrays_file"] = str(file)
    log = folder / LOGS / f"{path.stem}.txt"
    outcome = programs.run(words, json.dumps(message, allow_nan=False).encode(), cell.time_limit, sizes, log)
    result = EMPTY | {"status": outcome.word, "reason": outcome.reason}
    if outcome.word is None:
        try:
            result |= _judged(cell, instance, outcome, path)
        except Exception as error:  # a cell that fails is a row with its reason
            result |= {"status": ERROR, "reason": f"{type(error).__name__}: {error}"}
    write_json(path, {"cell": dataclasses.asdict(cell)} | result)


def _judged(cell: Cell, instance: Any, outcome: programs.Outcome, path: Path) -> dict[str, Any]:
    """What the file of a cell holds whose program ended well."""
    problem = instance.problem.validate()
    start = instances.start(problem, cell.seed)
    (flat_x, to_x), (flat_y, to_y) = (ravel_pytree(part) for part in start)
    points = [start] + [
        (to_x(jnp.asarray(line.x, flat_x.dtype)), to_y(jnp.asarray(line.y, flat_y.dtype))) for line in outcome.lines
    ]
    times = [0.0, *(line.time for line in outcome.lines)]
    found = [_measured(instance, *point) for point in points]
    # what calls were made nobody knows
    rows: list[Any] = [
        row_of(at, k, math.nan, seconds) for k, (at, seconds) in enumerate(zip(found, times, strict=True))
    ]
    x, y = points[-1]
    tol = instance.referee.default_tol(x)
    status = _status(instance, found[-1], rows, (x, y), tol)
    save_point(path.with_suffix(".npz"), x, y)
    best = min(rows, key=lambda row: rank(row, tol, instance.referee.at_y))
    stats = {
        "solver": cell.solver, "referee": instance.referee.name, "steps": len(outcome.lines), "tol": tol,
        "setup_time": 0.0, "solve_time": outcome.seconds, "oracles": None, "best_step": best["step"],
        "best_value": best["value"], "end_is_worse": worse(rows[-1], best, tol, instance.referee.at_y),
    }  # fmt: skip
    claims = _claims(instance, outcome.lines, points)
    result = {"status": status.name, "stats": stats, "record": rows, "claims": claims}
    with np.errstate(all="ignore"):
        result["metrics"] = {} if instance.metrics is None else instance.metrics(x, y)
        if status in BROKEN or not np.isfinite(rows[-1]["value"]):
            return result | {"reason": status.advice}
        return result | {"reason": None, "referee": referee.judge(instance, x, y, rows)}


def _claims(instance: Any, lines: list[programs.Line], points: list[tuple[PyTree, PyTree]]) -> dict[str, Any]:
    """What the program said of its points, and how much of it is so: each gradient of F that it told is held against
    ours, and is wrong where it is off by more than `WRONG` of the longest one of the run, beside the error of ours.
    """
    errors: list[float] = []
    if not instance.referee.at_y and any(line.gradient is not None for line in lines):
        ours = [bilevel.hypergradient(instance.problem, *point) for point in points]
        flat = [np.asarray(ravel_pytree(h.gradient)[0], float) for h in ours]
        longest = max((float(np.linalg.norm(g)) for g in flat if np.isfinite(g).all()), default=0.0)
        for line, h, g in zip(lines, ours[1:], flat[1:], strict=True):
            if line.gradient is not None and solved(h.status) and np.isfinite(h.error_bound):
                off = float(np.linalg.norm(np.asarray(line.gradient) - g)) - float(h.error_bound)
                errors.append(max(off, 0.0) / longest if longest else off)
    return {
        "converged": lines[-1].converged, "gradients": len(errors),
        "wrong_gradients": sum(error > WRONG for error in errors), "worst_gradient": max(errors, default=None),
    }  # fmt: skip


def _measured(instance: Any, x: PyTree, y: PyTree) -> Measurement:
    numbers = measure_lanes(Flat(instance.problem), x, y, False, instance.referee.measure)
    return Measurement(*np.asarray(numbers).tolist())


def _status(
    instance: Any, found: Measurement, rows: list[Row], point: tuple[PyTree, PyTree], tol: float
) -> bilevel.Status:
    """The word for the end, as `solve` finds it; STOPPED where the program ended before the referee was content."""
    status = verdict(found, tol, early=False)
    if status is None and may_be_stationary(found, tol) and stands_still(rows):
        rows[-1]["kink"] = descent_at_kink(instance.referee, instance.problem, *point, tol)
        status = Status.CONVERGED if rows[-1]["kink"] <= tol else None
    if status is None:
        status = last_word(Solver(), Status.MAX_STEPS, {}, rows, tol, instance.referee.at_y)
    return Status.STOPPED if status == Status.MAX_STEPS else status
