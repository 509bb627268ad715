"""Demonstrations: trajectories of states and actions as arrays."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel.backend.tree import poisoned
from bilevel.struct import invalid, struct
from irl import archives
from irl.mdp import MDP, check_range, whole_numbers

TRANSITIONS = "observation", "next_observation", "action", "reward", "terminal"  # of a replay memory's file


class Trajectories(NamedTuple):
    """A batch of b trajectories of at most T steps."""

    states: Any
    """[b, T]."""
    actions: Any
    """[b, T]."""
    weights: Any
    """n w_i/(sum of w) gamma^t, with trajectory i's weight w_i, and 0 in the padding; [b, T]."""

    def pick(self, table: Array) -> Array:
        """The entries [b, T] of a table [S, A] at the states and actions; of a table [T, S, A], each at its time."""
        if table.ndim == 2:
            return table[self.states, self.actions]
        return table[jnp.arange(self.states.shape[1])[None, :], self.states, self.actions]

    def occupancy(self, mdp: MDP) -> Array:
        """The mean over the batch of the weights at each pair, shaped `mdp.shape`: the adjoint of `pick`."""
        like = jnp.zeros(mdp.shape, self.weights.dtype)
        return jax.linear_transpose(self.pick, like)(self.weights / self.states.shape[0])[0]


