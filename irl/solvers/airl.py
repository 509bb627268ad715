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
    """The shaping term h(s)."""

    h: PyTree
    """The weights of its network."""
    step: Stepper
    """The rule for them."""


def potential(problem: ControlImitation, x: PyTree, h: PyTree, steps: Any) -> Array:
    """The reward f = r(s, a; x) + gamma h(s') - h(s) at steps with one leading axis, [b]; h(s') = 0 behind an end."""
    here, there = (mlp(h, problem.standard(s))[:, 0] for s in (steps.observation, steps.next_observation))
    return problem.rewards(x, steps) + problem.agent.discount * jnp.where(steps.terminated, 0, there) - here


@struct(kw_only=True)
class AIRL(Adversarial):
    """Adversarial inverse RL, for problems of `irl.to_control`.

    The discriminator is made of a reward, a shaping term and the policy: with f = r(s, a; x) + gamma h(s') - h(s) it
    gives D = exp(f/alpha)/(exp(f/alpha) + pi(a|s)) as the chance that (s, a, s') is the expert's.

        y <- SAC updates with rewards f                                                   num_lower_steps times
        (x, h) <- one step up E_expert log D + E_agent log(1 - D) - c E (|grad f|/alpha - 1)^2    the same.

    The recovered reward is r(.; x), disentangled from the dynamics where it is `DeepReward(state_only=True)`.

    Assumptions: none to imitate. To recover the reward, up to a constant: deterministic dynamics that are
    decomposable in the paper's sense, and a true reward that depends on the state alone.
    Cost per step: num_upper_steps upper gradients, num_lower_steps lower gradients (updates).

    Args: those of `imitation.Imitation`, whose upper_step_size serves h as well, and
        gradient_penalty: c >= 0, as for `GAIL`; the slope is that of f/alpha, without log pi.
            Default: 0. Only then is f/alpha = log pi at the optimum, and r the reward that is recovered.

    Reference: Fu, Luo, Levine. Learning robust rewards with adversarial inverse reinforcement learning. ICLR 2018,
        arXiv:1710.11248, Algorithm 1.
    Differs from the paper: the agent is SAC, and its entropy term takes the place of -log pi in the reward; f is
        then measured in units of the temperature alpha, and alpha = 1 gives the paper's D. Both sides of the loss count
        the same.
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
