"""Steps of an agent in an environment: with resets, as whole episodes, from demonstrations; the replay memory.

Everything is a function of keys. Many environments step together, by vmap; axis 0 of `Steps` is then the environment.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel.struct import invalid, static, struct
from irl.deep.environments import Absorbing, Environment, extend
from irl.deep.sac import SAC, Batch, Learner
from irl.demonstrations import Demonstrations
from irl.mdp import check_range

PyTree = Any


class Steps(NamedTuple):
    """Transitions, with any leading axes "…"."""

    observation: Array
    """[…, d]."""
    action: Array
    """[…, k]; one-hot where actions are discrete."""
    next_observation: Array
    """[…, d]."""
    reward: Array
    """The true reward, […]; 0 where it is not known."""
    terminated: Array
    """Whether the process ended with this step, […] bool."""
    truncated: Array
    """Whether only the watching ended with it, […] bool."""
    time: Array
    """Steps since the episode's start, […]."""
    inside: Array
    """Whether the step belongs to an episode, and is not padding behind its end, […] bool."""
    absorbed: Array
    """Whether the step is one of the absorbing state, of `Absorbing` environments alone, […] bool.

    Nobody chooses there. A flag, since no action says so: an expert may well do nothing.
    """

    @property
    def chosen(self) -> Array:
        """Whether somebody chose the step's action: it is inside and not absorbed, […] bool."""
        return self.inside & ~self.absorbed

    @property
    def flat(self) -> "Steps":
        """The same steps with one leading axis."""
        lead = self.reward.ndim
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[lead:]), self)

    @property
    def returns(self) -> Array:
        """The sum of rewards of each episode [n], for steps [n, T]."""
        return jnp.sum(jnp.where(self.inside, self.reward, 0), axis=1)


class Lanes(NamedTuple):
    """n environments between two steps."""

    state: PyTree
    """Their states, with a leading axis of n."""
    observation: Array
    """What they show, [n, d]."""
    time: Array
    """Steps since the start of each one's episode, [n]."""


def start(environment: Environment, key: Array, num_lanes: int) -> Lanes:
    """Lanes of `num_lanes` freshly reset environments."""
    state, observation = jax.vmap(environment.reset)(jax.random.split(key, num_lanes))
    return Lanes(state, observation, jnp.zeros(num_lanes, int))


def forward(environment: Environment, lanes: Lanes, action: Array, key: Array) -> tuple[Lanes, Steps]:
    """(lanes after the actions [n, k], steps [n]); nothing is reset."""
    native = action if environment.num_actions is None else jnp.argmax(action, axis=-1)
    state, t = jax.vmap(environment.step)(lanes.state, native, jax.random.split(key, len(lanes.time)))
    inside, absorbed = jnp.ones_like(t.terminated), jnp.zeros_like(t.terminated)
    if isinstance(environment, Absorbing):
        absorbed = lanes.observation[:, -1] > 0
    steps = Steps(
        lanes.observation, action, t.observation, t.reward, t.terminated, t.truncated, lanes.time, inside, absorbed
    )  # fmt: skip
    return Lanes(state, t.observation, lanes.time + 1), steps


