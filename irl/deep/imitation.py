"""The one loop of the solvers for problems of `irl.to_control`. Step k:

    lower     num_env_steps steps in the environment with pi_y into the memory, and num_lower_steps updates of y by
              SAC on transitions drawn from it, their rewards labelled anew with the reward of x_k
    upper     num_rollouts whole episodes of the new policy against all demonstrations: x moves

Solvers differ in the reward and in how x moves. The driver is `bilevel.solve`; its record has the fields of `Info` as
columns beside its own.
"""

import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from bilevel.backend.tree import norm
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, Referee, Status
from bilevel.solver import Solver
from bilevel.step import Stepper, StepSize, step_sizes, stepper
from bilevel.struct import invalid, static, struct
from irl.deep import control, rollouts
from irl.deep.control import Acting, ControlImitation
from irl.deep.environments import Environment
from irl.deep.rollouts import Lanes, Memory, Practice, Steps
from irl.deep.sac import Learner, Weights
from irl.problem import refuse_others

PyTree = Any


class State(NamedTuple):
    """What the next step needs."""

    x: PyTree
    """The reward's parameters."""
    y: Weights
    """The agent's networks."""
    moments: tuple[PyTree, PyTree, PyTree]
    """Adam's moments for actor, critics and temperature."""
    memory: Memory
    """The transitions that the agent learns from."""
    lanes: Lanes
    """The environments in which it collects them."""
    step_x: Stepper
    """The rule for x."""
    extra: PyTree
    """What a method keeps beside, such as a discriminator."""
    env_steps: Array
    """Environment steps so far, those of the rollouts included, []."""


class Info(NamedTuple):
    """What a step of these solvers shows; every entry is a scalar []."""

    Lhat: Array
    """The surrogate of the log-likelihood: E_expert sum_t gamma^t r - E V(s_0), with V the agent's soft value."""
    direction: Array
    """The norm of the direction that x moved along."""
    policy_change: Array
    """The root mean square of log pi_{k+1}(a|s) - log pi_k(a|s) over the demonstrations' steps, absorbed ones
    aside."""
    returns: Array
    """The mean return of the rollouts, by the true reward."""
    length: Array
    """Their mean length."""
    reward_expert: Array
    """The weighted mean of the learned reward over the demonstrations."""
    reward_agent: Array
    """The same over the rollouts."""
    reward_std: Array
    """The standard deviation of the learned reward over the demonstrations."""
    critic: Array
    """The critics' loss at the step's last update."""
    entropy: Array
    """The policy's mean entropy at the states of that update."""
    temperature: Array
    """The temperature alpha."""
    env_steps: Array
    """Environment steps so far, those of the rollouts included."""
    told_apart: Array
    """The share of steps that the discriminator gives to the right side: 1/2 by chance, NaN where there is none."""
    overlap: Array
    """Whether that share is below `SURE`. Above, the reward is nearly constant on each side and teaches nothing."""


SURE = 0.99


class Pair(NamedTuple):
    """The agent's and the expert's steps, each with one leading axis, and their weights.

    The weights of an episode sum to 1 where it reaches the time limit.
    """

    agent: Steps
    agent_weights: Array
    expert: Steps
    expert_weights: Array
    num_agent: int
    """How many episodes the agent's steps are from."""
    num_expert: int
    """How many the expert's are from."""

    def gap(self, values: Callable[[Steps], Array]) -> Array:
        """The agent's mean minus the expert's, [], over episodes, of the weighted sum of values(steps)."""
        agent = jnp.sum(self.agent_weights * values(self.agent)) / self.num_agent
        return agent - jnp.sum(self.expert_weights * values(self.expert)) / self.num_expert


def default_rule(learning_rate: float, decay: float) -> optax.GradientTransformation:
    """Adam on the gradient plus decay times the parameters."""
    return optax.chain(optax.add_decayed_weights(decay), optax.adam(learning_rate))


