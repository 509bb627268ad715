"""Time and oracle calls to F - F* <= 1e-3 with linear constraints below, as performance profiles: `python -m
benchmarks.constrained`.

Random instances `constrained[kind=random]` of 10 unknowns and 5 rows, 50 and 10, 200 and 50: a chosen active set at the
optimum, up to two of its rows weakly active, F* = 0. F is evaluated exactly, by the active-set method, at the x of each
solver after every 10 steps, later after every 5 per cent more steps; that is not the solver's time, nor is compiling.
Solvers take turns on each instance. A run that has not arrived after --limit seconds of its own has not paid, and its
cost is infinite. Seconds are CPU time on one thread, which other programs on the machine hardly change.

Each solver has one number to choose, the same four trials of it, on three seeds that are not reported: the setting that
arrives most often and then soonest is run. Oracle calls are as declared by the solvers: each gradient, cross product
and Hessian-vector product is one, so that a Hessian of n unknowns is n of them. Gradients of the constraints,
projections and quadratic programs are not counted.

    python -m benchmarks.experiments.constrained --instances 50 --limit 2 --out results/constrained
"""

import argparse
import json
import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bilevel
import problems
from benchmarks.judge.statistics import fraction_within, ratios
from bilevel.lower import polyhedral
from bilevel.report import save_figure

SIZES = ((10, 5), (50, 10), (200, 50))
GAP = 1e-3
SOLVERS: dict[str, tuple[Callable[[float], bilevel.Solver], tuple[float, ...]]] = {
    "DSBLO": (lambda g: bilevel.DSBLO(sigma=1e-3, gamma_1=g, gamma_2=g), (3.0, 10.0, 30.0, 100.0)),
    "SSIGD": (lambda s: bilevel.SSIGD(upper_step_size=s), (0.03, 0.1, 0.3, 1.0)),
    "PIGD": (lambda s: bilevel.PIGD(upper_step_size=s), (0.03, 0.1, 0.3, 1.0)),
    "BLOCC": (lambda c: bilevel.BLOCC(penalty=c), (10.0, 30.0, 100.0, 300.0)),
    "BiCGAFFA": (lambda c: bilevel.BiCGAFFA(penalty=c), (3.0, 10.0, 30.0, 100.0)),
    "LVHBA": (lambda c: bilevel.LVHBA(penalty=c), (3.0, 10.0, 30.0, 100.0)),
}
TUNING_SEEDS = (1000, 1001, 1002)


def instance(size: tuple[int, int], seed: int) -> bilevel.BilevelProblem:
    """Half of the rows active at the optimum, seed mod 3 of these weakly."""
    dim, rows = size
    return problems.make("constrained", kind="random", dim=dim, rows=rows, seed=seed, weak=seed % 3).problem


@jax.jit
def value(problem: bilevel.BilevelProblem, x: Any, y: Any) -> jax.Array:
    """F(x), with the lower level solved from y, shape []."""
    found = polyhedral.solve(problem, x, y, problem.lower_data.full())
    return problem.upper(x, found.y, problem.upper_data.full())


@jax.jit
def begin(problem: bilevel.BilevelProblem, solver: bilevel.Solver, key: jax.Array) -> Any:
    """The solver's first state."""
    return solver.init(problem, key)


@jax.jit
def go_on(
    problem: bilevel.BilevelProblem, solver: bilevel.Solver, state: Any, key: jax.Array, step: int, steps: int
) -> Any:
    """The state after so many steps more."""
    return bilevel.advance(problem, solver, state, key, step, steps)[0]