def collect(
    environment: Environment, act: Callable[[Array, Array], Array], lanes: Lanes, key: Array, num_steps: int
) -> tuple[Lanes, Steps]:
    """(lanes, steps [num_steps, n]) of act(observation, key), with a reset behind every end."""

    def one(lanes: Lanes, key: Array) -> tuple[Lanes, Steps]:
        key_act, key_step, key_reset = jax.random.split(key, 3)
        lanes, steps = forward(environment, lanes, act(lanes.observation, key_act), key_step)
        ended = steps.terminated | steps.truncated

        def reset(lanes: Lanes) -> Lanes:
            fresh = start(environment, key_reset, len(ended))
            choose = lambda new, old: jnp.where(ended.reshape(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: E731
            return jax.tree.map(choose, fresh, lanes)

        return lax.cond(jnp.any(ended), reset, lambda lanes: lanes, lanes), steps

    return lax.scan(one, lanes, jax.random.split(key, num_steps))


def uniform(environment: Environment) -> Callable[[Array, Array], Array]:
    """Random actions as act(observation [n, d], key): uniform in [-1, 1]^k, or one-hot."""

    def act(observation: Array, key: Array) -> Array:
        n, k = observation.shape[0], environment.action_size
        if environment.num_actions is None:
            return jax.random.uniform(key, (n, k), observation.dtype, -1, 1)
        return jax.nn.one_hot(jax.random.randint(key, (n,), 0, k), k, dtype=observation.dtype)

    return act


@partial(jax.jit, static_argnames=("num_lanes", "num_steps"))
def wander(environment: Environment, key: Array, *, num_lanes: int, num_steps: int) -> Steps:
    """Steps [num_steps, num_lanes] of random actions from fresh starts, with a reset behind every end."""
    key_start, key_run = jax.random.split(key)
    return collect(environment, uniform(environment), start(environment, key_start, num_lanes), key_run, num_steps)[1]


def episodes(environment: Environment, act: Callable[[Array, Array], Array], key: Array, num: int) -> Steps:
    """`num` whole episodes of act(observation, key), steps [num, max_steps + 1]: no step is taken past an end."""
    key_start, key_run = jax.random.split(key)
    lanes = start(environment, key_start, num)
    length = environment.max_steps + 1  # an absorbed state steps once more

    def one(carry: tuple[Array, Lanes, Array, Steps]) -> tuple[Array, Lanes, Array, Steps]:
        t, lanes, alive, kept = carry
        key_act, key_step = jax.random.split(jax.random.fold_in(key_run, t))
        lanes, steps = forward(environment, lanes, act(lanes.observation, key_act), key_step)
        steps = steps._replace(inside=alive)
        kept = jax.tree.map(lambda all, new: all.at[:, t].set(new), kept, steps)
        return t + 1, lanes, alive & ~(steps.terminated | steps.truncated), kept

    shapes = jax.eval_shape(lambda: forward(environment, lanes, act(lanes.observation, key), key)[1])
    kept = jax.tree.map(lambda leaf: jnp.zeros((num, length, *leaf.shape[1:]), leaf.dtype), shapes)
    going = lambda carry: (carry[0] < length) & jnp.any(carry[2])  # noqa: E731
    return lax.while_loop(going, one, (jnp.zeros((), int), lanes, jnp.ones(num, bool), kept))[3]


def weights(environment: Environment, steps: Steps, discount: Array | float) -> Array:
    """How much each step counts, discount^t, shaped like steps.reward; 0 in the padding.

    A step of the absorbing state stands for itself and all later ones up to the time limit T, so that with `Absorbing`
    the weights of every episode sum to 1 + discount + … + discount^(T-1), however early it ended. Without it those of
    an episode that ends early sum to less: what follows an end has reward 0.
    """
    discount = jnp.asarray(discount, steps.reward.dtype)
    powers = jnp.power(discount, jnp.arange(environment.max_steps, dtype=steps.reward.dtype))
    tails = jnp.append(jnp.cumsum(powers[::-1])[::-1], 0)  # from t to T - 1
    powers = jnp.append(powers, 0)
    counted = jnp.where(steps.absorbed, tails[steps.time], powers[steps.time])
    return jnp.where(steps.inside, counted, 0)


def demonstrated(environment: Environment, demonstrations: Demonstrations) -> Steps:
    """Demonstrations of observations [n, T, d] as steps [n, T], or [n, T + 1] with their absorbed steps.

    Continuous actions are clipped to [-1, 1], as the environment clips them: an expert recorded before the clip would
    else differ from every agent for ever, and a reward of actions grow without end. Where the environment's own bounds
    are others, actions beyond 1 are refused: they are likely in its own units.

    Raises:
        InvalidInput: where observations or actions do not fit the environment, or what followed the end is unknown;
            for actions that it does not have or whose units are not clear, and episodes beyond its time limit.
    """
    absorbing = isinstance(environment, Absorbing)
    d = environment.observation_size - absorbing
    states, lengths = jnp.asarray(demonstrations.states), demonstrations.lengths
    if states.ndim != 3 or states.shape[-1] != d:
        do = "Load demonstrations of this environment, as bilevax expert saves them."
        invalid("demonstrations (to_control)", f"states of shape {states.shape}", f"shape [n, T, {d}]", do)
    if demonstrations.last is None or demonstrations.terminated is None:
        do = "Give Demonstrations.of the observation after the last action, and whether the process ended there."
        invalid("demonstrations (to_control)", "no last, terminated", "both of them", do)
    action = demonstrations.actions
    if environment.num_actions is not None:
        check_range("actions (to_control)", action, environment.num_actions, "actions")
        action = jax.nn.one_hot(action, environment.num_actions, dtype=float)
    else:
        _check_units(environment, np.asarray(action)[np.arange(action.shape[1]) < np.asarray(lengths)[:, None]])
        action = jnp.clip(action, -1, 1)
    if action.ndim != 3 or action.shape[-1] != environment.action_size:
        got, k = f"actions of shape {demonstrations.actions.shape}", environment.action_size
        invalid("demonstrations (to_control)", got, f"shape [n, T, {k}]", "Load those of this environment.")
    if int(jnp.max(lengths)) > environment.max_steps:
        got, do = f"an episode of {int(jnp.max(lengths))} steps", "Cut the episodes, or raise max_steps of irl.make."
        invalid("lengths (to_control)", got, f"at most the time limit, {environment.max_steps}", do)
    n, T = states.shape[:2]
    if absorbing:
        pad = lambda leaf: jnp.pad(leaf, [(0, 0), (0, 1)] + [(0, 0)] * (leaf.ndim - 2))  # noqa: E731
        states, action, T = pad(states), pad(action), T + 1
    time = jnp.broadcast_to(jnp.arange(T)[None, :], (n, T))
    end, ended = lengths[:, None], demonstrations.terminated[:, None]
    last = time == end - 1
    after = jnp.concatenate([states[:, 1:], states[:, :1]], axis=1)
    after = jnp.where(last[..., None], demonstrations.last[:, None, :], after)
    inside, absorbed = time < end, jnp.zeros(time.shape, bool)
    if absorbing:
        absorbed = (time == end) & ended
        states = extend(states, absorbed)
        after = extend(after, (time >= end - 1) & ended)
        inside = time < end + ended.astype(end.dtype)
    nothing = jnp.zeros(time.shape, states.dtype)
    terminated = last & ended & (not absorbing)
    final = time == end - 1 + (ended.astype(end.dtype) if absorbing else 0)
    return Steps(states, action, after, nothing, terminated, final & ~terminated, time, inside, absorbed)


def _check_units(environment: Environment, actions: np.ndarray) -> None:
    """Refuse actions beyond [-1, 1] where the environment's own bounds are others."""
    low, high = (np.asarray(bound, float) for bound in environment.bounds)
    share = np.mean(np.abs(actions) > 1 + 1e-6)
    if share and not (np.all(low == -1) and np.all(high == 1)):
        do = f"From the environment's own units: 2 (a - low)/(high - low) - 1, its bounds are {low} and {high}."
        invalid("actions (to_control)", f"{share:.0%} of the numbers beyond", "actions scaled to [-1, 1]", do)


@struct
class Memory:
    """The last `capacity` transitions, of which the oldest are overwritten first."""

    rows: Any
    """[capacity, 2 d + k + 2]: observation, action, next_observation, true reward, terminated."""
    count: Any
    """How many transitions were ever added, []."""
    sizes: tuple[int, int] = static()
    """(d, k)."""

    @classmethod
    def empty(cls, environment: Environment, capacity: int) -> "Memory":
        """A memory without transitions."""
        d, k = environment.observation_size, environment.action_size
        return cls(jnp.zeros((capacity, 2 * d + k + 2), float), jnp.zeros((), int), (d, k))

    def add(self, steps: Steps) -> "Memory":
        """The memory with more steps, of any leading axes and fewer than the capacity."""
        s = steps.flat
        ends = jnp.stack([s.reward, s.terminated.astype(s.reward.dtype)], axis=1)
        rows = [s.observation, s.action, s.next_observation, ends]
        at = (self.count + jnp.arange(len(s.reward))) % self.rows.shape[0]
        rows = self.rows.at[at].set(jnp.concatenate(rows, axis=1), unique_indices=True)
        return Memory(rows, self.count + len(s.reward), self.sizes)

    def draw(self, key: Array, num: int) -> Batch:
        """`num` transitions, uniformly with replacement, with their true rewards: solvers label them anew."""
        at = jax.random.randint(key, (num,), 0, jnp.minimum(self.count, self.rows.shape[0]))
        d, k = self.sizes
        rows = self.rows[at]
        return Batch(rows[:, :d], rows[:, d : d + k], rows[:, d + k : 2 * d + k], rows[:, -2], rows[:, -1] > 0)


class Practice(NamedTuple):
    """An agent at work: its learner, its memory, the environments that it acts in."""

    learner: Learner
    memory: Memory
    lanes: Lanes


def begin(
    environment: Environment, agent: SAC, key: Array, *, num_lanes: int, capacity: int, num_random: int
) -> Practice:
    """A fresh agent with `num_random` steps of uniform actions, at least one a lane, in its memory."""
    key_agent, key_lanes, key_random = jax.random.split(key, 3)
    lanes = start(environment, key_lanes, num_lanes)
    lanes, steps = collect(environment, uniform(environment), lanes, key_random, max(1, num_random // num_lanes))
    return Practice(agent.init(environment, key_agent), Memory.empty(environment, capacity).add(steps), lanes)


def practise(
    environment: Environment, agent: SAC, practice: Practice, key: Array,
    update: Callable[[Learner, Memory, Array], tuple[Learner, PyTree]], *, num_steps: int, num_updates: int, block: int,
) -> tuple[Practice, PyTree]:  # fmt: skip
    """(practice, the last update's losses) after `num_steps` steps into the memory and `num_updates` updates.

    They alternate: `block` steps of every lane, then their share of the updates.
    """
    num_blocks = num_steps // (block * len(practice.lanes.time))

    def one(practice: Practice, key: Array) -> tuple[Practice, PyTree]:
        key_collect, key_updates = jax.random.split(key)
        learner, memory, lanes = practice
        lanes, steps = collect(environment, partial(agent.sample, learner.weights), lanes, key_collect, block)
        memory = memory.add(steps)
        keys = jax.random.split(key_updates, num_updates // num_blocks)
        learner, losses = lax.scan(lambda learner, key: update(learner, memory, key), learner, keys)
        return Practice(learner, memory, lanes), jax.tree.map(lambda leaf: leaf[-1], losses)

    practice, losses = lax.scan(one, practice, jax.random.split(key, num_blocks))
    return practice, jax.tree.map(lambda leaf: leaf[-1], losses)