@struct(kw_only=True)
class Imitation(Acting, Solver):
    """The loop of this file's docstring; a solver overrides `reward` and `move`, or more.

    Args:
        upper_step_size: the step of x: a > 0, an optax schedule or an optax transformation.
            Default: Adam with `learning_rate` and weight decay 1e-3.
        occupancy_discount: step t of an episode has the weight occupancy_discount^t in the upper level, in (0, 1].
            Default: 1, as in implementations, so that every visited state counts the same.
        num_env_steps: steps in the environment each step of the solver, a multiple of block * lanes.
        num_lower_steps: updates of the agent each step, a multiple of the number of blocks.
        num_rollouts: whole episodes each step, >= 1; they do not go into the memory.
        num_upper_steps: moves of x each step, >= 1, all on the same episodes.
        block: environment steps of every lane between two batches of updates, >= 1.
        lanes: environments that step together, >= 1.
        capacity: transitions that the memory holds, more than block * lanes.
        num_random: uniform actions before the first step.
        learning_rate: Adam's where upper_step_size is left out, > 0.
    """

    upper_step_size: StepSize | None = None
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

    full_batch = True
    assumptions = MappingProxyType({"overlap": f"the discriminator is right at less than {SURE:.0%} of the steps"})
    warnings = MappingProxyType({"overlap": Status.SATURATED})

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

    def init(self, problem: ControlImitation, key: Array) -> State:
        key_x, key_practice, key_extra = jax.random.split(key, 3)
        x, y = problem.init(key_x)
        sizes = {"num_lanes": self.lanes, "capacity": self.capacity, "num_random": self.num_random}
        practice = rollouts.begin(problem.environment, problem.agent, key_practice, **sizes)
        moments = practice.learner[1:]
        rule, extra = stepper(self.upper_step_size, None, x), self.init_extra(problem, key_extra)
        return State(x, y, moments, practice.memory, practice.lanes, rule, extra, practice.memory.count)

    def init_extra(self, problem: ControlImitation, key: Array) -> PyTree:
        """What the method keeps beside x and y: `State.extra` at the start."""
        return ()

    def reward(self, problem: ControlImitation, state: State, steps: Any) -> Array:
        """The reward that the agent is trained on, [b], at steps or a batch with one leading axis."""
        return problem.rewards(state.x, steps)

    def logit(self, problem: ControlImitation, state: State, steps: Any) -> Array | None:
        """The discriminator's logit for "these steps are the expert's", [b]; None where the method has none."""
        return None

    def move(self, problem: ControlImitation, state: State, pair: Pair, key: Array) -> tuple[State, Array]:
        """(state with x moved, the norm of its direction, []). Here x stays where it is."""
        return state, jnp.zeros(())

    def step(self, problem: ControlImitation, state: State, key: Array) -> tuple[State, Info]:
        key_lower, key_episodes, key_upper, key_value = jax.random.split(key, 4)
        environment, agent, expert = problem.environment, problem.agent, problem.demonstrations
        before = state.y
        state, losses = self.lower(problem, state, key_lower)

        act = functools.partial(agent.sample, state.y)
        rollout = rollouts.episodes(environment, act, key_episodes, self.num_rollouts)
        pair = self.pair(environment, rollout, expert)
        state = state._replace(env_steps=state.env_steps + jnp.sum(rollout.inside))
        V = agent.soft_value(state.y, state.y.critics, expert.observation[:, 0], key_value)
        labels = Labels(self.reward(problem, state, pair.expert), self.reward(problem, state, pair.agent), V)

        def moves(k: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
            return self.move(problem, carry[0], pair, jax.random.fold_in(key_upper, k))

        state, direction = lax.fori_loop(0, self.num_upper_steps, moves, (state, jnp.zeros(())))
        told_apart = self._told_apart(problem, state, pair)
        return state, Info(
            Lhat=_surrogate(problem, labels),
            direction=direction,
            policy_change=_policy_change(problem, before, state.y),
            returns=jnp.mean(rollout.returns),
            length=jnp.sum(rollout.inside, dtype=float) / self.num_rollouts,
            reward_expert=_mean(pair.expert_weights, labels.expert),
            reward_agent=_mean(pair.agent_weights, labels.agent),
            reward_std=_spread(pair, labels),
            critic=losses.critic,
            entropy=losses.entropy,
            temperature=jnp.exp(state.y.log_temperature),
            env_steps=state.env_steps,
            told_apart=told_apart,
            overlap=~(told_apart >= SURE),
        )

    def _told_apart(self, problem: ControlImitation, state: State, pair: Pair) -> Array:
        """The share of steps that the discriminator gives to the right side, [], both sides counting the same."""
        agent, expert = self.logit(problem, state, pair.agent), self.logit(problem, state, pair.expert)
        if agent is None or expert is None:
            return jnp.full((), jnp.nan)
        right = _mean(pair.agent_weights, (agent < 0).astype(float))
        return (right + _mean(pair.expert_weights, (expert > 0).astype(float))) / 2

    def pair(self, environment: Environment, seen: Steps, expert: Steps) -> Pair:
        """Episodes of both sides with their weights."""
        discount = jnp.asarray(self.occupancy_discount, expert.reward.dtype)
        whole = jnp.sum(jnp.power(discount, jnp.arange(environment.max_steps, dtype=expert.reward.dtype)))
        weigh = lambda steps: rollouts.weights(environment, steps, discount).reshape(-1) / whole  # noqa: E731
        return Pair(seen.flat, weigh(seen), expert.flat, weigh(expert), len(seen.reward), len(expert.reward))

    def lower(self, problem: ControlImitation, state: State, key: Array) -> tuple[State, Any]:
        """Steps in the environment and updates of the agent, in turns."""

        def update(learner: Learner, memory: Memory, key: Array) -> tuple[Learner, Any]:
            return self.update(problem, state._replace(y=learner.weights, memory=memory), learner, key)

        practice = Practice(Learner(state.y, *state.moments), state.memory, state.lanes)
        sizes = {"num_steps": self.num_env_steps, "num_updates": self.num_lower_steps, "block": self.block}
        practice, losses = rollouts.practise(problem.environment, problem.agent, practice, key, update, **sizes)
        learner, memory, lanes = practice
        env_steps = state.env_steps + self.num_env_steps
        return state._replace(
            y=learner.weights, moments=learner[1:], memory=memory, lanes=lanes, env_steps=env_steps
        ), losses  # fmt: skip

    def update(self, problem: ControlImitation, state: State, learner: Learner, key: Array) -> tuple[Learner, Any]:
        """One update of the agent on transitions drawn from the memory, labelled with the reward of now."""
        key_draw, key_update = jax.random.split(key)
        batch = state.memory.draw(key_draw, problem.agent.batch_size)
        return problem.agent.update(learner, batch._replace(reward=self.reward(problem, state, batch)), key_update)

    def cost(self, problem: ControlImitation) -> OracleCount:
        return OracleCount(upper_gradients=self.num_upper_steps, lower_gradients=self.num_lower_steps)

    def referee(self, problem: BilevelProblem) -> Referee:
        return control.REFEREE

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_others(self, problem, ControlImitation)


class Labels(NamedTuple):
    """What a step's networks say of its steps, before x moves."""

    expert: Array
    """The learned reward of the demonstrations' steps, [b]."""
    agent: Array
    """The learned reward of the rollouts' steps, [b]."""
    V: Array
    """The soft value of the demonstrations' first states, [n]."""


def _mean(weights: Array, values: Array) -> Array:
    """The weighted mean, []; 0 where all weights are 0."""
    return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1e-12)


