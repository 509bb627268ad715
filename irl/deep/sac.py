"""Soft actor-critic, and soft Q-learning where actions are discrete: the lower level of deep inverse RL.

Continuous actions, a = tanh u with Gaussian u, twin critics Q_i, their slow copies Q_i', temperature alpha:

    target      y = r + gamma (1 - terminated) (min_i Q_i'(s', a') - alpha log pi(a'|s')),    a' ~ pi(.|s')
    critics     minimise 1/2 sum_i E (Q_i(s, a) - y)^2
    actor       minimise E alpha log pi(a|s) - min_i Q_i(s, a),                                a ~ pi(.|s)
    alpha       minimise -log alpha E (log pi(a|s) + target entropy), if it is tuned
    copies      Q_i' <- (1 - tau) Q_i' + tau Q_i

Discrete actions need no actor: pi = softmax(min_i Q_i/alpha), and the target has the exact soft value
alpha log sum_a exp(min_i Q_i'(s', a)/alpha). Its fixed point is that of `soft.value_iteration` for rewards r/alpha.

Reference: Haarnoja, Zhou, Hartikainen, Tucker, Ha, Tan, Kumar, Zhu, Gupta, Abbeel, Levine. Soft actor-critic algorithms
    and applications. 2018, arXiv:1812.05905. Discrete actions: Haarnoja, Tang, Abbeel, Levine. Reinforcement learning
    with deep energy-based policies. ICML 2017, arXiv:1702.08165.
Differs from the paper: log std is squashed into [-5, 2]; twin critics for discrete actions, too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel.struct import invalid, static, struct
from irl.deep.environments import Environment
from irl.deep.networks import Gaussian, Layer, init_mlp, mlp, pairs

PyTree = Any
Net = tuple[Layer, ...]


class Weights(NamedTuple):
    """What a policy and its values are made of: the y of deep inverse RL."""

    actor: Net
    """observation -> mean and log std of u, 2 k outputs; () for discrete actions."""
    critics: tuple[Net, Net]
    """Q_1 and Q_2: of (observation, action), one output; of the observation, A outputs where actions are discrete."""
    targets: tuple[Net, Net]
    """Their slow copies."""
    log_temperature: Array
    """The logarithm of alpha, []."""


class Learner(NamedTuple):
    """The weights with what Adam remembers."""

    weights: Weights
    actor: PyTree
    """Adam's moments for the actor."""
    critics: PyTree
    """Those for the critics."""
    temperature: PyTree
    """Those for log alpha."""


class Batch(NamedTuple):
    """Transitions as an update takes them."""

    observation: Array
    """[b, d]."""
    action: Array
    """[b, k], or one-hot [b, A]."""
    next_observation: Array
    """[b, d]."""
    reward: Array
    """[b]."""
    terminated: Array
    """Whether the process ended, so that the value behind is 0, [b] bool."""


class Losses(NamedTuple):
    """What an update shows; every entry is a scalar []."""

    critic: Array
    """The critics' loss 1/2 sum_i E (Q_i - y)^2: about the mean squared error of one of them."""
    entropy: Array
    """The mean entropy of pi at the batch."""
    value: Array
    """The mean of Q_i over the batch and both critics."""


_adam = optax.scale_by_adam()


