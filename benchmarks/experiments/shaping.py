"""Weights of token-level rewards: Bayesian optimisation, random search and gradients at equal trials.

    python -m benchmarks.experiments.shaping [--seeds 5] [--trials 40] [--discounts 0.7 1]

Family `shaping`: 3 tokens, sequences of 4, four attributions, 8 steps of training. A trial is one training, with or
without its gradient, which takes as long as some three. Rows: one attribution alone, all alike, and

    random      weights drawn evenly from the simplex
    Bayesian    10 random weights, then the most promising of 500 drawn ones by the logarithm of expected improvement
                below a Gaussian process (Matern 5/2, scikit-learn); trials have no noise, so that noisy expected
                improvement is the same
    gradient    `LBFGS` from equal weights, and from others drawn evenly where it has ended

reward: E r after training, as a part of the way from the uniform policy's to the largest, of the best trial; mean and
deviation over seeds. ahead: on how many seeds it is ahead of the best attribution alone, by more than 1e-3.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import erfcx

import bilevel
import problems
from benchmarks.study.compilation import use_quick_compilation
from problems import shaping

FIRST, DRAWN = 10, 500


def log_improvement(z: np.ndarray) -> np.ndarray:
    """The logarithm of phi(z) + z Phi(z), shape of z; below -20 by its asymptote (Ament et al. 2023, equation 9)."""
    log_phi = -(z**2) / 2 - np.log(2 * np.pi) / 2
    near = np.maximum(z, -20)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.log1p(near * np.sqrt(np.pi / 2) * erfcx(-np.minimum(near, 5) / np.sqrt(2)))
        large = np.log(np.exp(log_phi) + z * (1 - np.exp(log_phi) * np.sqrt(np.pi / 2) * erfcx(z / np.sqrt(2))))
    return np.where(z < -20, log_phi - 2 * np.log(np.maximum(-z, 1)), np.where(z > 0, large, log_phi + inside))


def bayesian(F: Callable[[np.ndarray], float], rng: np.random.Generator, trials: int) -> list[float]:
    """The F of each trial."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    X = list(rng.dirichlet(np.ones(4), FIRST))
    found = [F(x) for x in X]
    while len(found) < trials:
        kernel = ConstantKernel(1.0, (1e-3, 1e5)) * Matern(0.5, (5e-2, 20.0), nu=2.5)
        process = GaussianProcessRegressor(kernel, alpha=1e-6, normalize_y=True, n_restarts_optimizer=1, random_state=0)
        with warnings.catch_warnings():  # a fit that stops early, or at a bound, is a fit: trials judge it
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(np.array(X), np.array(found))
        drawn = rng.dirichlet(np.ones(4), DRAWN)
        near = 0.9 * X[int(np.argmin(found))] + 0.1 * drawn[: DRAWN // 2]
        candidates = np.concatenate([drawn[DRAWN // 2 :], near])
        mean, deviation = process.predict(candidates, return_std=True)
        deviation = np.maximum(deviation, 1e-12)
        score = np.log(deviation) + log_improvement((min(found) - mean) / deviation)
        X.append(candidates[int(np.argmax(score))])
        found.append(F(X[-1]))
    return found


def gradient(problem: Any, key: jax.Array, trials: int, rng: np.random.Generator) -> list[float]:
    """The F of the point after each step, as often as the step looked at F."""
    solver, found = bilevel.LBFGS(), []
    start = jax.jit(solver.init)
    step = jax.jit(lambda state, k: bilevel.advance(problem, solver, state, key, k, 1))
    state, k = start(problem, key), 0
    while len(found) < trials:
        before = np.asarray(state.x)
        state, info = step(state, k)
        found += [float(state.value)] * int(np.sum(np.asarray(info.evaluations)))
        k += 1
        if np.abs(np.asarray(state.x) - before).max() < 1e-6:  # ended: from elsewhere
            state, k = start(problem, key)._replace(x=jnp.asarray(rng.dirichlet(np.ones(4)))), 0
    return found[:trials]


def one(seed: int, trials: int, discount: float) -> dict[str, float]:
    """{row: the reward}."""
    instance = problems.make("shaping", seed=seed, discount=discount)
    problem, r = instance.problem, shaping.draw(seed, 3, 4).reward
    compiled = jax.jit(lambda p, x: p.upper(x, shaping.trained(p, x), p.upper_data.full()))
    F = lambda x: float(compiled(problem, jnp.asarray(x)))  # noqa: E731
    rng = np.random.default_rng([3, seed])
    found = {name: F(x) for name, x in zip(shaping.ATTRIBUTIONS, np.eye(4), strict=True)}
    found["all alike"] = F(np.full(4, 0.25))
    found["random"] = min(F(x) for x in rng.dirichlet(np.ones(4), trials))
    found["Bayesian"] = min(bayesian(F, rng, trials))
    found["gradient"] = min(gradient(problem, jax.random.key(seed), trials, rng))
    return {name: (-value - r.mean()) / (r.max() - r.mean()) for name, value in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--discounts", nargs="+", type=float, default=[0.7, 1.0])
    args = parser.parse_args()
    use_quick_compilation()
    jax.config.update("jax_enable_x64", True)
    for discount in args.discounts:
        runs = [one(seed, args.trials, discount) for seed in range(args.seeds)]
        best = [max(run[name] for name in shaping.ATTRIBUTIONS) for run in runs]
        table = Table(title=f"discount {discount:g}, {args.trials} trials, {args.seeds} seeds")
        for heading in ("weights", "reward", "ahead"):
            table.add_column(heading)
        for name in sorted(runs[0], key=lambda name: -np.mean([run[name] for run in runs])):
            numbers = np.array([run[name] for run in runs])
            ahead = sum(a > b + 1e-3 for a, b in zip(numbers, best, strict=True))
            table.add_row(name, f"{numbers.mean():.4f} ± {numbers.std(ddof=1):.4f}", f"{ahead} of {args.seeds}")
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
