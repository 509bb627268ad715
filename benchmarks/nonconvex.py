"""How often solvers find the global optimum where the lower level is not convex: `python -m benchmarks.nonconvex`.

For each problem and 20 seeds, one row a solver: successes, that is |F - F*| <= 0.02 (1 + |F*|), true lower gap <= 1e-3
and violation <= 1e-6 (where F jumps, so that points of tiny gap undercut F*, nothing else counts either); the range of
F; the largest gap; seconds a solve after compiling; and the oracle calls of a solve. SampledPenalty runs 300 steps; the
rivals run as many steps as make the calls of SampledPenalty with one start.

    python -m benchmarks.nonconvex [family[key=value,…] …]    default: the problems of suites/nonconvex.toml
"""

import sys
import time

import jax
import numpy as np

import bilevel
from benchmarks.registry import build_instance, read_suite
from bilevel.gap import measure_global

SEEDS, STEPS = 20, 300


def run(instance: object, solver: bilevel.Solver, steps: int) -> str:
    """The row of one solver on one problem, or why it has none."""
    problem, truth = instance.problem, instance.truth.value  # pyright: ignore[reportAttributeAccessIssue]
    reason = solver.unsupported(problem)
    if reason is not None:
        return reason

    @jax.jit
    def solve(problem: bilevel.BilevelProblem, key: jax.Array) -> tuple:
        state = solver.init(problem, jax.random.fold_in(key, 0x7FFFFFFF))
        state, _ = bilevel.advance(problem, solver, state, key, 0, steps)
        return solver.output(problem, state)

    begin = time.perf_counter()
    compiled = solve.lower(problem, jax.random.key(0)).compile()
    compiling = time.perf_counter() - begin
    begin = time.perf_counter()
    ends = [jax.block_until_ready(compiled(problem, jax.random.key(seed))) for seed in range(SEEDS)]
    seconds = (time.perf_counter() - begin) / SEEDS
    judge = jax.jit(measure_global)
    measured = [judge(problem, *end) for end in ends]
    F, gap, outside = (
        np.array([float(getattr(m, name)) for m in measured]) for name in ("value", "lower_residual", "violation")
    )
    good = (np.abs(F - truth) <= 0.02 * (1 + abs(truth))) & (gap <= 1e-3) & (outside <= 1e-6)
    return (
        f"{good.sum():2d}/{SEEDS}  F* {truth:9.5f}  F {np.nanmin(F):9.5f} to {np.nanmax(F):9.5f}  "
        f"gap {np.nanmax(gap):.0e}  {seconds:7.3f} s  compile {compiling:5.1f} s  "
        f"{solver.cost(problem).total * steps:.1e} calls"
    )


def main(texts: list[str]) -> None:
    """Print the table for the problems that `texts` name."""
    jax.config.update("jax_enable_x64", True)
    texts = texts or list(dict.fromkeys(cell.problem for cell in read_suite("nonconvex")[1]))
    print(f"{SEEDS} seeds; SampledPenalty {STEPS} steps; rivals as many calls as SampledPenalty(num_starts=1)")
    for text in texts:
        instance = build_instance(text, 0)
        one = bilevel.SampledPenalty(num_starts=1)
        calls = one.cost(instance.problem).total * STEPS
        print(text)
        for name, solver in (
            ("SampledPenalty", bilevel.SampledPenalty()),
            ("SampledPenalty, 1 start", one),
            ("VPBGD", bilevel.VPBGD()),
            ("BOME", bilevel.BOME()),
        ):
            steps = (
                STEPS if isinstance(solver, bilevel.SampledPenalty) else calls // solver.cost(instance.problem).total
            )
            print(f"    {name:24s}{run(instance, solver, steps)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
