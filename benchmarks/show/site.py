"""A static site about runs: leaderboards, how often solvers were wrong, profiles, a page a problem and a page a solver.

Every page is one file that loads nothing and runs nothing, like that of `bilevax report`, and they link to each other
by relative names, so that any folder or host serves them. Nothing in them comes from elsewhere than the folders.
"""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.errors import UsageError
from benchmarks.judge import honesty, statistics
from benchmarks.show import compare, html, report, sheets
from benchmarks.show.verdicts import counts_text
from benchmarks.study import submission
from benchmarks.study.files import FolderError, slug, write_file
from benchmarks.study.formats import LIMITS
from benchmarks.study.registry import Cell

MARK = '<meta name="generator" content="bilevax site">'
WITHIN = (1.0, 2.0, 10.0)  # times the best cost, columns of a leaderboard


class Result(NamedTuple):
    """One cell of one folder."""

    cell: Cell
    """As it was asked for."""
    name: str
    """Its solver in tables: its text, with the folder where two folders have it."""
    result: dict[str, Any] | None
    settings: dict[str, Any]
    """Of its folder."""


def write(folders: list[Path], out: Path, *, by: str = "value", tolerance: float = 1e-3) -> list[Path]:
    """Write the site about the runs in `folders` into `out`; return its pages, index.html first.

    Raises:
        UsageError: a folder that cannot be read, bad arguments, or an `out` that holds something else.
    """
    _check(out)
    pages = _pages(folders, by, tolerance)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--out {out}: it cannot be written ({error.strerror or error}). Name another.") from error
    for name, text in pages.items():
        write_file(out / name, text.encode())
    return [out / name for name in pages]


def _check(out: Path) -> None:
    """Raise `UsageError` where `out` holds something else than a site."""
    index = out / "index.html"
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: it is a file; expected a folder. Name another.")
    if out.is_dir() and any(out.iterdir()) and not (index.is_file() and MARK in index.read_text("utf8", "replace")):
        raise UsageError(f"--out {out}: it holds other things than a site of bilevax. Name a new or empty folder.")


def _pages(folders: list[Path], by: str, tolerance: float) -> dict[str, str]:
    """The pages by their names."""
    results = _results(folders)
    compared = {"plain": compare.compare(folders, by=by, tolerance=tolerance)}
    if any(item.cell.search is not None for item in results):
        compared["tuned"] = compare.compare(folders, by=by, tolerance=tolerance, count_tuning=True)
    tables = sheets.sheets(compared["plain"])
    problems = list(dict.fromkeys(item.cell.problem for item in results))
    solvers = list(dict.fromkeys(_kind(item.name) for item in results))
    links = {
        "problems": {name: f"problem-{k}-{slug(name)[:60]}.html" for k, name in enumerate(problems, 1)},
        "solvers": {name: f"solver-{k}-{slug(name)[:60]}.html" for k, name in enumerate(solvers, 1)},
    }
    shared = {"links": links, "mark": MARK}
    index = html.template("site_index.html").render(
        **shared, boards=_boards(compared), honesty=_honesty(results, solvers), notes=compared["plain"]["notes"],
        profiles=html.profile_images(compared["plain"]), overall=tables[len(compared["plain"]["problems"]) :],
        solvers=compared["plain"]["solvers"], runs=_runs(folders), target=_target(by, tolerance),
    )  # fmt: skip
    pages = {"index.html": index}
    run, summary = _merged(folders, results)
    for problem, costs in zip(summary["problems"], tables, strict=False):
        own = [item for item in results if item.cell.problem == problem["problem"]]
        pages[links["problems"][problem["problem"]]] = html.template("site_problem.html").render(
            **shared, problem=html.problem_section(problem, costs, run), commands=_commands(own),
            solvers=dict.fromkeys(_kind(item.name) for item in own),
        )  # fmt: skip
    for name in solvers:
        own = [item for item in results if _kind(item.name) == name]
        pages[links["solvers"][name]] = html.template("site_solver.html").render(
            **shared, name=name, table=_of_solver(own), commands=_commands(own), honesty=_honesty(own, [name]),
            problems=dict.fromkeys(item.cell.problem for item in own),
        )  # fmt: skip
    return pages


