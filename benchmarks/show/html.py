"""One page about a run: tables, convergence with bands, profiles, settings and the command that repeats it.

The page is one file. It loads nothing and runs nothing: its own policy forbids both, pictures are inside as SVG, and
whatever comes from results is escaped. Values under the pointer and boxes that hide solvers need no script (`hover`).
"""

import base64
import contextlib
import io
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.errors import UsageError
from benchmarks.judge import statistics
from benchmarks.show import compare, hover, report, sheets
from benchmarks.study import submission, suites
from benchmarks.study.files import write_file
from benchmarks.study.registry import Cell

TEMPLATES = Path(__file__).parent / "templates"
CURVES = {"value": "F", "hypergradient": "|grad F|", "lower_residual": "lower residual"}
UNITS = {"oracles": "oracle calls (passes over the data)", "time": "solver time (s)"}
STYLES = ("-", "--", "-.", ":")


def page(folder: Path, *, tolerance: float = 1e-3, by: str = "value") -> str:
    """The page about the run in `folder`; arguments as those of `compare.compare`.

    Raises:
        UsageError: a folder that cannot be read, bad arguments.
    """
    run = report.load(folder)
    summary = report.summarise(run)
    compared = compare.compare([folder], by=by, tolerance=tolerance)
    tables = sheets.sheets(compared)
    count = len(compared["problems"])
    problems = [
        problem_section(problem, table, run, f"p{k}")
        for k, (problem, table) in enumerate(zip(summary["problems"], tables[:count], strict=True), 1)
    ]
    cells = [cell for cell, _ in run.results]
    name = run.settings["name"]
    command, suite = _command(name, cells, run.settings)
    return template("report.html").render(
        title=heading(run), settings=run.settings, totals=report.totals(summary), notes=compared["notes"],
        problems=problems, overall=tables[count:], solvers=compared["solvers"],
        profile_images=profile_images(compared), command=command, suite=suite, suite_file=f"{name}.toml",
        settings_sheets=[
            sheets.Sheet(title, "", ["what", "is"], [[str(k), str(v)] for k, v in run.settings[key].items()])
            for title, key in (("Versions", "versions"), ("Machine", "system"))
        ],
    )  # fmt: skip


def heading(run: report.Run, most: int = 4) -> str:
    """What was run, in a line: a suite by its name and version, else solvers and problems, `most` of each by name."""
    if "suite" in run.settings:
        return f"Suite {run.settings['suite']}"

    def listed(texts: list[str]) -> str:
        names = list(dict.fromkeys(text.partition("[")[0] for text in texts))
        return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

    cells = [cell for cell, _ in run.results]
    name = run.settings["name"]
    return ("" if name.startswith("custom") else f"{name}: ") + (
        f"{listed([cell.solver for cell in cells])} on {listed([cell.problem for cell in cells])}"
    )


