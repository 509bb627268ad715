"""DeepMLIRL: MLIRL where the lower level is soft actor-critic, for environments that can only be stepped."""

import jax
from jax import Array

from bilevel.struct import struct
from irl.deep.control import ControlImitation
from irl.deep.imitation import Imitation, Pair, State, step_x


@struct(kw_only=True)
class DeepMLIRL(Imitation):
    """ML-IRL, for problems of `irl.to_control`: the iteration of `MLIRL` with samples and networks in place of tables.

        y <- SAC updates on transitions drawn from the memory, with rewards r(s, a; x)     num_lower_steps times
        pi = the policy of y
        x <- Proj_X(x - a (h(agent) - h(expert))),    h = mean over episodes of sum_t w_t grad r(s_t, a_t; x)/W.

    The weights are w_t = occupancy_discount^t, and W is their sum up to the time limit. Every episode is divided by
    this W and never by its own length: one that ends early weighs less, or, with `Absorbing`, the same, the rest of it
    in the absorbing state.

    Assumptions: those of `MLIRL`, up to the error of the networks, which is not known.
    Cost per step: num_upper_steps upper gradients on episodes, num_lower_steps lower gradients (updates).

    Args: those of `imitation.Imitation`.

    Reference: Zeng, Li, Garcia, Hong. Maximum-likelihood inverse reinforcement learning with finite-time guarantees.
        NeurIPS 2022, arXiv:2210.01282, Section 6.
    Differs from the paper: rewards see observations standardised by demonstrations and random actions together (see
        `to_control`); the weights are 1 by default, where the theory has gamma^t.
    """

    def move(self, problem: ControlImitation, state: State, pair: Pair, key: Array) -> tuple[State, Array]:
        direction = jax.grad(lambda x: pair.gap(lambda steps: problem.rewards(x, steps)))(state.x)
        return step_x(problem, state, direction)
