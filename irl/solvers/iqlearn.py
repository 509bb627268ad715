"""IQLearn: inverse soft Q-learning; one network is the value, and the reward follows from it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.problem import BilevelProblem
from bilevel.struct import struct
from irl import rollouts
from irl.imitation import Imitation, State
from irl.sac import Batch, Learner, Losses, Net


@struct
class IQLearn(Imitation):
    """Inverse soft Q-learning, for problems of `irl.to_control`: no reward network, x stays where it is. With V the
    soft value of Q and the policy, and r = Q - gamma V(s') the reward that Q implies,

        Q <- one step down -E_expert r + E[V(s) - gamma V(s')] + E r^2/(4 c)
        actor, temperature and slow copies as in SAC                                      num_lower_steps times

    The last two expectations are over expert and memory, half of each.

    Assumptions: as of soft Q-learning.
    Cost per step: num_lower_steps lower gradients (updates).

    Args: as of `imitation.Imitation`; what belongs to x has no effect; and
        regularisation: c > 0 of the chi-square term.

    Reference: Garg, Chakraborty, Cundy, Song, Ermon. IQ-Learn: inverse soft-Q learning for imitation. NeurIPS 2021,
        arXiv:2106.12142, Algorithm 1.
    Differs from the paper: V(s') comes from the slow copies without gradient, as in the authors' experiments with
    continuous actions; twin critics.
    """

    regularisation: float = 0.5

    def reward(self, problem: BilevelProblem, state: State, steps: Any) -> Array:
        agent, y = problem.lower_data.full().agent, state.y
        V = agent.soft_value(y, y.targets, steps.next_observation, jax.random.key(0))
        Q = jnp.min(agent.values(y.critics, steps.observation, steps.action), axis=0)
        return Q - agent.discount * jnp.where(steps.terminated, 0, V)

    def update(self, problem: BilevelProblem, state: State, learner: Learner, key: Array) -> tuple[Learner, Any]:
        task = problem.lower_data.full()
        agent, half = task.agent, task.agent.batch_size // 2
        key_draw, key_expert, key_here, key_there, key_actor = jax.random.split(key, 5)
        chances = rollouts.weights(task.environment, task.expert, self.occupancy_discount)
        drawn = jax.random.choice(key_expert, len(chances), (half,), p=chances / jnp.sum(chances))
        expert = Batch(*(getattr(task.expert, name)[drawn] for name in Batch._fields))
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts), expert, state.memory.draw(key_draw, half))
        after = agent.soft_value(learner.weights, learner.weights.targets, both.next_observation, key_there)
        after = agent.discount * jnp.where(both.terminated, 0, after)

        def loss(critics: tuple[Net, Net]) -> tuple[Array, Array]:
            Q = agent.values(critics, both.observation, both.action)
            V = agent.soft_value(learner.weights, critics, both.observation, key_here)
            r = Q - after[None, :]
            gap = jnp.mean(V - after) - jnp.mean(r[:, :half], axis=1)
            return jnp.sum(gap + jnp.mean(r**2, axis=1) / (4 * self.regularisation)), jnp.mean(Q)

        learner, (value, Q) = agent.critic_step(learner, loss)
        learner, entropy = agent.actor_step(learner, both.observation, key_actor)
        return agent.follow(learner), Losses(value, entropy, Q)
