"""What `solve` returns, and how it prints: header, table and footer."""

import functools
import math
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

from bilevel import report
from bilevel.record import Record, Row, Stats, Status

PyTree = Any


class Best(NamedTuple):
    """The best point that the referee measured: of rows whose F is not in doubt those within the tolerance of the sets,
    and of these the one of least F (`run.verdicts.rank`).
    """

    x: PyTree
    y: PyTree
    """The solver's, as `x`."""
    row: Row
    """Its row of the record."""

    @property
    def step(self) -> int:
        """The number of steps after which the run was there."""
        return self.row["step"]


class Solution:
    """What `solve` returns; printing it gives the report.

    Attributes:
        x: the solver's upper variable.
        y: the solver's lower variable.
        status: how the run ended, a `Status`.
        record: what was measured on the way, a `Record`.
        stats: what the run was and what it cost, a dictionary with the entries of `Stats`.
        state: the solver's state, from which `advance` goes on.
        info: what the solver shows of its last step.
        best: the best point that was measured, a `Best`; the end itself is `x` and `y`.
        aux: what f returns beside its value at (x, y), on all of the data; None without `has_aux=True`.
    """

    def __init__(
        self,
        x: PyTree,
        y: PyTree,
        status: Status,
        record: Record,
        stats: Stats,
        state: PyTree,
        info: PyTree,
        best: Best | None = None,
        aux: PyTree = None,
        multipliers: Callable[[], Any] = lambda: None,
    ) -> None:
        """Collect the parts."""
        self.x, self.y, self.status, self.record = x, y, status, record
        self.stats, self.state, self.info, self.best, self.aux = stats, state, info, best, aux
        self._multipliers = multipliers

    @functools.cached_property
    def multipliers(self) -> Any:
        """Those of the upper constraints at x, `parts.reduced.Multipliers`, computed when first asked for; None without
        upper constraints.
        """
        return self._multipliers()

    def __str__(self) -> str:
        """Header, table and footer."""
        return solution_text(self)

    def _repr_html_(self) -> str:
        """The same for a notebook, which calls this by itself."""
        return solution_html(self)

    def plot(self) -> Any:
        """A `matplotlib.figure.Figure` of F, the hypergradient's norm and the lower residual along the run, against
        oracle calls and against time. Save it by `solution.plot().savefig("run.png")`.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
        """
        name = self.stats["solver"]
        return report.records_figure({name: [self.record]}, f"{name}: {self.status} after {self.stats['steps']} steps")

    def __repr__(self) -> str:
        """One line."""
        value = self.record.rows[-1]["value"] if self.record.rows else math.nan
        return f"Solution(status={self.status.name}, steps={self.stats['steps']}, F={value:.6g})"


class SolveError(RuntimeError):
    """Raised by `solve(..., throw=True)` when a run does not end well; `.solution` holds what there is."""

    def __init__(self, solution: Solution) -> None:
        """Carry the solution."""
        super().__init__(f"{solution.status.name}: {solution.status.advice}")
        self.solution = solution


HEADINGS = ("step", "F(x)", "hypergrad", "lower res", "feas", "oracles", "time (s)", "verdict")


WIDTHS = (9, 14, 10, 10, 9, 11, 9, 16)


def header() -> str:
    """The table's heading and rule."""
    line = " | ".join(f"{name:>{width}}" for name, width in zip(HEADINGS, WIDTHS, strict=True))
    return f"{line}\n{'-' * len(line)}"


def row_cells(row: Row) -> tuple[str, ...]:
    """The texts of a row, one for each of HEADINGS."""
    calls, kink = "-" if math.isnan(row["oracles"]) else f"{row['oracles']:.5g}", row.get("kink", math.nan)
    return (
        f"{int(row['step'])}", f"{row['value']:.7g}", size_text(row["hypergradient"], row["error_bound"]),
        f"{row['lower_residual']:.3e}", f"{row['violation']:.2e}", calls, f"{row['time']:.3f}",
        Status(row["status"]).name if math.isnan(kink) else f"kink {kink:.1e}",
    )  # fmt: skip


