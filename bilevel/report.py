"""Text and pictures of a run: header, rows, footer; progress; plots."""

import io
import math
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bilevel.backend.extras import extra
from bilevel.backend.files import write_atomically
from bilevel.backend.table import Table

BLOCKS = "▁▂▃▄▅▆▇█"
DRIVERS = ("step", "violation", "oracles", "time", "error_bound", "status")  # columns that are no curves


def sparkline(values: Any, width: int = 40) -> str:
    """A curve as one line of at most `width` blocks, from its least value to its largest; blanks where not finite.

    Longer ones are thinned, the last value kept. Positive values that span three decades are drawn by their logarithms.
    """
    values = [float(v) for v in values]
    if len(values) > width:
        values = [values[round(k * (len(values) - 1) / (width - 1))] for k in range(width)]
    finite = [v for v in values if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) > 1e3 * min(finite):
        values = [math.log(v) if math.isfinite(v) else v for v in values]
        finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)


def curves(record: Table) -> Any:
    """A rich table, a line for each measured quantity, the solver's own among them: name, last value, curve, span."""
    with extra("cli"):
        from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "left", "left"):
        table.add_column(justify=justify, no_wrap=True)
    names = {"value": "F(x)", "hypergradient": "|grad F|", "lower_residual": "lower residual"}
    for column in record.rows[-1] if record.rows else ():
        values = record[column]
        finite = [float(v) for v in values if math.isfinite(v)]
        if column not in DRIVERS and finite:
            span = f"{min(finite):.3g} to {max(finite):.3g}"
            table.add_row(names.get(column, column), f"{values[-1]:.4g}", sparkline(values), span)
    return table


class Progress:
    """A rich progress bar with the curves of everything measured; it appears after two seconds on a terminal, and not
    at all elsewhere.
    """

    def __init__(self, wanted: bool | None, total: int, label: str) -> None:
        """`wanted=None` asks the terminal, and whether rich is installed."""
        self.wanted = sys.stderr.isatty() and find_spec("rich") is not None if wanted is None else wanted
        self.total, self.label, self.begin, self.bar, self.task = total, label, time.monotonic(), None, None

    def update(self, step: int, record: Table, verdict: str = "") -> None:
        """Show `step`, what has been measured so far, and what the referee says of the last of it."""
        if not self.wanted or time.monotonic() - self.begin < 2:
            return
        with extra("cli"):
            from rich.console import Console, Group

        if self.bar is None:
            from rich.live import Live
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns)
            self.task = self.bar.add_task(self.label, total=self.total)
            self.live = Live(console=Console(stderr=True), transient=True, refresh_per_second=4)
            self.live.start()
        assert self.task is not None
        description = f"{self.label}, at step {record.rows[-1]['step']}: {verdict}" if verdict else self.label
        self.bar.update(self.task, completed=step, description=description)
        self.live.update(Group(self.bar, curves(record)))

    def close(self) -> None:
        """Remove them."""
        if self.bar is not None:
            self.live.stop()


def records_figure(records: Mapping[str, Sequence[Table]], title: str = "", optimum: float | None = None) -> Any:
    """A matplotlib figure of F, hypergradient norm and lower residual (rows) against oracle calls and time (columns).

    One colour a label; the first record bold, the others faint. With `optimum` the first row shows F - F*.
    """
    with extra("cli"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    axes: Any = figure.subplots(3, 2, squeeze=False)
    names = ("F(x) - F*" if optimum is not None else "F(x)", "hypergradient norm", "lower residual norm")
    for r, column in enumerate(("value", "hypergradient", "lower_residual")):
        for c, (axis, unit) in enumerate(
            (("oracles", "oracle calls (passes over the data)"), ("time", "solver time (s)"))
        ):
            ax, positive = axes[r][c], False
            for k, (label, runs) in enumerate(records.items()):
                for i, record in enumerate(runs):
                    values = record[column] - (optimum or 0.0) if r == 0 else record[column]
                    style = {"alpha": 1.0, "lw": 1.6, "label": label} if i == 0 else {"alpha": 0.3, "lw": 0.8}
                    ax.plot(record[axis], values, color=f"C{k % 10}", **style)
                    positive |= bool((values > 0).any())
            if (r > 0 or optimum is not None) and positive:
                ax.set_yscale("log")
            ax.set_xlabel(unit)
            ax.set_ylabel(names[r])
            ax.grid(alpha=0.3)
    if records:
        axes[0][0].legend(fontsize=8)
    figure.suptitle(title)  # pyright: ignore[reportUnknownMemberType]: its settings have no type
    return figure


def plot_records(
    records: Mapping[str, Sequence[Table]], path: str | Path, title: str = "", optimum: float | None = None
) -> Path:
    """`records_figure` as a PNG; returns where."""
    return save_figure(records_figure(records, title, optimum), path)


def save_figure(figure: Any, path: str | Path, dpi: int = 110) -> Path:
    """Write a matplotlib figure as a PNG, whole or not at all, below a folder that is made where there is none."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    write_atomically(Path(path), stream.getvalue())
    return Path(path)