def _surrogate(problem: ControlImitation, labels: Labels) -> Array:
    """`Info.Lhat`, []."""
    discounted = rollouts.weights(problem.environment, problem.demonstrations, problem.agent.discount).reshape(-1)
    return jnp.sum(discounted * labels.expert) / len(labels.V) - jnp.mean(labels.V)


def _policy_change(problem: ControlImitation, before: Weights, after: Weights) -> Array:
    """`Info.policy_change`, []."""
    agent, steps = problem.agent, problem.expert
    change = agent.log_prob(after, steps.observation, steps.action)
    change = change - agent.log_prob(before, steps.observation, steps.action)
    return jnp.sqrt(jnp.sum(jnp.where(steps.chosen, change**2, 0)) / jnp.sum(steps.chosen, dtype=float))


def _spread(pair: Pair, labels: Labels) -> Array:
    """`Info.reward_std`, []."""
    inside, mean = pair.expert.inside, _mean(pair.expert_weights, labels.expert)
    return jnp.sqrt(jnp.sum(jnp.where(inside, (labels.expert - mean) ** 2, 0)) / jnp.sum(inside, dtype=float))


def classify(logit: Callable[[Steps], Array], pair: Pair) -> Array:
    """The logistic loss of logits for "these steps are the expert's", [], in which both sides count the same."""
    agent = jnp.sum(pair.agent_weights * jax.nn.softplus(logit(pair.agent))) / jnp.sum(pair.agent_weights)
    expert = jnp.sum(pair.expert_weights * jax.nn.softplus(-logit(pair.expert))) / jnp.sum(pair.expert_weights)
    return agent + expert


