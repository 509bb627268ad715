"""Deep inverse reinforcement learning as a bilevel problem: `to_control`, and what its solvers share.

x: the reward's parameters. y: `sac.Weights`, the policy and its soft values as networks. With an environment that can
only be stepped, nothing of the lower level is known exactly, and the problem says what can be said of (x, y) alone:

    upper     f = -mean of log pi_y(a|s) over the demonstrations' steps
    lower     T_x(y) = y - the gradients of `SAC.update`'s losses at the demonstrations' transitions with r(.; x); the
              slow copies go to the critics

The solvers of `irl.solvers` for these problems are one loop, `Imitation`. Step k:

    lower     num_env_steps steps in the environment with pi_y into the memory, and num_lower_steps updates of y by
              SAC on transitions drawn from it, their rewards labelled anew with the reward of x_k
    upper     num_rollouts whole episodes of the new policy against all demonstrations: x moves

They differ in the reward and in how x moves. The driver is `bilevel.solve`; its record has this file's `Info` as
columns beside its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from bilevel import BilevelProblem, FixedPoint, Full, Reals, Status, oracles
from bilevel.diagnostics import Measurement, norm
from bilevel.record import OracleCount
from bilevel.sets import Set
from bilevel.solver import Solver
from bilevel.step import Stepper, step_sizes, stepper
from bilevel.struct import invalid, static, struct
from irl import rollouts
from irl.demonstrations import Demonstrations
from irl.environments import Environment
from irl.networks import init_mlp, mlp, pairs
from irl.rollouts import Lanes, Memory, Practice, Steps
from irl.sac import SAC, Learner, Weights

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
        """r [b] of standardised observations [b, d] and actions [b, k]."""
        return jnp.clip(self.raw(x, observation, action), -self.clamp, self.clamp)


class Task(NamedTuple):
    """The lower level's data. center, scale [d]: of the demonstrations' observations. expert: their steps, flat."""

    environment: Any
    reward: Any
    agent: Any
    center: Array
    scale: Array
    expert: Steps

    def standard(self, observation: Array) -> Array:
        """Observations as rewards and discriminators see them."""
        return (observation - self.center[None, :]) / self.scale[None, :]

    def rewards(self, x: PyTree, steps: Any) -> Array:
        """r(s, a; x) of flat steps, [b]."""
        return self.reward(x, self.standard(steps.observation), steps.action)


class Experts(NamedTuple):
    """The upper level's data: the demonstrations' steps [n, T], and the agent that prices them."""

    agent: Any
    steps: Steps


def upper(x: PyTree, y: Weights, batch: Experts) -> Array:
    """-mean of log pi_y(a|s) over the demonstrations' steps outside of absorbing states, []."""
    steps = batch.steps.flat
    inside = steps.inside & jnp.any(steps.action != 0, axis=-1)
    log_pi = jnp.where(inside, batch.agent.log_prob(y, steps.observation, steps.action), 0)
    return -jnp.sum(log_pi) / jnp.maximum(jnp.sum(inside), 1)


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
) -> BilevelProblem:
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
    flat = steps.flat
    seen = np.asarray(flat.observation)[np.asarray(flat.inside)]
    scale = np.std(seen, axis=0)
    if hasattr(environment, "environment"):  # the entry of the absorbing state stays as it is
        seen[:, -1], scale[-1] = 0, 1
    task = Task(
        environment, reward, agent, jnp.asarray(seen.mean(axis=0)), jnp.asarray(np.where(scale > 1e-3, scale, 1)), flat
    )  # fmt: skip
    sizes = Sizes(environment.observation_size, environment.action_size, environment.num_actions)
    return BilevelProblem(
        upper=upper,
        lower=FixedPoint(lower_map),
        x_set=x_set,
        upper_data=Full(Experts(agent, steps)),
        lower_data=Full(task),
        init=_init(sizes, _parts(reward), _parts(agent)),
    )


def measure(problem: BilevelProblem, x: PyTree, y: Weights) -> Measurement:
    """What can be said of (x, y) without a model: -Lhat, the lower residual, and whether the reward is saturated.

    There is no exact lower level to judge by, so hypergradient and error bound are NaN, and no run is called converged.
    SATURATED: at half of the demonstrations' steps or more the network is within 1 % of its clamp, or beyond.
    """
    task = problem.lower_data.full()
    nan = jnp.full((), jnp.nan)
    value = oracles.upper_value(problem, x, y, problem.upper_data.full())
    residual = norm(oracles.residual(problem, x, y, task))
    r = jnp.where(task.expert.inside, task.rewards(x, task.expert), 0)
    bound = getattr(task.reward, "clamp", jnp.inf)
    share = jnp.sum(jnp.abs(r) >= 0.99 * bound) / jnp.sum(task.expert.inside)
    status = jnp.where(share >= 0.5, int(Status.SATURATED), int(Status.UNCHECKED))
    return Measurement(value, nan, nan, residual, jnp.zeros(()), status, nan)


