"""Cost against size, with fitted exponents.

    python -m benchmarks.experiments.scale [unknowns samples states] [--quick]

    unknowns: g = sum d_i (y_i - x_i)^2/2, f = |y - 1|^2/2 + |x|^2/2; x and y to 1e6; every solver that takes it. Those
              that track the lower solution exactly would factor the n x n matrix g_yy: they are given its diagonal.
              SampledPenalty, whose default is thousands of points of Y, has few. AT and PerSamplePenalty are not here:
              they need a y for each sample.
    samples:  least squares with 10 features and a penalty for each, n to 1e6; all data a step, or batches of 64
    states:   gridworld, to 1e5 states; exact occupancy, soft value iteration

A row a solver and size: CPU seconds of a step and of the start (`init`, with its default step sizes), each the least of
three where that is quick, so that other work on the machine distorts little; the most memory a compiled step holds; and
a line a size: one of the referee's measurements, which cost the same with every solver, and the addition of two arrays
that take 80 bytes for each one of the size together, about what most solvers hold. The exponent p of each in size^p is
the slope between the two largest sizes: 1 is linear. Above 1.2 it is marked: nothing should be quadratic that the
method does not make so; but where arrays leave the caches, the addition's p is above 1 as well. What does not run at a
size, for want of memory for instance, is a line with the reason.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import bilevel
import irl
import problems
from benchmarks.experiments import profile
from bilevel import diagnostics
from bilevel.run import lanes

SIZES = {
    "unknowns": (100_000, 1_000_000),
    "samples": (10_000, 100_000, 1_000_000),
    "states": (1_024, 10_000, 100_489),
}
REPEATS = 3
LONG = 2.0  # seconds of a call, from which on one is enough
SPAN = 0.2  # CPU seconds of steps in one call, where a step is short
QUANTITIES = ("step", "init", "peak")


def separable_upper(x: jax.Array, y: jax.Array, batch: Any) -> jax.Array:
    """|y - 1|^2/2 + |x|^2/2, shape []."""
    return (jnp.sum((y - 1) ** 2) + jnp.sum(x**2)) / 2


def separable_lower(x: jax.Array, y: jax.Array, batch: jax.Array) -> jax.Array:
    """Sum of d_i (y_i - x_i)^2/2, shape []."""
    return jnp.sum(batch * (y - x) ** 2) / 2


def squares(x: jax.Array, y: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean squared error/2, shape []."""
    return jnp.mean((batch[0] @ y - batch[1]) ** 2) / 2


