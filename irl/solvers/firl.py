"""FIRL: f-IRL, descent on an f-divergence between the agent's and the expert's visits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from bilevel.step import Stepper, stepper
from bilevel.struct import invalid, static, struct
from irl.deep.control import ControlImitation
from irl.deep.imitation import Imitation, Pair, State, classify, step_x

PyTree = Any

H = {  # (log u, clamp) -> h_f(u) plus a constant, such that the least value of log u, -clamp, gives about 0
    "fkl": lambda log_u, clamp: -jnp.exp(log_u),
    "rkl": lambda log_u, clamp: -log_u - clamp,
    "js": lambda log_u, clamp: -jax.nn.softplus(log_u),
}


class Discriminator(NamedTuple):
    """The logit log u, a network like the reward."""

    weights: PyTree
    """Its weights."""
    step: Stepper
    """The rule for them."""


@struct(kw_only=True)
class FIRL(Imitation):
    """f-IRL, for problems of `irl.to_control`: descent on an f-divergence between the expert's visits and the agent's.

    With rho and rho_E the densities of the agent's and the expert's visits, u = rho_E/rho is estimated by a
    discriminator D whose logit is log u. For n episodes tau of the agent,

        y <- SAC updates with rewards r(s, a; x)                                          num_lower_steps times
        D <- Adam steps on the logistic loss of expert against agent                      num_discriminator_steps times
        x <- Proj_X(x - a/(alpha W) cov_tau(sum_t w_t h_f(u_t), sum_t w_t grad r(s_t, a_t; x)))

    where h_f = -u (forward KL), 1 - log u (reverse KL) or -log(1 + u) (Jensen-Shannon), alpha is the temperature,
    w_t = occupancy_discount^t, and W is the sum of w_t up to the time limit.

    The covariance over episodes is the only signal, and vanishes where the agent's episodes are all alike. On Pendulum
    that happened at some seeds: the agent spins, which the reward overrates, D is at its clamp at every step, and
    nothing brings the reward down again. With rewards of the state alone, `DeepReward(state_only=True)`, as its authors
    use them, it happened less often.

    Assumptions: the agent is soft-optimal for x, as the lower level says; D is the true ratio, and not sharper.
    Cost per step: num_upper_steps upper gradients, num_lower_steps lower gradients (updates).

    Args: those of `imitation.Imitation`, with num_rollouts >= 2 for the covariance, and
        divergence: "fkl", "rkl" or "js". Default: "fkl".
        num_discriminator_steps: steps of D on the episodes of each step, >= 0. Default: 50.

    Reference: Ni, Sikchi, Wang, Gupta, Lee, Eysenbach. f-IRL: inverse reinforcement learning via state marginal
        matching. CoRL 2020, arXiv:2011.04709, Theorem 4.1 and Algorithm 1.
    Differs from the paper: the visits are of what the reward sees, states or pairs of states and actions. The paper's
        episodes all have one length, so that constants in h_f drop out of the covariance. Where an episode ends early
        here, its missing steps count as ones that the expert never took, with u near 0 and h_f = 0; for the reverse KL,
        1 - log u is shifted by its largest value to that end.
    """

    divergence: str = static(default="fkl")
    num_discriminator_steps: int = static(default=50)

    def __post_init__(self) -> None:
        """Check the choice of divergence and the number of episodes."""
        super().__post_init__()
        if self.divergence not in H:
            invalid("divergence (FIRL)", repr(self.divergence), " or ".join(map(repr, H)), "Choose one.")
        if self.num_rollouts < 2:
            invalid("num_rollouts (FIRL)", self.num_rollouts, "at least 2", "A covariance needs two episodes.")

    def init_extra(self, problem: ControlImitation, key: Array) -> Discriminator:
        weights = problem.reward.init(problem.environment, key)
        return Discriminator(weights, stepper(optax.adam(1e-3), None, weights))

    def logit(self, problem: ControlImitation, state: State, steps: Any) -> Array:
        return problem.rewards(state.extra.weights, steps)

    def move(self, problem: ControlImitation, state: State, pair: Pair, key: Array) -> tuple[State, Array]:
        n = pair.num_agent

        def fit(_: Array, D: Discriminator) -> Discriminator:
            gradient = jax.grad(lambda weights: classify(lambda steps: problem.rewards(weights, steps), pair))(
                D.weights
            )
            return Discriminator(*D.step(D.weights, gradient))

        D = lax.fori_loop(0, self.num_discriminator_steps, fit, state.extra)
        sums = lambda values: jnp.sum((pair.agent_weights * values).reshape(n, -1), axis=1)  # noqa: E731
        clamp = getattr(problem.reward, "clamp", 10.0)
        h = sums(H[self.divergence](problem.rewards(D.weights, pair.agent), clamp))
        away = lax.stop_gradient(h - jnp.mean(h)) / (n - 1)
        alpha = jnp.exp(state.y.log_temperature)
        direction = jax.grad(lambda x: jnp.sum(away * sums(problem.rewards(x, pair.agent))) / alpha)(state.x)
        return step_x(problem, state._replace(extra=D), direction)
