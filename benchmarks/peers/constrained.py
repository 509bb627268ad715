"""Constrained lower level, solve and gradient, against qpax, jaxopt and cvxpylayers: `python -m
benchmarks.peers.constrained`.

    lower: y(x) = argmin y'H y/2 + (G x + c)'y  over  A y + B x <= b,    upper: t'y + |y|^2/2

One process, one thread, float64; 50 unknowns, 30 rows, 10 parameters x; about half of the rows active. Each library
returns F and grad F. Calls from Python: median and minimum over interleaved repetitions, each at another x near the
last; a call that does nothing is in the table, since dispatch counts for all. Then the same inside one compiled loop
over these x, as a solver's steps are. "warm" starts from the solution and active set at x = 0; "factors kept" also from
its factors (`PolyhedralSolution.kept`), which do not depend on x. Error: worst relative error of the gradient over
those x against NumPy's dense KKT system on the active rows. Then 256 perturbations q of g (g + q'y) by vmap.

qpax runs with its default tolerances, and with the tight ones where its gradient was found to be the most exact (1e-10,
target_kappa 1e-8: tighter ones are no more exact). A library that is not installed is named and skipped; cvxpylayers'
JAX layer runs outside of jit, and so in the first table only.
"""

import argparse
import importlib.util
import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import bilevel
from benchmarks.peers.timing import Measured, interleaved
from bilevel import polyhedral

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
    """Grad F from the dense KKT system on the rows that y holds with equality."""
    A, B, b = map(np.asarray, rows)
    active = np.abs(A @ y + B @ x - b) <= 1e-9
    A, B = A[active], B[active]
    H, G, c = (np.asarray(data[name]) for name in "HGc")
    M = np.block([[H, A.T], [A, np.zeros((len(A), len(A)))]])
    y = np.linalg.solve(M, np.append(-G @ x - c, b[active] - B @ x))[: len(y)]
    uv = np.linalg.solve(M, np.append(np.asarray(data["t"]) + y, np.zeros(len(A))))
    return -G.T @ uv[: len(y)] - B.T @ uv[len(y) :]


def gradient_of(problem: bilevel.BilevelProblem, y0: jax.Array) -> Callable:
    """Value and gradient by `bilevel.hypergradient`, cold."""

    def call(x):
        h = bilevel.hypergradient(problem, x, y0, estimate=False)
        return h.value, h.gradient

    return call


def qpax_call(data: dict, rows: tuple, **settings: float) -> Callable:
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
    problem = make_problem(data, rows)
    calls: dict[str, Callable] = {}
    if importlib.util.find_spec("qpax"):
        calls["qpax, default"] = jax.jit(qpax_call(data, rows))
        calls["qpax, tight"] = jax.jit(qpax_call(data, rows, solver_tol=1e-10, target_kappa=1e-8))
    if importlib.util.find_spec("jaxopt"):
        calls["jaxopt OSQP"] = jax.jit(jaxopt_call(data, rows))
    if importlib.util.find_spec("cvxpylayers"):
        calls["cvxpylayers (no jit)"] = cvxpylayers_call(data, rows)
    for name in ("qpax", "jaxopt", "cvxpylayers"):
        if not importlib.util.find_spec(name):
            console.print(f"skipped: {name} is not installed")
    y0 = jnp.zeros(n)
    slope = lambda h: (h.value, h.gradient)  # noqa: E731
    calls["bilevax, cold"] = jax.jit(lambda x: slope(bilevel.hypergradient(problem, x, y0, estimate=False)))
    calls["bilevax, cold, error estimate"] = jax.jit(lambda x: slope(bilevel.hypergradient(problem, x, y0)))
    found = jax.jit(polyhedral.solve)(problem, jnp.zeros(DIM_X), y0, data)
    settings = polyhedral.ActiveSet(start=found.active)
    calls["bilevax, warm"] = jax.jit(
        lambda x: slope(bilevel.hypergradient(problem, x, found.y, lower=settings, estimate=False))
    )
    kept = found.kept()
    calls["bilevax, warm, factors kept"] = jax.jit(
        lambda x: slope(bilevel.hypergradient(problem, x, found.y, lower=kept, estimate=False))
    )
    calls["a call that does nothing"] = jax.jit(lambda x: (jnp.sum(x), x))
    points = [1e-3 * np.random.default_rng(k).normal(size=DIM_X) for k in range(repeats)]
    solve = jax.jit(polyhedral.solve)
    truths = [exact(data, rows, x, np.asarray(solve(problem, jnp.asarray(x), y0, data).y)) for x in points]

    def error(k: int, out: tuple) -> float:
        return float(np.linalg.norm(out[1] - truths[k]) / np.linalg.norm(truths[k]))

    measured = interleaved(calls, [(jnp.asarray(x),) for x in points], error)
    loops = {name: jax.jit(partial(jax.lax.map, call)) for name, call in calls.items() if "no jit" not in name}
    looped = interleaved(loops, [(jnp.asarray(points),)] * (1 + repeats // 5))
    for row in looped.values():
        row.seconds = [seconds / repeats for seconds in row.seconds]
    table = Table(title=f"Solve and gradient, {n} unknowns, {rows_count} rows, float64, one thread")
    for column in ("library", "first call (s)", "call: median (min), ms", "in a loop, ms", "worst relative error"):
        table.add_column(column, justify="left" if column == "library" else "right")
    for name, row in measured.items():
        inside = median_ms(looped[name]) if name in looped else "-"
        shown = "-" if "nothing" in name else f"{row.worst:.1e}"
        table.add_row(name, f"{row.first:.2f}", median_ms(row), inside, shown)
    console.print(table)


def many(console: Console, n: int, rows_count: int, repeats: int, number: int = 256) -> None:
    """`number` perturbations q of g by vmap: y_q and the gradient in q."""
    data, rows = make_data(n, rows_count)
    problem = make_problem(data, rows, perturbed, n)
    draws = jnp.asarray(0.05 * np.random.default_rng(0).normal(size=(number, n)))
    y0 = jnp.zeros(n)
    found = jax.jit(polyhedral.solve)(problem, jnp.zeros(n), y0, data)
    settings = polyhedral.ActiveSet(start=found.active)
    one = lambda q: bilevel.hypergradient(problem, q, found.y, lower=settings, estimate=False).gradient  # noqa: E731
    calls = {"bilevax": jax.jit(jax.vmap(one))}
    if importlib.util.find_spec("qpax"):
        shifted = lambda q: data | {"G": jnp.eye(n)}  # noqa: E731
        rest = (rows[0], jnp.zeros((rows_count, n)), rows[2])
        for name, more in (("qpax, default", {}), ("qpax, tight", {"solver_tol": 1e-10, "target_kappa": 1e-8})):
            calls[name] = jax.jit(jax.vmap(lambda q, more=more: qpax_call(shifted(q), rest, **more)(q)[1]))
    measured = interleaved(calls, [(draws * (1 + 1e-6 * k),) for k in range(repeats)])
    table = Table(title=f"{number} perturbations by vmap, {n} unknowns, {rows_count} rows")
    table.add_column("library")
    table.add_column("steady: median (minimum), ms", justify="right")
    for name, row in measured.items():
        table.add_row(name, median_ms(row))
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=101)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console(width=120)
    single(console, 50, 30, options.repeats)
    for n, rows_count in ((10, 8), (50, 20)):
        many(console, n, rows_count, max(3, options.repeats // 10))


if __name__ == "__main__":
    main()