def penalised(x: jax.Array, y: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The same with a penalty e^x a feature, shape []."""
    return squares(x, y, batch) + jnp.sum(jnp.exp(x) * y**2) / 2


Runs = dict[str, tuple[bilevel.BilevelProblem, bilevel.Solver]]
EXACT = ("DSBLO", "DSIGD", "PIGD", "SSIGD")


def unknowns(size: int) -> Runs:
    """The separable problem and every solver with its defaults."""
    curvature = jnp.linspace(0.5, 1.5, size)
    problem = bilevel.BilevelProblem(
        separable_upper, bilevel.Minimize(separable_lower), lower_data=bilevel.Full(curvature),
        init=lambda key: (jnp.ones(size), jnp.zeros(size)),
    )  # fmt: skip
    given = dataclasses.replace(problem, lower=bilevel.Minimize(separable_lower, diagonal=lambda x, y, batch: batch))
    boxed = dataclasses.replace(problem, y_set=bilevel.Box(-10.0, 10.0))
    found: Runs = {}
    for name, cls in bilevel.solvers.ALL.items():
        taken, title = (given, f"{name} (diagonal given)") if name in EXACT else (problem, name)
        if cls().unsupported(taken) is None:
            found[title] = taken, cls()
    few = bilevel.SampledPenalty(num_samples=16, num_slots=2, num_starts=1, num_ladders=1)
    return found | {"SampledPenalty (|y_i| < 10, 16 samples)": (boxed, few)}


def samples(size: int) -> Runs:
    """Least squares in batches of 64; AID uses all of the data in every step."""
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(size, 10))
    rows = jnp.asarray(Z), jnp.asarray(Z @ np.ones(10) + rng.normal(size=size))
    source = bilevel.Minibatch(rows, 64)
    problem = bilevel.BilevelProblem(
        squares, bilevel.Minimize(penalised), upper_data=source, lower_data=source,
        init=lambda key: (jnp.zeros(10), jnp.zeros(10)),
    )  # fmt: skip
    return {type(solver).__name__: (problem, solver) for solver in (bilevel.AID(), bilevel.SOBA(), bilevel.StocBiO())}


def states(size: int) -> Runs:
    """A gridworld of isqrt(size)^2 states."""
    side = math.isqrt(size)
    problem = problems.make("gridworld", size=side, trajectories=0, discount=0.9).problem
    return {
        "MLIRL": (problem, irl.MLIRL()),
        "SOBA": (problem, bilevel.SOBA(lower_step_size=0.5, linear_step_size=0.5, upper_step_size=0.1)),
    }


CASES: dict[str, Callable[[int], Runs]] = {"unknowns": unknowns, "samples": samples, "states": states}


def least(call: Callable[[], Any]) -> float:
    """CPU seconds of a call that has been compiled, the least of `REPEATS`, or of one that is `LONG`."""
    times = []
    while len(times) < REPEATS and max(times, default=0.0) < LONG:
        begin = time.process_time()
        jax.block_until_ready(call())
        times.append(time.process_time() - begin)
    return min(times)


def cost(problem: bilevel.BilevelProblem, solver: bilevel.Solver) -> dict[str, float]:
    """CPU seconds of a step and of init; bytes that a step holds."""
    key = jax.random.key(0)
    start = lanes.init.lower(problem, solver, key, False).compile()
    begin = time.process_time()
    state = jax.block_until_ready(start(problem, solver, key))
    init = time.process_time() - begin
    if init < LONG:
        init = least(lambda: start(problem, solver, key))
    advance = lanes.advance_lanes.lower(problem, solver, state, key, 0, 0, False).compile()
    copy, once = (least(lambda n=n: advance(problem, solver, state, key, 0, n)) for n in (0, 1))
    more = int(np.clip(SPAN / max(once - copy, 1e-9), 1, 1000))  # the state is copied once a call, not once a step
    step = max(least(lambda: advance(problem, solver, state, key, 0, 1 + more)) - once, 0.0) / more
    return {"step": step, "copy": copy, "init": init, "peak": profile.peak(advance)}


def measurement(problem: bilevel.BilevelProblem) -> float:
    """CPU seconds of one of the referee's measurements at the start, which is the same for all solvers."""
    x, y = problem.init(jax.random.key(0))
    measure = lanes.measure_lanes.lower(problem, x, y, False, diagnostics.measure).compile()
    return least(lambda: measure(problem, x, y))


def addition(size: int) -> float:
    """CPU seconds of b <- b/2 + a for arrays of 5 `size` numbers: what memory and caches alone cost at that size."""
    a, b = jnp.ones(5 * size), jnp.zeros(5 * size)
    step = jax.jit(lambda a, b, n: jax.lax.fori_loop(0, n, lambda _, b: b / 2 + a, b)).lower(a, b, 0).compile()
    count = int(np.clip(2e7 / size, 10, 1e5))
    return least(lambda: step(a, b, count)) / count


def exponent(small: float, large: float, ratio: float) -> float:
    """The slope p in large/small = ratio^p."""
    return math.log(large / small) / math.log(ratio) if small > 0 and large > 0 else math.nan


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="cost against size, with fitted exponents")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--quick", action="store_true", help="sizes ten times smaller")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="two or more, instead of the cases' own")
    parser.add_argument("--solver", action="append", help="only these")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console(width=120)
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; expected {', '.join(CASES)}")
    if options.sizes and not (len(options.sizes) > 1 and options.sizes == sorted(set(options.sizes))):
        parser.error(f"--sizes: got {options.sizes}; expected two or more, ascending")
    for case in options.cases or CASES:
        sizes = options.sizes or [size // 10 if options.quick else size for size in SIZES[case]]
        found: dict[str, dict[int, dict[str, float]]] = {}
        failed: dict[str, str] = {}
        measured, added = {}, {}
        for size in sizes:
            runs = CASES[case](size)
            measured[size], added[size] = measurement(next(iter(runs.values()))[0]), addition(size)
            print(case, size, f"a measurement {measured[size]:.3g}, an addition {added[size]:.3g}", flush=True)
            for name, (problem, solver) in runs.items():
                if (options.solver and type(solver).__name__ not in options.solver) or name in failed:
                    continue
                try:
                    row = cost(problem, solver)
                except (MemoryError, RuntimeError) as error:  # XLA's own are RuntimeErrors
                    failed[name] = f"{name} at {size}: {str(error).splitlines()[0]}"
                    print(failed[name], flush=True)
                    continue
                found.setdefault(name, {})[size] = row
                print(case, size, name, {k: float(f"{v:.3g}") for k, v in row.items()}, flush=True)
                jax.clear_caches()
        last, before = sizes[-1], sizes[-2]
        table = Table(title=f"{case}: exponents between {before} and {last}; numbers at {last}")
        for column in ("solver", "ms a step", "p", "init s", "p", "peak MB", "p"):
            table.add_column(column, justify="left" if column == "solver" else "right")
        for name, rows in found.items():
            if name in failed:
                continue
            cells = []
            for quantity, scale in zip(QUANTITIES, (1e3, 1, 1e-6), strict=True):
                p = exponent(rows[before][quantity], rows[last][quantity], last / before)
                cells += [f"{scale * rows[last][quantity]:.3g}", f"{p:.2f}" + (" !" if p > 1.2 else "")]
            table.add_row(name, *cells)
        console.print(table)
        for what, times in (("a measurement", measured), ("an addition", added)):
            p = exponent(times[before], times[last], last / before)
            console.print(f"{what}: {times[last]:.3g} s, p {p:.2f}")
        for reason in failed.values():
            console.print(reason, markup=False)


if __name__ == "__main__":
    main()
