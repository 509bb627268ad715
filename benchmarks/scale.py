"""Cost against size, with fitted exponents: `python -m benchmarks.scale [unknowns samples states] [--quick]`.

    unknowns: g = sum d_i (y_i - x_i)^2/2, f = |y - 1|^2/2 + |x|^2/2; x and y to 1e6; every solver that takes it
    samples:  least squares with 10 features and a penalty for each, n to 1e6; all data a step, or batches of 64
    states:   gridworld, to 1e5 states; exact occupancy, soft value iteration

A row a solver and size: CPU seconds of a step, of the start (`init`, with its default step sizes) and of one of the
referee's measurements, each the least of three, so that other work on the machine distorts little; the most memory a
compiled step holds. The exponent p of each in size^p is the slope between the two largest sizes: 1 is linear. Above 1.2
it is marked: nothing should be quadratic that the method does not make so.
"""

import argparse
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
from benchmarks import profile
from bilevel import lanes, run

SIZES = {
    "unknowns": (10_000, 100_000, 1_000_000),
    "samples": (10_000, 100_000, 1_000_000),
    "states": (1_024, 10_000, 100_489),
}
REPEATS = 3
QUANTITIES = ("step", "init", "measure", "peak")


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


def unknowns(size: int) -> tuple[bilevel.BilevelProblem, dict[str, bilevel.Solver]]:
    """The separable problem and every solver with its defaults."""
    curvature = jnp.linspace(0.5, 1.5, size)
    problem = bilevel.BilevelProblem(
        separable_upper, bilevel.Minimize(separable_lower), lower_data=bilevel.Full(curvature),
        init=lambda key: (jnp.ones(size), jnp.zeros(size)),
    )  # fmt: skip
    solvers = {name: cls() for name, cls in bilevel.solvers.ALL.items()}
    return problem, {name: solver for name, solver in solvers.items() if solver.unsupported(problem) is None}


def samples(size: int) -> tuple[bilevel.BilevelProblem, dict[str, bilevel.Solver]]:
    """Least squares in batches of 64; AID uses all of the data in every step."""
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(size, 10))
    rows = jnp.asarray(Z), jnp.asarray(Z @ np.ones(10) + rng.normal(size=size))
    source = bilevel.Minibatch(rows, 64)
    problem = bilevel.BilevelProblem(
        squares, bilevel.Minimize(penalised), upper_data=source, lower_data=source,
        init=lambda key: (jnp.zeros(10), jnp.zeros(10)),
    )  # fmt: skip
    return problem, {"AID": bilevel.AID(), "SOBA": bilevel.SOBA(), "StocBiO": bilevel.StocBiO()}


def states(size: int) -> tuple[bilevel.BilevelProblem, dict[str, bilevel.Solver]]:
    """A gridworld of isqrt(size)^2 states."""
    side = math.isqrt(size)
    problem = problems.make("gridworld", size=side, trajectories=0, discount=0.9).problem
    return problem, {"MLIRL": irl.MLIRL(), "SOBA": bilevel.SOBA(0.5, 0.5, 0.1)}


CASES: dict[str, Callable[[int], tuple[bilevel.BilevelProblem, dict[str, bilevel.Solver]]]] = {
    "unknowns": unknowns, "samples": samples, "states": states,
}  # fmt: skip


def cost(problem: bilevel.BilevelProblem, solver: bilevel.Solver, steps: int = 3) -> dict[str, float]:
    """CPU seconds of a step, of init, of a measurement, the least of `REPEATS`; bytes of a step."""
    key = jax.random.key(0)
    state = lanes.init(problem, solver, key, False)
    x, y = solver.output(problem, state)
    measure = run.default_measure(problem, solver)
    advance = lambda n: lanes.advance_lanes(problem, solver, state, key, 0, n, False)  # noqa: E731
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: advance(steps),
        "call": lambda: advance(0),  # the state is copied once a call, not once a step
        "init": lambda: lanes.init(problem, solver, key, False),
        "measure": lambda: lanes.measure_lanes(problem, x, y, False, measure),
    }
    found = {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles
        times = []
        for _ in range(REPEATS):
            begin = time.process_time()
            jax.block_until_ready(call())
            times.append(time.process_time() - begin)
        found[name] = min(times)
    step = max(found["step"] - found["call"], 0.0) / steps
    return found | {"step": step, "peak": profile.of(problem, solver, key)["peak"]}


def exponent(small: float, large: float, ratio: float) -> float:
    """The slope p in large/small = ratio^p."""
    return math.log(large / small) / math.log(ratio) if small > 0 and large > 0 else math.nan


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="cost against size, with fitted exponents")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--quick", action="store_true", help="sizes ten times smaller")
    parser.add_argument("--solver", action="append", help="only these")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console(width=120)
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; expected {', '.join(CASES)}")
    for case in options.cases or CASES:
        sizes = [size // 10 if options.quick else size for size in SIZES[case]]
        found: dict[str, dict[int, dict[str, float]]] = {}
        for size in sizes:
            problem, solvers = CASES[case](size)
            for name, solver in solvers.items():
                if options.solver and name not in options.solver:
                    continue
                found.setdefault(name, {})[size] = cost(problem, solver)
                row = found[name][size]
                print(case, size, name, {k: float(f"{v:.3g}") for k, v in row.items()}, flush=True)
        table = Table(title=f"{case}: exponents between {sizes[-2]} and {sizes[-1]}; numbers at {sizes[-1]}")
        for column in ("solver", "ms a step", "p", "init s", "p", "measure s", "p", "peak MB", "p"):
            table.add_column(column, justify="left" if column == "solver" else "right")
        for name, rows in found.items():
            last, before = rows[sizes[-1]], rows[sizes[-2]]
            cells = []
            for quantity, scale in zip(QUANTITIES, (1e3, 1, 1, 1e-6), strict=True):
                p = exponent(before[quantity], last[quantity], sizes[-1] / sizes[-2])
                cells += [f"{scale * last[quantity]:.3g}", f"{p:.2f}" + (" !" if p > 1.2 else "")]
            table.add_row(name, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
