"""Deep inverse reinforcement learning as a bilevel problem: `to_control`.

x: the reward's parameters. y: `sac.Weights`, the policy and its soft values as networks. With an environment that can
only be stepped, nothing of the lower level is known exactly, and the problem says what can be said of (x, y) alone:

    upper     f = -mean of log pi_y(a|s) over the demonstrations' steps
    lower     T_x(y) = y - the gradients of `SAC.update`'s losses at the demonstrations' transitions with r(.; x); the
              slow copies go to the critics
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel import FixedPoint, Full, Reals, Status, oracles
from bilevel.backend.tree import norm
from bilevel.data import Source
from bilevel.diagnostics import Measurement, Referee
from bilevel.sets import Set
from bilevel.struct import derived, invalid, static, struct
from irl.deep import rollouts
from irl.deep.environments import Absorbing, Environment
from irl.deep.networks import init_mlp, mlp, pairs
from irl.deep.rollouts import Steps
from irl.deep.sac import SAC, Weights
from irl.demonstrations import Demonstrations
from irl.problem import ImitationProblem

PyTree = Any


@struct
class DeepReward:
    """r(s, a; x), a network of the standardised observation and the action, cut off at +-clamp.

    Args:
        clamp: c > 0. Where the network is beyond, the reward has no gradient: `solve` then ends SATURATED.
        hidden: the widths of its hidden layers.
        state_only: r(s; x), which transfers to other dynamics.
        module: a `flax.linen` module instead, called with inputs [b, d] or [b, d + k]; its first output counts.
    """

    clamp: float = 10.0
    hidden: tuple[int, ...] = static(default=(64, 64))
    state_only: bool = static(default=False)
    module: Any = static(default=None)

    def init(self, environment: Environment, key: Array) -> PyTree:
        size = environment.observation_size + (0 if self.state_only else environment.action_size)
        if self.module is None:
            return init_mlp(key, (size, *self.hidden, 1))
        with jax.numpy_dtype_promotion("standard"):  # parameters may start in float32
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), self.module.init(key, jnp.zeros((1, size))))

    def raw(self, x: PyTree, observation: Array, action: Array) -> Array:
        """Before the cut, [b]."""
        inputs = observation if self.state_only else pairs(observation, action)
        return (mlp(x, inputs) if self.module is None else self.module.apply(x, inputs))[:, 0]

    def __call__(self, x: PyTree, observation: Array, action: Array) -> Array:
        """The reward [b] of standardised observations [b, d] and actions [b, k]."""
        return jnp.clip(self.raw(x, observation, action), -self.clamp, self.clamp)


class Task(NamedTuple):
    """A batch of the lower level: all that T needs."""

    reward: Any
    agent: SAC
    center: Array
    """The mean of observations, [d]."""
    scale: Array
    """Their standard deviation, [d]."""
    demonstrations: Steps
    """The expert's steps, [n, T]."""

    @property
    def expert(self) -> Steps:
        """The demonstrations' steps with one leading axis."""
        return self.demonstrations.flat

    def standard(self, observation: Array) -> Array:
        """Observations [b, d] as rewards and discriminators see them."""
        return (observation - self.center[None, :]) / self.scale[None, :]

    def rewards(self, x: PyTree, steps: Any) -> Array:
        """The rewards r(s, a; x) of steps with one leading axis, [b]."""
        return self.reward(x, self.standard(steps.observation), steps.action)


class Experts(NamedTuple):
    """A batch of the upper level: the demonstrations' steps [n, T], and the agent that gives their likelihood."""

    agent: SAC
    steps: Steps


def upper(x: PyTree, y: Weights, batch: Experts) -> Array:
    """-mean of log pi_y(a|s) over the demonstrations' steps outside of absorbing states, []."""
    steps = batch.steps.flat
    log_pi = jnp.where(steps.chosen, batch.agent.log_prob(y, steps.observation, steps.action), 0)
    return -jnp.sum(log_pi) / jnp.maximum(jnp.sum(steps.chosen, dtype=float), 1)