def row_text(row: Row) -> str:
    """One aligned row."""
    return " | ".join(f"{cell:>{width}}" for cell, width in zip(row_cells(row), WIDTHS, strict=True))


def size_text(size: float | None, error_bound: float | None, spec: str = ".3e") -> str:
    """The size of a gradient: with a question mark where no bound of its error is known, and then never as zero."""
    known = error_bound is not None and math.isfinite(error_bound)
    if size is None or (size == 0 and not known):
        return "-" if size is None else "unknown"
    return format(size, spec) + ("" if known or not math.isfinite(size) else "?")


def solution_text(solution: "Solution", max_rows: int = 12) -> str:
    """Header, at most `max_rows` evenly chosen rows (the first and last among them), and a footer with status and
    times.
    """
    rows = _chosen(solution.record.rows, max_rows)
    return "\n".join([_title(solution), header(), *map(row_text, rows), *_footer(solution, rows)])


def solution_html(solution: "Solution", max_rows: int = 12) -> str:
    """`solution_text` as an HTML table; whatever comes from names or statuses is escaped."""
    rows = _chosen(solution.record.rows, max_rows)

    def line(tag: str, texts: tuple[str, ...]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in texts)}</tr>"

    body = "".join(line("td", row_cells(row)) for row in rows)
    table = f"<table><thead>{line('th', HEADINGS)}</thead><tbody>{body}</tbody></table>"
    footer = "<br>".join(escape(text) for text in _footer(solution, rows))
    return f"<div><strong>{escape(_title(solution))}</strong>{table}<p>{footer}</p></div>"


def _title(solution: "Solution") -> str:
    title, why = f"{solution.stats['solver']} (tol {solution.stats['tol']:.1e})", solution.stats.get("recommended")
    return f"{title}, recommended. {why}" if why else title


def _chosen(rows: list[Row], max_rows: int) -> list[Row]:
    """At most `max_rows` of the rows."""
    if len(rows) <= max_rows:
        return rows
    return [rows[k] for k in sorted({round(k * (len(rows) - 1) / (max_rows - 1)) for k in range(max_rows)})]


def _footer(solution: "Solution", rows: list[Row]) -> list[str]:
    """The lines below a table of `rows`: status with its advice, times, assumptions that failed."""
    stats = solution.stats
    calls = "passes over the data"
    if any(math.isnan(row["oracles"]) for row in rows):
        calls += ", - where a step takes as many as it needs"
    unit = f"oracles: {calls}; feas: distance to the sets; F and hypergrad: {stats['referee']}"
    if any(not math.isfinite(row["error_bound"]) for row in rows):
        unit += "; ?: no bound of its error is known"
    lines = [
        f"{solution.status.name} after {stats['steps']} steps: {solution.status.advice}",
        f"solve {stats['solve_time']:.3f} s, set-up {stats['setup_time']:.3f} s, "
        f"measuring {stats['measure_time']:.3f} s; {unit}",
    ]
    lines += _at_kink(stats)
    if solution.status == Status.NO_FOLLOWER:
        with_one = [row["step"] for row in solution.record.rows if math.isfinite(row["value"])]
        last = f"the last x with a follower is that of step {with_one[-1]}" if with_one else "no x had a follower"
        lines.append(f"Y(x) is empty here; {last}")
    if stats.get("end_is_worse"):
        lines.append(
            f"the end is worse than step {stats['best_step']}, where F = {stats['best_value']:.7g}: "
            "take solution.best.x and solution.best.y"
        )
    for sentence, number in stats.get("failed", {}).items():
        lines.append(f"assumption failed at {number} of {stats['steps']} steps: {sentence}")
    return lines


def _at_kink(stats: Stats) -> list[str]:
    """What was found of a kink at the end, a line; none where nothing was tested."""
    kink, near = stats.get("kink"), stats.get("goldstein")
    if kink is not None and math.isfinite(kink):
        word = "no direction leads down" if kink <= stats["tol"] else "x is not stationary"
        return [f"at a kink of F: F'(x; d) >= {-kink:.1e} for every feasible unit d, by its branches: {word}"]
    if near is None:
        return []
    return [f"zero is within {near['distance']:.1e} of the hull of gradients at distances up to {near['radius']:.1e}"]
