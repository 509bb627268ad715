"""Reward transfer, exactly: `python -m benchmarks.experiments.transfer [--seeds 5]`.

A reward is recovered in one gridworld, from the expert's exact occupancy, and optimised again in another, whose actions
lead elsewhere: each move is the next one of the four around the compass. The true reward is of the state alone, random
and standard normal. Each method is at its optimum, without networks or sampling:

    MLIRL(s)     maximum likelihood over rewards of the state        MLIRL(s,a)   over rewards of state and action
    IQLearn      the chi-square objective over tables Q; the reward is Q - gamma P V
    AIRL(s)      g of the best fit g(s) + gamma h(s') - h(s) = log pi_E(a|s), where its discriminator is at rest

regret: what the policy of the recovered reward loses of the true soft value in the new world, as a part of what uniform
actions lose: 0 is as good as the true reward, 1 as bad as uniform. EPIC: distance to the true reward, 0 to 1.
Float64; medians over seeds, the worst in brackets.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

import irl
from benchmarks.study.compilation import use_quick_compilation
from irl.tabular import soft
from irl.tabular.diagnostics import epic_distance, objective
from problems.gridworld import grid

SIZE, GAMMA = 4, 0.9


def turned(mdp: irl.MDP) -> irl.MDP:
    """The world whose actions up, right, down, left lead where the next of them led."""
    lists: Any = mdp.transitions
    order = jnp.array([1, 2, 3, 0, 4])
    following, p = np.asarray(lists.next_states)[:, order], np.asarray(lists.probabilities)[:, order]
    return irl.MDP.sparse(following, p, np.asarray(mdp.start), float(mdp.discount))


def dense(mdp: irl.MDP) -> np.ndarray:
    """The transition probabilities of an MDP as an array, shape [S, A, S]."""
    lists: Any = mdp.transitions
    P = np.zeros((mdp.num_states, mdp.num_actions, mdp.num_states))
    s, a, _ = np.indices(lists.next_states.shape)
    np.add.at(P, (s, a, np.asarray(lists.next_states)), np.asarray(lists.probabilities))
    return P


def value_of(mdp: irl.MDP, r: jax.Array, pi: jax.Array) -> float:
    """The soft value of a policy from the start: its reward and its entropy."""
    d = soft.occupancy(mdp, pi, mdp.start)
    return float(jnp.sum(d * (r - jnp.log(pi))))


def likelihood(mdp: irl.MDP, c: jax.Array, reward: Any) -> jax.Array:
    """The table of the reward of greatest likelihood, from r = 0 by BFGS on exact values and gradients.

    First-order solvers of `irl` have the same optimum; here the dynamics are deterministic, F is badly conditioned, and
    they need more steps than a benchmark of the optimum itself should wait for.
    """
    problem = irl.to_bilevel(mdp, c, reward, objective="surrogate")
    start, unravel = ravel_pytree(problem.init(jax.random.key(0))[0])

    def both(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = unravel(jnp.asarray(x))
        gradient = irl.likelihood_gradient(mdp, c, reward, point, mdp.start)
        return float(objective(problem, point)), np.asarray(ravel_pytree(gradient)[0])

    found = scipy.optimize.minimize(both, np.asarray(start), jac=True, method="BFGS", options={"gtol": 1e-7})
    size = np.abs(found.jac).max()
    if not size <= 1e-4:
        raise RuntimeError(f"not at the optimum: |gradient| is {size:.1e}; {found.message}")
    return reward.table(unravel(jnp.asarray(found.x)))


def iqlearn(mdp: irl.MDP, c: jax.Array, P: jax.Array, steps: int = 20_000) -> jax.Array:
    """Q - gamma P V at the maximum of <c, r - r^2/2> - <start, V>, the regulariser of the deep variant, c = 1/2."""

    def loss(Q: jax.Array) -> jax.Array:
        V = jax.nn.logsumexp(Q, axis=1)
        r = Q - GAMMA * P @ V
        return -jnp.sum(c * (r - r**2 / 2)) + jnp.sum(mdp.start * V)

    rule = optax.adam(optax.exponential_decay(0.05, steps, 1e-3))

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        Q, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(jax.grad(loss)(Q), state)
        return (Q + updates, state), None

    start = jnp.zeros_like(c)
    Q, _ = jax.jit(lambda: jax.lax.scan(step, (start, rule.init(start)), length=steps)[0])()
    size = float(jnp.abs(jax.grad(loss)(Q)).max())
    if not size <= 1e-4:
        raise RuntimeError(f"IQLearn is not at its optimum: |gradient| is {size:.1e} after {steps} steps")
    return Q - GAMMA * P @ jax.nn.logsumexp(Q, axis=1)


def airl(c: np.ndarray, P: np.ndarray, pi: np.ndarray) -> np.ndarray:
    """The g [S] of the weighted least squares g(s) + gamma h(s') - h(s) = log pi(a|s)."""
    S = P.shape[0]
    s, a, t = (index.ravel() for index in np.indices(P.shape))
    weights = np.sqrt((c[:, :, None] * P).ravel())
    eye = np.eye(S)
    rows = np.concatenate([eye[s], GAMMA * eye[t] - eye[s]], axis=1) * weights[:, None]
    return np.linalg.lstsq(rows, weights * np.log(pi)[s, a], rcond=None)[0][:S]


def one(seed: int, slip: float) -> dict[str, tuple[float, float]]:
    """{method: (regret, EPIC distance)}."""
    mdp = grid(SIZE, slip, GAMMA)
    other, S, A = turned(mdp), mdp.num_states, mdp.num_actions
    true = jnp.asarray(np.repeat(np.random.default_rng(seed).normal(size=(S, 1)), A, axis=1))
    pi = soft.policy(soft.value_iteration(mdp, true).Q)
    c, P = soft.occupancy(mdp, pi, mdp.start), dense(mdp)
    of_states = irl.LinearReward.of(np.eye(S), A)
    found = {
        "MLIRL(s)": likelihood(mdp, c, of_states),
        "MLIRL(s,a)": likelihood(mdp, c, irl.TableReward(S, A)),
        "IQLearn": iqlearn(mdp, c, jnp.asarray(P)),
        "AIRL(s)": jnp.asarray(np.repeat(airl(np.asarray(c), P, np.asarray(pi))[:, None], A, axis=1)),
    }
    best = value_of(other, true, soft.policy(soft.value_iteration(other, true).Q))
    floor = value_of(other, true, jnp.full((S, A), 1 / A))
    out = {}
    for name, r in found.items():
        reached = value_of(other, true, soft.policy(soft.value_iteration(other, r).Q))
        out[name] = (best - reached) / (best - floor), float(epic_distance(r, true, GAMMA))
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--slips", nargs="+", type=float, default=[0.0, 0.3])
    args = parser.parse_args()
    use_quick_compilation()
    jax.config.update("jax_enable_x64", True)
    table = Table(title=f"Transfer to a {SIZE} x {SIZE} grid with turned actions, {args.seeds} seeds")
    for heading in ("slip", "method", "regret", "EPIC"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for slip in args.slips:
        runs = [one(seed, slip) for seed in range(args.seeds)]
        for name in runs[0]:
            cells = [[run[name][k] for run in runs] for k in (0, 1)]
            table.add_row(f"{slip}", name, *(f"{np.median(v):.3f} ({max(v):.3f})" for v in cells))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
