"""Throughput against the number of devices.

    python -m benchmarks.experiments.devices [--samples 2000 200000] [--out devices.png]

With `--moves` what moves between devices, read out of the compiled programs.

One SOBA run on a finite sum of least squares (n samples of d features; a step is one pass over all of them), sharded
over 1, 2, 4, … devices: steps a second, the speed-up over one device, and the largest difference of x to one device's.
Without an accelerator the devices are `--devices` virtual ones of this machine's processor: they share its cores and
memory, so that the table shows the cost of partitioning there, not a gain. Runs are interleaved; medians. CPU time of
all threads, the least, says what a step costs also where other work shares the cores and seconds say little: of virtual
devices the plot shows steps per second of CPU time.
"""

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np


def upper(x: Any, y: Any, batch: Any) -> Any:
    """Half the mean squared error on the validation rows, shape []; batch (Z [n, d], t [n])."""
    import jax.numpy as jnp

    return jnp.mean((batch[0] @ y - batch[1]) ** 2) / 2


def lower(x: Any, y: Any, batch: Any) -> Any:
    """The same on the training rows, with a penalty e^x a feature, shape []."""
    import jax.numpy as jnp

    return upper(x, y, batch) + jnp.sum(jnp.exp(x) * y**2) / 2


def squares(samples: int, features: int, batch_size: int | None = None) -> Any:
    """The least squares problem, all of its data a step or batches."""
    import jax.numpy as jnp

    import bilevel

    rng = np.random.default_rng(0)
    Z = rng.normal(size=(2, samples, features))
    t = Z @ rng.normal(size=features) + rng.normal(size=(2, samples))
    parts = [(jnp.asarray(Z[k]), jnp.asarray(t[k])) for k in (0, 1)]
    halves = [bilevel.Full(part) if batch_size is None else bilevel.Minibatch(part, batch_size) for part in parts]
    return bilevel.BilevelProblem(
        upper, bilevel.Minimize(lower), upper_data=halves[0], lower_data=halves[1],
        init=lambda key: (jnp.zeros(features), jnp.zeros(features)),
    )  # fmt: skip


def waves() -> Any:
    """A lower level with many minima on a box, x and y of 10."""
    import jax.numpy as jnp

    import bilevel

    box = bilevel.Box(-1.0, 1.0)
    return bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum((x - 0.3) ** 2 + y),
        bilevel.Minimize(lambda x, y, batch: jnp.sum(jnp.cos(4 * y) + (y - x) ** 2)),
        x_set=box, y_set=box, init=lambda key: (jnp.zeros(10), jnp.zeros(10)),
    )  # fmt: skip


def examples() -> dict[str, tuple[Any, Any]]:
    """Problems and solvers that split each kind of thing, small, since only their programs are read."""
    import jax.numpy as jnp

    import bilevel
    import irl
    import problems

    bent = waves()
    rows = bilevel.LinearCoupling(jnp.ones((1, 10)), jnp.zeros((1, 10)), jnp.full(1, 0.5))
    near = bilevel.Minimize(lambda x, y, batch: jnp.sum((y - x) ** 2))
    penalty = bilevel.SampledPenalty(num_samples=64, num_slots=2, num_starts=1, num_ladders=1)
    soba = bilevel.SOBA(lower_step_size=0.3, linear_step_size=0.3, upper_step_size=0.1)
    grid = problems.make("gridworld", size=4, trajectories=64, length=20, batch_size=16).problem
    return {
        "SOBA, 800 samples of 50 features, all of them a step": (squares(800, 50), soba),
        "AID, the same": (squares(800, 50), bilevel.AID(lower_step_size=0.1, upper_step_size=0.1)),
        "SOBA, batches of 16": (squares(800, 50, 16), soba),
        "SampledPenalty, 64 samples, x and y of 10": (bent, penalty),
        "DSBLO, 8 perturbations, x and y of 10, one row": (
            bilevel.BilevelProblem(bent.upper, near, coupling=rows, init=bent.init), bilevel.DSBLO(num_perturbations=8),
        ),
        "MLIRL, batches of 16 trajectories of 20 steps": (grid, irl.MLIRL(upper_step_size=0.1)),
    }  # fmt: skip


