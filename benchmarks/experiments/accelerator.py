"""A step on the processor and on the accelerator.

    python -m benchmarks.experiments.accelerator [methods unknowns many agent]

    methods:  the three at the heart where there is much to share out: samples of Y, perturbations q, wide networks
    unknowns: every solver on the separable problem of `benchmarks.experiments.scale`
    many:     all data of a million samples; soft value iteration; lanes of seeds by `solve_many`'s vmap
    agent:    the SAC update, 2 x 256 units

Both devices run the compiled functions of `solve` from the same start, in one process. ms a step is wall time, the
median of `--repeats` calls that are waited for, of many steps each; compiling is apart. difference: the largest entry
of |(x, y) - (x, y) of the processor| after `--check` steps, over the largest of (x, y). Methods that compare numbers
may go another way at a tie. What fails on a device is a line with the reason, and exit code 1.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import bilevel
import problems
from benchmarks.experiments import devices, neural_irl, scale
from benchmarks.peers import sac
from benchmarks.study.sweep import cores
from bilevel import diagnostics
from bilevel.run import lanes

PyTree = Any
Steps = Callable[[int], PyTree]  # n -> (x, y) after n steps from the start
Makers = Mapping[str, Callable[[], Steps]]
SPAN = 0.3  # seconds of a timed call, about


def of_solver(make: Callable[[], tuple[bilevel.BilevelProblem, bilevel.Solver]], seeds: int | None = None) -> Steps:
    """Steps of a solver for one key, or for many at once."""
    problem, solver = make()
    key, many = jax.random.key(0), seeds is not None
    key = key if seeds is None else jax.random.split(key, seeds)
    run = lanes.compiled(problem, solver, key, many, diagnostics.measure)
    state = run.init()
    return lambda n: (jax.vmap(run.output) if many else run.output)(run.advance(state, 0, n)[0])


def of_agent(batch_size: int) -> Steps:
    """Updates of `benchmarks.peers.sac`'s agent."""
    run = sac.ours(sac.transitions(), batch_size)[0]
    return lambda n: run(n).weights


def scaled(case: str, name: str, size: int) -> tuple[bilevel.BilevelProblem, bilevel.Solver]:
    """A problem and a solver of `benchmarks.experiments.scale`, of a size."""
    return scale.CASES[case](size)[name]


def sampled(num_samples: int) -> tuple[bilevel.BilevelProblem, bilevel.Solver]:
    """A lower level with many minima, and `SampledPenalty` with so many samples of it."""
    return devices.waves(), bilevel.SampledPenalty(num_samples=num_samples)


def perturbed(num: int) -> tuple[bilevel.BilevelProblem, bilevel.Solver]:
    """A lower level of fifty unknowns under thirty coupled rows, and `DSBLO` with so many perturbations."""
    return problems.make("constrained", kind="random", dim=50, rows=30).problem, bilevel.DSBLO(num_perturbations=num)


def neural(width: int) -> tuple[bilevel.BilevelProblem, bilevel.Solver]:
    """The 5 x 5 gridworld of `benchmarks.experiments.neural_irl`."""
    return neural_irl.make_run(neural_irl.world(), 0, width).train, neural_irl.solver(width)


def methods() -> Makers:
    """Three methods, each with little and with much to do in a step."""
    return (
        {f"SampledPenalty, {n:,} samples": partial(of_solver, partial(sampled, n)) for n in (512, 8_192)}
        | {f"DSBLO, {n:,} perturbations": partial(of_solver, partial(perturbed, n)) for n in (1, 256)}
        | {f"NeuralIRL, width {n:,}": partial(of_solver, partial(neural, n)) for n in (256, 16_384)}
    )


def unknowns() -> Makers:
    """Solvers on problems with a million unknowns."""
    return {
        f"{name}, 1e6": partial(of_solver, partial(scaled, "unknowns", name, 1_000_000)) for name in scale.unknowns(10)
    }


