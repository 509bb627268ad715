"""Gridworld: inverse reinforcement learning, a known linear reward recovered from demonstrations on a slippery grid.

A size x size grid; the actions are up, right, down, left and stay. With probability 1 - slip the move is the action's,
else it is one of the five, drawn evenly; moves off the grid stay. The first state is uniform. Four random cells are
landmarks, and the features of a state are exp(-squared distance/4) to each, centred over the grid, so that no constant
is among them. The expert is soft-optimal for the reward features . x*, with x* drawn from N(0, 4 I).

The problem is `irl.to_bilevel`: f is the discounted negative log-likelihood of the demonstrations. With
trajectories = 0 these are the expert's exact occupancy, and the optimum is x*; samples have one of their own.

Settings that work: MLIRL(), 10 000 steps; AID(upper_step_size=optax.adam(0.05), num_lower_steps=20), 1000 steps;
SOBA(), 20 000. With batches of 10, 8000 steps of SOBA with lower and linear steps 1 and
adam(exponential_decay(0.01, 8000, 0.05)).
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import bilevel
import irl
from bilevel.backend.checks import is_count
from bilevel.struct import invalid
from irl.tabular import soft
from problems.instance import Instance, Truth

PyTree = Any
NUM_LANDMARKS = 4
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1), (0, 0)])


def grid(size: int, slip: float, discount: float, horizon: int | None = None) -> irl.MDP:
    """The process, in which cell (i, j) is state size i + j; every pair's k-th successor is where move k leads."""
    cells = np.stack(np.divmod(np.arange(size**2), size), axis=1)
    reached = np.clip(cells[:, None, :] + MOVES, 0, size - 1)
    reached = size * reached[..., 0] + reached[..., 1]
    next_states = np.repeat(reached[:, None, :], len(MOVES), axis=1)
    moved = (1 - slip) * np.eye(len(MOVES)) + slip / len(MOVES)
    probabilities = np.repeat(moved[None], size**2, axis=0)
    return irl.MDP.sparse(next_states, probabilities, np.full(size**2, size**-2.0), discount, horizon)


def landmark_features(rng: np.random.Generator, size: int) -> np.ndarray:
    """Features [S, 4] of the states."""
    cells = np.stack(np.divmod(np.arange(size**2), size), axis=1)
    landmarks = cells[rng.choice(size**2, NUM_LANDMARKS, replace=False)]
    features = np.exp(-np.sum((cells[:, None] - landmarks) ** 2, axis=-1) / 4)
    return features - features.mean(axis=0)


def _metrics(reward: irl.Reward, r_true: np.ndarray, pi: np.ndarray, d: np.ndarray, x: PyTree, Q: Any):
    """How near the policy of Q, and the reward at x where there is one, are to the expert's.

    `policy_error`: the largest total variation distance of the two policies over the states. `expert_kl`: the
    expert's discounted sum of KL(expert | policy of Q), >= 0. `reward_rank`: Spearman's correlation of the two rewards
    over the states.
    """
    log_pi = np.asarray(soft.log_policy(jnp.asarray(Q, float)))
    numbers = {
        "policy_error": float(np.abs(np.exp(log_pi) - pi).sum(axis=-1).max() / 2),
        "expert_kl": float(np.sum(d * (np.log(pi) - log_pi))),
    }
    if x is not None:
        from scipy.stats import spearmanr

        found, true = np.asarray(reward.table(x)).mean(axis=1), r_true.mean(axis=1)
        constant = np.ptp(found) == 0  # x = 0 ranks nothing
        numbers["reward_rank"] = 0.0 if constant else float(np.asarray(spearmanr(found, true))[0])
    return numbers


def _maps(reward: irl.Reward, r_true: np.ndarray, x: PyTree, Q: Array) -> dict[str, np.ndarray]:
    """The two rewards over the cells, averaged over actions and centred, since no demonstration shows their means."""
    side = round(len(r_true) ** 0.5)
    tables = {"true reward": r_true, "learned reward": np.asarray(reward.table(x))}
    means = {name: table.mean(axis=1).reshape(side, side) for name, table in tables.items()}
    return {name: values - values.mean() for name, values in means.items()}


