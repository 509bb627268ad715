"""Ridge hypergradient against jaxopt and optimistix: `python -m benchmarks.peers.hypergradient [--rows 500]`.

    lower: w(x) = argmin |Z w - t|^2/(2 n) + sum_i exp(x_i) w_i^2/2,   upper: |Z' w - t'|^2/(2 n)

One thread, float64. Each library solves from w = 0 and returns F and grad F. Steady call: median over interleaved
repetitions in one process, each at another x. First call: trace, compile, run, with no persistent cache, in a process
of its own for each library, since whoever is called first also warms up what the others share; the median of `--first`
such processes, taken in turns, imports left out; and the CPU time of it, which other programs hardly change. Error:
worst relative error of the gradient over those x against NumPy's normal equations. A library that is not installed is
named and skipped.
"""

import argparse
import importlib.util
import os
import time

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import bilevel
from benchmarks.peers.timing import interleaved


def upper(x, w, batch):
    """Validation loss."""
    return 0.5 * jnp.mean((batch["Z"] @ w - batch["t"]) ** 2)


def lower(x, w, batch):
    """Training loss with one penalty per feature."""
    return 0.5 * jnp.mean((batch["Z"] @ w - batch["t"]) ** 2) + 0.5 * jnp.sum(jnp.exp(x) * w**2)


def make_data(rows: int, features: int) -> dict[str, dict[str, jax.Array]]:
    """Two Gaussian samples of one linear model with noise, column scales from 0.3 to 3."""
    rng = np.random.default_rng(0)
    truth, scales = rng.normal(size=features), np.geomspace(0.3, 3, features)
    parts = {}
    for name in ("train", "validation"):
        Z = rng.normal(size=(rows, features)) * scales
        parts[name] = {"Z": jnp.asarray(Z), "t": jnp.asarray(Z @ truth + rng.normal(size=rows))}
    return parts


def exact(data: dict, x: np.ndarray) -> np.ndarray:
    """Gradient of F from NumPy's dense normal equations."""
    Z, t = (np.asarray(data["train"][name]) for name in "Zt")
    V, s = (np.asarray(data["validation"][name]) for name in "Zt")
    H = Z.T @ Z / len(t) + np.diag(np.exp(x))
    w = np.linalg.solve(H, Z.T @ t / len(t))
    v = np.linalg.solve(H, V.T @ (V @ w - s) / len(s))
    return -np.exp(x) * w * v


def ours(data: dict, features: int) -> dict[str, Callable]:
    """The certified-by-estimate hypergradient, and jax.grad of the implicit objective."""
    problem = bilevel.BilevelProblem(
        upper=upper,
        lower=bilevel.Minimize(lower),
        upper_data=bilevel.Full(data["validation"]),
        lower_data=bilevel.Full(data["train"]),
        init=lambda key: (jnp.zeros(features), jnp.zeros(features)),
    )

    def certified(x):
        h = bilevel.hypergradient(problem, x).checked()
        return h.value, h.gradient, h.error_bound

    def plain(x):
        return jax.value_and_grad(bilevel.implicit_objective(problem))(x)

    return {"bilevax hypergradient (with error estimate)": certified, "bilevax implicit_objective": plain}


def jaxopt_lbfgs(data: dict, features: int) -> dict[str, Callable]:
    """jaxopt.LBFGS with its implicit differentiation by CG."""
    import jaxopt
    from jaxopt.linear_solve import solve_cg

    solver = jaxopt.LBFGS(
        fun=lambda w, x: lower(x, w, data["train"]),
        tol=1e-11,
        maxiter=1000,
        implicit_diff=True,
        implicit_diff_solve=lambda matvec, b: solve_cg(matvec, b, tol=1e-12, maxiter=1000),
    )

    def call(x):
        return jax.value_and_grad(lambda x: upper(x, solver.run(jnp.zeros(features), x).params, data["validation"]))(x)

    return {"jaxopt LBFGS + CG": call}