@struct
class SAC:
    """Settings of an agent; the algorithm is in this file's docstring.

    Args:
        discount: gamma in (0, 1).
        temperature: alpha > 0, or only its start where it is `tuned`.
        learning_rate: Adam's, > 0, of actor, critics and temperature alike.
        target_rate: tau in (0, 1].
        target_entropy: the entropy that a tuned temperature aims at.
            Default: -k for k continuous actions, (log A)/2 for A discrete ones.
        hidden: the widths of the hidden layers of actor and critics.
        batch_size: transitions of an update, >= 1.
        tuned: whether the temperature is tuned.
    """

    discount: float = 0.99
    temperature: float = 0.2
    learning_rate: float = 1e-3
    target_rate: float = 0.005
    target_entropy: float | None = static(default=None)
    hidden: tuple[int, ...] = static(default=(256, 256))
    batch_size: int = static(default=256)
    tuned: bool = static(default=False)

    def __post_init__(self) -> None:
        """Check the numbers that are known; traced ones are not."""
        for name, low, high in (("discount", 0, 1), ("temperature", 0, None), ("learning_rate", 0, None)):
            value = getattr(self, name)
            if isinstance(value, int | float) and not (value > low and (high is None or value < high)):
                wanted = f"a number > {low}" + ("" if high is None else f" and < {high}")
                invalid(f"{name} (SAC)", value, wanted, "Leave it out for the default.")

    def init(self, environment: Environment, key: Array) -> Learner:
        """Fresh networks for an environment."""
        d, k, discrete = environment.observation_size, environment.action_size, environment.num_actions is not None
        key_actor, *keys = jax.random.split(key, 3)
        actor = () if discrete else init_mlp(key_actor, (d, *self.hidden, 2 * k))
        sizes = (d, *self.hidden, k) if discrete else (d + k, *self.hidden, 1)
        critics = tuple(init_mlp(one, sizes) for one in keys)
        copies = jax.tree.map(jnp.array, critics)
        weights = Weights(actor, critics, copies, jnp.log(jnp.asarray(self.temperature, float)))  # pyright: ignore[reportArgumentType]
        return Learner(weights, *(_adam.init(part) for part in (actor, critics, weights.log_temperature)))  # pyright: ignore[reportArgumentType]

    def sample(self, weights: Weights, observation: Array, key: Array) -> Array:
        """One action of the policy at each observation [b, d]: [b, k], or one-hot [b, A]."""
        if weights.actor:
            return Gaussian.of(mlp(weights.actor, observation)).sample(key)[0]
        logits = self.log_policy(weights, observation)
        return jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1], dtype=logits.dtype)

    def mode(self, weights: Weights, observation: Array) -> Array:
        """The policy's best action at each observation [b, d]: tanh of the mean, or the likeliest one, one-hot."""
        if weights.actor:
            return jnp.tanh(Gaussian.of(mlp(weights.actor, observation)).mean)
        logits = self.log_policy(weights, observation)
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)

    def log_policy(self, weights: Weights, observation: Array) -> Array:
        """The logarithm of pi(.|s), [b, A], of discrete actions."""
        Q = jnp.minimum(*(mlp(net, observation) for net in weights.critics))
        return jax.nn.log_softmax(Q / jnp.exp(weights.log_temperature), axis=-1)

    def log_prob(self, weights: Weights, observation: Array, action: Array) -> Array:
        """The logarithm of pi(a|s), [b]."""
        if weights.actor:
            return Gaussian.of(mlp(weights.actor, observation)).log_prob(action)
        return jnp.sum(self.log_policy(weights, observation) * action, axis=-1)

    def values(self, critics: tuple[Net, Net], observation: Array, action: Array) -> Array:
        """Q_i(s, a) of both critics, [2, b]."""
        if critics[0][-1].bias.size > 1:
            return jnp.stack([jnp.sum(mlp(net, observation) * action, axis=-1) for net in critics])
        inputs = pairs(observation, action)
        return jnp.stack([mlp(net, inputs)[:, 0] for net in critics])

    def soft_value(self, weights: Weights, critics: tuple[Net, Net], observation: Array, key: Array) -> Array:
        """V(s) = E min_i Q_i - alpha log pi, [b]: one sample of it, or exact for discrete actions."""
        alpha = jnp.exp(weights.log_temperature)
        if not weights.actor:
            Q = jnp.minimum(*(mlp(net, observation) for net in critics))
            return alpha * jax.nn.logsumexp(Q / alpha, axis=-1)
        action, log_pi = Gaussian.of(mlp(weights.actor, observation)).sample(key)
        return jnp.min(self.values(critics, observation, action), axis=0) - alpha * log_pi

    def update(self, learner: Learner, batch: Batch, key: Array) -> tuple[Learner, Losses]:
        """One step of critics, actor, temperature and copies."""
        key_target, key_actor = jax.random.split(key)
        weights = learner.weights
        V = self.soft_value(weights, weights.targets, batch.next_observation, key_target)
        y = batch.reward + self.discount * jnp.where(batch.terminated, 0, V)

        def loss(critics: tuple[Net, Net]) -> tuple[Array, Array]:
            Q = self.values(critics, batch.observation, batch.action)
            return 0.5 * jnp.sum(jnp.mean((Q - y[None, :]) ** 2, axis=1)), Q

        learner, (error, Q) = self.critic_step(learner, loss)
        learner, entropy = self.actor_step(learner, batch.observation, key_actor)
        return self.follow(learner), Losses(error, entropy, jnp.mean(Q))

    def critic_step(self, learner: Learner, loss: Callable) -> tuple[Learner, tuple[Array, Any]]:
        """(learner after one Adam step of the critics, (value, aux)), where loss(critics) -> (value, aux)."""
        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(learner.weights.critics)
        critics, moments = self._adam(learner.weights.critics, gradient, learner.critics)
        return learner._replace(weights=learner.weights._replace(critics=critics), critics=moments), (value, aux)

    def fit(self, learner: Learner, loss: Callable[[Weights], Array]) -> tuple[Learner, Array]:
        """(learner after one Adam step of actor and critics, the loss before it), where loss(weights) -> []."""
        weights = learner.weights

        def of(actor: Net, critics: tuple[Net, Net]) -> Array:
            return loss(weights._replace(actor=actor, critics=critics))

        value, gradients = jax.value_and_grad(of, argnums=(0, 1))(weights.actor, weights.critics)
        actor, actor_moments = self._adam(weights.actor, gradients[0], learner.actor)
        critics, critic_moments = self._adam(weights.critics, gradients[1], learner.critics)
        weights = weights._replace(actor=actor, critics=critics)
        return learner._replace(weights=weights, actor=actor_moments, critics=critic_moments), value

    def actor_step(self, learner: Learner, observation: Array, key: Array) -> tuple[Learner, Array]:
        """(learner after one step of actor and temperature at states [b, d], the policy's mean entropy there)."""
        weights = learner.weights
        if not weights.actor:
            log_pi = self.log_policy(weights, observation)
            entropy = -jnp.mean(jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1))
            return self._tune(learner, entropy, 0.5 * math.log(log_pi.shape[-1])), entropy
        alpha = jnp.exp(weights.log_temperature)

        def loss(actor: Net) -> tuple[Array, Array]:
            action, log_pi = Gaussian.of(mlp(actor, observation)).sample(key)
            Q = jnp.min(self.values(weights.critics, observation, action), axis=0)
            return jnp.mean(alpha * log_pi - Q), -jnp.mean(log_pi)

        gradient, entropy = jax.grad(loss, has_aux=True)(weights.actor)
        actor, moments = self._adam(weights.actor, gradient, learner.actor)
        learner = learner._replace(weights=weights._replace(actor=actor), actor=moments)
        return self._tune(learner, entropy, -weights.actor[-1].bias.size / 2), entropy

    def _tune(self, learner: Learner, entropy: Array, default: float) -> Learner:
        """Raise alpha while the entropy is below the target: the gradient in log alpha is entropy - target."""
        if not self.tuned:
            return learner
        target = default if self.target_entropy is None else self.target_entropy
        log_alpha, moments = self._adam(learner.weights.log_temperature, entropy - target, learner.temperature)
        return learner._replace(weights=learner.weights._replace(log_temperature=log_alpha), temperature=moments)

    def follow(self, learner: Learner) -> Learner:
        """The learner with its slow copies moved towards the critics."""
        weights, tau = learner.weights, self.target_rate
        targets = jax.tree.map(lambda slow, fast: slow + tau * (fast - slow), weights.targets, weights.critics)
        return learner._replace(weights=weights._replace(targets=targets))

    def _adam(self, params: PyTree, gradient: PyTree, moments: PyTree) -> tuple[Any, PyTree]:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
            direction, moments = _adam.update(gradient, moments)
        return jax.tree.map(lambda p, d: p - self.learning_rate * d, params, direction), moments
