"""Constrained lower level, solve and gradient, against qpax, jaxopt and cvxpylayers: `python -m
benchmarks.peers.constrained`.

    lower: y(x) = argmin y'H y/2 + (G x + c)'y  over  A y + B x <= b,    upper: t'y + |y|^2/2

One process, one thread (calls run in the thread that makes them, and XLA schedules for one), float64; 50 unknowns, 30
rows, 10 parameters x; about half of the rows active. Each library returns F and grad F. Times are CPU time, medians and
minima over repetitions, each at another x near the last, the libraries in turn:

- steady: 20 calls from Python in a row before the next library's turn, as in a loop of calls;
- alone: one call a turn, so that the others' work has emptied the caches;
- loop: inside one compiled loop, as a solver's steps are, with g_yy moving with x, so that nothing of it is left to do
  outside of the loop; "warm" starts here from the last step's y.

"warm" starts from the solution and active set at x = 0; "factors kept" also from its factors
(`PolyhedralSolution.warm`), which do not depend on x except in the loop, where refinement makes up for that. A call
that does nothing is in the table, since dispatch counts for all, and a Cholesky factor of H with two triangular solves.
Error: worst relative error of the gradient over those x against NumPy's dense KKT system on the active rows. Then 256
perturbations q of g (g + q'y) by vmap.

qpax runs with its default tolerances, and with the tight ones where its gradient was found to be the most exact (1e-10,
target_kappa 1e-8: tighter ones are no more exact). A library that is not installed is named and skipped; cvxpylayers'
JAX layer runs outside of jit, and so in the first table only.
"""

import argparse
import importlib.util
import os

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import bilevel
from benchmarks.peers.timing import Measured, interleaved
from bilevel.lower import Warm, polyhedral

DIM_X = 10


def upper(x, y, batch):
    """Upper level t'y + |y|^2/2, shape []."""
    return batch["t"] @ y + 0.5 * jnp.sum(y**2)


def lower(x, y, batch):
    """Lower level y'H y/2 + (G x + c)'y, shape []."""
    return 0.5 * y @ batch["H"] @ y + (batch["G"] @ x + batch["c"]) @ y


def perturbed(x, y, batch):
    """`lower` with its linear term moved by the parameter x, shaped like y."""
    return 0.5 * y @ batch["H"] @ y + (x + batch["c"]) @ y


def make_data(n: int, rows: int, seed: int = 0) -> tuple[dict, tuple]:
    """Random g and rows, half of which are active at x = 0 with multipliers in [0.1, 1]."""
    rng = np.random.default_rng(seed)
    Z, A = rng.normal(size=(n, n)) / np.sqrt(n), rng.normal(size=(rows, n)) / np.sqrt(n)
    y, lam = rng.normal(size=n), np.where(np.arange(rows) % 2 == 0, rng.uniform(0.1, 1, rows), 0)
    H = Z @ Z.T + 0.1 * np.eye(n)
    b = A @ y + np.where(lam > 0, 0, rng.uniform(0.1, 1, rows))
    data = {"H": H, "G": rng.normal(size=(n, DIM_X)), "c": -H @ y - A.T @ lam, "t": rng.normal(size=n)}
    return jax.tree.map(jnp.asarray, data), (
        jnp.asarray(A),
        jnp.asarray(rng.normal(size=(rows, DIM_X))),
        jnp.asarray(b),
    )


def make_problem(data: dict, rows: tuple, g: Callable = lower, dim_x: int = DIM_X) -> bilevel.BilevelProblem:
    """The bilevel problem of the data."""
    n, full = len(data["c"]), bilevel.Full(data)
    coupling = bilevel.LinearCoupling(rows[0], jnp.zeros((len(rows[2]), dim_x)) if g is perturbed else rows[1], rows[2])
    init = lambda key: (jnp.zeros(dim_x), jnp.zeros(n))  # noqa: E731
    return bilevel.BilevelProblem(
        upper, bilevel.Minimize(g), coupling=coupling, upper_data=full, lower_data=full, init=init
    )


