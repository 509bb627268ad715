"""Linear solvers against jax.scipy and lineax: `python -m benchmarks.peers.linear [--size 200]`.

Symmetric positive definite systems with a geometric spectrum, float64, relative tolerance 1e-12, one process. First
call: trace, compile, run, without a persistent cache. Steady call: median of interleaved repetitions. Error against
NumPy's dense solution. lineax is skipped, and named, where it is not installed.
"""

import argparse
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.peers.timing import interleaved
from bilevel.linear import CG, GMRES, Dense, LinearSolver

TOL = 1e-12


def own(solver: LinearSolver) -> Callable:
    """A function (M, b) -> v that solves M v = b by one of our solvers."""
    return lambda M, b: solver.prepare(lambda v: M @ v, b.size, b.dtype)(b, jnp.zeros_like(b)).v


def peers() -> dict[str, Callable]:
    """Such functions by the others' solvers, as far as they are installed, by name."""
    calls: dict[str, Callable] = {
        "jax.scipy cg": lambda M, b: jax.scipy.sparse.linalg.cg(lambda v: M @ v, b, tol=TOL)[0]
    }
    if importlib.util.find_spec("lineax") is not None:
        import lineax as lx

        spd = lambda M: lx.MatrixLinearOperator(M, lx.positive_semidefinite_tag)  # noqa: E731
        cg, gmres = lx.CG(rtol=TOL, atol=0.0), lx.GMRES(rtol=TOL, atol=0.0, restart=50)
        calls["lineax CG"] = lambda M, b: lx.linear_solve(spd(M), b, cg, throw=False).value
        calls["lineax GMRES"] = lambda M, b: lx.linear_solve(lx.MatrixLinearOperator(M), b, gmres, throw=False).value
    return calls


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="linear solvers against jax.scipy and lineax")
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--conditions", type=float, nargs="+", default=[10.0, 1e4])
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    console = Console(width=100)
    if importlib.util.find_spec("lineax") is None:
        console.print("skipped: lineax is not installed (pip install 'bilevax[peers]')")
    calls = {
        "bilevax CG": own(CG(tol=TOL)),
        "bilevax GMRES": own(GMRES(tol=TOL)),
        "bilevax Dense": own(Dense()),
    } | peers()
    for condition in options.conditions:
        rng, n = np.random.default_rng(0), options.size
        Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
        M, b = jnp.asarray((Q * np.geomspace(1, condition, n)) @ Q.T), jnp.asarray(rng.normal(size=n))
        exact = np.linalg.solve(M, b)
        error = lambda _, v, exact=exact: float(np.linalg.norm(v - exact) / np.linalg.norm(exact))  # noqa: E731
        compiled = {name: jax.jit(call) for name, call in calls.items()}
        found = interleaved(compiled, [(M, b)] * options.repeats, error)
        table = Table(title=f"{n} unknowns, condition {condition:g}, float64")
        for column in ("solver", "first call (s)", "steady (ms)", "relative error"):
            table.add_column(column, justify="left" if column == "solver" else "right")
        for name, row in found.items():
            table.add_row(name, f"{row.first:.2f}", f"{1e3 * row.median:.2f}", f"{row.worst:.1e}")
        console.print(table)


if __name__ == "__main__":
    main()
