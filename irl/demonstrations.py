"""Demonstrations: trajectories of states and actions as arrays."""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel.struct import invalid, struct
from irl.mdp import MDP, check_range, whole_numbers


@struct
class Demonstrations:
    """n trajectories of at most T steps; a pytree. Build it with `of`, `load` or `sample`.

    Attributes:
        states, actions: [n, T] whole numbers; entries from a trajectory's length on are padding, set to 0.
        lengths: [n] whole numbers in [1, T].
        weights: [n] numbers >= 0, how much each trajectory counts; only their ratios matter.
    """

    states: Any
    actions: Any
    lengths: Any
    weights: Any

    @classmethod
    def of(cls, states: Any, actions: Any, lengths: Any = None, weights: Any = None) -> "Demonstrations":
        """From arrays; lengths default to T and weights to 1.

        Raises:
            InvalidInput: for wrong shapes or kinds of numbers, lengths outside of [1, T], weights that are negative,
                not finite or all zero.
        """
        states = whole_numbers("states (Demonstrations)", states)
        actions = whole_numbers("actions (Demonstrations)", actions)
        if states.ndim != 2 or states.size == 0:
            do = "One row per trajectory, one column per step."
            invalid("states (Demonstrations)", f"shape {states.shape}", "shape [n, T], both at least 1", do)
        if actions.shape != states.shape:
            do = "Give one action per state; drop a last state without action."
            invalid("actions (Demonstrations)", f"shape {actions.shape}", f"{states.shape} as the states", do)
        n, T = states.shape
        lengths = np.full(n, T) if lengths is None else lengths
        lengths = whole_numbers("lengths (Demonstrations)", lengths)
        weights = np.ones(n) if weights is None else np.asarray(weights)
        for name, part in (("lengths", lengths), ("weights", weights)):
            if part.shape != (n,):
                do = "Give one number per trajectory."
                invalid(f"{name} (Demonstrations)", f"shape {part.shape}", f"shape ({n},)", do)
        if not bool(jnp.all((lengths >= 1) & (lengths <= T))):
            got = f"lengths from {lengths.min()} to {lengths.max()}"
            invalid("lengths (Demonstrations)", got, f"lengths in [1, {T}]", "Drop empty trajectories.")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            do = "Weights say how much a trajectory counts."
            invalid("weights (Demonstrations)", weights.tolist(), "finite numbers >= 0, not all zero", do)
        inside = jnp.arange(T)[None, :] < lengths[:, None]
        states, actions = jnp.where(inside, states, 0), jnp.where(inside, actions, 0)
        return cls(states, actions, lengths, jnp.asarray(weights, float))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Demonstrations":
        """From an .npz file with the arrays states and actions, and lengths and weights where they are not default.

        Raises:
            InvalidInput: where an array is missing or unusable.
        """
        with np.load(path, allow_pickle=False) as arrays:
            for name in ("states", "actions"):
                if name not in arrays:
                    do = f"Save it: np.savez(path, states=…, actions=…). Expected in {os.fspath(path)!r}."
                    invalid(f"{name} (Demonstrations.load)", f"arrays {sorted(arrays)}", f"an array {name!r}", do)
            return cls.of(*(arrays.get(name) for name in ("states", "actions", "lengths", "weights")))

    def save(self, path: str | os.PathLike) -> None:
        """Write the .npz file that `load` reads."""
        np.savez(path, states=self.states, actions=self.actions, lengths=self.lengths, weights=self.weights)

    @property
    def num_trajectories(self) -> int:
        """The number n of trajectories."""
        return self.states.shape[0]

    def discounted_weights(self, discount: Array) -> Array:
        """Weights n w_i/(sum of w) gamma^t within the trajectory, 0 in the padding; shape [n, T]."""
        times = jnp.arange(self.states.shape[1])
        powers = jnp.power(discount, times.astype(self.weights.dtype))
        inside = times[None, :] < self.lengths[:, None]
        return jnp.where(inside, (self.weights / jnp.mean(self.weights))[:, None] * powers[None, :], 0)

    def occupancy(self, mdp: MDP) -> Array:
        """The discounted empirical occupancy c(s, a) = mean of sum_t gamma^t 1{s_t = s, a_t = a}, shape [S, A].

        Trajectories cut at T lose the mass gamma^T/(1 - gamma) of what would have followed.
        """
        weights = self.discounted_weights(mdp.discount) / self.num_trajectories
        return jnp.zeros((mdp.num_states, mdp.num_actions), weights.dtype).at[self.states, self.actions].add(weights)

    def validate(self, mdp: MDP) -> "Demonstrations":
        """Check states and actions against the MDP; return self.

        Raises:
            InvalidInput: naming the first entry that the MDP does not have.
        """
        for name, size in (("states", mdp.num_states), ("actions", mdp.num_actions)):
            check_range(f"{name} (Demonstrations)", getattr(self, name), size, name)
        return self


@partial(jax.jit, static_argnames=("num_trajectories", "length"))
def sample(mdp: MDP, policy: Array, key: Array, *, num_trajectories: int, length: int) -> Demonstrations:
    """Trajectories of a policy [S, A] from the MDP's start distribution, all of the same length."""
    log_policy = jnp.log(policy)

    def step(state: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
        key_action, key_state = jax.random.split(key)
        action = jax.random.categorical(key_action, log_policy[state])
        return mdp.sample_next(key_state, state, action), (state, action)

    def trajectory(key: Array) -> tuple[Array, Array]:
        key_start, key_steps = jax.random.split(key)
        return lax.scan(step, mdp.sample_start(key_start), jax.random.split(key_steps, length))[1]

    states, actions = jax.vmap(trajectory)(jax.random.split(key, num_trajectories))
    lengths = jnp.full(num_trajectories, length)
    return Demonstrations(states, actions, lengths, jnp.ones(num_trajectories, policy.dtype))
