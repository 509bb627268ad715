"""AIRL: adversarial inverse RL; the discriminator is made of a reward, a shaping term and the policy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.step import Stepper, stepper
from bilevel.struct import struct
from irl.deep.control import ControlImitation
from irl.deep.imitation import Adversarial, Pair, State, step_x
from irl.deep.networks import init_mlp, mlp

PyTree = Any


class Shaping(NamedTuple):
    """h(s), a network, and the rule for its weights."""

    h: PyTree
    step: Stepper


def potential(problem: ControlImitation, x: PyTree, h: PyTree, steps: Any) -> Array:
    """F = r(s, a; x) + gamma h(s') - h(s), [b]; h is 0 behind an end."""
    here, there = (mlp(h, problem.standard(s))[:, 0] for s in (steps.observation, steps.next_observation))
    return problem.rewards(x, steps) + problem.agent.discount * jnp.where(steps.terminated, 0, there) - here


@struct(kw_only=True)
class AIRL(Adversarial):
    """Adversarial inverse RL, for problems of `irl.to_control`: with f = r(s, a; x) + gamma h(s') - h(s) and
    D = exp(f/alpha)/(exp(f/alpha) + pi(a|s)) the chance that (s, a, s') is the expert's,

        y <- SAC updates with rewards f                                                   num_lower_steps times
        (x, h) <- one step up E_expert log D + E_agent log(1 - D) - c E (|grad f|/alpha - 1)^2    the same.

    The recovered reward is r(.; x), disentangled from the dynamics where it is `DeepReward(state_only=True)`.

    Assumptions: for the recovery deterministic dynamics that decompose, and a true reward of the state alone.
    Cost per step: num_upper_steps upper gradients, num_lower_steps lower gradients (updates).

    Args: as of `imitation.Imitation`; upper_step_size serves h, too; and
        gradient_penalty: c >= 0, as of `GAIL`; the slope is that of f/alpha, not of log pi. Only without it is f/alpha
            log pi at the optimum, and r what is recovered.

    Reference: Fu, Luo, Levine. Learning robust rewards with adversarial inverse reinforcement learning. ICLR 2018,
        arXiv:1710.11248, Algorithm 1.
    Differs from the paper: SAC, whose entropy term is the -log pi in the reward: with temperature alpha, f is in
    its units, and alpha = 1 is the paper's D. Both sides of the loss count the same.
    """

    def init_extra(self, problem: ControlImitation, key: Array) -> Shaping:
        h = init_mlp(key, (problem.environment.observation_size, 64, 64, 1))
        return Shaping(h, stepper(self.upper_step_size, None, h))

    def reward(self, problem: ControlImitation, state: State, steps: Any) -> Array:
        return potential(problem, state.x, state.extra.h, steps)

    def logit(self, problem: ControlImitation, state: State, steps: Any) -> Array:
        log_pi = problem.agent.log_prob(state.y, steps.observation, steps.action)
        return self.reward(problem, state, steps) / jnp.exp(state.y.log_temperature) - log_pi

    def move(self, problem: ControlImitation, state: State, pair: Pair, key: Array) -> tuple[State, Array]:

        def loss(x: PyTree, h: PyTree) -> Array:
            at = state._replace(x=x, extra=state.extra._replace(h=h))
            f = lambda steps: self.reward(problem, at, steps) / jnp.exp(state.y.log_temperature)  # noqa: E731
            return self.loss(lambda steps: self.logit(problem, at, steps), f, pair, problem.scale, key)

        to_x, to_h = jax.grad(loss, argnums=(0, 1))(state.x, state.extra.h)
        h, rule = state.extra.step(state.extra.h, to_h)
        return step_x(problem, state._replace(extra=Shaping(h, rule)), to_x)