def moves(problem: Any, solver: Any) -> dict[str, list[int]]:
    """{"a step" | "a pass of its inner loops" | "before the steps": bytes of each collective's result, on a device}.

    XLA takes what does not change out of the loop, and joins collectives into one.
    """
    import jax

    from bilevel.backend import sharding
    from bilevel.run import lanes

    key = jax.random.key(0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    state = lanes.init(problem, solver, key, False)
    with sharding.on(mesh) as devices:
        parts = problem.on_mesh(devices), *sharding.place((solver, state, key), devices)
        text = lanes.advance_lanes.lower(*parts, 0, 1, False).compile().as_text() or ""
    found: dict[str, list[int]] = {"a step": [], "a pass of its inner loops": [], "before the steps": []}
    for line in text.splitlines():
        match = re.search(r" = (.*?) (?:all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", line)
        if match is None:
            continue
        sizes = [
            max(int(bits or 8) // 8, 1) * int(np.prod([int(n) for n in shape.split(",") if n]))
            for bits, shape in re.findall(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]", match.group(1))
        ]
        path = re.search(r'op_name="([^"]*)"', line)
        depth = path.group(1).split(":")[0].count("while/body") if path else 1
        found[("before the steps", "a step", "a pass of its inner loops")[min(depth, 2)]].append(sum(sizes))
    return found


def measure(samples: int, features: int, steps: int, repeats: int) -> dict[int, dict[str, float]]:
    """{devices: steps a second, CPU seconds a step, difference of x to one device's}."""
    import jax
    import jax.numpy as jnp

    import bilevel

    problem = squares(samples, features)
    solver = bilevel.SOBA(lower_step_size=0.3, linear_step_size=0.3, upper_step_size=0.1)
    counts = [n for n in (2**k for k in range(10)) if n <= jax.device_count()]
    calls: dict[int, Any] = {}
    for count in counts:
        mesh = None if count == 1 else jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))

        def call(mesh: Any = mesh) -> Any:
            return bilevel.solve(
                problem, solver, key=jax.random.key(0), max_steps=steps, every=steps, tol=0.0, progress=False,
                mesh=mesh, measure=nothing,
            )  # fmt: skip

        calls[count] = call

    def nothing(problem: Any, x: Any, y: Any) -> Any:
        zero = jnp.zeros(())
        return bilevel.diagnostics.Measurement(zero, zero, zero, zero, zero, zero)

    first = {count: call() for count, call in calls.items()}
    times: dict[int, list[float]] = {count: [] for count in counts}
    work: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count, call in calls.items():
            begin = time.process_time()
            times[count].append(call().stats["solve_time"])
            work[count].append(time.process_time() - begin)
    alone = np.asarray(first[1].x)
    return {
        count: {
            "rate": steps / float(np.median(times[count])),
            "cpu": min(work[count]) / steps,
            "difference": float(np.abs(np.asarray(first[count].x) - alone).max()),
        }
        for count in counts
    }


def plot(found: dict[int, dict[int, dict[str, float]]], path: Path, title: str, virtual: bool) -> None:
    """Steps a second against devices, a curve for each number of samples, with the lines of what would be perfect.

    Virtual devices share what computes: perfect is then that more of them cost nothing.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    from bilevel.report import save_figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    ax: Any = figure.subplots()
    for k, (samples, rows) in enumerate(found.items()):
        counts, rates = list(rows), [1 / row["cpu"] if virtual else row["rate"] for row in rows.values()]
        ax.plot(counts, rates, "o-", color=f"C{k}", label=f"{samples:,} samples")
        perfect = [rates[0] * (1 if virtual else count) for count in counts]
        label = "no cost of splitting" if virtual else "perfect scaling"
        ax.plot(counts, perfect, ":", color="gray", label=None if k else label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(list(next(iter(found.values()))))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("virtual devices on the same core" if virtual else "devices")
    ax.set_ylabel("throughput (steps per second of CPU time)" if virtual else "throughput (steps per second)")
    ax.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", fontsize=8, ncols=2)
    ax.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description="throughput against the number of devices")
    parser.add_argument("--samples", type=int, nargs="+", default=[2_000, 200_000])
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", type=int, default=8, help="virtual ones, where there is no accelerator")
    parser.add_argument("--moves", action="store_true", help="only print what moves between devices")
    parser.add_argument("--out", type=Path, help="a PNG of the plot")
    options = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={options.devices}")
    import jax
    from rich.console import Console
    from rich.table import Table

    from benchmarks.study.sweep import cores

    jax.config.update("jax_enable_x64", True)
    if options.moves:
        table = Table(title=f"collectives on {jax.device_count()} devices: how many, bytes of their results a device")
        for column in ("case", "a step", "a pass of its inner loops", "before the steps"):
            table.add_column(column, overflow="fold")
        for name, (problem, solver) in examples().items():
            table.add_row(name, *(f"{len(s)}: {sum(s):,} B" if s else "-" for s in moves(problem, solver).values()))
        Console(width=120).print(table)
        return
    begin = time.perf_counter()
    kind = f"{options.features} features, float64, {jax.devices()[0].device_kind}, {len(cores())} core(s)"
    found = {}
    for samples in options.samples:
        found[samples] = measure(samples, options.features, options.steps, options.repeats)
        table = Table(title=f"{samples} samples of {kind}")
        for column in ("devices", "steps/s", "speed-up", "CPU ms a step", "largest difference of x"):
            table.add_column(column, justify="right")
        for count, row in found[samples].items():
            speed = row["rate"] / found[samples][1]["rate"]
            table.add_row(
                str(count), f"{row['rate']:.1f}", f"{speed:.2f}", f"{1e3 * row['cpu']:.3g}", f"{row['difference']:.1e}"
            )
        Console(width=100).print(table)
    if options.out is not None:
        plot(found, options.out, kind, jax.devices()[0].platform == "cpu")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
