"""GAIL: generative adversarial imitation learning; the reward is a discriminator's."""

import functools
from typing import Any

import jax
from jax import Array

from bilevel.struct import struct
from irl.deep.control import ControlImitation
from irl.deep.imitation import Adversarial, Pair, State, step_x

PyTree = Any


@struct(kw_only=True)
class GAIL(Adversarial):
    """Generative adversarial imitation, for problems of `irl.to_control`.

    The reward network is a discriminator: r(s, a; x) is the logit for "(s, a) is the expert's", and
    D = sigmoid(-r(s, a; x)) the chance that it is the agent's.

        y <- SAC updates with rewards -log D(s, a) = log(1 + exp r(s, a; x))              num_lower_steps times
        x <- one step up E_agent log D + E_expert log(1 - D) - c E (|grad r| - 1)^2       num_upper_steps times.

    What x becomes is no reward to train another agent on: at the optimum D is 1/2 everywhere.

    Assumptions: none are checked, and the saddle point need not be reached. Rewards are positive, so that where
    episodes can end early they pay the agent for staying alive, unless the environment has the absorbing state.
    Cost per step: num_upper_steps upper gradients, num_lower_steps lower gradients (updates).

    Args: those of `imitation.Imitation`, and
        gradient_penalty: c >= 0, the weight of `imitation.gradient_penalty`; 10 is usual.
            Default: 0, as in the paper. The discriminator of a continuous task can then be right everywhere, and the
            reward that it gives nearly constant.

    Reference: Ho, Ermon. Generative adversarial imitation learning. NeurIPS 2016, arXiv:1606.03476, Algorithm 1.
    Differs from the paper: the agent is SAC, whose memory gets new rewards at each update, and not TRPO; both sides of
        the discriminator's loss count the same, whatever the length of the agent's episodes; its logit is cut off at
        the reward's clamp.
    """

    def reward(self, problem: ControlImitation, state: State, steps: Any) -> Array:
        return jax.nn.softplus(problem.rewards(state.x, steps))

    def logit(self, problem: ControlImitation, state: State, steps: Any) -> Array:
        return problem.rewards(state.x, steps)

    def move(self, problem: ControlImitation, state: State, pair: Pair, key: Array) -> tuple[State, Array]:

        def loss(x: PyTree) -> Array:
            logit = functools.partial(problem.rewards, x)
            return self.loss(logit, logit, pair, problem.scale, key)

        return step_x(problem, state, jax.grad(loss)(state.x))
