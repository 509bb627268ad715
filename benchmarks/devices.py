"""Throughput against the number of devices: `python -m benchmarks.devices [--samples 2000 200000] [--out devices.png]`.

One SOBA run on a finite sum of least squares (n samples of d features; a step is one pass over all of them), sharded
over 1, 2, 4, … devices: steps a second, the speed-up over one device, and the largest difference of x to one device's.
Without an accelerator the devices are `--devices` virtual ones of this machine's processor: they share its cores and
memory, so that the table shows the cost of partitioning there, not a gain. Runs are interleaved; medians. CPU time of
all threads, the least, says what a step costs also where other work shares the cores and seconds say little.
"""

import argparse
import os
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


def measure(samples: int, features: int, steps: int, repeats: int) -> dict[int, dict[str, float]]:
    """{devices: steps a second, CPU seconds a step, difference of x to one device's}."""
    import jax
    import jax.numpy as jnp

    import bilevel

    rng = np.random.default_rng(0)
    Z = rng.normal(size=(2, samples, features))
    t = Z @ rng.normal(size=features) + rng.normal(size=(2, samples))
    halves = [bilevel.Full((jnp.asarray(Z[k]), jnp.asarray(t[k]))) for k in (0, 1)]
    problem = bilevel.BilevelProblem(
        upper, bilevel.Minimize(lower), upper_data=halves[0], lower_data=halves[1],
        init=lambda key: (jnp.zeros(features), jnp.zeros(features)),
    )  # fmt: skip
    solver = bilevel.SOBA(0.3, 0.3, 0.1)
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


def plot(found: dict[int, dict[int, dict[str, float]]], path: Path, title: str) -> None:
    """Steps a second against devices, a curve for each number of samples, with the lines of perfect scaling."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    ax: Any = figure.subplots()
    for k, (samples, rows) in enumerate(found.items()):
        counts, rates = list(rows), [row["rate"] for row in rows.values()]
        ax.plot(counts, rates, "o-", color=f"C{k}", label=f"{samples} samples")
        perfect = [rates[0] * count for count in counts]
        ax.plot(counts, perfect, ":", color="gray", label=None if k else "perfect scaling")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(list(next(iter(found.values()))))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("devices")
    ax.set_ylabel("throughput (steps/s)")
    ax.set_title(title, fontsize=9)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description="throughput against the number of devices")
    parser.add_argument("--samples", type=int, nargs="+", default=[2_000, 200_000])
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", type=int, default=8, help="virtual ones, where there is no accelerator")
    parser.add_argument("--out", type=Path, help="a PNG of the plot")
    options = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={options.devices}")
    import jax
    from rich.console import Console
    from rich.table import Table

    jax.config.update("jax_enable_x64", True)
    begin = time.perf_counter()
    kind = f"{options.features} features, float64, {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
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
        plot(found, options.out, kind)
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
