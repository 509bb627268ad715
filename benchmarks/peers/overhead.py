"""The price of `solve` over a hand-written loop: `python -m benchmarks.peers.overhead [--dims 20 50 100] [--data]`.

10,000 SOBA steps, every=1000, against the same update written by hand in one `lax.scan` and jitted once: on
deterministic quadratics, and with --data
on hyper-cleaning of the digits (650 lower unknowns, all of the data in each step). Float64,
one process; medians of interleaved, repeated calls after compiling; ratios to the scan. `solve` is the whole call; the
column before it leaves out what the referee's eleven measurements took, which are not the solver's.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import bilevel
import problems
from bilevel import run
from bilevel.run import lanes

A, B, C = 0.1, 0.1, 0.01  # step sizes of y, v, x


def by_hand(problem, x, y, num_steps: int):
    """SOBA written with jax.grad and jax.vjp: of the library only the problem's functions and arrays."""
    f, g = problem.upper, problem.lower.g
    upper, lower = problem.upper_data.arrays, problem.lower_data.arrays

    def step(carry, _):
        x, y, v = carry
        fx, fy = jax.grad(f, argnums=(0, 1))(x, y, upper)
        gy, pull = jax.vjp(lambda x, y: jax.grad(g, argnums=1)(x, y, lower), x, y)
        gxy_v, gyy_v = pull(v)
        direction_x, direction_v = jax.tree.map(jnp.subtract, fx, gxy_v), jax.tree.map(jnp.subtract, gyy_v, fy)
        along = lambda tree, size, direction: jax.tree.map(lambda a, d: a - size * d, tree, direction)  # noqa: E731
        return (along(x, C, direction_x), along(y, A, gy), along(v, B, direction_v)), None

    return jax.lax.scan(step, (x, y, jax.tree.map(jnp.zeros_like, y)), length=num_steps)[0]


def measure(problem: bilevel.BilevelProblem, num_steps: int, repeats: int) -> dict[str, float]:
    """Median seconds of the hand-written scan, of `advance`, and of `solve` without and with measuring."""
    solver, key = bilevel.SOBA(lower_step_size=A, linear_step_size=B, upper_step_size=C), jax.random.key(0)
    arguments = {"key": key, "max_steps": num_steps, "every": num_steps // 10, "tol": 0.0, "progress": False}
    start = lanes.init(problem, solver, key, False)
    hand = jax.jit(by_hand, static_argnames="num_steps")
    chunk = jax.jit(run.advance)
    calls: dict[str, Callable] = {
        "hand-written scan": lambda: jax.block_until_ready(hand(problem, start.x, start.y, num_steps=num_steps)),
        "advance": lambda: jax.block_until_ready(
            chunk(problem, solver, start, key, jnp.asarray(0), jnp.asarray(num_steps))
        ),
        "solve": lambda: bilevel.solve(problem, solver, **arguments),
    }
    first = {name: call() for name, call in calls.items()}
    by_hand_x, solved_x = first["hand-written scan"][0], first["solve"].x
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), by_hand_x, solved_x)
    times: dict[str, list[float]] = {
        name: [] for name in ("hand-written scan", "advance", "solve - measuring", "solve")
    }
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            out = call()
            times[name].append(time.perf_counter() - begin)
            if name == "solve":
                times["solve - measuring"].append(times[name][-1] - out.stats["measure_time"])
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="solve against a hand-written scan")
    parser.add_argument("--dims", type=int, nargs="*", default=[20, 50, 100])
    parser.add_argument("--data", action="store_true", help="hyper-cleaning as well (about a minute)")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    cases = {
        f"quadratic, R^{d} x R^{d}": ({"name": "quadratic", "dim_x": d, "dim_y": d}, options.repeats)
        for d in options.dims
    }
    if options.data:
        cases["hyper_cleaning"] = ({"name": "hyper_cleaning"}, 3)
    table = Table(title=f"{options.steps} SOBA steps, every={options.steps // 10}: median ms (ratio to the scan)")
    for column in ("problem", "hand-written scan", "advance", "solve - measuring", "solve"):
        table.add_column(column, justify="left" if column == "problem" else "right")
    for label, (params, repeats) in cases.items():
        times = measure(problems.make(**params).problem, options.steps, repeats)
        base = times["hand-written scan"]
        table.add_row(label, *(f"{1e3 * seconds:.1f} ({seconds / base:.2f})" for seconds in times.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
