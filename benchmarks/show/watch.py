"""Follow a study that another process runs: what has finished, how it ended, what is left. It only reads."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from benchmarks.errors import UsageError
from benchmarks.show.report import number_text
from benchmarks.study import tuning
from benchmarks.study.files import LOCK, cell_path, read_cell, read_instance, read_settings
from benchmarks.study.registry import Cell

QUIET = 5.0  # seconds without a new result after which it is asked whether anybody still runs the study


class Seen(NamedTuple):
    """What a look at the folder found."""

    lines: list[str]
    """A line for each cell that has finished since the last look."""
    done: int
    total: int
    """Cells, those of a search for settings among them."""
    running: bool
    """Whether a process may still be at it; false where nobody holds the folder's lock, or nothing is left."""


def follow(folder: Path, every: float) -> Iterator[Seen]:
    """Look into the folder of a run each `every` seconds until all cells are finished, or nobody runs them.

    Raises:
        UsageError: the folder is no run, or a result is damaged.
    """
    settings = read_settings(folder)
    if settings is None:
        raise UsageError(f"{folder}: no settings.json in it; expected the folder of a run, as `bilevax run` names it.")
    reported = [Cell.of(cell) for cell in settings["cells"]]
    trials = tuning.trials(reported)
    places = [(folder / tuning.FOLDER, k, cell) for k, cell in enumerate(trials)]
    places += [(folder, k, cell) for k, cell in enumerate(reported)]
    told: set[Path] = set()
    news = time.monotonic()
    while True:
        lines = []
        for place, index, cell in places:
            path = cell_path(place, index, cell)
            if path in told or not path.exists():
                continue
            told.add(path)
            result = read_cell(place, index, cell)
            if result is not None:
                kind = "trial " if place != folder else ""
                lines.append(f"{len(told)}/{len(places)} {kind}{_line(folder, cell, result)}")
        if lines:
            news = time.monotonic()
        left = len(told) < len(places)
        quiet = not told or time.monotonic() - news >= QUIET
        running = left and not (quiet and _free(folder))
        yield Seen(lines, len(told), len(places), running)
        if not running:
            return
        time.sleep(every)


def _line(folder: Path, cell: Cell, result: dict[str, Any]) -> str:
    """A finished cell: which, how it ended, where, at what price, and what the referee says."""
    parts = [f"{cell.problem} {cell.solver} seed {cell.seed}: {result['status']}"]
    if result["record"]:
        last = result["record"][-1]
        known = read_instance(folder, cell.problem, cell.seed, needed=False)
        optimum = None if known is None else known["optimum"]
        value = number_text(last["value"], ".7g")
        gap = "" if optimum is None or last["value"] is None else f" (F - F* = {last['value'] - optimum:.1e})"
        parts.append(f"F {value}{gap}, |grad F| {number_text(last['hypergradient'], '.1e')}")
        parts.append(f"{number_text(last['oracles'], '.4g')} passes, {last['time']:.2f} s")
    if result["referee"]:
        parts.append(f"referee {result['referee']['verdict']}")
    elif result["reason"]:
        parts.append(" ".join(result["reason"].split())[:120])
    return ", ".join(parts)


def _free(folder: Path) -> bool:
    """Whether nobody holds the folder's lock; false where that is not known, as on a file system that is read-only."""
    if not (folder / LOCK).exists():
        return True
    try:
        with FileLock(folder / LOCK, timeout=0):
            return True
    except (Timeout, OSError):
        return False
