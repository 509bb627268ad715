"""Results as benchopt keeps them, so that its pages and merges take runs of bilevax beside its own.

A CSV with a line for each measurement: `objective_value` is F as the referee measured it, `stop_val` the number of
steps, `time` seconds of solver time, `idx_rep` the seed, `p_solver_…` and `p_dataset_…` the parameters that were given.
`data_name` is what older releases call a data set; newer ones read it as `dataset_name`.
"""

import csv
import io
from pathlib import Path
from typing import Any

from benchmarks.show import compare
from benchmarks.study.registry import parse

OBJECTIVE = "Bilevel Optimization"  # as in benchopt/benchmark_bilevel, so that files of both can be merged
COLUMNS = {
    "value": "objective_value", "hypergradient": "objective_gradient_norm",
    "lower_residual": "objective_lower_residual", "violation": "objective_violation", "oracles": "objective_passes",
}  # fmt: skip


def as_csv(folders: list[Path], problems: list[str], solvers: list[str]) -> str:
    """The measurements of the runs in `folders`; `problems` and `solvers` choose, empty lists mean all.

    Raises:
        UsageError: as of `compare.read`.
    """
    trials, _ = compare.read(folders, problems, solvers)
    lines: list[dict[str, Any]] = []
    for trial in trials:
        record = [] if trial.result is None else trial.result["record"]
        where = {"objective_name": OBJECTIVE, "data_name": trial.problem, "solver_name": trial.solver,
                 "idx_rep": trial.seed, "sampling_strategy": "Iteration"}  # fmt: skip
        where |= _parameters("p_solver_", trial.solver.partition(" @ ")[0].partition(" #")[0])
        where |= _parameters("p_dataset_", trial.problem)
        for row in record:
            numbers = {name: row[column] for column, name in COLUMNS.items()}
            lines.append(where | {"stop_val": row["step"], "time": row["time"]} | numbers)
    stream = io.StringIO()
    names = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(stream, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _parameters(prefix: str, text: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in parse(text)[1].items()}
