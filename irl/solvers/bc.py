"""BC: behavioural cloning, a policy that does what was demonstrated; no reward."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.record import OracleCount
from bilevel.struct import invalid, static, struct
from irl.deep.control import ControlImitation, Experts, upper
from irl.deep.imitation import Imitation, State
from irl.deep.networks import EDGE, Gaussian, mlp, of_standard
from irl.deep.sac import Learner, Losses, Weights

RATE = 1e-3  # of the average


class Clone(NamedTuple):
    """What learns, for standardised observations."""

    weights: Weights
    """The last ones."""
    mean: Weights
    """Their average, in which the k-th has the rate max(RATE, 10/(k + 10)): at first it is over a tenth of them."""
    count: Array
    """Updates so far, []."""

    def follow(self, weights: Weights) -> "Clone":
        """After one update, to these weights."""
        rate = jnp.maximum(RATE, 10 / (self.count.astype(float) + 10))
        mean = jax.tree.map(lambda slow, new: slow + rate.astype(new.dtype) * (new - slow), self.mean, weights)
        return Clone(weights, mean, self.count + 1)


@struct(kw_only=True)
class BC(Imitation):
    """Behavioural cloning, for problems of `irl.to_control`: the lower level and the reward play no part, x stays.

        y <- y - b grad_y of the loss                                                     num_lower_steps times

    by Adam, with the agent's learning rate b, on batches of the demonstrations' steps. With continuous actions the
    actor moves, whose best action is tanh m(s); with discrete ones the critics do, since the policy is their softmax.
    The losses, means over the batch:

        "mse"           |tanh m(s) - a|^2; beside it the deviation, with all else held, is fitted to tanh m(s) - a
        "likelihood"    -log pi_y(a|s), which is f; the only one of discrete actions

    Networks learn from observations that are standardised as for rewards, an affine map that goes into their first
    layer afterwards; and y has their average over the last 1000 updates or so, since the steps of Adam do not shrink.
    So y is a policy of plain observations, like any other. Episodes are played only to be measured.

    Assumptions: none. The policy is never tried while it learns, so its errors add up along an episode.
    Cost per step: num_lower_steps upper gradients.

    Args: those of `imitation.Imitation`, of which those about the memory and about x have no effect, and
        loss: "mse" or "likelihood". The density of tanh u grows without bound at the bounds of the actions, where
            many an expert's lie (44 % in one of Hopper), and the likelihood then cares for little else. Default:
            "mse".

    Reference: Pomerleau. Efficient training of artificial neural networks for autonomous navigation. Neural
        Computation 3(1), 1991.
    Differs from the paper: Adam; standardised observations; averaged weights; a policy with a deviation.
    """

    loss: Literal["mse", "likelihood"] = static(default="mse")

    def __post_init__(self) -> None:
        """Check the loss's name."""
        super().__post_init__()
        if self.loss not in ("mse", "likelihood"):
            invalid("loss (BC)", repr(self.loss), '"mse" or "likelihood"', "Leave it out for the default.")

    def init(self, problem: ControlImitation, key: Array) -> State:
        """As of `Imitation`; the drawn networks are taken for those of standardised observations."""
        state = super().init(problem, key)
        count = jnp.zeros((), int)
        return state._replace(y=of_plain(problem, state.y), extra=Clone(state.y, state.y, count))

    def lower(self, problem: ControlImitation, state: State, key: Array) -> tuple[State, Any]:
        agent, steps = problem.agent, problem.expert
        chances = steps.chosen.astype(float) / jnp.sum(steps.chosen, dtype=float)
        steps = steps._replace(observation=problem.standard(steps.observation))
        loss = upper if self.loss == "likelihood" or not state.y.actor else squared

        def update(carry: tuple[Learner, Clone], key: Array) -> tuple[tuple[Learner, Clone], Array]:
            learner, clone = carry
            drawn = jax.random.choice(key, len(chances), (agent.batch_size,), p=chances)
            few = Experts(agent, jax.tree.map(lambda leaf: leaf[drawn], steps))
            learner, value = agent.fit(learner, lambda weights: loss(state.x, weights, few))
            return (learner, clone.follow(learner.weights)), value

        keys = jax.random.split(key, self.num_lower_steps)
        begin = Learner(state.extra.weights, *state.moments), state.extra
        (learner, clone), losses = lax.scan(update, begin, keys)
        losses = Losses(jnp.zeros(()), losses[-1], jnp.zeros(()))  # the loss is shown in the entropy's column
        return state._replace(y=of_plain(problem, clone.mean), moments=learner[1:], extra=clone), losses

    def cost(self, problem: ControlImitation) -> OracleCount:
        return OracleCount(upper_gradients=self.num_lower_steps)


def squared(x: Any, y: Weights, batch: Experts) -> Array:
    """The loss "mse" of `BC`, [], at steps of continuous actions with one leading axis, all of them chosen.

    The deviation is fitted in actions, not in u = artanh a, where a small miss near a bound is a large one.
    """
    s, a = batch.steps.observation, batch.steps.action
    best = jnp.tanh(Gaussian.of(mlp(y.actor, s)).mean)
    held = (*lax.stop_gradient(y.actor[:-1]), y.actor[-1])  # the deviation has its own columns of the last layer
    missed = lax.stop_gradient(best) - jnp.clip(a, EDGE - 1, 1 - EDGE)  # as f counts them
    slope = jnp.maximum(1 - lax.stop_gradient(best) ** 2, EDGE)  # of tanh at m: that of a is the slope times that of u
    log_std = Gaussian.of(mlp(held, s)).log_std + jnp.log(slope)
    deviation = 0.5 * (missed * jnp.exp(-log_std)) ** 2 + log_std
    return jnp.mean(jnp.sum((best - a) ** 2 + deviation, axis=-1))


def of_plain(problem: ControlImitation, y: Weights) -> Weights:
    """The weights that do with observations what y does with standardised ones."""
    change = lambda net: of_standard(net, problem.center, problem.scale)  # noqa: E731
    if y.actor:
        return y._replace(actor=change(y.actor))
    one, other = y.critics
    return y._replace(critics=(change(one), change(other)))