@struct
class Demonstrations:
    """n trajectories of at most T steps; a pytree. Build it with `of`, `load` or `sample`.

    Attributes:
        states: whole numbers [n, T], or observations [n, T, d]. From a trajectory's length on, states and actions are
            padding, set to 0.
        actions: whole numbers [n, T], or, beside observations, numbers [n, T, k], which `to_control` clips to [-1, 1]
            as its environments do.
        lengths: whole numbers in [1, T], [n].
        weights: how much each trajectory counts, numbers >= 0 [n]; only their ratios matter.
        last: the observation after the last action, [n, d]; None where it is not known.
        terminated: whether the process ended there, and not only the watching, [n]; None where it is not known.
        returns: the sums of true rewards, [n]; None where they are not known.
    """

    states: Any
    actions: Any
    lengths: Any
    weights: Any
    last: Any = None
    terminated: Any = None
    returns: Any = None

    @classmethod
    def of(
        cls, states: Any, actions: Any, lengths: Any = None, weights: Any = None, last: Any = None,
        terminated: Any = None, returns: Any = None,
    ) -> "Demonstrations":  # fmt: skip
        """From arrays as in the class's attributes; lengths default to T, weights to 1.

        Raises:
            InvalidInput: for wrong shapes or kinds of numbers, lengths outside of [1, T], weights that are negative,
                not finite or all zero.
        """
        states = _numbers("states (Demonstrations)", states)
        actions = _numbers("actions (Demonstrations)", actions)
        if states.ndim not in (2, 3) or states.size == 0:
            do = "One row per trajectory, one column per step; observations are on a third axis."
            invalid("states (Demonstrations)", f"shape {states.shape}", "shape [n, T] or [n, T, d], all at least 1", do)
        if actions.ndim not in (2, states.ndim) or actions.shape[:2] != states.shape[:2]:
            do = "Give one action per state; drop a last state without action."
            want = f"{states.shape[:2]} as the states" + (", or a third axis" if states.ndim == 3 else "")
            invalid("actions (Demonstrations)", f"shape {actions.shape}", want, do)
        n, T = states.shape[:2]
        lengths = np.full(n, T) if lengths is None else lengths
        lengths = whole_numbers("lengths (Demonstrations)", lengths)
        weights = np.ones(n) if weights is None else _finite("weights (Demonstrations)", weights)
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
        for name, part in (("states", states), ("actions", actions)):
            if part.ndim == 2 and bool(jnp.any((part < 0) & inside)):
                do = "States and actions are counted from 0; behind a trajectory's length anything may stand."
                invalid(f"{name} (Demonstrations)", f"{part.min()}", "whole numbers >= 0", do)
        states, actions = (
            jnp.where(inside.reshape(n, T, *[1] * (part.ndim - 2)), part, 0) for part in (states, actions)
        )
        extras = _extras(n, states.shape[2:], {"last": last, "terminated": terminated, "returns": returns})
        return cls(states, actions, lengths, jnp.asarray(weights, float), **extras)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Demonstrations":
        """From an .npz file with the arrays states and actions, and those of the others that are known.

        Or with transitions as replay memories keep them, n episodes beside each other: observation and
        next_observation [n, T, d], action [n, T, k], reward and terminal [n, T].

        Raises:
            InvalidInput: where an array is missing or unusable, or the file broken or larger than it may be.
        """
        what = "Demonstrations.load"
        own = tuple(cls.__dataclass_fields__)
        arrays, names = archives.read(path, (*own, *TRANSITIONS), what)
        needed = TRANSITIONS if "observation" in arrays else ("states", "actions")
        for name in needed:
            if name not in arrays:
                do = f"Save it: np.savez(path, {'=…, '.join(needed)}=…). Expected in {os.fspath(path)!r}."
                invalid(f"{name} ({what})", f"arrays {names}", f"an array {name!r}", do)
        if needed is TRANSITIONS:
            return cls._from_transitions(arrays)
        return cls.of(**{name: arrays[name] for name in own if name in arrays})

    @classmethod
    def _from_transitions(cls, arrays: Any) -> "Demonstrations":
        """From the arrays of a replay memory; what follows the first terminal step of a row is padding."""
        seen = arrays["observation"]
        if seen.ndim != 3 or seen.size == 0:
            do = "Stack episodes, steps and coordinates."
            invalid("observation (Demonstrations.load)", f"shape {seen.shape}", "shape [n, T, d], all at least 1", do)
        for name, shape in (("next_observation", seen.shape), ("reward", seen.shape[:2]), ("terminal", seen.shape[:2])):
            if arrays[name].shape != shape:
                do = "Give one entry for each step."
                invalid(f"{name} (Demonstrations.load)", f"shape {arrays[name].shape}", f"shape {shape}", do)
        _finite("reward (Demonstrations.load)", arrays["reward"])
        ends = _flags("terminal (Demonstrations.load)", arrays["terminal"])
        terminated = ends.any(axis=1)
        lengths = np.where(terminated, ends.argmax(axis=1) + 1, ends.shape[1])
        last = arrays["next_observation"][np.arange(len(ends)), lengths - 1]
        inside = np.arange(ends.shape[1])[None, :] < lengths[:, None]
        returns = np.where(inside, arrays["reward"], 0).sum(axis=1)
        return cls.of(arrays["observation"], arrays["action"], lengths, None, last, terminated, returns)

    @classmethod
    def from_minari(cls, dataset: Any, state: Callable[[np.ndarray], np.ndarray] | None = None) -> "Demonstrations":
        """From a Minari data set with discrete actions: every episode a trajectory, its last observation left out.

        Args:
            dataset: a `minari.MinariDataset`, or the name of one that is on this machine; only a name needs Minari.
            state: maps the observations [T, …] of an episode to whole numbers [T]; default: they are states already.

        Raises:
            InvalidInput: where Minari is missing, or observations or actions are not whole numbers.
        """
        if isinstance(dataset, str):
            try:
                import minari
            except ImportError:
                do = "Install it: pip install minari; or give the data set itself, or arrays to Demonstrations.of."
                invalid("dataset (from_minari)", f"the name {dataset!r}", "the package minari to load it with", do)
            dataset = minari.load_dataset(dataset)
        episodes = list(dataset.iterate_episodes())
        kinds = {type(part).__name__ for e in episodes for part in (e.observations, e.actions)}
        if kinds != {"ndarray"}:
            do = "Flatten dictionaries and tuples to one array, or give arrays to Demonstrations.of."
            invalid("dataset (from_minari)", f"{len(episodes)} episodes of {kinds or 'nothing'}", "arrays", do)
        pairs = [(e.observations[:-1], e.actions) for e in episodes]
        pairs = [(seen if state is None else np.asarray(state(seen)), actions) for seen, actions in pairs]
        lengths = np.array([len(actions) for _, actions in pairs], int)
        stacked: dict[str, np.ndarray] = {}
        for name, parts in zip(("states", "actions"), zip(*pairs, strict=True), strict=True):
            for k, part in enumerate(parts):
                if part.shape != (lengths[k],) or part.dtype.kind not in "iu":
                    got = f"shape {part.shape}, dtype {part.dtype} in episode {k}"
                    do = "Pass state=, a function from observations to numbers of states."
                    invalid(f"{name} (from_minari)", got, f"whole numbers of shape ({lengths[k]},)", do)
            stacked[name] = np.stack([np.pad(part, (0, lengths.max() - len(part))) for part in parts])
        return cls.of(**stacked, lengths=lengths)

    def save(self, path: str | os.PathLike) -> None:
        """Write the .npz file that `load` reads."""
        arrays = {name: getattr(self, name) for name in self.__dataclass_fields__}
        known: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
        np.savez(path, **known)

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

        Trajectories cut at T lose the mass gamma^T/(1 - gamma) of what would have followed. With a horizon the times
        stay apart, [T, S, A].
        """
        return self.batch(mdp.discount).occupancy(mdp)

    def batch(self, discount: Array) -> "Trajectories":
        """All trajectories with their discounted weights: what the likelihood needs."""
        return Trajectories(self.states, self.actions, self.discounted_weights(discount))

    def validate(self, mdp: MDP) -> "Demonstrations":
        """Check states and actions against the MDP; return self.

        Raises:
            InvalidInput: naming the first entry that the MDP does not have, or trajectories beyond its horizon.
        """
        if self.states.ndim != 2:
            do = "For observations and an environment there is irl.to_control."
            invalid("states (Demonstrations)", f"shape {self.states.shape}", "shape [n, T], numbers of states", do)
        if mdp.horizon is not None and self.states.shape[1] > mdp.horizon:
            got = f"{self.states.shape[1]} steps"
            invalid("states (Demonstrations)", got, f"at most the horizon {mdp.horizon}", "Cut the trajectories.")
        for name, size in (("states", mdp.num_states), ("actions", mdp.num_actions)):
            check_range(f"{name} (Demonstrations)", getattr(self, name), size, name)
        return self


def _numbers(name: str, values: Any) -> Array:
    """Whole numbers [n, T], or finite floats where there is a third axis."""
    array = np.asarray(values)
    return whole_numbers(name, values) if array.ndim != 3 else jnp.asarray(_finite(name, array), float)


def _extras(n: int, inner: tuple[int, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The optional arrays of n trajectories, checked, as floats and bools; None stays None."""
    out: dict[str, Any] = {}
    for name, shape in (("last", (n, *inner)), ("terminated", (n,)), ("returns", (n,))):
        array = given[name]
        if array is not None and np.shape(array) != shape:
            do = "Give one entry per trajectory."
            invalid(f"{name} (Demonstrations)", f"shape {np.shape(array)}", f"shape {shape}", do)
        if array is None:
            out[name] = None
        elif name == "terminated":
            out[name] = jnp.asarray(_flags("terminated (Demonstrations)", array))
        else:
            out[name] = jnp.asarray(_finite(f"{name} (Demonstrations)", array), float)
    return out


