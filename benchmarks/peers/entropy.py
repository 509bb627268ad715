"""The gradient of maximum causal entropy IRL on a gridworld with an end, for `bilevax peers`.

F(x) = - the expected log-likelihood of the soft-optimal policy for the reward features(s) . x, T steps, no discount,
grad F = mu_pi - mu_E, the sums of features over an episode.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

import irl
from problems.gridworld import grid, landmark_features

SIZE, HORIZON = 15, 30


def make() -> tuple[irl.MDP, dict[str, np.ndarray]]:
    """(the gridworld, the same as arrays): P [S, A, S], start [S], features [S, F], expert [F], horizon []."""
    rng = np.random.default_rng(0)
    mdp = grid(SIZE, 0.2, 1.0, HORIZON)
    features = landmark_features(rng, SIZE)
    arrays = {"P": np.asarray(mdp.to_dense().transitions), "start": np.asarray(mdp.start), "features": features}
    arrays |= {"horizon": np.array(HORIZON), "expert": np.zeros(features.shape[1])}
    arrays["expert"] = exact(arrays, 2 * rng.normal(size=features.shape[1]))  # of the soft-optimal policy for some x
    return mdp, arrays


def exact(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """mu_pi - expert [F] by dense NumPy: values backwards, states forwards."""
    P, V = arrays["P"], np.zeros(len(arrays["P"]))
    reward, log_pi = (arrays["features"] @ x)[:, None], []
    for _ in range(int(arrays["horizon"])):
        Q = reward + P @ V
        V = np.asarray(logsumexp(Q, axis=1))
        log_pi.append(Q - V[:, None])
    here, visited = arrays["start"], np.zeros(len(P))
    for row in reversed(log_pi):
        visited = visited + here
        here = np.einsum("s,sa,sat->t", here, np.exp(row), P)
    return visited @ arrays["features"] - arrays["expert"]


def calls(mdp: irl.MDP, arrays: dict[str, np.ndarray]) -> dict[str, Callable[[Any], Any]]:
    """Ours, on successor lists and on the dense transitions that imitation takes."""
    reward = irl.LinearReward.of(jnp.asarray(arrays["features"]), mdp.num_actions)
    expert = jnp.asarray(arrays["expert"])
    nothing = jnp.zeros(mdp.shape)  # the expert comes as sums of features, which are subtracted

    def gradient(mdp: irl.MDP) -> Callable[[Any], Any]:
        return jax.jit(lambda x: irl.likelihood_gradient(mdp, nothing, reward, x, mdp.start) - expert)

    return {"bilevax likelihood_gradient": gradient(mdp), "bilevax, dense P": gradient(mdp.to_dense())}
