"""IQLearn: inverse soft Q-learning; one network is the value, and the reward follows from it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.problem import BilevelProblem
from bilevel.struct import static, struct
from irl import rollouts
from irl.imitation import Imitation, State
from irl.sac import Batch, Learner, Losses, Net


@struct
class IQLearn(Imitation):
    """Inverse soft Q-learning, for problems of `irl.to_control`: no reward network, x stays where it is. With V_i the
    soft value of one critic Q_i and the policy, and r_i = Q_i - gamma V_i(s') the reward that it implies,

        Q_i <- one step down -E_expert r_i + E[V_i(s) - gamma V_i(s')] + E r_i^2/(4 c),    for both critics
        actor and temperature as in SAC                                                    num_lower_steps times

    The last two expectations are over the expert, or with `use_memory` half over the memory. The first of them is then
    (1 - gamma) E V(s_0) either way, up to where episodes are cut off.

    Assumptions: as of soft Q-learning.
    Cost per step: num_lower_steps lower gradients (updates).

    Args: as of `imitation.Imitation`; what belongs to x has no effect; and
        regularisation: c > 0 of the chi-square term.
        use_memory: see above. Measured: with it CartPole is not learnt, since rewards of visited states are pushed
            below 0, where an early end pays; without it, little is learnt beyond what `BC` learns.

    Reference: Garg, Chakraborty, Cundy, Song, Ermon. IQ-Learn: inverse soft-Q learning for imitation. NeurIPS 2021,
        arXiv:2106.12142, Algorithm 1.
    Differs from the paper: twin critics, each with its own objective.
    """

    regularisation: float = 0.5
    use_memory: bool = static(default=False)

    def reward(self, problem: BilevelProblem, state: State, steps: Any) -> Array:
        agent, y = problem.lower_data.full().agent, state.y
        V = agent.soft_value(y, y.critics, steps.next_observation, jax.random.key(0))
        Q = jnp.min(agent.values(y.critics, steps.observation, steps.action), axis=0)
        return Q - agent.discount * jnp.where(steps.terminated, 0, V)

    def update(self, problem: BilevelProblem, state: State, learner: Learner, key: Array) -> tuple[Learner, Any]:
        task = problem.lower_data.full()
        agent, size = task.agent, task.agent.batch_size
        given = size // 2 if self.use_memory else size
        key_draw, key_expert, key_here, key_there, key_actor = jax.random.split(key, 5)
        chances = rollouts.weights(task.environment, task.expert, self.occupancy_discount)
        drawn = jax.random.choice(key_expert, len(chances), (given,), p=chances / jnp.sum(chances))
        batch = Batch(*(getattr(task.expert, name)[drawn] for name in Batch._fields))
        if self.use_memory:
            batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), batch, state.memory.draw(key_draw, given))

        def loss(critics: tuple[Net, Net]) -> tuple[Array, Array]:
            Q, total = agent.values(critics, batch.observation, batch.action), jnp.zeros(())
            for k, net in enumerate(critics):
                V = agent.soft_value(learner.weights, (net, net), batch.observation, key_here)
                after = agent.soft_value(learner.weights, (net, net), batch.next_observation, key_there)
                after = agent.discount * jnp.where(batch.terminated, 0, after)
                r = Q[k] - after
                total += jnp.mean(V - after) - jnp.mean(r[:given]) + jnp.mean(r**2) / (4 * self.regularisation)
            return total, jnp.mean(Q)

        learner, (value, Q) = agent.critic_step(learner, loss)
        learner, entropy = agent.actor_step(learner, batch.observation, key_actor)
        return agent.follow(learner), Losses(value, entropy, Q)