def _results(folders: list[Path]) -> list[Result]:
    """All cells of all folders, named as the comparison names them."""
    trials, _ = compare.read(folders, [], [])
    found = [(run.settings, cell) for run in map(report.load, folders) for cell, _ in run.results]
    return [
        Result(cell, trial.solver, trial.result, settings)
        for (settings, cell), trial in zip(found, trials, strict=True)
    ]


def _kind(name: str) -> str:
    """A solver without its settings: what a page is about."""
    return name.partition("[")[0].partition(" ")[0]


def _merged(folders: list[Path], results: list[Result]) -> tuple[report.Run, dict[str, Any]]:
    """(one run of all folders' cells, its summary)."""
    instances = {key: known for run in map(report.load, folders) for key, known in run.instances.items()}
    cells: list[Any] = [(dataclasses.replace(item.cell, solver=item.name), item.result) for item in results]
    run = report.Run({"name": "site"}, cells, instances)
    return run, report.summarise(run)


def _target(by: str, tolerance: float) -> str:
    what = "F - F_L" if by == "value" else "|grad F|"
    return f"An instance is solved where {what} came down to {tolerance:g} of its start, inside of the sets."


def _boards(compared: dict[str, dict[str, Any]]) -> list[sheets.Sheet]:
    """A leaderboard for each budget: passes, seconds, and passes with those of tuning counted."""
    kinds = [("Oracle calls, in passes over the data", "plain", "oracles"), ("Seconds of solver time", "plain", "time")]
    if "tuned" in compared:
        kinds.append(("Oracle calls, with those of the search for settings", "tuned", "oracles"))
    return [_board(title, compared[key]["costs"], axis) for title, key, axis in kinds]


def _board(title: str, costs: list[dict[str, Any]], axis: str) -> sheets.Sheet:
    """A row for each solver: how many of its instances it solved, and how many at how many times the least cost."""
    best: dict[tuple[str, int], float] = {}
    for row in costs:
        key = row["problem"], row["seed"]
        if not math.isnan(row[axis]):
            best[key] = min(best.get(key, math.inf), row[axis])
    lines = []
    for solver in dict.fromkeys(row["solver"] for row in costs):
        own = [row for row in costs if row["solver"] == solver]
        if any(math.isnan(row[axis]) for row in own):  # its calls are not counted
            continue
        ratios = [_ratio(row[axis], best[row["problem"], row["seed"]]) for row in own]
        solved = sum(map(math.isfinite, ratios))
        within = [sum(ratio <= times for ratio in ratios) / len(own) for times in WITHIN]
        lines.append((solved, within[1] * len(own), solver, len(own), within, ratios))
    lines.sort(key=lambda line: (-line[0], -line[1], line[3]))
    rows = [
        [solver, f"{solved}/{count}", *(f"{part:.0%}" for part in within), _median(ratios)]
        for solved, _, solver, count, within, ratios in lines
    ]
    headings = ["solver", "solved", *("best" if t == 1 else f"within x{t:g}" for t in WITHIN), "median x best"]
    about = "of the instances that each was run on; sorted by how many it solved, and by how many within twice the best"
    return sheets.Sheet(title, about, headings, rows)


def _ratio(cost: float, best: float) -> float:
    if not math.isfinite(cost):
        return math.inf
    return cost / best if best > 0 else 1.0 if cost == best else math.inf


def _median(ratios: list[float]) -> str:
    middle = statistics.quantile(ratios, 0.5)
    return f"{middle:.3g}" if math.isfinite(middle) else "-"


