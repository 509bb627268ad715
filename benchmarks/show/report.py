"""Tables, CSV and plots of a run, made from the files in its folder and from nothing else."""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from benchmarks.errors import UsageError
from benchmarks.show.metrics_plot import draw_metrics
from benchmarks.show.verdicts import counts_text, endings, failed_assumptions, row_verdict
from benchmarks.study.files import (
    FAILED,
    read_cell,
    read_instance,
    read_settings,
    slug,
    write_file,
    write_json,
)
from benchmarks.study.registry import Cell
from bilevel.record import Record
from bilevel.solution import size_text

WIDTH = 120


@dataclass(frozen=True)
class Run:
    """A run's files: settings, the result of each cell (None: unfinished), what is known of each (problem, seed)."""

    settings: dict[str, Any]
    results: list[tuple[Cell, dict[str, Any] | None]]
    instances: dict[tuple[str, int], dict[str, Any]]


def load(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UsageError: the folder is no run, or is damaged.
    """
    settings = read_settings(folder)
    if settings is None:
        raise UsageError(f"{folder}: no settings.json in it; expected the folder of a run, as `bilevax run` names it.")
    cells = [Cell.of(cell) for cell in settings["cells"]]
    results = [(cell, read_cell(folder, k, cell)) for k, cell in enumerate(cells)]
    keys = dict.fromkeys((cell.problem, cell.seed) for cell in cells)
    begun = {(cell.problem, cell.seed) for cell, result in results if result is not None and result["record"]}
    known = {key: read_instance(folder, *key, needed=key in begun) for key in keys}
    return Run(settings, results, {key: value for key, value in known.items() if value is not None})


@np.errstate(over="ignore", invalid="ignore")  # a diverged run overflows in means, too: its numbers say so
def summarise(run: Run) -> dict[str, Any]:
    """The run in numbers: a row per problem and solver (means over the seeds), counts of statuses, reasons, what is
    unfinished.
    """
    problems = [_problem(run, name) for name in dict.fromkeys(cell.problem for cell, _ in run.results)]
    done = [result for _, result in run.results if result is not None]
    return {
        "name": run.settings["name"],
        "problems": problems,
        "statuses": dict(Counter(result["status"] for result in done)),
        "referee": dict(Counter(result["referee"]["verdict"] for result in done if result["referee"])),
        "failed": sum(result["status"] in FAILED for result in done),
        "cells": len(run.results),
        "rule": settings_rule([cell for cell, _ in run.results]),
        "suite": run.settings.get("suite"),
        "unfinished": [f"{c.problem} {c.solver} seed {c.seed}" for c, result in run.results if result is None],
    }


def _problem(run: Run, name: str) -> dict[str, Any]:
    instances = {seed: known for (problem, seed), known in run.instances.items() if problem == name}
    optima = [known["optimum"] for known in instances.values() if known["optimum"] is not None]
    rows = []
    for solver in dict.fromkeys(cell.solver for cell, _ in run.results if cell.problem == name):
        found = [(c, r) for c, r in run.results if (c.problem, c.solver) == (name, solver) and r is not None]
        if found:
            rows.append(_solver_row(solver, found, instances))
    baselines = {key: None for known in instances.values() for key in known["baselines"]}
    return {
        "problem": name,
        "sizes": next(iter(instances.values()))["sizes"] if instances else None,
        "seeds": len({cell.seed for cell, _ in run.results if cell.problem == name}),
        "optimum": float(np.mean(optima)) if optima else None,
        "rows": rows,
        "baselines": [
            {"baseline": key, "metrics": _spread([known["baselines"].get(key, {}) for known in instances.values()])}
            for key in baselines
        ],
    }


def _solver_row(solver: str, found: list[tuple[Cell, dict]], instances: dict[int, dict]) -> dict[str, Any]:
    """Means of the last measurements over the seeds that have one."""
    measured = [(cell, result, result["record"][-1]) for cell, result in found if result["record"]]
    gaps = [
        last["value"] - instances[cell.seed]["optimum"]
        for cell, _, last in measured
        if last["value"] is not None and instances[cell.seed]["optimum"] is not None
    ]
    columns = {
        name: [last[name] for *_, last in measured]
        for name in ("value", "hypergradient", "lower_residual", "violation")
    }
    stats = {
        name: [r["stats"][name] for _, r, _ in measured] for name in ("oracles", "steps", "solve_time", "setup_time")
    }
    return {
        "solver": solver,
        "seeds": len(found),
        **{name: mean(values) for name, values in columns.items()},
        "gap": mean(gaps),
        "error_bound": mean([last.get("error_bound") for *_, last in measured]),
        "verdicts": dict(Counter(row_verdict(last) for *_, last in measured)),
        "best_value": mean([r["stats"].get("best_value", last["value"]) for _, r, last in measured]),
        "worse_than_best": sum(bool(r["stats"].get("end_is_worse")) for _, r, _ in measured),
        **{name: mean(values) for name, values in stats.items()},
        "statuses": dict(Counter(result["status"] for _, result in found)),
        "referee": dict(Counter(result["referee"]["verdict"] for _, result in found if result["referee"])),
        "referee_reasons": list(
            dict.fromkeys(
                f"{r['referee']['verdict']}: {r['referee']['reason']}"
                for _, r in found
                if (r["referee"] or {}).get("reason")
            )
        ),
        "tuned": list(dict.fromkeys(r["tuned"] for _, r in found if r.get("tuned"))),
        "reasons": list(dict.fromkeys(f"{r['status']}: {r['reason']}" for _, r in found if r["reason"])),
        "assumptions": failed_assumptions([result["stats"] for _, result, _ in measured]),
        "metrics": _spread([result["metrics"] for _, result in found if result["metrics"]]),
    }


def mean(values: list[float | None]) -> float | None:
    """The mean; None where there is nothing to average or a seed has no finite number."""
    if not values or any(value is None for value in values):
        return None
    return float(np.mean(np.array(values, float)))


def _spread(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """{metric: mean, sample standard deviation and count} over the seeds that have it.

    Where some have failed, with None for the metric, "failed" says how many, and there is no mean over the others.
    """
    spread = {}
    for name in dict.fromkeys(name for row in metrics for name in row):
        known = [row[name] for row in metrics if name in row]
        values = np.array([value for value in known if value is not None], float)
        if failed := len(known) - values.size:
            spread[name] = {"mean": None, "std": None, "count": int(values.size), "failed": failed}
            continue
        std = float(values.std(ddof=1)) if values.size > 1 else None
        spread[name] = {"mean": float(values.mean()), "std": std, "count": int(values.size)}
    return spread


def number_text(value: float | None, spec: str) -> str:
    """`value` in the format `spec`, a dash for None."""
    return "-" if value is None else format(value, spec)


def _plus_minus(cell: Mapping[str, Any] | None) -> str:
    if cell is not None and cell.get("failed"):
        return "failed" if not cell["count"] else f"{cell['failed']} of {cell['failed'] + cell['count']} failed"
    if cell is None or cell["mean"] is None:
        return "-"
    spec = ".4f" if abs(cell["mean"]) < 1e4 else ".3g"
    return format(cell["mean"], spec) + (f" ± {cell['std']:{spec}}" if cell["std"] is not None else "")


def short_names(labels: list[str]) -> dict[str, str]:
    """Names to print: without the parameters where no other of `labels` has the same name."""
    names = Counter(text.partition("[")[0] for text in labels)
    return {text: text.partition("[")[0] if names[text.partition("[")[0]] == 1 else text for text in labels}


def _table(headings: list[str], left: Sequence[str], first_width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in headings:
        width = min(first_width, 36) if heading == headings[0] else None
        table.add_column(
            heading,
            justify="left" if heading in left else "right",
            no_wrap=heading not in left,
            overflow="fold" if heading in left else "ellipsis",
            min_width=width,
        )
    return table


def _filled(headings: list[str], left: Sequence[str], rows: list[list[str]]) -> Table:
    table = _table(headings, left, max((len(row[0]) for row in rows), default=6))
    for row in rows:
        table.add_row(*map(Text, row))  # as they are: "SOBA[a=1]" is no markup
    return table


def table_text(headings: list[str], rows: list[list[str]]) -> str:
    """A table as text without colours, as wide as its numbers need: names to the left, numbers to the right."""
    return _plain(_filled(headings, headings[:1], rows), 1000)


def optimisation_rows(problem: dict[str, Any], names: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): a row a solver, where its runs ended."""
    gap = ["F - F*"] if problem["optimum"] is not None else []
    headings = ["solver", "F", *gap, "|grad F|", "lower res", "passes", "steps", "time s", "status", "referee"]
    rows = [
        [
            names[row["solver"]],
            number_text(row["value"], ".7g"),
            *[number_text(row["gap"], ".1e") for _ in gap],
            size_text(row["hypergradient"], row["error_bound"], ".1e"),
            number_text(row["lower_residual"], ".1e"),
            number_text(row["oracles"], ".4g"),
            number_text(row["steps"], ".5g"),
            number_text(row["solve_time"], ".2f"),
            counts_text(row["statuses"]),
            counts_text(row["referee"]),
        ]
        for row in problem["rows"]
    ]
    return headings, rows


def metrics_rows(problem: dict[str, Any], names: dict[str, str]) -> tuple[list[str], list[list[str]]] | None:
    """Solvers and baselines by what people look at; None where the problem has no metrics."""
    rows = [(names[row["solver"]], row["metrics"]) for row in problem["rows"] if row["metrics"]]
    rows += [(f"({row['baseline']})", row["metrics"]) for row in problem["baselines"]]
    columns = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    if not columns:
        return None
    headings = ["solver or (baseline)", *[name.replace("_", " ") for name in columns]]
    return headings, [[text, *[_plus_minus(metrics.get(name)) for name in columns]] for text, metrics in rows]


def facts(problem: dict[str, Any]) -> str:
    """Sizes, seeds, optimum."""
    sizes = problem["sizes"]
    parts = [f"x {sizes['x']}, y {sizes['y']} unknowns"] if sizes else []
    parts.append(f"{problem['seeds']} seed{'s' if problem['seeds'] > 1 else ''}")
    if problem["optimum"] is not None:
        parts.append(f"F* = {problem['optimum']:.7g}" + (" (mean)" if problem["seeds"] > 1 else ""))
    return ", ".join(parts)


def reasons(problem: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Why the referee skipped, what settings were chosen, why runs failed or were refused, what assumptions failed."""
    found = []
    for row in problem["rows"]:
        for reason in row["referee_reasons"]:  # a skip is the problem's, a disagreement the row's
            whose = "" if reason.startswith("skipped") else f"{names[row['solver']]}: "
            found.append(f"{whose}referee {_shorten(reason)}")
    found = list(dict.fromkeys(found))
    found += [f"{names[row['solver']]}: tuned to {text}" for row in problem["rows"] for text in row["tuned"]]
    found += [f"{names[row['solver']]}: {text}" for row in problem["rows"] for text in endings(row)]
    said = [(row["solver"], text) for row in problem["rows"] for text in row["reasons"] + row["assumptions"]]
    return found + [f"{names[solver]}: {_shorten(text)}" for solver, text in said]


def settings_rule(cells: list[Cell]) -> str:
    """Where the settings of `cells` come from, a sentence; the search is that of `benchmarks.study.tuning`."""
    search = next((cell.search for cell in cells if cell.search is not None), None)
    if search is None:
        return "Settings: fixed, as given."
    plural = "s" if len(search.seeds) > 1 else ""
    return (
        f"Settings: the best of {search.trials} trials a solver by {search.score}, with the same budget, on "
        f"seed{plural} {', '.join(map(str, search.seeds))}; the runs here have other seeds."
    )


def totals(summary: dict[str, Any]) -> str:
    """Cells, statuses and verdicts in a line."""
    statuses = ", ".join(f"{count} {name}" for name, count in summary["statuses"].items()) or "nothing finished"
    verdicts = ", ".join(f"{count} {name}" for name, count in summary["referee"].items()) or "nothing to judge"
    return f"{summary['cells']} cells: {statuses}. Referee: {verdicts}."


def tables(summary: dict[str, Any]) -> Group:
    """The printed report: for every problem a heading, its tables and the reasons; then a line of totals."""
    parts: list[Any] = []
    for problem in summary["problems"]:
        parts.append(Text(problem["problem"], style="bold") + Text(f"   {facts(problem)}", style="dim"))
        names = short_names([row["solver"] for row in problem["rows"]])
        headings, rows = optimisation_rows(problem, names)
        parts.append(_filled(headings, ("solver", "status", "referee"), rows))
        metrics = metrics_rows(problem, names)
        if metrics is not None:
            parts.append(_filled(metrics[0], metrics[0][:1], metrics[1]))
        parts += [Text(f"  {name} = {text}", style="dim") for text, name in names.items() if name != text]
        parts += [
            Text(f"  {text}", style="dim" if text.startswith("referee skipped") else "yellow")
            for text in reasons(problem, names)
        ]
        parts.append(Text(""))
    suite = "" if summary["suite"] is None else f"Suite {summary['suite']}. "
    parts += [Text(totals(summary)), Text(suite + summary["rule"], style="dim")]
    if summary["unfinished"]:
        listed = "; ".join(summary["unfinished"][:5]) + ("; …" if len(summary["unfinished"]) > 5 else "")
        parts.append(Text(f"{len(summary['unfinished'])} cells unfinished: {listed}", style="yellow"))
    return Group(*parts)


def _shorten(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def as_text(summary: dict[str, Any]) -> str:
    """The printed report without colours, 120 columns wide."""
    return _plain(tables(summary))


def _plain(printed: Any, width: int = WIDTH) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False, color_system=None).print(printed)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def as_csv(summary: dict[str, Any]) -> str:
    """The same rows with all digits."""
    numbers = ("value", "gap", "hypergradient", "error_bound", "best_value", "lower_residual", "violation")
    numbers = (*numbers, "oracles", "steps", "solve_time", "setup_time")
    kinds = [(p, "solver", row) for p in summary["problems"] for row in p["rows"]]
    kinds += [(p, "baseline", row) for p in summary["problems"] for row in p["baselines"]]
    names = list(dict.fromkeys(name for *_, row in kinds for name in row["metrics"]))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    spread = [f"{name}_{part}" for name in names for part in ("mean", "std")]
    writer.writerow(["problem", "kind", "name", "seeds", *numbers, "status", "verdict", "referee", *spread])
    for problem, kind, row in kinds:
        metrics = [row["metrics"].get(name, {}).get(part) for name in names for part in ("mean", "std")]
        writer.writerow(
            [problem["problem"], kind, row[kind], row.get("seeds", problem["seeds"]), *[row.get(n) for n in numbers],
             *[counts_text(row.get(column, {})) for column in ("statuses", "verdicts", "referee")], *metrics]
        )  # fmt: skip
    return stream.getvalue()


def write(folder: Path, run: Run, plot: bool = True) -> dict[str, Any]:
    """Write summary.txt, .csv, .json and PNGs per problem (curves, metrics) into `folder`; return the summary."""
    summary = summarise(run)
    write_json(folder / "summary.json", summary)
    write_file(folder / "summary.txt", as_text(summary).encode())
    write_file(folder / "summary.csv", as_csv(summary).encode())
    if plot:
        for problem in summary["problems"]:
            _plot(folder, run, problem)
            names = short_names([row["solver"] for row in problem["rows"]])
            draw_metrics(folder / f"{slug(problem['problem'])}-metrics.png", problem, names)
    return summary


def _plot(folder: Path, run: Run, problem: dict[str, Any]) -> None:
    """F (minus each seed's own F*, where known), hypergradient norm and lower residual against oracle calls and
    time.
    """
    from bilevel.report import plot_records

    known = problem["optimum"] is not None
    names = short_names([row["solver"] for row in problem["rows"]])
    records: dict[str, list[Record]] = {}
    for cell, result in run.results:
        if cell.problem != problem["problem"] or result is None or not result["record"]:
            continue
        shift = run.instances[cell.problem, cell.seed]["optimum"] if known else 0.0
        rows = [{key: _drawn(value) for key, value in row.items()} for row in result["record"]]
        rows = [row | {"value": row["value"] - shift} for row in rows]
        records.setdefault(names[cell.solver], []).append(Record(rows))
    if records:
        path = folder / f"{slug(problem['problem'])}.png"
        plot_records(records, path, problem["problem"], 0.0 if known else None)


def _drawn(value: float | None) -> float:
    """NaN, a gap in the line, for what cannot be drawn: not finite, or diverged beyond an axis."""
    return math.nan if value is None or abs(value) > 1e50 else value


def exit_code(summary: dict[str, Any]) -> int:
    """0, or 1 where a cell failed: an error, or a value that is not finite."""
    return 1 if summary["failed"] else 0
