"""IQLearn: inverse soft Q-learning; one network is the value, and the reward follows from it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.struct import static, struct
from irl.deep import rollouts
from irl.deep.control import ControlImitation
from irl.deep.imitation import Imitation, State
from irl.deep.sac import Batch, Learner, Losses, Net


@struct(kw_only=True)
class IQLearn(Imitation):
    """Inverse soft Q-learning, for problems of `irl.to_control`: the critics imply a reward, and x stays where it is.

    With V_i the soft value of one critic Q_i under the policy, and r_i = Q_i - gamma V_i(s') the reward it implies,

        Q_i <- one step down -E_expert r_i + E[V_i(s) - gamma V_i(s')] + E r_i^2/(4 c),    for both critics
        actor and temperature as in SAC                                                    num_lower_steps times

    where all expectations are over the expert's steps: nothing is learnt from the environment. With `use_memory` three
    things are as in its authors' code for Hopper. V_i(s') is that of the slow copies. The second term is
    (1 - gamma) E_expert V_i(s), as if every demonstrated state were a start. And half of the last expectation is over
    transitions (s, s') in memory, each with a fresh action of the policy at s in place of the one that led to s'.

    Assumptions: those of soft Q-learning.
    Cost per step: num_lower_steps lower gradients (updates).

    Args: those of `imitation.Imitation`, of which those about x have no effect, and
        regularisation: c > 0, the weight of the chi-square term is 1/(4 c). Default: 0.5.
        use_memory: see above. Default: False. Measured: without it little is learnt beyond what `BC` learns; with it
            policies come close to the expert and leave it again, once the critics tell the few demonstrated pairs from
            all others. Its authors mostly use temperatures of 0.01, and learning rates of 3e-4 and, for the actor,
            3e-5.

    Reference: Garg, Chakraborty, Cundy, Song, Ermon. IQ-Learn: inverse soft-Q learning for imitation. NeurIPS 2021,
        arXiv:2106.12142, Algorithm 1.
    Differs from the paper: twin critics, each with its own objective; actor and critics have one learning rate.
    """

    regularisation: float = 0.5
    use_memory: bool = static(default=False)

    def reward(self, problem: ControlImitation, state: State, steps: Any) -> Array:
        agent, y = problem.agent, state.y
        V = agent.soft_value(y, y.critics, steps.next_observation, jax.random.key(0))
        Q = jnp.min(agent.values(y.critics, steps.observation, steps.action), axis=0)
        return Q - agent.discount * jnp.where(steps.terminated, 0, V)

    def update(self, problem: ControlImitation, state: State, learner: Learner, key: Array) -> tuple[Learner, Any]:
        agent, size = problem.agent, problem.agent.batch_size
        given = size // 2 if self.use_memory else size
        key_memory, key_expert, key_here, key_there, key_actor = jax.random.split(key, 5)
        shown = problem.expert
        chances = rollouts.weights(problem.environment, shown, self.occupancy_discount)
        drawn = jax.random.choice(key_expert, len(chances), (given,), p=chances / jnp.sum(chances))
        batch = expert = Batch(*(getattr(shown, name)[drawn] for name in Batch._fields))
        if self.use_memory:
            key_draw, key_policy = jax.random.split(key_memory)
            seen = state.memory.draw(key_draw, given)
            seen = seen._replace(action=agent.sample(learner.weights, seen.observation, key_policy))
            batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), expert, seen)

        def loss(critics: tuple[Net, Net]) -> tuple[Array, Array]:
            Q, total = agent.values(critics, batch.observation, batch.action), jnp.zeros(())
            behind = learner.weights.targets if self.use_memory else critics
            for k, (net, after) in enumerate(zip(critics, behind, strict=True)):
                V = agent.soft_value(learner.weights, (net, net), expert.observation, key_here)
                future = agent.soft_value(learner.weights, (after, after), batch.next_observation, key_there)
                future = agent.discount * jnp.where(batch.terminated, 0, future)
                r, start = Q[k] - future, (1 - agent.discount) * V if self.use_memory else V - future
                total += jnp.mean(start) - jnp.mean(r[:given]) + jnp.mean(r**2) / (4 * self.regularisation)
            return total, jnp.mean(Q)

        learner, (value, Q) = agent.critic_step(learner, loss)
        learner, entropy = agent.actor_step(learner, batch.observation, key_actor)
        return agent.follow(learner), Losses(value, entropy, Q)