def optimistix_lbfgs(data: dict, features: int) -> dict[str, Callable]:
    """optimistix.LBFGS, with lineax.CG for the adjoint: the variant that compiles and runs fastest of those tried.

    Its L-BFGS ends near 4e-8 at any tolerance, since it compares values of g. A second row brings it to the accuracy
    asked for with optimistix's own Newton root finder, from the L-BFGS solution.
    """
    import lineax as lx
    import optimistix as optx

    solver = optx.LBFGS(rtol=1e-11, atol=1e-11)
    newton = optx.Newton(rtol=1e-13, atol=1e-13)

    def residual(w, x):
        return jax.grad(lower, 1)(x, w, data["train"])

    def call(x, polish):
        def objective(x):
            # minimise's own adjoint does not tag its Hessian as positive definite, which lineax.CG asks for; the root
            # of the gradient, from the L-BFGS solution, is the documented way to choose the linear solver.
            at = jax.lax.stop_gradient(x)
            found = optx.minimise(
                lambda w, x: lower(x, w, data["train"]), solver, jnp.zeros(features), at, max_steps=5000, throw=False
            ).value
            if polish:
                found = optx.root_find(residual, newton, found, at, max_steps=20, throw=False).value
            w = jax.lax.custom_root(
                lambda w: residual(w, x),
                jax.lax.stop_gradient(found),
                lambda _, w: w,
                lambda matvec, b: lx.linear_solve(
                    lx.FunctionLinearOperator(matvec, jax.eval_shape(lambda: b), lx.positive_semidefinite_tag),
                    b, lx.CG(rtol=1e-12, atol=1e-12), throw=False,
                ).value,
            )  # fmt: skip
            return upper(x, w, data["validation"])

        return jax.value_and_grad(objective)(x)

    return {
        "optimistix LBFGS + lineax CG": partial(call, polish=False),
        "optimistix LBFGS + Newton + lineax CG": partial(call, polish=True),
    }


MAKERS = {"jaxopt": jaxopt_lbfgs, "optimistix": optimistix_lbfgs, "bilevax": ours}


def prepared(rows: int, features: int) -> dict:
    """The data, with the runtime started and SciPy, which JAX takes LAPACK from, imported: nobody's first call."""
    import scipy.linalg  # noqa: F401

    jax.config.update("jax_enable_x64", True)
    data = make_data(rows, features)
    jax.block_until_ready(jax.jit(lambda a: a @ a.T)(data["train"]["Z"]))
    return data


def first_call(name: str, rows: int, features: int, x: np.ndarray) -> tuple[float, float]:
    """Seconds of the first call of `name`, by the clock and of CPU time; meant for a fresh process."""
    data = prepared(rows, features)
    call = MAKERS[name.split()[0]](data, features)[name]
    begin, used = time.perf_counter(), time.process_time()
    jax.block_until_ready(jax.jit(call)(jnp.asarray(x)))
    return time.perf_counter() - begin, time.process_time() - used


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--first", type=int, default=5, help="fresh processes for each first call")
    options = parser.parse_args()
    data = prepared(options.rows, options.features)

    console = Console(width=120)
    calls: dict[str, Callable] = {}
    for needs, make in MAKERS.items():
        if importlib.util.find_spec(needs if needs != "bilevax" else "bilevel") is None:
            console.print(f"skipped: {needs} is not installed (pip install 'bilevax[peers]')")
            continue
        calls |= make(data, options.features)
    rng = np.random.default_rng(1)
    points = [rng.normal(size=options.features) - 3 for _ in range(options.repeats)]
    first: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(options.first):
        for name in calls:
            # one process lives for one call
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                first[name].append(process.submit(first_call, name, options.rows, options.features, points[0]).result())
    compiled, truths = {name: jax.jit(call) for name, call in calls.items()}, [exact(data, x) for x in points]

    def error(k: int, out: tuple) -> float:
        return float(np.linalg.norm(np.asarray(out[1]) - truths[k]) / np.linalg.norm(truths[k]))

    found = interleaved(compiled, [(jnp.asarray(x),) for x in points], error)
    table = Table(title=f"Ridge hypergradient, {options.rows} rows, {options.features} penalties, float64, one thread")
    for column in ("library", "first call (s)", "its CPU time (s)", "steady (ms)", "worst relative error"):
        table.add_column(column, justify="left" if column == "library" else "right")
    for name in calls:
        row = found[name]
        clock, cpu = np.median(first[name], axis=0)
        table.add_row(name, f"{clock:.2f}", f"{cpu:.2f}", f"{1e3 * row.median:.2f}", f"{row.worst:.1e}")
    console.print(table)


if __name__ == "__main__":
    main()