def exact(data: dict, rows: tuple, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The gradient of F from the dense KKT system on the rows that y holds with equality.

    Raises:
        RuntimeError: where these rows do not give the lower level's solution, so that this is no truth.
    """
    A, B, b = map(np.asarray, rows)
    active = np.abs(A @ y + B @ x - b) <= 1e-9
    A, B = A[active], B[active]
    H, G, c = (np.asarray(data[name]) for name in "HGc")
    M = np.block([[H, A.T], [A, np.zeros((len(A), len(A)))]])
    found = np.linalg.solve(M, np.append(-G @ x - c, b[active] - B @ x))
    y, lam = found[: len(y)], found[len(y) :]
    outside = float(np.max(np.asarray(rows[0]) @ y + np.asarray(rows[1]) @ x - b))
    if not (np.isfinite(found).all() and outside <= 1e-9 and (lam >= -1e-9).all()):
        raise RuntimeError(f"no truth: constraints are off by {outside:.1e}, multipliers by {-min(lam, default=0):.1e}")
    uv = np.linalg.solve(M, np.append(np.asarray(data["t"]) + y, np.zeros(len(A))))
    return -G.T @ uv[: len(y)] - B.T @ uv[len(y) :]


def bilevax_step(rows: tuple, warm: Warm | None = None, estimate: bool = False) -> Callable:
    """Step: (data, x, warm start y) -> (F, grad F, y) by `bilevel.hypergradient`."""

    def step(data, x, y):
        h = bilevel.hypergradient(make_problem(data, rows), x, y, warm=warm, estimate=estimate).checked()
        return h.value, h.gradient, h.y

    return step


def floor_step(data, x, y):
    """What no method with a new H avoids: its Cholesky factor and two triangular solves."""
    factor = jax.lax.linalg.cholesky(data["H"], symmetrize_input=False)
    return x[0], x, jax.scipy.linalg.cho_solve((factor, True), data["G"] @ x + data["c"])


def qpax_call(data: dict, rows: tuple, **settings: Any) -> Callable:
    """Value and gradient by qpax."""
    import qpax

    A, B, b = rows
    none = jnp.zeros((0, A.shape[1])), jnp.zeros(0)

    def F(x):
        y = qpax.solve_qp_primal(data["H"], data["G"] @ x + data["c"], *none, A, b - B @ x, **settings)
        return upper(x, y, data)

    return jax.value_and_grad(F)


def jaxopt_call(data: dict, rows: tuple) -> Callable:
    """Value and gradient by jaxopt.OSQP with its implicit differentiation."""
    import jaxopt

    A, B, b = rows
    solver = jaxopt.OSQP(tol=1e-8, maxiter=20_000)

    def F(x):
        found = solver.run(params_obj=(data["H"], data["G"] @ x + data["c"]), params_ineq=(A, b - B @ x))
        return upper(x, found.params.primal, data)

    return jax.value_and_grad(F)


def cvxpylayers_call(data: dict, rows: tuple) -> Callable:
    """Value and gradient by cvxpylayers' JAX layer."""
    import cvxpy as cp
    from cvxpylayers.jax import CvxpyLayer

    A, B, b = rows
    y, linear, bound = cp.Variable(A.shape[1]), cp.Parameter(A.shape[1]), cp.Parameter(len(b))
    objective = 0.5 * cp.quad_form(y, cp.psd_wrap(np.asarray(data["H"]))) + linear @ y
    layer = CvxpyLayer(cp.Problem(cp.Minimize(objective), [np.asarray(A) @ y <= bound]), [linear, bound], [y])
    return jax.value_and_grad(lambda x: upper(x, layer(data["G"] @ x + data["c"], b - B @ x)[0], data))


def median_ms(found: Measured) -> str:
    """Median and minimum in milliseconds."""
    return f"{1e3 * found.median:.3f} ({1e3 * found.least:.3f})"


def single(console: Console, n: int, rows_count: int, repeats: int) -> None:
    """The table of single solves and gradients."""
    data, rows = make_data(n, rows_count)
    y0 = jnp.zeros(n)
    found = jax.jit(polyhedral.solve)(make_problem(data, rows), jnp.zeros(DIM_X), y0, data)
    start = found.y  # NaN, and all of the table with it, where it is not solved
    steps: dict[str, Callable] = {}
    tight = {"solver_tol": 1e-10, "target_kappa": 1e-8}
    if importlib.util.find_spec("qpax"):
        steps["qpax, default"] = lambda data, x, y: (*qpax_call(data, rows)(x), y)
        steps["qpax, tight"] = lambda data, x, y: (*qpax_call(data, rows, **tight)(x), y)
    if importlib.util.find_spec("jaxopt"):
        steps["jaxopt OSQP"] = lambda data, x, y: (*jaxopt_call(data, rows)(x), y)
    steps["bilevax, cold"] = lambda data, x, y: (*bilevax_step(rows)(data, x, y0)[:2], y)
    steps["bilevax, cold, error estimate"] = lambda data, x, y: (*bilevax_step(rows, None, True)(data, x, y0)[:2], y)
    steps["bilevax, warm"] = bilevax_step(rows, Warm(found.active))
    steps["bilevax, warm, factors kept"] = bilevax_step(rows, found.warm())
    steps["a call that does nothing"] = lambda data, x, y: (jnp.sum(x), x, y)
    steps["Cholesky of H, two solves"] = floor_step
    calls: dict[str, Callable] = {
        name: jax.jit(lambda x, step=step: step(data, x, start)) for name, step in steps.items()
    }
    if importlib.util.find_spec("cvxpylayers"):
        calls["cvxpylayers (no jit)"] = cvxpylayers_call(data, rows)
    for name in ("qpax", "jaxopt", "cvxpylayers"):
        if not importlib.util.find_spec(name):
            console.print(f"skipped: {name} is not installed")
    points = [1e-3 * np.random.default_rng(k).normal(size=DIM_X) for k in range(repeats)]
    solve = jax.jit(polyhedral.solve)
    problem = make_problem(data, rows)
    truths = [exact(data, rows, x, np.asarray(solve(problem, jnp.asarray(x), y0, data).y)) for x in points]

    def error(k: int, out: tuple) -> float:
        return float(np.linalg.norm(out[1] - truths[k]) / np.linalg.norm(truths[k]))

    at = [(jnp.asarray(x),) for x in points]
    alone = interleaved(calls, at, error, clock=time.process_time)
    steady = interleaved(calls, at, in_a_row=20, clock=time.process_time)

    def loop(step: Callable) -> Callable:
        def body(y, at):
            x, scale = at
            value, gradient, y = step(data | {"H": scale * data["H"]}, x, y)
            return y, (value, gradient)

        return jax.jit(lambda points, scales: jax.lax.scan(body, start, (points, scales)))

    scales = jnp.asarray(1 + 1e-3 * np.random.default_rng(0).normal(size=repeats))
    turns = [(jnp.asarray(points), scales)] * (1 + repeats // 10)
    looped = interleaved({name: loop(step) for name, step in steps.items()}, turns, clock=time.process_time)
    for row in looped.values():
        row.seconds = [seconds / repeats for seconds in row.seconds]
    table = Table(title=f"Solve and gradient, {n} unknowns, {rows_count} rows, float64, one thread; CPU time, ms")
    for column in ("library", "first call (s)", "steady: median (min)", "alone", "loop", "worst relative error"):
        table.add_column(column, justify="left" if column == "library" else "right")
    for name in calls:
        inside = median_ms(looped[name]) if name in looped else "-"
        shown = "-" if name in list(steps)[-2:] else f"{alone[name].worst:.1e}"
        table.add_row(name, f"{alone[name].first:.2f}", median_ms(steady[name]), median_ms(alone[name]), inside, shown)
    console.print(table)


def many(console: Console, n: int, rows_count: int, repeats: int, number: int = 256) -> None:
    """`number` perturbations q of g by vmap: y_q and the gradient in q."""
    data, rows = make_data(n, rows_count)
    problem = make_problem(data, rows, perturbed, n)
    draws = jnp.asarray(0.05 * np.random.default_rng(0).normal(size=(number, n)))
    y0 = jnp.zeros(n)
    found = jax.jit(polyhedral.solve)(problem, jnp.zeros(n), y0, data)
    warm = Warm(found.active)
    one = lambda q: bilevel.hypergradient(problem, q, found.y, warm=warm, estimate=False).checked().gradient  # noqa: E731
    calls = {"bilevax": jax.jit(jax.vmap(one))}
    if importlib.util.find_spec("qpax"):
        shifted = lambda q: data | {"G": jnp.eye(n)}  # noqa: E731
        rest = (rows[0], jnp.zeros((rows_count, n)), rows[2])
        for name, more in (("qpax, default", {}), ("qpax, tight", {"solver_tol": 1e-10, "target_kappa": 1e-8})):
            calls[name] = jax.jit(jax.vmap(lambda q, more=more: qpax_call(shifted(q), rest, **more)(q)[1]))
    measured = interleaved(calls, [(draws * (1 + 1e-6 * k),) for k in range(repeats)], clock=time.process_time)
    table = Table(title=f"{number} perturbations by vmap, {n} unknowns, {rows_count} rows")
    table.add_column("library")
    table.add_column("CPU time: median (minimum), ms", justify="right")
    for name, row in measured.items():
        table.add_row(name, median_ms(row))
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=101)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    console = Console(width=120)
    single(console, 50, 30, options.repeats)
    for n, rows_count in ((10, 8), (50, 20)):
        many(console, n, rows_count, max(3, options.repeats // 10))


if __name__ == "__main__":
    main()