def refuse_other_problems(solver: Solver, problem: BilevelProblem) -> str | None:
    """The reason for solvers of problems of `to_control`."""
    if isinstance(problem.lower, FixedPoint) and problem.lower.T is lower_map:
        return None
    return f"{type(solver).__name__} needs a problem of irl.to_control; got {type(problem.lower).__name__}."


class State(NamedTuple):
    """x; y = the agent's weights; Adam's moments of the agent; memory and environments; the rule for x.

    extra: what a method has beside, a discriminator for one. env_steps: how many so far, rollouts among them.
    """

    x: PyTree
    y: Weights
    moments: tuple[PyTree, PyTree, PyTree]
    memory: Memory
    lanes: Lanes
    step_x: Stepper
    extra: PyTree
    env_steps: Array


class Info(NamedTuple):
    """What people look at, scalars. Lhat: E_expert sum of w r - E V(s0), the surrogate of the likelihood.

    direction: |the direction of x|. policy_change: root mean square of log pi_{k+1} - log pi_k at the demonstrations.
    returns, length: of the rollouts, by the true reward. reward_expert, reward_agent: weighted means of the learned
    reward. reward_std: over the demonstrations. critic: the last update's error. entropy, temperature: of pi.
    env_steps: in all.
    """

    Lhat: Array
    direction: Array
    policy_change: Array
    returns: Array
    length: Array
    reward_expert: Array
    reward_agent: Array
    reward_std: Array
    critic: Array
    entropy: Array
    temperature: Array
    env_steps: Array


class Pair(NamedTuple):
    """The agent's and the expert's steps, flat, with weights whose sum is 1 for an episode that runs to the end."""

    agent: Steps
    agent_weights: Array
    expert: Steps
    expert_weights: Array
    num_agent: int
    num_expert: int

    def gap(self, values: Callable[[Steps], Array]) -> Array:
        """Mean over episodes of the weighted sum of values, the agent's minus the expert's, []."""
        agent = jnp.sum(self.agent_weights * values(self.agent)) / self.num_agent
        return agent - jnp.sum(self.expert_weights * values(self.expert)) / self.num_expert


def default_rule(learning_rate: float, decay: float) -> optax.GradientTransformation:
    """Adam with weight decay as part of the gradient."""
    return optax.chain(optax.add_decayed_weights(decay), optax.adam(learning_rate))


