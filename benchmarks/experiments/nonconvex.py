"""How often solvers find the global optimum where the lower level is not convex.

    python -m benchmarks.experiments.nonconvex

For each problem and 20 seeds, one row a solver: successes, that is |F - F*| <= 0.02 (1 + |F*|), true lower gap <= 1e-3
and violation <= 1e-6 (where F jumps, so that points of tiny gap undercut F*, nothing else counts either); the range of
F; the largest gap; and seconds a solve after compiling, by the clock and of processor time. SampledPenalty runs 300
steps with its defaults. "1 start" is the answer of the same run's lanes of the first start alone, as `num_starts=1` has
them: lanes are independent, but for the scales of f and g, which are means over the starts. Rivals run as many steps as
make the oracle calls of SampledPenalty with one start, all seeds at once; a run that stands still, to 1e-12, ends.

Failures are sorted by cause: `local`, a lower solution whose F is too large; `gap`, a y that does not solve the lower
level; `under`, F below F* at a small gap; `infeasible`; `nan`.

    python -m benchmarks.experiments.nonconvex [--out FILE] [--rows NAME,…] [--table] [family[key=value,…] …]

The default problems are those of suites/nonconvex.toml. FILE keeps a JSON line for each row, and rows that it has are
not run again. --table prints what FILE has as Markdown and runs nothing.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from benchmarks.study.registry import build_instance
from benchmarks.study.suites import read_suite
from bilevel.diagnostics import lower_gap
from bilevel.solver import refusal

SEEDS, STEPS, PIECE = 20, 300, 2000
ROWS = {
    "default": bilevel.SampledPenalty(),
    "1 start": bilevel.SampledPenalty(num_starts=1),
    "VPBGD": bilevel.VPBGD(),
    "BOME": bilevel.BOME(),
    "MEHA": bilevel.MEHA(),
}
CAUSES: tuple[str, ...] = ("local", "gap", "under", "infeasible", "nan")


@jax.jit
def _solve(problem: bilevel.BilevelProblem, solver: Any, key: jax.Array) -> tuple[Any, Any, Any]:
    """(x, y, the lanes of the first start)."""
    state = solver.init(problem, jax.random.fold_in(key, 0x7FFFFFFF))
    state, _ = bilevel.advance(problem, solver, state, key, 0, STEPS)
    lanes = ("x", "y", "samples", "sizes", "size", "rule", "first", "last")
    num = solver.sizes(state.sizes.shape[2]).ladders
    own = {name: jax.tree.map(lambda leaf: leaf[:num], getattr(state, name)) for name in lanes}
    return *solver.output(problem, state), state._replace(**own)


@jax.jit
def _solve_all(problem: bilevel.BilevelProblem, solver: bilevel.Solver, keys: jax.Array, steps: int) -> tuple[Any, Any]:
    """All keys at once, in pieces, until no x and y moves by 1e-12 (1 + |.|) any more over a whole piece."""
    state = jax.vmap(lambda key: solver.init(problem, jax.random.fold_in(key, 0x7FFFFFFF)))(keys)
    piece = jax.vmap(lambda state, key, k: bilevel.advance(problem, solver, state, key, k, PIECE)[0], (0, 0, None))

    def body(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        state, k, _ = carry
        new = piece(state, keys, k)
        moves = jax.tree.map(
            lambda a, b: jnp.max(jnp.abs(a - b) / (1 + jnp.abs(a))), (state.x, state.y), (new.x, new.y)
        )
        return new, k + PIECE, jnp.maximum(*moves) > 1e-12

    state = jax.lax.while_loop(lambda carry: (carry[1] < steps) & carry[2], body, (state, 0, jnp.array(True)))[0]
    return jax.vmap(functools.partial(solver.output, problem))(state)


@jax.jit
def _judge(problem: bilevel.BilevelProblem, xs: Any, ys: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(F, true lower gap, violation) of stacked points; NaN where Y(x) is empty."""

    def one(x: Any, y: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        found = lower_gap(problem, x, y)
        value = problem.upper(x, y, problem.upper_data.full())
        return value + 0 * found.gap, jnp.abs(found.gap), found.violation + problem.x_set.violation(x)

    return jax.lax.map(lambda point: one(*point), (xs, ys))


def run(text: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of solvers on one problem."""
    instance = build_instance(text, 0)
    problem, truth, ours = instance.problem, instance.truth.value, bilevel.SampledPenalty()
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    if {"default", "1 start"} & set(names):
        begin = time.perf_counter()
        jax.block_until_ready(_solve(problem, ours, keys[0]))
        first = time.perf_counter() - begin
        begin, cpu = time.perf_counter(), time.process_time()
        ends = [jax.block_until_ready(_solve(problem, ours, key)) for key in keys]
        clock = {"seconds": (time.perf_counter() - begin) / SEEDS, "first": first}
        clock["cpu"] = (time.process_time() - cpu) / SEEDS
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ends)
        single = jax.jit(jax.vmap(functools.partial(ours.output, problem)))
    for name in names:
        solver = ROWS[name]
        row: dict[str, Any] = {"problem": text, "row": name, "truth": truth}
        reason = refusal(solver, problem)
        if reason is not None:
            yield row | {"refused": reason}
            continue
        cost = solver.cost(problem).total
        calls = (cost if name == "default" else ROWS["1 start"].cost(problem).total) * STEPS
        if name == "default":
            row, (x, y) = row | clock, stacked[:2]
        elif name == "1 start":
            x, y = single(stacked[2])
        else:
            x, y = _solve_all(problem, solver, keys, calls // cost)
        yield row | {"calls": calls} | _count(truth, *(np.asarray(part, float) for part in _judge(problem, x, y)))


def _count(truth: float, F: np.ndarray, gap: np.ndarray, outside: np.ndarray) -> dict[str, Any]:
    """Successes, causes of failures, the range of F and the largest gap."""
    allowed = 0.02 * (1 + abs(truth))
    tests = {
        "nan": ~(np.isfinite(F) & np.isfinite(gap)), "infeasible": outside > 1e-6, "gap": gap > 1e-3,
        "under": truth - allowed > F, "local": truth + allowed < F,
    }  # fmt: skip
    failed = np.zeros(SEEDS, bool)
    causes: dict[str, int] = dict.fromkeys(CAUSES, 0)
    for cause, which in tests.items():
        causes[cause] = int((which & ~failed).sum())
        failed |= which
    return {
        "good": int((~failed).sum()), "causes": causes,
        "F": [float(np.nanmin(F)), float(np.nanmax(F))] if np.isfinite(F).any() else None,
        "gap": float(np.nanmax(gap)) if np.isfinite(gap).any() else None,
    }  # fmt: skip


def _why(row: dict[str, Any]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in row["causes"].items() if count)


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    if "refused" in row:
        return f"    {row['row']:10s} refused: {row['refused']}"
    low, high = row["F"] or (np.nan, np.nan)
    took = f"{row['seconds']:6.2f} s, CPU {row['cpu']:6.2f} s, first {row['first']:5.1f} s" if "seconds" in row else ""
    gap = np.nan if row["gap"] is None else row["gap"]
    return (
        f"    {row['row']:10s}{row['good']:3d}/{SEEDS}  F* {row['truth']:9.5f}  F {low:9.5f} to {high:9.5f}  "
        f"gap {gap:7.0e}  {row['calls']:.0e} calls  {took}  {_why(row)}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a problem, a column a solver with the causes of its failures; below, totals, and the failures of
    SampledPenalty by name.
    """
    found = {(row["problem"], row["row"]): row for row in rows}
    names = list(dict.fromkeys(row["problem"] for row in rows))
    lines = [
        f"| Problem | F* | {' | '.join(ROWS)} | s a solve | CPU s |",
        f"| --- | --- | {' | '.join('---' for _ in ROWS)} | --- | --- |",
    ]

    def cell(row: dict[str, Any] | None) -> str:
        if row is None or "refused" in row:
            return "" if row is None else "refused"
        return f"{row['good']}" + (f" ({_why(row)})" if row["good"] < SEEDS else "")

    for name in names:
        first = found.get((name, "default"), {})
        cells = [cell(found.get((name, row))) for row in ROWS]
        took = f"{first['seconds']:.2f} | {first['cpu']:.2f}" if "cpu" in first else " | "
        truth = next(row["truth"] for row in rows if row["problem"] == name)
        lines.append(f"| `{name}` | {truth:.5f} | {' | '.join(cells)} | {took} |")
    for kind in ROWS:
        ran = [row for row in rows if row["row"] == kind and "good" in row]
        if ran:
            good, pairs = sum(row["good"] for row in ran), SEEDS * len(ran)
            lines.append(f"\n{kind}: {good} of {pairs} (problem, seed) pairs, {100 * good / pairs:.1f}%.")
    for row in rows:
        if row.get("good", SEEDS) < SEEDS and row["row"] in ("default", "1 start"):
            lines.append(f"\n- `{row['problem']}`, {row['row']}: {_why(row)}.")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    kept = chosen.out.read_text().splitlines() if chosen.out and chosen.out.exists() else []
    rows = [json.loads(text) for text in kept]
    if chosen.table:
        print(table(rows))
        return
    texts = chosen.problems or list(dict.fromkeys(cell.problem for cell in read_suite("nonconvex")[1]))
    done = {(row["problem"], row["row"]) for row in rows}
    for count, text in enumerate(texts):
        print(f"{text}  ({count + 1} of {len(texts)})", flush=True)
        missing = [name for name in chosen.rows.split(",") if (text, name) not in done]
        for row in run(text, missing):
            print(line(row), flush=True)
            if chosen.out:
                with chosen.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
