"""The tuning rule of a suite: a stated search, equally many trials for each solver, on seeds that are not reported.

For a solver whose suite entry says `tune = {setting = range}`, trial 0 is the entry as it is written; the others draw
every setting: a range [low, high] evenly in its logarithm (whole numbers stay whole), a list of words evenly. The draws
are a Latin hypercube, fixed by the texts of problem and solver alone, so that everybody gets the same ones. Every trial
has the whole budget of the reported runs, on each of the rule's seeds. On each seed the trials are ranked by what their
last measurement says: F, or |grad F| with score = "gradient"; infinite outside of the sets, where the lower level is
not solved (`compare.Trial.inside`), and for a run that failed. The trial with the least mean rank is chosen, of equals
the first.
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks.judge.trials import COLUMNS, Trial
from benchmarks.study.files import read_cell, write_json
from benchmarks.study.registry import Cell, label, parse

FOLDER = "tuning"


def draws(cell: Cell) -> list[str]:
    """The solver texts of a cell's trials, the first as written."""
    search = cell.search
    if search is None:
        return [cell.solver]
    name, params = parse(cell.solver)
    words = f"{cell.problem} {cell.solver}".encode()
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(words).digest()[:8], "big"))
    n = search.trials - 1
    texts = [cell.solver]
    levels = [(rng.permutation(n) + rng.random(n)) / max(n, 1) for _ in search.space]
    for k in range(n):
        drawn = {key: _value(values, level[k]) for (key, values), level in zip(search.space, levels, strict=True)}
        inside = ",".join(f"{key}={value}" for key, value in (params | drawn).items())
        texts.append(label(f"{name}[{inside}]"))
    return texts


def _value(values: tuple[Any, ...], level: float) -> Any:
    """The value at `level` in [0, 1) of a range or of a list of words."""
    if all(isinstance(value, str) for value in values):
        return values[int(level * len(values))]
    low, high = values
    if all(isinstance(value, int) for value in values):
        return min(high, math.floor(low * ((high + 1) / low) ** level))
    return float(f"{low * (high / low) ** level:.4g}")


def trials(cells: list[Cell]) -> list[Cell]:
    """The cells of the search behind `cells`: every trial on every tuning seed; none where nothing is tuned."""
    found = []
    for cell in _entries(cells):
        assert cell.search is not None
        for seed in cell.search.seeds:
            found += [dataclasses.replace(cell, solver=text, seed=seed, search=None) for text in draws(cell)]
    return list(dict.fromkeys(found))


def _entries(cells: list[Cell]) -> list[Cell]:
    """One cell for each problem and solver that is tuned, with seed 0."""
    return list(dict.fromkeys(dataclasses.replace(cell, seed=0) for cell in cells if cell.search is not None))


def choose(folder: Path, cells: list[Cell]) -> None:
    """Write tuning.json of a run's folder from the finished trials in its folder `tuning`.

    Raises:
        FolderError: a trial's result is damaged, or the file cannot be written.
    """
    run = trials(cells)
    results = {cell: read_cell(folder / FOLDER, index, cell) for index, cell in enumerate(run)}
    chosen: dict[str, dict[str, Any]] = {}
    for entry in _entries(cells):
        assert entry.search is not None
        texts, column = draws(entry), COLUMNS[entry.search.score]
        ends = np.array(
            [
                [
                    _end(dataclasses.replace(entry, solver=text, seed=seed, search=None), results, column)
                    for text in texts
                ]
                for seed in entry.search.seeds
            ]
        )
        ranks = rankdata(ends, axis=1).mean(axis=0)
        best = int(ranks.argmin())
        chosen.setdefault(entry.problem, {})[entry.solver] = {
            "solver": texts[best],
            "trials": [
                {"solver": text, "mean_rank": rank, "ends": column}
                for text, rank, column in zip(texts, ranks.tolist(), ends.T.tolist(), strict=True)
            ],
        }
    write_json(folder / "tuning.json", {"chosen": chosen})


def spent(folder: Path, cells: list[Cell]) -> dict[tuple[str, str], dict[str, float]]:
    """{(problem, solver): what its search cost, over all trials and seeds, in "oracles" (passes) and "time" (seconds)}
    of a run's folder; nothing for those that were not tuned, infinite where a trial is missing, NaN where calls are not
    counted.

    Raises:
        FolderError: a trial's result is damaged.
    """
    run, found = trials(cells), {}
    results = {cell: read_cell(folder / FOLDER, index, cell) for index, cell in enumerate(run)}
    for entry in _entries(cells):
        assert entry.search is not None
        own = [
            results[dataclasses.replace(entry, solver=text, seed=seed, search=None)]
            for text in dict.fromkeys(draws(entry))
            for seed in entry.search.seeds
        ]
        found[entry.problem, entry.solver] = {
            axis: math.inf if None in own else sum(_paid(result["stats"], key) for result in own if result)
            for axis, key in (("oracles", "oracles"), ("time", "solve_time"))
        }
    return found


def _paid(stats: dict[str, Any], key: str) -> float:
    """What a trial cost; nothing where it ended before it began, NaN where that is not known."""
    value = stats.get(key, 0.0)
    return math.nan if value is None else float(value)


def _end(cell: Cell, results: dict[Cell, dict[str, Any] | None], column: str) -> float:
    """The score of a trial's last measurement, infinite where there is none or it does not count."""
    curve = Trial(cell.problem, cell.seed, cell.solver, results[cell], {}).inside(column)
    return float(curve[-1]) if curve.size else math.inf