def _honesty(results: list[Result], kinds: list[str]) -> sheets.Sheet:
    """How often each solver was wrong, in parts of its runs."""
    rows = []
    for kind in kinds:
        found = honesty.counts([item.result for item in results if _kind(item.name) == kind and item.result])
        runs = found["runs"]
        wrong = [f"{found[name]} ({found[name] / runs:.0%})" if runs else "-" for name in honesty.HEADINGS[2:]]
        rows.append([kind, str(runs), str(found["judged"]), *wrong])
    return sheets.Sheet(
        "How often it was wrong", "of the runs that it did not refuse", ["solver", *honesty.HEADINGS], rows
    )


def _runs(folders: list[Path]) -> sheets.Sheet:
    """Where the numbers come from."""
    rows = []
    for folder, run in zip(folders, map(report.load, folders), strict=True):
        s = run.settings
        versions = ", ".join(f"{k} {v}" for k, v in s["versions"].items() if k in ("bilevax", "jax", "python"))
        machine = ", ".join(str(s["system"][k]) for k in ("device", "cpus", "platform") if k in s["system"])
        what = s.get("suite", s["name"]), str(len(run.results)), s["started"], f"{s['precision']} bits"
        rows.append([folder.resolve().name, *what, versions, machine])
    headings = ["folder", "suite", "runs", "begun", "floats", "versions", "machine: device, cores, system"]
    return sheets.Sheet("Where the numbers come from", "seconds compare on one machine only", headings, rows)


def _grouped(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """The cells of each problem and solver: a row, over its seeds."""
    rows: dict[tuple[str, str], list[Result]] = {}
    for item in results:
        rows.setdefault((item.cell.problem, item.name), []).append(item)
    return rows


def _of_solver(results: list[Result]) -> sheets.Sheet:
    """A row for each problem and setting: how the runs ended."""
    rows = []
    for (problem, name), items in _grouped(results).items():
        ended = [item.result for item in items if item.result is not None]
        last = [result["record"][-1] for result in ended if result["record"]]
        mean = lambda values: report.number_text(report.mean(values), ".4g")  # noqa: E731
        statuses: dict[str, int] = {}
        for result in ended:
            statuses[result["status"]] = statuses.get(result["status"], 0) + 1
        tuned = list(dict.fromkeys(result["tuned"] for result in ended if result.get("tuned")))
        rows.append(
            [problem, name + (f", tuned to {'; '.join(tuned)}" if tuned else ""), f"{len(ended)}/{len(items)}",
             counts_text(statuses), mean([row["value"] for row in last]), mean([row["oracles"] for row in last]),
             mean([row["time"] for row in last])]
        )  # fmt: skip
    headings = ["problem", "settings", "runs", "status", "F", "passes", "time s"]
    return sheets.Sheet("How it ended", "means over the seeds", headings, rows)


def _commands(results: list[Result]) -> list[tuple[str, str]]:
    """(the row, the command that repeats it)."""
    return [(f"{problem}, {name}", _command(items)) for (problem, name), items in _grouped(results).items()]


def _command(items: list[Result]) -> str:
    """The command that runs these cells, of one problem and solver, again."""
    first, seeds = items[0], max(item.cell.seed for item in items) + 1
    cell, settings = first.cell, first.settings
    if "program" in settings:
        own = [dataclasses.asdict(item.cell) for item in items]
        return submission.again({"program": settings["program"], "cells": own})
    text = next((item.result["tuned"] for item in items if item.result and item.result.get("tuned")), cell.solver)
    limits = "".join(
        f" --{name.replace('_', '-')} {value:.17g}" for name in LIMITS if (value := getattr(cell, name)) is not None
    )
    bits = "" if settings["precision"] == 64 else f" --precision {settings['precision']}"
    return f"bilevax run -p {shlex.quote(cell.problem)} -s {shlex.quote(text)} --seeds {seeds}{limits}{bits}"