def recovery(
    mdp: irl.MDP,
    reward: irl.Reward,
    r_true: np.ndarray,
    *,
    seed: int,
    trajectories: int,
    length: int,
    batch_size: int | None,
    objective: Any,
    x_true: PyTree = None,
    attained: bool = True,
    x_set: bilevel.sets.Set = bilevel.Reals(),  # noqa: B008
) -> Instance:
    """An instance that is to recover the reward r_true [S, A] from its soft-optimal policy.

    Args:
        mdp: the process.
        reward: the model of the reward.
        r_true: the reward of the expert.
        seed: >= 0, of the demonstrations.
        trajectories: demonstrated ones, >= 0; 0 for the exact occupancy of the expert.
        length: their steps, >= 1; at most the horizon's.
        batch_size: trajectories in a batch; None: all.
        objective: that of `irl.to_bilevel`.
        x_true: the parameters of r_true, where they are known.
        attained: whether some x attains r_true: then, with trajectories = 0, the optimal value is known.
        x_set: where x may be.

    Raises:
        InvalidInput: for trajectories that are not a whole number >= 0; for a discount so near one that the dtype does
            not show the expert's soft values.
    """
    if not is_count(trajectories, 0):
        invalid("trajectories", trajectories, "a whole number >= 0", "0 gives the expert's exact occupancy.")
    Q = irl.value_iteration(mdp, jnp.asarray(r_true, float)).Q
    pi = irl.policy(Q)
    d = irl.occupancy(mdp, pi)
    if not jnp.isfinite(d).all():
        got = f"{float(mdp.discount)}, at which the expert's soft values are not found in {d.dtype}"
        invalid("discount", got, "one further from 1", "Lower it, or use float64.")
    truth, kind = None, "sampled" if trajectories else "population"
    if trajectories:
        length = length if mdp.horizon is None else min(length, mdp.horizon)
        demonstrations = irl.sample(mdp, pi, jax.random.key(seed), num_trajectories=trajectories, length=length)
    else:
        demonstrations = d
        if attained:
            value = float(-jnp.sum(d * soft.log_policy(Q)))
            truth, kind = Truth(value, x_true, None if x_true is None else Q), "known-optimum"
    problem = irl.to_bilevel(mdp, demonstrations, reward, objective=objective, batch_size=batch_size, x_set=x_set)
    c = irl.expert_occupancy(mdp, demonstrations)
    metrics = partial(_metrics, reward, r_true, np.asarray(pi, np.float64), np.asarray(d, np.float64))
    counted = np.asarray(c) / np.asarray(c).sum()
    known = None
    if isinstance(reward, irl.LinearReward) and mdp.horizon is None and objective == "likelihood":
        known = irl.constants(mdp, c, reward)
    return Instance(
        problem,
        truth,
        constants=known,
        tags=frozenset({"irl", "fixed-point", kind} | ({"stochastic"} if batch_size is not None else set())),
        metrics=metrics,
        maps=partial(_maps, reward, r_true),
        baselines={
            "uniform policy": lambda: metrics(None, np.zeros(counted.shape)),
            "behavioural cloning": lambda: metrics(None, np.log(counted + 1e-3 / counted.size)),
        },
    )


def make(
    seed: int = 0,
    size: int = 5,
    slip: float = 0.2,
    discount: float = 0.9,
    trajectories: int = 100,
    length: int = 50,
    batch_size: int | None = None,
    objective: Literal["likelihood", "surrogate"] = "likelihood",
    horizon: int | None = None,
) -> Instance:
    """A grid with 4 unknown weights of its reward.

    Args:
        seed: >= 0; fixes landmarks, weights and demonstrations.
        size: >= 2; there are size^2 states and 5 actions.
        slip: in [0, 1], the probability that the move is drawn evenly.
        discount: in [0, 1), or in [0, 1] with a horizon.
        trajectories: of the expert, >= 0; 0 gives its exact occupancy instead.
        length: steps of each, >= 1; at most the horizon's.
        batch_size: trajectories a batch, in [1, trajectories]; default all of them in every batch.
        objective: that of `irl.to_bilevel`.
        horizon: None, or the number of steps after which everything ends.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    for name, number, lowest in (("size", size, 2), ("trajectories", trajectories, 0), ("length", length, 1)):
        if not is_count(number, lowest):
            invalid(f"{name} (gridworld)", number, f"a whole number >= {lowest}", "Give a size.")
    if not 0 <= slip <= 1:
        invalid("slip (gridworld)", slip, "a number in [0, 1]", "It is a probability.")
    if batch_size is not None and trajectories == 0:
        invalid("batch_size (gridworld)", batch_size, "None where trajectories = 0", "Ask for trajectories.")

    rng = np.random.default_rng(seed)
    mdp = grid(size, slip, discount, horizon)
    features = landmark_features(rng, size)
    x_true = 2 * rng.normal(size=NUM_LANDMARKS)
    reward = irl.LinearReward.of(features, mdp.num_actions)
    return recovery(
        mdp, reward, np.asarray(reward.table(jnp.asarray(x_true, float))), seed=seed, trajectories=trajectories,
        length=length, batch_size=batch_size, objective=objective, x_true=jnp.asarray(x_true, float),
    )  # fmt: skip
