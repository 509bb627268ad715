"""From which size do more BLAS threads pay? `python -m benchmarks.experiments.blas_threads [--busy]`.

JAX's LAPACK calls on the CPU go to SciPy's OpenBLAS. For each size n and number of threads a process of its own takes
the median time of a Cholesky factor, an LU factor and the eigenvalues of a symmetric matrix [n, n], float64, as JAX
calls them. With --busy one other process takes a core meanwhile, as on a machine that is shared.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

SIZES = (50, 100, 200, 400, 800, 1600)
SECONDS = 0.5  # spent on each kernel, at least three calls


def measure(n: int) -> dict[str, float]:
    """Median milliseconds of each kernel, in this process."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    A = np.random.default_rng(n).standard_normal((n, n))
    H = jnp.asarray(A @ A.T / n + np.eye(n))
    kernels: dict[str, Any] = {
        "Cholesky": jnp.linalg.cholesky,
        "LU": lambda M: jax.scipy.linalg.lu_factor(M)[0],
        "eigenvalues": jnp.linalg.eigvalsh,
    }
    found: dict[str, float] = {}
    for name, kernel in kernels.items():
        call = jax.jit(kernel)
        call(H).block_until_ready()
        times: list[float] = []
        end = time.perf_counter() + SECONDS
        while len(times) < 3 or time.perf_counter() < end:
            begin = time.perf_counter()
            call(H).block_until_ready()
            times.append(1e3 * (time.perf_counter() - begin))
        found[name] = float(np.median(times))
    return found


def in_process(n: int, threads: int) -> dict[str, float]:
    """`measure` in a fresh process, whose BLAS has so many threads."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.experiments.blas_threads", "--one", str(n)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--busy", action="store_true", help="beside one process that takes a core")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one)))
        return
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.busy else None
    console, cores = Console(width=120), len(os.sched_getaffinity(0))
    table = Table(title=f"LAPACK, ms: 1 thread | {cores}{', a busy neighbour' if busy else ''}")
    table.add_column("n", justify="right")
    try:
        for n in track(SIZES, description="sizes", console=Console(stderr=True)):
            one, all_of_them = in_process(n, 1), in_process(n, cores)
            if not table.rows:
                for name in one:
                    table.add_column(name, justify="right")
            table.add_row(str(n), *(f"{one[name]:.3f} | {all_of_them[name]:.3f}" for name in one))
    finally:
        if busy is not None:
            busy.kill()
    console.print(table)


if __name__ == "__main__":
    main()