def lower_map(x: PyTree, y: Weights, batch: Task) -> Weights:
    """T_x(y) of this file's docstring, shaped like y; actions are drawn with one fixed key."""
    agent, steps, key = batch.agent, batch.expert, jax.random.key(0)
    r = lax.stop_gradient(batch.rewards(x, steps))
    V = agent.soft_value(y, y.targets, steps.next_observation, key)
    target = lax.stop_gradient(r + agent.discount * jnp.where(steps.terminated, 0, V))

    def losses(actor: Any, critics: Any) -> Array:
        errors = agent.values(critics, steps.observation, steps.action) - target[None, :]
        critic = 0.5 * jnp.sum(jnp.mean(jnp.where(steps.inside[None, :], errors, 0) ** 2, axis=1))
        frozen = jax.tree.map(lax.stop_gradient, y.critics)
        V = agent.soft_value(y._replace(actor=actor), frozen, steps.observation, key) if y.actor else jnp.zeros(1)
        return critic - jnp.mean(V)

    actor, critics = jax.grad(losses, argnums=(0, 1))(y.actor, y.critics)
    minus = functools.partial(jax.tree.map, jnp.subtract)
    return Weights(minus(y.actor, actor), minus(y.critics, critics), y.critics, y.log_temperature)


def _task(problem: "ControlImitation") -> Task:
    return Task(problem.reward, problem.agent, problem.center, problem.scale, problem.demonstrations)


class Acting:
    """What marks the solvers whose agent acts in an environment, or learns from those who did."""


@struct
class ControlImitation(ImitationProblem):
    """The bilevel problem of this module's docstring, as `to_control` makes it.

    Args:
        environment: in which the agent acts.
        reward: r(s, a; x), `DeepReward` or anything with its init and __call__, of standardised observations.
        agent: settings of the lower level.
        demonstrations: the expert's steps [n, T].
        center, scale: by which observations are standardised, both [d].
    """

    _: dataclasses.KW_ONLY
    environment: Environment
    reward: Any
    agent: SAC
    demonstrations: Steps
    center: Any
    scale: Any
    upper: Callable[..., Array] = derived(lambda problem: upper)
    lower: FixedPoint = derived(lambda problem: FixedPoint(lower_map))
    upper_data: Source = derived(lambda problem: Full(Experts(problem.agent, problem.demonstrations)))
    lower_data: Source = derived(lambda problem: Full(_task(problem)))

    made_by = "irl.to_control"
    parts = ("environment", "reward", "agent", "demonstrations", "center", "scale")

    def refuses(self, solver: object) -> str | None:
        """Solvers that step no environment would see the demonstrations' transitions alone, and no agent."""
        if isinstance(solver, Acting):
            return None
        return f"{type(solver).__name__} does not step environments. Use irl.DeepMLIRL(), or another of irl.solvers."

    @property
    def expert(self) -> Steps:
        """The demonstrations' steps with one leading axis."""
        return self.demonstrations.flat

    def on_full_data(self) -> "ControlImitation":
        """The same problem, whose batches are all of the demonstrations as it is."""
        return self

    def standard(self, observation: Array) -> Array:
        """Observations [b, d] as rewards and discriminators see them."""
        return _task(self).standard(observation)

    def rewards(self, x: PyTree, steps: Any) -> Array:
        """The rewards r(s, a; x) of steps with one leading axis, [b]."""
        return _task(self).rewards(x, steps)


