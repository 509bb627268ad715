"""What is said of the verdicts of runs: of a row, and of how the runs of a solver ended."""

from collections import Counter
from typing import Any

from bilevel.record import Status

PLAIN = Status.CONVERGED, Status.MAX_STEPS, Status.TIME_LIMIT, Status.STOPPED  # ends of which no more is said


def row_verdict(row: dict[str, Any]) -> str:
    """The name of a row's status, or that of a kink where it was tested for one."""
    if row.get("kink") is not None:
        return "KINK"
    return Status(int(row["status"])).name if row.get("status") is not None else "-"


def endings(row: dict[str, Any]) -> list[str]:
    """What the statuses of a solver's runs mean where something is wrong with them, and whether a run passed a better
    point than its end.
    """
    told = {text.partition(":")[0] for text in row["reasons"]}
    names = [name for name in row["statuses"] if name in Status.__members__ and name not in told]
    found = [f"{name}: {Status[name].advice}" for name in names if Status[name] not in PLAIN]
    if row["worse_than_best"]:
        best = "-" if row["best_value"] is None else format(row["best_value"], ".7g")
        found.append(f"{row['worse_than_best']} of {row['seeds']} runs end worse than their best point; its F: {best}")
    return found


def failed_assumptions(stats: list[dict[str, Any]]) -> list[str]:
    """What the solver's steps saw fail of its assumptions, counted over the seeds."""
    failed = sum((Counter(one.get("failed", {})) for one in stats), Counter())
    steps = sum(one["steps"] for one in stats)
    return [f"assumption failed at {count:,} of {steps:,} steps: {text}" for text, count in failed.items()]


def counts_text(counts: dict[str, int]) -> str:
    """`CONVERGED`, or `9 CONVERGED, 1 MAX_STEPS`."""
    if len(counts) <= 1:
        return next(iter(counts), "-")
    return ", ".join(f"{count} {name}" for name, count in counts.items())
