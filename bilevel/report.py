"""Text and pictures of a run: header, rows, footer; progress; plots."""

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # record prints through this module: at run time the arrow points one way
    from bilevel.record import Record, Solution

HEADINGS = ("step", "F(x)", "hypergrad", "lower res", "feas", "oracles", "time (s)")
WIDTHS = (9, 14, 10, 10, 9, 11, 9)


def header() -> str:
    """The table's heading and rule."""
    line = " | ".join(f"{name:>{width}}" for name, width in zip(HEADINGS, WIDTHS, strict=True))
    return f"{line}\n{'-' * len(line)}"


def row_text(row: dict[str, float]) -> str:
    """One aligned row."""
    cells = (
        f"{int(row['step'])}", f"{row['value']:.7g}", f"{row['hypergradient']:.3e}", f"{row['lower_residual']:.3e}",
        f"{row['violation']:.2e}", f"{row['oracles']:.5g}", f"{row['time']:.3f}",
    )  # fmt: skip
    return " | ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def solution_text(solution: "Solution", max_rows: int = 12) -> str:
    """Header, at most `max_rows` evenly chosen rows (the first and last among them), and a footer with status and
    times.
    """
    rows, stats = solution.record.rows, solution.stats
    if len(rows) > max_rows:
        chosen = sorted({round(k * (len(rows) - 1) / (max_rows - 1)) for k in range(max_rows)})
        rows = [rows[k] for k in chosen]
    unit = "oracles: passes over the data; feas: distance to the sets; F and hypergrad recomputed with y(x)"
    footer = (
        f"{solution.status.name} after {stats['steps']} steps: {solution.status.advice}\n"
        f"solve {stats['solve_time']:.3f} s, set-up {stats['setup_time']:.3f} s, "
        f"measuring {stats['measure_time']:.3f} s; {unit}"
    )
    failed = [
        f"assumption failed at {number} of {stats['steps']} steps: {sentence}"
        for sentence, number in stats.get("failed", {}).items()
    ]
    return "\n".join([f"{stats['solver']} (tol {stats['tol']:.1e})", header(), *map(row_text, rows), footer, *failed])


class Progress:
    """A rich progress bar that appears after two seconds on a terminal, and not at all elsewhere."""

    def __init__(self, wanted: bool | None, total: int, label: str) -> None:
        """`wanted=None` asks the terminal."""
        self.wanted = sys.stderr.isatty() if wanted is None else wanted
        self.total, self.label, self.begin, self.bar, self.task = total, label, time.monotonic(), None, None

    def update(self, step: int, record: "Record") -> None:
        """Show `step` and the last measured row."""
        if not self.wanted or time.monotonic() - self.begin < 2:
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[last]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, last="")
        last = record.rows[-1] if record.rows else {"value": math.nan, "hypergradient": math.nan}
        assert self.task is not None
        self.bar.update(self.task, completed=step, last=f"F {last['value']:.5g}  |grad| {last['hypergradient']:.1e}")

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()


def plot_records(
    records: dict[str, list["Record"]], path: str | Path, title: str = "", optimum: float | None = None
) -> Path:
    """A PNG of F, hypergradient norm and lower residual (rows) against oracle calls and time (columns).

    One colour a label; the first record bold, the others faint. With `optimum` the first row shows F - F*.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(3, 2, squeeze=False)
    names = ("F(x) - F*" if optimum is not None else "F(x)", "hypergradient norm", "lower residual norm")
    for r, column in enumerate(("value", "hypergradient", "lower_residual")):
        for c, (axis, unit) in enumerate(
            (("oracles", "oracle calls (passes over the data)"), ("time", "solver time (s)"))
        ):
            ax = axes[r][c]
            for k, (label, runs) in enumerate(records.items()):
                for i, record in enumerate(runs):
                    values = record[column] - (optimum or 0.0) if r == 0 else record[column]
                    style = {"alpha": 1.0, "lw": 1.6, "label": label} if i == 0 else {"alpha": 0.3, "lw": 0.8}
                    ax.plot(record[axis], values, color=f"C{k % 10}", **style)
            if r > 0 or optimum is not None:
                ax.set_yscale("log")
            ax.set_xlabel(unit)
            ax.set_ylabel(names[r])
            ax.grid(alpha=0.3)
    if records:
        axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