def gradient_penalty(logit: Callable[[Steps], Array], pair: Pair, scale: Array, key: Array, num: int = 256) -> Array:
    """Mean of (|grad logit| - 1)^2 at `num` random points between the agent's steps and the expert's, [].

    The gradient is by observations in units of scale [d], and by the action; whether a step ended is the agent's. A
    logit that is cut off has no slope beyond the cut, nor this a derivative there.

    Reference: Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville. Improved training of Wasserstein GANs. NeurIPS 2017,
        arXiv:1704.00028, equation 3; for imitation: Kostrikov et al. ICLR 2019, arXiv:1809.02925.
    """
    key_agent, key_expert, key_between = jax.random.split(key, 3)
    at_agent = jax.random.choice(key_agent, len(pair.agent_weights), (num,), p=pair.agent_weights)
    at_expert = jax.random.choice(key_expert, len(pair.expert_weights), (num,), p=pair.expert_weights)
    agent = jax.tree.map(lambda leaf: leaf[at_agent], pair.agent)
    expert = jax.tree.map(lambda leaf: leaf[at_expert], pair.expert)
    share = jax.random.uniform(key_between, (num, 1), agent.observation.dtype)
    inputs = lambda steps: (steps.observation, steps.next_observation, steps.action)  # noqa: E731
    between = jax.tree.map(lambda a, e: share * a + (1 - share) * e, inputs(agent), inputs(expert))

    def total(here: Array, there: Array, action: Array) -> Array:
        return jnp.sum(logit(agent._replace(observation=here, next_observation=there, action=action)))

    here, there, action = jax.grad(total, argnums=(0, 1, 2))(*between)
    slopes = jnp.concatenate([here * scale[None, :], there * scale[None, :], action], axis=1)
    size = jnp.sqrt(jnp.sum(slopes**2, axis=1) + 1e-12)  # a ReLU network can be flat, where a norm has no derivative
    return jnp.mean((size - 1) ** 2)


@struct(kw_only=True)
class Adversarial(Imitation):
    """`Imitation` whose x moves by a discriminator's loss.

    Args: as of `Imitation`, and
        gradient_penalty: c >= 0, the weight of `imitation.gradient_penalty`; 10 is usual. 0, the default: none.
    """

    gradient_penalty: float = static(default=0.0)

    def __post_init__(self) -> None:
        """Check the penalty's weight."""
        super().__post_init__()
        if not self.gradient_penalty >= 0:
            name = f"gradient_penalty ({type(self).__name__})"
            invalid(name, self.gradient_penalty, "a number >= 0", "10 is usual, 0 is none.")

    def loss(
        self, logit: Callable[[Steps], Array], sloped: Callable[[Steps], Array], pair: Pair, scale: Array, key: Array
    ) -> Array:
        """The logistic loss of `logit` plus c times the penalty on the slope of `sloped`, its part that learns, []."""
        fit, c = classify(logit, pair), self.gradient_penalty
        return fit + c * gradient_penalty(sloped, pair, scale, key) if c else fit


def step_x(problem: ControlImitation, state: State, direction: PyTree) -> tuple[State, Array]:
    """(state with x one projected step against the direction, the direction's norm)."""
    x, rule = state.step_x(state.x, direction)
    return state._replace(x=problem.x_set.project(x), step_x=rule), norm(direction)
