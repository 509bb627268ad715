"""What a solve costs before it runs: seconds of tracing and compiling, and the memory of a step.

`bilevax run --profile` prints it for each problem and solver. The numbers are XLA's own of the compiled chunk of steps
(`lanes.advance_lanes`): arguments (problem, settings, state), results, and temporary buffers, whose sum is the most
that is alive at once; floating-point operations of one pass through the program, loops counted once. Nothing is read
from a compilation cache.
"""

import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.study.files import write_json
from benchmarks.study.registry import Cell, build_instance, build_solver
from bilevel.run import lanes
from bilevel.solver import Unsupported, refusal

HEADINGS = ["solver", "x", "y", "trace s", "compile s", "data MB", "state MB", "temporary MB", "peak MB", "Mflop"]


def of(problem: Any, solver: Any, key: jax.Array) -> dict[str, float]:
    """Seconds and bytes of the compiled step of `solver` on `problem`; nothing is run but `init`.

    Raises:
        Unsupported: with the solver's reason.
    """
    reason = refusal(solver, problem)
    if reason is not None:
        raise Unsupported(reason)
    state = lanes.init(problem, solver, key, False)
    jax.clear_caches()  # a run before has compiled the very same program
    begin = time.perf_counter()
    lowered = lanes.advance_lanes.lower(problem, solver, state, key, 0, 1, False)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory: Any = compiled.memory_analysis()
    flops = (compiled.cost_analysis() or {}).get("flops", float("nan"))
    size = lambda tree: sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(tree))  # noqa: E731
    return {
        "trace": middle - begin, "compile": end - middle, "data": size(problem), "state": size(state),
        "temporary": memory.temp_size_in_bytes, "peak": peak(compiled), "flops": flops,
        "x": size(problem.init(key)[0]) // 8, "y": size(problem.init(key)[1]) // 8,
    }  # fmt: skip


def peak(compiled: Any) -> float:
    """Bytes of arguments, results and temporary buffers of a compiled program together."""
    memory = compiled.memory_analysis()
    parts = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return sum(parts) - memory.alias_size_in_bytes


def table(cells: list[Cell]) -> list[dict[str, Any]]:
    """A row for each problem and solver of `cells`, at the first seed; `reason` where it is unsupported."""
    rows = []
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for text, solver in dict.fromkeys((cell.problem, cell.solver) for cell in cells):
            row: dict[str, Any] = {"problem": text, "solver": solver}
            try:
                row |= of(build_instance(text, 0).problem, build_solver(solver), jax.random.key(0))
            except Unsupported as error:
                row["reason"] = str(error)
            rows.append(row)
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    return rows


def write(folder: Path, cells: list[Cell]) -> str:
    """Write profile.json into the run's folder; return the tables as text."""
    from benchmarks.show.report import table_text

    rows = table(cells)
    write_json(folder / "profile.json", rows)
    parts = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        lines = [
            [row["solver"], str(row["x"]), str(row["y"]), f"{row['trace']:.2f}", f"{row['compile']:.2f}"]
            + [f"{row[name] / 1e6:.3g}" for name in ("data", "state", "temporary", "peak", "flops")]
            for row in rows
            if row["problem"] == problem and "reason" not in row
        ]
        parts.append(f"{problem}   cost of a compiled step\n{table_text(HEADINGS, lines)}")
    return "\n".join(parts)
