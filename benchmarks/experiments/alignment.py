"""Alignment from demonstrations, exactly: one likelihood, or rounds of rewards from pairs, and where the anchor is.

    python -m benchmarks.experiments.alignment [--seeds 5] [--demonstrations 300] [--beta 2] [--rounds 8]

Family `alignment`, 8 tokens, up to 4 of them, 2801 sequences, rewards linear in 6 features among which the true one is.
Expectations over policies are exact, demonstrations are samples. Everything starts from ref, the chain that the expert
departed from, or from SFT, the Markov chain of greatest likelihood on the demonstrations, which is what one has where
the expert's origin is not known. Rows:

    IRL       max over x of E_D log pi_x, `LBFGS` on the bilevel problem
    1 round   the reward that tells D from the start (Bradley-Terry), and the policy for it
    fixed     so many rounds, each reward fresh, each policy tied to the start by beta KL
    moving    the same, each policy tied to the last one; kept: with the pairs of earlier rounds

true reward: of the way from ref's to the expert's; KL(expert | pi); KL(pi | start); ranking by the last reward, and by
beta log(pi/start), of pairs from ref, 0.5 by chance. Mean and deviation over seeds.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import bilevel
import problems
from benchmarks.study.compilation import use_quick_compilation
from bilevel import Full
from problems import alignment

PENALTY = 1e-4


def bradley_terry(features: np.ndarray, D: np.ndarray, m: np.ndarray) -> np.ndarray:
    """The linear reward [N] that tells D from m, by Newton's method on E -log sigmoid(r(s) - r(s')) + PENALTY |x|^2."""
    F, both = features[D > 0], D[D > 0][:, None] * m[None]

    def look(x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The loss [], its gradient [K] and its Hessian [K, K]."""
        right = 1 / (1 + np.exp((features @ x)[None] - (F @ x)[:, None]))
        value = -float(np.sum(both * np.log(np.maximum(right, 1e-300)))) + PENALTY * x @ x
        wrong, bend = both * (1 - right), both * right * (1 - right)
        slope = wrong.sum(axis=0) @ features - wrong.sum(axis=1) @ F + 2 * PENALTY * x
        cross = F.T @ bend @ features
        curvature = (F.T * bend.sum(axis=1)) @ F + (features.T * bend.sum(axis=0)) @ features - cross - cross.T
        return float(value), slope, curvature + 2 * PENALTY * np.eye(len(x))

    x, (value, slope, curvature) = np.zeros(features.shape[1]), look(np.zeros(features.shape[1]))
    for _ in range(50):
        if np.abs(slope).max() <= 1e-9:
            return features @ x
        direction, t = np.linalg.solve(curvature, slope), 1.0
        while (after := look(x - t * direction))[0] > value and t > 1e-6:
            t /= 2
        x, (value, slope, curvature) = x - t * direction, after
    raise RuntimeError(f"the reward is not fitted: |gradient| is {np.abs(slope).max():.1e}")


def likelihood(instance: Any, world: alignment.World, log_start: np.ndarray) -> np.ndarray:
    """The reward [N] of greatest likelihood with the policy tied to `log_start`."""
    data = instance.problem.lower_data.full()
    lower = Full({**data, "log_ref": jnp.asarray(log_start)})
    problem = dataclasses.replace(instance.problem, lower_data=lower)
    solution = bilevel.solve(problem, bilevel.LBFGS(), key=jax.random.key(0), max_steps=100, every=50, tol=1e-7)
    if solution.status != bilevel.Status.CONVERGED:
        raise RuntimeError(str(solution))
    return world.features @ np.asarray(solution.x)


def one(seed: int, demonstrations: int, beta: float, count: int) -> dict[str, dict[str, float]]:
    """{row: its numbers}."""
    instance = problems.make("alignment", seed=seed, beta=beta, demonstrations=demonstrations)
    world = alignment.draw(seed, 8, 4, 6, beta)
    D = alignment.shown(world, beta, demonstrations, seed)
    true = world.features @ world.x
    starts = {"ref": world.log_ref, "SFT": alignment.fitted_chain(world, D * demonstrations)}
    found = {}

    def judged(log_pi: np.ndarray, log_start: np.ndarray, r: np.ndarray | None) -> dict[str, float]:
        numbers = alignment.judge(world, beta, log_pi, r)
        pi = np.exp(log_pi)
        numbers["start_kl"] = float(pi @ (log_pi - log_start))
        if r is not None:
            numbers["implied"] = alignment.ranking(log_pi - log_start, true, world.log_ref)
        return numbers

    fit = lambda D, m: bradley_terry(world.features, D, m)  # noqa: E731
    for start, log_start in starts.items():
        found[f"{start}, nothing more"] = judged(log_start, log_start, None)
        r = likelihood(instance, world, log_start)
        found[f"{start}, IRL"] = judged(alignment.tilted(log_start, r, beta), log_start, r)
        for moving in (False, True):
            for kept in (False, True):
                ends = alignment.rounds(log_start, D, fit, beta, count, moving=moving, kept=kept)
                name = f"{start}, {count} rounds, {'moving' if moving else 'fixed'}{', kept' if kept else ''}"
                found[name] = judged(ends[-1].log_pi, log_start, ends[-1].reward)
        found[f"{start}, 1 round"] = judged(ends[0].log_pi, log_start, ends[0].reward)
    return found


def show(title: str, runs: Sequence[Mapping[str, Mapping[str, float]]], columns: Sequence[str]) -> None:
    """A table of mean and deviation over `runs`, {row: its numbers} each; the row nearest to the expert first."""
    table = Table(title=title)
    for heading in ("method", *columns):
        table.add_column(heading)
    for name in sorted(runs[0], key=lambda name: np.mean([run[name]["expert_kl"] for run in runs])):
        cells = []
        for column in columns:
            numbers = np.array([run[name].get(column, np.nan) for run in runs])
            cells.append("" if np.isnan(numbers).all() else f"{numbers.mean():.3f} ± {numbers.std(ddof=1):.3f}")
        table.add_row(name, *cells)
    Console(width=130).print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--demonstrations", type=int, default=300)
    parser.add_argument("--beta", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    use_quick_compilation()
    jax.config.update("jax_enable_x64", True)
    runs = [one(seed, args.demonstrations, args.beta, args.rounds) for seed in range(args.seeds)]
    title = f"{args.demonstrations} demonstrations, beta {args.beta:g}, {args.seeds} seeds"
    show(title, runs, ("true_reward", "expert_kl", "start_kl", "ranking", "implied"))


if __name__ == "__main__":
    main()