def template(name: str) -> Any:
    """A template of this folder; what goes into it is escaped.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)  # fmt: skip


def write(folder: Path, path: Path | None = None, **arguments: Any) -> Path:
    """Write `page(folder, **arguments)` to `path`, by default report.html in the folder; return where it is."""
    path = folder / "report.html" if path is None else path
    write_file(path, page(folder, **arguments).encode())
    return path


def _command(name: str, cells: list[Cell], settings: dict[str, Any]) -> tuple[str, str | None]:
    """(command, suite file or None where the run is one of the suites that come with bilevax)."""
    if "program" in settings:
        return submission.again(settings), None
    bits = "" if settings["precision"] == 64 else f" --precision {settings['precision']}"
    with contextlib.suppress(UsageError):
        found = suites.title(name, cells)
        if found is not None and "," not in found:
            return f"bilevax run --suite {shlex.quote(found.replace(' ', '@'))}{bits}", None
    return f"bilevax run --suite {shlex.quote(f'{name}.toml')}{bits}", suites.suite_text(cells)


def problem_section(problem: dict[str, Any], costs: sheets.Sheet, run: report.Run, key: str = "p1") -> dict[str, Any]:
    """What a page says of a problem: a row of `report.summarise`, its sheet of costs, and the run behind them; `key`
    is the problem's own on its page.
    """
    names = report.short_names([row["solver"] for row in problem["rows"]])
    found = [sheets.Sheet("End of the runs", "means over the seeds", *report.optimisation_rows(problem, names))]
    metrics = report.metrics_rows(problem, names)
    if metrics is not None:
        found.append(sheets.Sheet("Metrics", "mean ± sample deviation over the seeds", *metrics))
    found.append(sheets.Sheet("Cost to the tolerance", costs.about, costs.headings, costs.rows))
    curves = {
        name: [
            (trial, run.instances.get((cell.problem, cell.seed), {}).get("optimum"))
            for cell, result in run.results
            if (cell.problem, cell.solver) == (problem["problem"], text) and result is not None and result["record"]
            for trial in [compare.Trial(cell.problem, cell.seed, name, result, {})]
        ]
        for text, name in names.items()
    }
    parameters = [f"{name} = {text}" for text, name in names.items() if name != text]
    return {
        "title": problem["problem"], "about": report.facts(problem) + ".", "sheets": found,
        "reasons": parameters + report.reasons(problem, names),
        "curves": _convergence(curves, problem["optimum"] is not None, key), "solvers": list(curves), "key": key,
        "active": _active_sets(problem["problem"], names, run),
        "maps": _maps(problem["problem"], names, run),
    }  # fmt: skip


def _figure(rows: int) -> tuple[Any, Any]:
    """(figure, axes [rows]), narrow enough to be read on a telephone."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]