def many() -> Makers:
    """Problems with many data, many states and many seeds."""

    def cleaning() -> tuple[bilevel.BilevelProblem, bilevel.Solver]:
        return problems.make("hyper_cleaning").problem, bilevel.SOBA(
            lower_step_size=0.5, linear_step_size=0.5, upper_step_size=0.1
        )

    return {
        "AID, 1e6 samples of 10 features": partial(of_solver, partial(scaled, "samples", "AID", 1_000_000)),
        "MLIRL, gridworld of 1,024 states": partial(of_solver, partial(scaled, "states", "MLIRL", 1024)),
        "MLIRL, gridworld of 102,400 states": partial(of_solver, partial(scaled, "states", "MLIRL", 102_400)),
        "SOBA, hyper-cleaning": partial(of_solver, cleaning),
        "SOBA, hyper-cleaning, 64 seeds": partial(of_solver, cleaning, 64),
    }


def agent() -> Makers:
    """The agent of deep inverse reinforcement learning, at two sizes of a batch."""
    return {f"SAC, batch of {n:,}": partial(of_agent, n) for n in (256, 4_096)}


CASES = {"methods": methods, "unknowns": unknowns, "many": many, "agent": agent}


def on(device: Any, make: Callable[[], Steps], check: int, repeats: int) -> tuple[float, float, np.ndarray]:
    """(median seconds of a step, seconds until the first one is done, (x, y) after `check` steps, flat) on a device."""
    with jax.default_device(device):
        begin = time.perf_counter()
        steps = make()
        jax.block_until_ready(steps(1))
        first = time.perf_counter() - begin

        def seconds(n: int) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(steps(n))
            return time.perf_counter() - begin

        start, one = seconds(0), seconds(1)
        n = int(np.clip(SPAN / max(one - start, 1e-6), 1, 10_000))
        n = int(np.clip(n * SPAN / max(seconds(n) - start, 1e-6), 1, 100_000))  # the first guess was coarse
        step = float(np.median([max(seconds(n) - start, 0) / n for _ in range(repeats)]))
        reached = jax.tree.leaves(steps(check))
        platforms = {d.platform for leaf in reached for d in leaf.devices()}
    if platforms != {device.platform}:
        raise RuntimeError(f"ran on {platforms}, not on {device.platform}")
    flat = np.concatenate([np.ravel(leaf) for leaf in reached if leaf.dtype.kind == "f"])
    if not np.isfinite(flat).all():
        raise RuntimeError(f"(x, y) is not finite on {device.platform}")
    return step, first, flat


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="a step on the processor and on the accelerator")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--precision", type=int, choices=(32, 64), default=64)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose names contain one of these")
    parser.add_argument("--check", type=int, default=10, help="steps after which results are compared")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; expected {', '.join(CASES)}")
    jax.config.update("jax_enable_x64", options.precision == 64)
    processor, device = jax.devices("cpu")[0], jax.devices()[0]
    if device.platform == "cpu":
        parser.error("no accelerator: jax.devices() are processors; install JAX for yours, as its documentation says.")
    table = Table(title=f"float{options.precision}; {len(cores())} cores and one {device.device_kind}")
    for column in ("", "processor: ms a step", "first s", "accelerator: ms a step", "first s", "ratio", "difference"):
        table.add_column(column, justify="right" if column else "left")
    failed = []
    rows = [item for case in options.cases or CASES for item in CASES[case]().items()]
    for name, make in [row for row in rows if any(text in row[0] for text in options.only)]:
        try:
            (slow, begin, there), (fast, begin_fast, here) = (
                on(d, make, options.check, options.repeats) for d in (processor, device)
            )
        except (MemoryError, RuntimeError) as error:  # XLA's own are RuntimeErrors
            failed.append(f"{name}: {str(error).splitlines()[0]}")
            print(failed[-1], flush=True)
            continue
        row = f"{1e3 * slow:.3g}", f"{begin:.1f}", f"{1e3 * fast:.3g}", f"{begin_fast:.1f}", f"{slow / fast:.2f}"
        difference = np.abs(here - there).max() / max(np.abs(there).max(), 1e-300)
        print(name, *row, f"{difference:.1e}", flush=True)
        table.add_row(name, *row, f"{difference:.1e}")
        jax.clear_caches()
    Console(width=140).print(table)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
