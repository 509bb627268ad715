"""Objectworld: inverse reinforcement learning with a reward that is not linear in the features.

A slippery grid as in `gridworld` with coloured objects on random cells, each with an outer and an inner colour. The
reward is +strength within 3 cells of outer colour 0 and 2 cells of outer colour 1, -strength within 3 cells of outer
colour 0 only, and 0 elsewhere; other outer and all inner colours say nothing. Features of a state are the distances to
the nearest object of each outer and of each inner colour: the reward is a function of them, but not a linear one.

The expert is soft-optimal. The reward is learned as a network of the features (default), as a linear function of
them, or as one number for each state and action; only the last attains the expert's likelihood exactly.

Reference: Levine, Popović, Koltun. Nonlinear inverse reinforcement learning with Gaussian processes. NeurIPS 2011,
    Section 6. Differs: the expert is soft-optimal and the rewards are scaled by strength; distances
    beyond 5 count as 5.

Settings that work: MLIRL[upper_step_size=adam(0.01)], 3000 steps.
"""

from typing import Any, Literal

import numpy as np

import bilevel
import irl
from bilevel.backend.checks import is_count
from bilevel.struct import invalid
from problems.gridworld import grid, recovery
from problems.instance import Instance

FAR = 5.0


def distances(rng: np.random.Generator, size: int, objects: int, colours: int) -> np.ndarray:
    """Euclidean distances [S, 2, colours] to the nearest object of each outer [:, 0] and inner [:, 1] colour.

    The first objects have the outer colours 0, 1, …, so that each of them is there.
    """
    cells = np.stack(np.divmod(np.arange(size**2), size), axis=1)
    places = cells[rng.choice(size**2, objects, replace=False)]
    worn = rng.integers(colours, size=(objects, 2))
    worn[:colours, 0] = np.arange(colours)
    apart = np.sqrt(np.sum((cells[:, None] - places) ** 2, axis=-1))  # [S, objects]
    mine = worn[:, :, None] == np.arange(colours)  # [objects, 2, colours]
    return np.where(mine[None], apart[:, :, None, None], np.inf).min(axis=1)


def true_reward(distance: np.ndarray, strength: float) -> np.ndarray:
    """The reward [S] from the distances [S, 2, colours]."""
    near_0, near_1 = distance[:, 0, 0] <= 3, distance[:, 0, 1] <= 2
    return strength * np.where(near_0, np.where(near_1, 1.0, -1.0), 0.0)


def make(
    seed: int = 0,
    size: int = 8,
    objects: int = 8,
    colours: int = 2,
    strength: float = 2.0,
    model: Literal["network", "linear", "table"] = "network",
    width: int = 32,
    slip: float = 0.3,
    discount: float = 0.9,
    trajectories: int = 0,
    length: int = 50,
    batch_size: int | None = None,
    objective: Literal["likelihood", "surrogate"] = "likelihood",
) -> Instance:
    """A grid with coloured objects.

    Args:
        seed: >= 0; fixes objects, colours and demonstrations.
        size: >= 2; there are size^2 states and 5 actions.
        objects: in [colours, size^2].
        colours: >= 2.
        strength: > 0, the reward's size against the entropy's temperature 1.
        model: what is learned: a tanh network of two hidden layers, a linear function, or a table.
        width: >= 1, units of each hidden layer.
        slip: in [0, 1], the probability that the move is drawn evenly.
        discount: in [0, 1).
        trajectories: of the expert, >= 0; 0 gives its exact occupancy instead.
        length: steps of each, >= 1.
        batch_size: trajectories a batch; default all of them in every batch.
        objective: that of `irl.to_bilevel`.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    for name, number, low, high in (
        ("size", size, 2, np.inf), ("colours", colours, 2, np.inf), ("width", width, 1, np.inf),
        ("objects", objects, colours, size**2), ("length", length, 1, np.inf),
    ):  # fmt: skip
        if not (is_count(number, low) and number <= high):
            invalid(f"{name} (objectworld)", number, f"a whole number in [{low}, {high}]", "Give a size.")
    if not 0 <= slip <= 1:
        invalid("slip (objectworld)", slip, "a number in [0, 1]", "It is a probability.")
    if not 0 < strength < np.inf:
        invalid("strength (objectworld)", strength, "a positive finite number", "It scales the reward.")
    if model not in ("network", "linear", "table"):
        invalid("model (objectworld)", repr(model), '"network", "linear" or "table"', "It is the learned reward.")

    rng = np.random.default_rng(seed)
    mdp = grid(size, slip, discount)
    distance = distances(rng, size, objects, colours)
    r_true = np.repeat(true_reward(distance, strength)[:, None], mdp.num_actions, axis=1)
    features = np.minimum(distance, FAR).reshape(size**2, -1) / FAR
    reward: Any = irl.TableReward(mdp.num_states, mdp.num_actions)
    bound = 2 * strength * r_true.size**0.5  # twice the largest norm that the true table can have
    if model == "network":
        reward = irl.NetworkReward.of(_network(width), features, mdp.num_actions)
    elif model == "linear":
        reward = irl.LinearReward.of(features - features.mean(axis=0), mdp.num_actions)
    return recovery(
        mdp, reward, r_true, seed=seed, trajectories=trajectories, length=length, batch_size=batch_size,
        objective=objective, attained=model == "table",
        x_set=bilevel.Ball(bound) if model == "table" else bilevel.Reals(),
    )  # fmt: skip


def _network(width: int) -> Any:
    import flax.linen as nn

    return nn.Sequential((nn.Dense(width), nn.tanh, nn.Dense(width), nn.tanh, nn.Dense(1)))