@struct
class Imitation(Solver):
    """The loop of this file's docstring; a solver overrides `reward` and `move`, or more.

    Args:
        upper_step_size: for x: a > 0, an optax schedule or an optax transformation. Default: Adam, `learning_rate`,
            with weight decay 1e-3.
        occupancy_discount: weights discount^t of an episode's steps in the upper level, in (0, 1]. 1, the default, is
            what implementations use: every visited state counts the same.
        num_env_steps: steps in the environment each step. num_lower_steps: updates of the agent each step.
        num_rollouts: whole episodes each step; they do not go into the memory.
        num_upper_steps: moves of x each step, on the same episodes.
        block: environment steps between two batches of updates. lanes: environments that step together.
        capacity: transitions in memory. num_random: uniform actions before the first step.
    """

    upper_step_size: Any = None
    occupancy_discount: float = 1.0
    num_env_steps: int = static(default=1000)
    num_lower_steps: int = static(default=1000)
    num_rollouts: int = static(default=5)
    num_upper_steps: int = static(default=1)
    block: int = static(default=50)
    lanes: int = static(default=1)
    capacity: int = static(default=200_000)
    num_random: int = static(default=1000)
    learning_rate: float = static(default=1e-3)

    referee = staticmethod(measure)
    full_batch = True

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations; check the loop lengths."""
        rule = default_rule(self.learning_rate, 1e-3)
        if self.upper_step_size is None:
            object.__setattr__(self, "upper_step_size", rule)
        step_sizes(self, "upper_step_size")
        per, name = self.block * self.lanes, type(self).__name__
        if self.num_env_steps < per or self.num_env_steps % per:
            do = f"block * lanes = {per} environment steps are taken at a time."
            invalid(f"num_env_steps ({name})", self.num_env_steps, f"a multiple of {per}", do)
        if self.num_lower_steps < self.num_env_steps // per or self.num_lower_steps % (self.num_env_steps // per):
            do = "Every block of environment steps is followed by the same number of updates."
            want = f"a multiple of {self.num_env_steps // per}, the number of blocks"
            invalid(f"num_lower_steps ({name})", self.num_lower_steps, want, do)

    def init(self, problem: BilevelProblem, key: Array) -> State:
        task = problem.lower_data.full()
        key_x, key_practice, key_extra = jax.random.split(key, 3)
        x, y = problem.init(key_x)
        sizes = {"num_lanes": self.lanes, "capacity": self.capacity, "num_random": self.num_random}
        practice = rollouts.begin(task.environment, task.agent, key_practice, **sizes)
        moments = practice.learner[1:]
        rule, extra, memory = stepper(self.upper_step_size, None, x), self.init_extra(problem, key_extra), practice.memory
        return State(x, y, moments, memory, practice.lanes, rule, extra, memory.count)

    def init_extra(self, problem: BilevelProblem, key: Array) -> PyTree:
        """What the method keeps beside x and y."""
        return ()

    def reward(self, problem: BilevelProblem, state: State, steps: Any) -> Array:
        """The reward that the agent is trained on, at flat transitions, [b]."""
        return problem.lower_data.full().rewards(state.x, steps)

    def move(self, problem: BilevelProblem, state: State, pair: Pair, key: Array) -> tuple[State, Array]:
        """(state with x moved, the norm of its direction)."""
        raise NotImplementedError

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        key_lower, key_episodes, key_upper, key_value = jax.random.split(key, 4)
        task, expert = problem.lower_data.full(), problem.upper_data.full().steps
        environment, agent = task.environment, task.agent
        before = state.y
        state, losses = self.lower(problem, state, key_lower)

        act = functools.partial(agent.sample, state.y)
        seen = rollouts.episodes(environment, act, key_episodes, self.num_rollouts)
        pair = self.pair(environment, seen, expert)
        state = state._replace(env_steps=state.env_steps + jnp.sum(seen.inside))
        V = agent.soft_value(state.y, state.y.critics, expert.observation[:, 0], key_value)
        labels = self.reward(problem, state, pair.expert), self.reward(problem, state, pair.agent)

        def moves(k: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
            return self.move(problem, carry[0], pair, jax.random.fold_in(key_upper, k))

        state, direction = lax.fori_loop(0, self.num_upper_steps, moves, (state, jnp.zeros(())))

        flat = expert.flat
        count = jnp.sum(flat.inside)
        change = agent.log_prob(state.y, flat.observation, flat.action)
        change = change - agent.log_prob(before, flat.observation, flat.action)
        means = [jnp.sum(w * r) / jnp.maximum(jnp.sum(w), 1e-12) for w, r in zip(pair[1:4:2], labels[::-1], strict=True)]
        spread = jnp.sqrt(jnp.sum(jnp.where(flat.inside, (labels[0] - means[1]) ** 2, 0)) / count)
        discounted = rollouts.weights(environment, expert, agent.discount).reshape(-1)
        Lhat = jnp.sum(discounted * labels[0]) / len(V) - jnp.mean(V)
        return state, Info(
            Lhat, direction, jnp.sqrt(jnp.sum(jnp.where(flat.inside, change**2, 0)) / count), jnp.mean(seen.returns),
            jnp.sum(seen.inside) / self.num_rollouts, means[1], means[0], spread, losses.critic, losses.entropy,
            jnp.exp(state.y.log_temperature), state.env_steps,
        )  # fmt: skip

    def pair(self, environment: Environment, seen: Steps, expert: Steps) -> Pair:
        """Episodes of both sides with their weights."""
        discount = jnp.asarray(self.occupancy_discount, expert.reward.dtype)
        whole = jnp.sum(jnp.power(discount, jnp.arange(environment.max_steps, dtype=expert.reward.dtype)))
        weigh = lambda steps: rollouts.weights(environment, steps, discount).reshape(-1) / whole  # noqa: E731
        return Pair(seen.flat, weigh(seen), expert.flat, weigh(expert), len(seen.reward), len(expert.reward))

    def lower(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Any]:
        """Steps in the environment and updates of the agent, in turns."""
        task = problem.lower_data.full()

        def update(learner: Learner, memory: Memory, key: Array) -> tuple[Learner, Any]:
            return self.update(problem, state._replace(y=learner.weights, memory=memory), learner, key)

        practice = Practice(Learner(state.y, *state.moments), state.memory, state.lanes)
        sizes = {"num_steps": self.num_env_steps, "num_updates": self.num_lower_steps, "block": self.block}
        (learner, memory, lanes), losses = rollouts.practise(task.environment, task.agent, practice, key, update, **sizes)
        env_steps = state.env_steps + self.num_env_steps
        return state._replace(
            y=learner.weights, moments=learner[1:], memory=memory, lanes=lanes, env_steps=env_steps
        ), losses  # fmt: skip

    def update(self, problem: BilevelProblem, state: State, learner: Learner, key: Array) -> tuple[Learner, Any]:
        """One update of the agent on transitions drawn from the memory, labelled with the reward of now."""
        agent = problem.lower_data.full().agent
        key_draw, key_update = jax.random.split(key)
        batch = state.memory.draw(key_draw, agent.batch_size)
        return agent.update(learner, batch._replace(reward=self.reward(problem, state, batch)), key_update)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=self.num_upper_steps, lower_gradients=self.num_lower_steps)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_other_problems(self, problem)


def step_x(problem: BilevelProblem, state: State, direction: PyTree) -> tuple[State, Array]:
    """(state with x one projected step against the direction, the direction's norm)."""
    x, rule = state.step_x(state.x, direction)
    return state._replace(x=problem.x_set.project(x), step_x=rule), norm(direction)
