"""MLIRL, MCEIRL and NeuralIRL with nothing set, on drawn MDPs: how far F is from its least after 3000 steps.

    python -m benchmarks.experiments.irl_defaults --count 200
    python -m benchmarks.experiments.irl_defaults --count 40 --solver MCEIRL --steps 300
    python -m benchmarks.experiments.irl_defaults --count 40 --rollouts 10
    python -m benchmarks.experiments.irl_defaults --count 40 --solver NeuralIRL --rollouts 25

The expert's occupancy is exact, so that F is least at its own reward. A run counts as good where F - F* <= 1e-2; with
rollouts (NeuralIRL: transitions) where the median of five keys is at most 1e-2 max(1, F(x0) - F*). Sizes are of a short
list, so that few programs are compiled.
"""

import argparse
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
import irl
from irl.tabular import diagnostics


class Drawn(NamedTuple):
    """An MDP with a linear reward and an expert in it."""

    mdp: irl.MDP
    reward: irl.LinearReward
    x: jax.Array
    """The expert's reward."""
    c: jax.Array
    """Its exact occupancy."""


def draw(seed: int, sizes: tuple[int, int] | None = None, discount: float | None = None) -> Drawn:
    """2 to 20 states, 2 or 4 actions, few or many successors; a reward of each state or of 4 features, mild or wild."""
    rng = np.random.default_rng(seed)
    S, A = (int(rng.choice([2, 5, 10, 20])), int(rng.choice([2, 4]))) if sizes is None else sizes
    gamma = float(rng.choice([0.5, 0.8, 0.9, 0.95, 0.99])) if discount is None else discount
    P, successors = np.zeros((S, A, S)), int(rng.integers(1, min(S, 5) + 1))
    for s, a in np.ndindex(S, A):
        P[s, a, rng.choice(S, successors, replace=False)] = rng.dirichlet(np.ones(successors))
    by_state = np.broadcast_to(np.eye(S)[:, None], (S, A, S))
    features = by_state if rng.uniform() < 0.5 else rng.normal(size=(S, A, 4))
    K = features.shape[-1]
    x = jnp.asarray(rng.uniform(size=K) if rng.uniform() < 0.5 else 2 * rng.normal(size=K))
    mdp, reward = irl.MDP.dense(P, np.full(S, 1 / S), gamma), irl.LinearReward.of(features)
    return Drawn(mdp, reward, x, irl.occupancy(mdp, irl.policy(irl.value_iteration(mdp, reward.table(x)).Q)))


@functools.partial(jax.jit, static_argnames="num_steps")
def gaps(
    problem: irl.TabularImitation, solver: bilevel.Solver, x: jax.Array, key: jax.Array, num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """F - F* at the start and after `num_steps` steps."""
    start = solver.init(problem, key)
    end = solver.output(problem, bilevel.advance(problem, solver, start, key, 0, num_steps)[0])[0]
    least = diagnostics.objective(problem, x)
    return diagnostics.objective(problem, start.x) - least, diagnostics.objective(problem, end) - least


def default(name: str, rollouts: int | None, discount: float) -> bilevel.Solver:
    """The solver of that name with nothing set, with `rollouts` trajectories or transitions a step where given."""
    if name == "MCEIRL":
        return irl.MCEIRL()
    if name == "NeuralIRL":
        return irl.NeuralIRL(num_transitions=rollouts)
    far = math.ceil(5 / (1 - discount))
    return irl.MLIRL() if rollouts is None else irl.MLIRL(num_rollouts=rollouts, rollout_length=far)


def main() -> None:
    """Print a line for each MDP that does not come out well, and how many do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--solver", choices=("MLIRL", "MCEIRL", "NeuralIRL"), default="MLIRL")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--rollouts", type=int, help="trajectories a step of MLIRL, transitions of NeuralIRL; default: exact"
    )
    chosen = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    ends, good = [], 0
    for seed in range(chosen.count):
        drawn = draw(seed)
        sampled = chosen.rollouts is not None
        solver = default(chosen.solver, chosen.rollouts, float(drawn.mdp.discount))
        objective = "surrogate" if sampled else "likelihood"
        problem = irl.to_bilevel(drawn.mdp, drawn.c, drawn.reward, objective=objective)
        keys = [jax.random.key(k) for k in range(5 if sampled else 1)]
        found = np.array([gaps(problem, solver, drawn.x, key, chosen.steps) for key in keys])
        start, end = np.median(found, axis=0)
        enough = end <= 1e-2 * (max(1.0, start) if sampled else 1.0)
        good += enough
        ends.append(end)
        if not enough:
            sizes = f"{drawn.mdp.num_states} states, discount {float(drawn.mdp.discount)}"
            print(f"seed {seed}: {sizes}: F - F* {start:.3g} at the start, {end:.3g} at the end", flush=True)
    print(f"{good} of {chosen.count} good; F - F* at the end: median {np.median(ends):.1e}, worst {np.max(ends):.2g}")


if __name__ == "__main__":
    main()