def _standard(environment: Environment, expert: Steps) -> tuple[Array, Array]:
    """(mean, deviation [d]) of the half-and-half mixture of the demonstrations and of random actions.

    The demonstrations alone will not do. An expert that balances a pole varies by 0.007 in its angle; an episode ends
    at 0.2, 28 such deviations away, where a ReLU network is 28 times as large and moves 28^2 times as fast under
    descent as at home: the reward is then decided by falling poles, and falling can pay.
    """
    wandered = rollouts.wander(environment, jax.random.key(0), num_lanes=8, num_steps=128).flat
    sides = [np.asarray(steps.observation, float)[np.asarray(steps.chosen)] for steps in (expert, wandered)]
    mean = np.mean([side.mean(axis=0) for side in sides], axis=0)
    scale = np.sqrt(np.mean([((side - mean) ** 2).mean(axis=0) for side in sides], axis=0))
    if isinstance(environment, Absorbing):  # its entry stays as it is
        mean[-1], scale[-1] = 0, 1
    return jnp.asarray(mean, float), jnp.asarray(np.where(scale > 1e-3, scale, 1), float)


class Sizes(NamedTuple):
    """What networks need to know of an environment."""

    observation_size: int
    action_size: int
    num_actions: int | None


@functools.cache
def _init(sizes: Sizes, *parts: Any) -> Callable[[Array], tuple[PyTree, Weights]]:
    """One function for equal sizes and settings, so that another instance compiles nothing."""
    reward, agent = (jax.tree.unflatten(structure, leaves) for structure, leaves in parts)

    def init(key: Array) -> tuple[PyTree, Weights]:
        key_x, key_y = jax.random.split(key)
        return reward.init(sizes, key_x), agent.init(sizes, key_y).weights

    return init


def _parts(settings: Any) -> tuple[Any, tuple[float, ...]]:
    leaves, structure = jax.tree.flatten(settings)
    return structure, tuple(map(float, leaves))


def to_control(
    environment: Environment,
    demonstrations: Demonstrations,
    reward: Any = None,
    *,
    agent: SAC = SAC(),  # noqa: B008
    x_set: Set = Reals(),  # noqa: B008
) -> ControlImitation:
    """The bilevel problem of this module's docstring.

    Args:
        environment: of `irl.environments.make`, or any other with its protocol.
        demonstrations: with observations [n, T, d], last and terminated.
        reward: `DeepReward`, the default, or anything with its init and __call__.
        agent: settings of the lower level, the same for every solver.
        x_set: where x may be.

    Raises:
        InvalidInput: naming what does not fit together.
    """
    if not isinstance(environment, Environment):
        do = "Use irl.environments.make; for an MDP there is irl.to_bilevel."
        invalid("environment (to_control)", type(environment).__name__, "an Environment", do)
    reward = DeepReward() if reward is None else reward
    steps = rollouts.demonstrated(environment, demonstrations)
    center, scale = _standard(environment, steps.flat)
    sizes = Sizes(environment.observation_size, environment.action_size, environment.num_actions)
    return ControlImitation(
        environment=environment, reward=reward, agent=agent, demonstrations=steps, center=center, scale=scale,
        x_set=x_set, init=_init(sizes, _parts(reward), _parts(agent)),
    )  # fmt: skip


def measure(problem: ControlImitation, x: PyTree, y: Weights) -> Measurement:
    """What can be said of (x, y) without a model: -Lhat, the lower residual, and whether the reward is saturated.

    There is no exact lower level to judge by, so hypergradient and error bound are NaN, and no run is called converged.
    SATURATED: at half of the demonstrations' steps or more the network is within 1 % of its clamp, or beyond.
    """
    nan = jnp.full((), jnp.nan)
    value = oracles.upper_value(problem, x, y, problem.upper_data.full())
    residual = norm(oracles.residual(problem, x, y, problem.lower_data.full()))
    expert = problem.expert
    r = jnp.where(expert.inside, problem.rewards(x, expert), 0)
    bound = getattr(problem.reward, "clamp", jnp.inf)
    share = jnp.sum(jnp.abs(r) >= 0.99 * bound, dtype=float) / jnp.sum(expert.inside, dtype=float)
    status = jnp.where(share >= 0.5, int(Status.SATURATED), int(Status.UNCHECKED))
    return Measurement(value, nan, nan, residual, jnp.zeros(()), status, nan)


REFEREE = Referee("what can be said without a model", measure)
"""Of problems of `to_control`: no run is called converged, and nothing checks its numbers."""
