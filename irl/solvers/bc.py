"""BC: behavioural cloning, the policy that makes the demonstrated actions most likely; no reward."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.record import OracleCount
from bilevel.struct import struct
from irl.deep.control import ControlImitation, Experts, upper
from irl.deep.imitation import Imitation, State
from irl.deep.sac import Learner, Losses


@struct(kw_only=True)
class BC(Imitation):
    """Behavioural cloning, for problems of `irl.to_control`: the lower level and the reward play no part, x stays.

        y <- y - b grad_y f,    f = -mean of log pi_y(a|s) over the demonstrations        num_lower_steps times

    by Adam, with the agent's learning rate b, on batches of the demonstrations' steps. With continuous actions the
    actor moves; with discrete ones the critics do, since the policy is their softmax. Episodes are played only to be
    measured.

    Assumptions: none. The policy is never tried while it learns, so its errors add up along an episode.
    Cost per step: num_lower_steps upper gradients.

    Args: those of `imitation.Imitation`; the ones about the memory and about x have no effect.

    Reference: Pomerleau. Efficient training of artificial neural networks for autonomous navigation. Neural
        Computation 3(1), 1991.
    Differs from the paper: a stochastic policy and its likelihood in place of squared errors.
    """

    def lower(self, problem: ControlImitation, state: State, key: Array) -> tuple[State, Any]:
        agent, steps = problem.agent, problem.expert
        chances = steps.chosen.astype(float) / jnp.sum(steps.chosen, dtype=float)

        def update(learner: Learner, key: Array) -> tuple[Learner, Array]:
            drawn = jax.random.choice(key, len(chances), (agent.batch_size,), p=chances)
            few = Experts(agent, jax.tree.map(lambda leaf: leaf[drawn], steps))
            return agent.fit(learner, lambda weights: upper(state.x, weights, few))

        keys = jax.random.split(key, self.num_lower_steps)
        learner, losses = lax.scan(update, Learner(state.y, *state.moments), keys)
        losses = Losses(jnp.zeros(()), losses[-1], jnp.zeros(()))  # f is shown in the entropy's column
        return state._replace(y=learner.weights, moments=learner[1:]), losses

    def cost(self, problem: ControlImitation) -> OracleCount:
        return OracleCount(upper_gradients=self.num_lower_steps)