def _data_uri(figure: Any) -> str:
    """The figure as SVG inside an address; the same bytes for the same figure."""
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bilevax"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def band(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(budgets [b], quartiles and median [3, b]) of curves (amounts, values) over the seeds.

    At a budget a run counts with its last measurement at or before it: nothing is interpolated, and a run that has
    ended keeps its last value. A value that is not finite counts as infinite.
    """
    budgets = np.unique(np.concatenate([amounts for amounts, _ in curves]))
    at = [values[np.searchsorted(amounts, budgets, side="right") - 1] for amounts, values in curves]
    at = np.where(np.isnan(at), np.inf, at)
    return budgets, np.array([[statistics.quantile(column, q) for column in at.T] for q in (0.25, 0.5, 0.75)])


def _convergence(
    solvers: dict[str, list[tuple[compare.Trial, float | None]]], known: bool, key: str
) -> list[tuple[str, str]]:
    """F (minus the optimum), hypergradient and lower residual: (an element <svg>, by what), by calls and time."""
    trials = [trial for found in solvers.values() for trial, _ in found]
    counted = [axis for axis in UNITS if any(np.isfinite(trial.column(axis)).all() for trial in trials)]
    return [(_curves(solvers, known, axis, f"{key}-{axis}"), UNITS[axis]) for axis in counted]


def _curves(solvers: dict[str, list[tuple[compare.Trial, float | None]]], known: bool, axis: str, key: str) -> str:
    figure, axes = _figure(len(CURVES))
    words: dict[str, list[str]] = {}
    for ax, (column, text) in zip(axes, CURVES.items(), strict=True):
        shifted = known and column == "value"
        medians = []
        for k, (name, trials) in enumerate(solvers.items()):
            curves = [
                (
                    trial.column(axis),
                    _drawable(trial.column(column) - ((math.nan if f is None else f) if shifted else 0)),
                )
                for trial, f in trials
            ]
            curves = [curve for curve in curves if np.isfinite(curve[0]).all()]  # not where calls are not counted
            if curves:
                budgets, (low, middle, high) = (np.where(np.isfinite(a), a, np.nan) for a in band(curves))
                (line,) = ax.step(budgets, middle, where="post", label=name, **_style(k))
                hover.mark(line, k, f"{column}-line")
                spread = ax.fill_between(budgets, low, high, step="post", alpha=0.2, color=_style(k)["color"], lw=0)
                hover.mark(spread, k, f"{column}-band")
                medians.append((k, name, budgets, middle))
        positive = any((np.asarray(line.get_ydata(), float) > 0).any() for line in ax.lines)
        if positive and (shifted or column != "value"):
            ax.set_yscale("log")
        what, unit = "F - F*" if shifted else text, "passes" if axis == "oracles" else "s"
        for k, name, budgets, middle in medians:
            said = [
                f"{name}: {what} {value:.4g} after {at:.4g} {unit}" for at, value in zip(budgets, middle, strict=True)
            ]
            words |= hover.points(ax, k, budgets, middle, said, f"{column}-points")
        ax.set_xlabel(UNITS[axis])
        ax.set_ylabel(what)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return hover.inline(figure, key, words)


def _active_sets(problem: str, names: dict[str, str], run: report.Run) -> list[str]:
    """How many lower constraints are active, and how many changed since the last measurement, at the first seed."""
    found = {
        names[cell.solver]: result["active"]
        for cell, result in reversed(run.results)
        if cell.problem == problem and result is not None and result.get("active")
    }
    if not found:
        return []
    figure, axes = _figure(2)
    for ax, (what, text) in zip(axes, (("count", "active"), ("changed", "changed since the last")), strict=True):
        for k, (name, rows) in enumerate(reversed(found.items())):
            values = [row[what] for row in rows]
            calls = np.array([row["oracles"] for row in rows], float)
            ax.step(calls, values, where="post", label=name, **_style(k))
        ax.set_xlabel(UNITS["oracles"])
        ax.set_ylabel(f"lower constraints {text}")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return [_data_uri(figure)]


def _maps(problem: str, names: dict[str, str], run: report.Run) -> list[str]:
    """The maps of the instance at the first seed: what is the same for all solvers once, the others by solver."""
    drawn: dict[str, Any] = {}
    for cell, result in run.results:
        if cell.problem == problem and cell.seed == 0 and result is not None:
            for name, values in result.get("maps", {}).items():
                true = name.startswith("true")
                drawn.setdefault(name if true else f"{names[cell.solver]}: {name}", values)
    images = []
    for title, values in drawn.items():
        figure, (ax,) = _figure(1)
        image = ax.imshow(np.array(values, float), cmap="viridis")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("column")
        ax.set_ylabel("row")
        figure.colorbar(image, ax=ax, label="reward, less its mean")
        images.append(_data_uri(figure))
    return images


def _style(k: int) -> dict[str, str]:
    return {"color": f"C{k % 10}", "ls": STYLES[k // 10 % len(STYLES)]}


def _drawable(values: np.ndarray) -> np.ndarray:
    """Diverged beyond an axis is not drawn."""
    return np.where(np.abs(values) > 1e50, np.nan, values)


def profile_images(compared: dict[str, Any]) -> list[tuple[str, str]]:
    """Performance and data profile: (picture, by what), by oracle calls and by time; none with a single solver."""
    found = compared["profiles"]
    return [(_profile(found[axis], unit), unit) for axis, unit in UNITS.items() if axis in found]


def _profile(profile: dict[str, Any], unit: str) -> str:
    figure, axes = _figure(2)
    for ax, kind in zip(axes, ("performance", "data"), strict=True):
        relative = kind == "performance"
        finite = [x for column in profile[kind].values() for x in column if math.isfinite(x)]
        end = max([1.0, *finite] if relative else finite, default=1.0) * 1.1 or 1.0
        for k, (name, column) in enumerate(profile[kind].items()):
            inside = [x for x in column if math.isfinite(x)]
            steps = np.arange(len(inside) + 1) / len(column)
            ax.step([float(relative), *inside, end], [*steps, steps[-1]], where="post", label=name, **_style(k))
        if relative:
            ax.set_xscale("log", base=2)
        ax.set_xlabel(f"{'times the least' if relative else 'at most so many'} {unit}")
        ax.set_ylabel("part of instances solved")
        ax.set_ylim(-0.02, 1.02)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return _data_uri(figure)
