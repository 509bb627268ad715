"""What people look at, drawn: a panel for each metric, a row for each solver and baseline, mean and deviation."""

from pathlib import Path
from typing import Any

from bilevel.report import save_figure


def draw_metrics(path: Path, problem: dict[str, Any], names: dict[str, str]) -> bool:
    """Write a PNG of a problem's metrics, one of `report.summarise`'s problems; false where it has none.

    Args:
        path: of the PNG; written whole or not at all.
        problem: with rows and baselines, each with metrics: name -> mean, std (None for one seed), count.
        names: the solvers' names to print.
    """
    rows = [(names[row["solver"]], row["metrics"], "o") for row in problem["rows"] if row["metrics"]]
    rows += [(f"({row['baseline']})", row["metrics"], "s") for row in problem["baselines"]]
    columns = list(dict.fromkeys(name for _, metrics, _ in rows for name in metrics))
    if not columns:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 2.5 * len(columns), 1.2 + 0.35 * len(rows)), layout="constrained")
    axes: Any = figure.subplots(1, len(columns), squeeze=False, sharey=True)
    for ax, column in zip(axes[0], columns, strict=True):
        for k, (_, metrics, marker) in enumerate(rows):
            cell = metrics.get(column)
            if cell is not None and cell["mean"] is not None:
                color = f"C{k % 10}"
                ax.errorbar(cell["mean"], k, xerr=cell["std"] or 0.0, fmt=marker, color=color, capsize=3)
        ax.set_xlabel(f"{column.replace('_', ' ')}\nmean and deviation over seeds")
        ax.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(rows)), [text for text, *_ in rows], fontsize=8)
    axes[0][0].invert_yaxis()
    figure.suptitle(problem["problem"])
    save_figure(figure, path)
    return True
