"""From a start to a good answer: `LBFGS` and `TrustRegion` beside SciPy's L-BFGS-B, jaxopt and first-order solvers.

    python -m benchmarks.peers.exact [--splits 3] [--steps 3000]

30 penalties in [-9, 3], one for each feature, of an l2-logistic regression on the breast cancer data, half of
it for training: F is the loss of the other half. Float64, defaults, from -3 everywhere. LBFGS and TrustRegion run to a
mapping of 1e-8, SciPy to gtol = 1e-8, first-order solvers and Adam (rate 0.05, clipped to the box) on gradients by
jaxopt for so many steps; seconds of the first run, with compiling, and of the next one from the same start; F above the
least that any of them found, by `hypergradient` for all of them. `local_optima` is LBFGS from 16 points of the box.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from scipy import optimize
from sklearn.datasets import load_breast_cancer

import bilevel

LO, HI, DIM = -9.0, 3.0, 30
FIRST_ORDER = ("AID", "SOBA", "F2SA", "StocBiO")


def loss(y, data):
    """The mean logistic loss of the weights y; data: features [n, 30] and labels -1, 1 [n]."""
    return jnp.mean(jnp.logaddexp(0.0, -data[1] * (data[0] @ y)))


def upper(x, y, batch):
    """Of the validation half."""
    return loss(y, batch)


def lower(x, y, batch):
    """Of the training half, with a penalty exp(x_i) for feature i."""
    return loss(y, batch) + jnp.sum(jnp.exp(x) * y**2) / 2


def start(key):
    """Penalties exp(-3), no weights."""
    return jnp.full(DIM, -3.0), jnp.zeros(DIM)


def make(split: int) -> bilevel.BilevelProblem:
    """The problem with the split of that number."""
    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    order = np.random.default_rng(split).permutation(len(labels))
    halves = [bilevel.Full((features[rows], 2.0 * labels[rows] - 1)) for rows in np.array_split(order, 2)]
    return bilevel.BilevelProblem(
        upper, bilevel.Minimize(lower), bilevel.Box(LO, HI), upper_data=halves[1], lower_data=halves[0], init=start
    )


def by_solver(problem: bilevel.BilevelProblem, solver: bilevel.Solver, steps: int) -> tuple[Any, str]:
    """(x, how it ended) of a run."""
    solution = bilevel.solve(
        problem, solver, key=jax.random.key(0), max_steps=steps, every=max(steps // 20, 5), tol=1e-8, progress=False
    )
    return solution.x, f"{solution.status.name}, {solution.stats['steps']} steps"


def by_scipy(problem: bilevel.BilevelProblem) -> Callable[[], tuple[Any, str]]:
    """Its L-BFGS-B, warm-started by nothing: what a user writes first."""
    both = jax.jit(jax.value_and_grad(bilevel.implicit_objective(problem)))

    def run() -> tuple[Any, str]:
        found = optimize.minimize(
            lambda x: tuple(np.asarray(part) for part in both(jnp.asarray(x))), np.full(DIM, -3.0), jac=True,
            method="L-BFGS-B", bounds=[(LO, HI)] * DIM, options={"maxiter": 2000, "ftol": 0.0, "gtol": 1e-8},
        )  # fmt: skip
        return jnp.asarray(found.x), f"{found.nit} iterations, {found.nfev} evaluations"

    return run


def by_starts(problem: bilevel.BilevelProblem) -> tuple[Any, str]:
    """The best of 16 starts, and how many ends there were."""
    found = bilevel.local_optima(
        problem, bilevel.LBFGS(), key=jax.random.key(0), max_steps=500, every=25, tol=1e-8, progress=False
    )
    good = sum(one.count for one in found if one.status == bilevel.Status.CONVERGED)
    return found[0].x, f"{good} of 16 CONVERGED, at {len(found)} places; {found[0].count} at the best"


def by_jaxopt(problem: bilevel.BilevelProblem, steps: int) -> Callable[[], tuple[Any, str]]:
    """Adam on gradients by jaxopt.LBFGS (tol 1e-9) and CG, y warm-started, in one compiled loop."""
    import jaxopt
    from jaxopt.linear_solve import solve_cg

    def solve_adjoint(matvec: Callable, b: Any, init: Any = None, ridge: Any = None) -> Any:
        return solve_cg(matvec, b, tol=1e-9, maxiter=1000)

    train, validation = problem.lower_data.full(), problem.upper_data.full()
    solver = jaxopt.LBFGS(
        lambda y, x: lower(x, y, train), tol=1e-9, maxiter=500, implicit_diff_solve=solve_adjoint, linesearch="zoom"
    )

    def F(x: Any, y: Any) -> tuple[Any, Any]:
        y = solver.run(y, x).params
        return loss(y, validation), y

    rule = optax.adam(0.05)

    @jax.jit
    def loop(x: Any, y: Any) -> Any:
        def step(carry: Any, _: Any) -> tuple[Any, None]:
            x, y, memory = carry
            (_, y), gradient = jax.value_and_grad(F, has_aux=True)(x, y)
            updates, memory = rule.update(gradient, memory, x)
            return (jnp.clip(x + updates, LO, HI), jax.lax.stop_gradient(y), memory), None

        return jax.lax.scan(step, (x, y, rule.init(x)), length=steps)[0][0]

    return lambda: (jax.block_until_ready(loop(*start(None))), f"{steps} steps")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="LBFGS and TrustRegion beside SciPy, jaxopt and first-order solvers")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    table = Table(title="30 penalties of a logistic regression: F less the least found")
    for column in ("split", "method", "F", "F - least", "first run (s)", "again (s)", "end"):
        table.add_column(column, justify="left" if column in ("method", "end") else "right")
    for split in range(options.splits):
        problem = make(split)
        runs: dict[str, Callable[[], tuple[Any, str]]] = {
            "LBFGS": lambda problem=problem: by_solver(problem, bilevel.LBFGS(), 500),
            "TrustRegion": lambda problem=problem: by_solver(problem, bilevel.TrustRegion(), 300),
            "local_optima": lambda problem=problem: by_starts(problem),
            "SciPy L-BFGS-B on implicit_objective": by_scipy(problem),
        }
        if importlib.util.find_spec("jaxopt"):
            runs["Adam on jaxopt's LBFGS + CG"] = by_jaxopt(problem, options.steps)
        for name in FIRST_ORDER:
            solver = getattr(bilevel, name)()
            runs[name] = lambda problem=problem, solver=solver: by_solver(problem, solver, options.steps)
        rows = []
        for name, run in runs.items():
            times = []
            for _ in range(2):
                begin = time.perf_counter()
                x, end = run()
                times.append(time.perf_counter() - begin)
            found = bilevel.hypergradient(problem, x, jnp.zeros(DIM)).checked()
            rows.append((name, float(found.value), *times, end))
        least = np.nanmin([row[1] for row in rows])
        for name, value, first, again, end in rows:
            table.add_row(str(split), name, f"{value:.7f}", f"{value - least:.1e}", f"{first:.1f}", f"{again:.3f}", end)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