def run(problem: bilevel.BilevelProblem, solver: bilevel.Solver, seed: int, limit: float) -> dict[str, float]:
    """Seconds and oracle calls until F <= GAP, infinite where that does not happen; and the least F."""
    key = jax.random.key(seed)
    cost = solver.cost(problem).total
    jax.block_until_ready(go_on(problem, solver, begin(problem, solver, key), key, 0, 0))  # compile
    start = time.process_time()
    state = jax.block_until_ready(begin(problem, solver, key))
    seconds, step, least = time.process_time() - start, 0, np.inf
    while True:
        F = float(value(problem, *solver.output(problem, state)))
        least = min(least, F)
        if F <= GAP:
            return {"seconds": seconds, "calls": step * cost, "steps": step, "least": least}
        if seconds >= limit or not np.isfinite(F):
            return {"seconds": np.inf, "calls": np.inf, "steps": step, "least": least}
        steps = max(10, step // 20)
        start = time.process_time()
        state = jax.block_until_ready(go_on(problem, solver, state, key, step, steps))
        seconds, step = seconds + time.process_time() - start, step + steps


def choose(size: tuple[int, int], name: str, limit: float) -> float:
    """The setting that arrives most often on the tuning seeds, and then soonest."""
    make, trials = SOLVERS[name]

    def rank(setting: float) -> tuple[int, float]:
        ends = [run(instance(size, seed), make(setting), seed, limit)["seconds"] for seed in TUNING_SEEDS]
        return sum(np.isinf(ends)), sum(end for end in ends if np.isfinite(end))

    return min(trials, key=rank)


def plot(results: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Performance profiles: columns are sizes, rows seconds and oracle calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 7), layout="constrained")
    axes: Any = figure.subplots(2, len(results), squeeze=False, sharey=True)
    limits = np.logspace(0, 4, 400)
    for c, (size, runs) in enumerate(results.items()):
        for r, (kind, label) in enumerate((("seconds", "solver time"), ("calls", "oracle calls"))):
            costs = np.array([[one[kind] for one in ends] for ends in runs.values()]).T
            for name, part in zip(runs, np.asarray(fraction_within(ratios(costs), limits)).T, strict=True):
                axes[r][c].step(limits, part, where="post", label=name)
            axes[r][c].set(xscale="log", xlabel=f"{label} / the best solver's", ylim=(-0.02, 1.02))
            axes[r][c].grid(alpha=0.3)
        axes[0][c].set_title(size)
    for r in range(2):
        axes[r][0].set_ylabel(f"part of the instances with F - F* <= {GAP}")
    axes[0][0].legend(fontsize=8)
    save_figure(figure, path)


def table(size: str, runs: dict[str, list[dict[str, float]]], settings: dict[str, float]) -> str:
    """One row a solver: setting, arrivals, medians over all instances (infinite where less than half arrived)."""
    lines = [f"{size:24s}{'setting':>9s}{'arrived':>9s}{'median s':>11s}{'median calls':>14s}{'median least F':>16s}"]
    for name, ends in runs.items():
        seconds, calls, least = (np.array([end[kind] for end in ends]) for kind in ("seconds", "calls", "least"))
        arrived = f"{np.isfinite(seconds).sum()}/{len(ends)}"
        lines.append(
            f"    {name:20s}{settings[name]:9g}{arrived:>9s}{np.median(seconds):11.4f}{np.median(calls):14.0f}"
            f"{np.median(least):16.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Tune, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=50)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds of solver time for a run")
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 1, 2], help="which of the three sizes")
    parser.add_argument("--out", type=Path, default=Path("results/constrained"))
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    options.out.mkdir(parents=True, exist_ok=True)
    results, chosen = {}, {}
    for size in (SIZES[k] for k in options.sizes):
        text = f"{size[0]} unknowns, {size[1]} rows"
        chosen[text] = {name: choose(size, name, options.limit) for name in SOLVERS}
        results[text] = {name: [] for name in SOLVERS}
        for seed in range(options.instances):
            problem = instance(size, seed)
            for name, (make, _) in SOLVERS.items():
                results[text][name].append(run(problem, make(chosen[text][name]), seed, options.limit))
            print(f"\r{text}: {seed + 1}/{options.instances}", end="", flush=True)
        print("\r" + table(text, results[text], chosen[text]), flush=True)
        (options.out / "runs.json").write_text(json.dumps({"settings": chosen, "runs": results}, indent=1))
        plot(results, options.out / "profile.png")
    print(f"profiles: {options.out / 'profile.png'}")


if __name__ == "__main__":
    main()