def _finite(name: str, values: Any) -> np.ndarray:
    """Finite numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        got = f"dtype {array.dtype}" if array.dtype.kind not in "fiu" else "an entry that is not finite"
        invalid(name, got, "finite numbers", "Clean it.")
    return array


def _flags(name: str, values: Any) -> np.ndarray:
    """Booleans, also where they are written as the numbers 0 and 1."""
    array = np.asarray(values)
    if array.dtype.kind not in "bfiu" or not ((array == 0) | (array == 1)).all():
        got = f"dtype {array.dtype}" if array.dtype.kind not in "bfiu" else "an entry that is neither 0 nor 1"
        invalid(name, got, "booleans, or numbers 0 and 1", "Say of each whether the process ended there.")
    return array.astype(bool)


@partial(jax.jit, static_argnames=("num_trajectories", "length"))
def sample(mdp: MDP, policy: Array, key: Array, *, num_trajectories: int, length: int) -> Demonstrations:
    """Trajectories of a policy [S, A], or [T, S, A] with a horizon, from the MDP's start distribution.

    All have the same length, at most T. Their weights are NaN where the policy is, as that of soft values that were not
    solved for.
    """
    if mdp.horizon is not None and length > mdp.horizon:
        invalid("length (sample)", length, f"at most the horizon {mdp.horizon}", "Nothing follows after it.")
    log_policy = jnp.log(policy)

    def step(state: Array, at: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        time, key = at
        key_action, key_state = jax.random.split(key)
        logits = log_policy[state] if mdp.horizon is None else log_policy[time, state]
        action = jax.random.categorical(key_action, logits)
        return mdp.sample_next(key_state, state, action), (state, action)

    def trajectory(key: Array) -> tuple[Array, Array]:
        key_start, key_steps = jax.random.split(key)
        steps = jnp.arange(length), jax.random.split(key_steps, length)
        return lax.scan(step, mdp.sample_start(key_start), steps)[1]

    states, actions = jax.vmap(trajectory)(jax.random.split(key, num_trajectories))
    lengths, weights = jnp.full(num_trajectories, length), jnp.ones(num_trajectories, policy.dtype)
    return Demonstrations(states, actions, lengths, poisoned(weights, jnp.isfinite(policy).all()))
