"""Multilayer perceptrons and the tanh-Gaussian policy: what deep agents, rewards and discriminators are made of."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any
EDGE = 1e-3  # actions nearer than this to a bound count as this near: there the density of a tanh-Gaussian has a pole
LOG_STD = (-5.0, 2.0)


class Layer(NamedTuple):
    """An affine map."""

    weights: Array
    """[inputs, outputs]."""
    bias: Array
    """[outputs]."""


def init_mlp(key: Array, sizes: tuple[int, ...]) -> tuple[Layer, ...]:
    """The layers of a perceptron with the given widths, weights and biases uniform in +-1/sqrt(inputs)."""
    layers = []
    for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        key_w, key_b = jax.random.split(jax.random.fold_in(key, k))
        bound = inputs**-0.5
        weights = jax.random.uniform(key_w, (inputs, outputs), float, -bound, bound)
        layers.append(Layer(weights, jax.random.uniform(key_b, (outputs,), float, -bound, bound)))
    return tuple(layers)


def mlp(layers: tuple[Layer, ...], inputs: Array) -> Array:
    """The outputs [b, outputs] at inputs [b, d]: ReLU between the layers, none after the last."""
    for k, (weights, bias) in enumerate(layers):
        inputs = inputs @ weights + bias[None, :]
        if k < len(layers) - 1:
            inputs = jax.nn.relu(inputs)
    return inputs


def of_standard(layers: tuple[Layer, ...], center: Array, scale: Array) -> tuple[Layer, ...]:
    """The layers that make of s [b, d] what `layers` make of (s - center)/scale: standardising is frozen in them."""
    weights, bias = layers[0]
    return (Layer(weights / scale[:, None], bias - (center / scale) @ weights), *layers[1:])


def pairs(observations: Array, actions: Array) -> Array:
    """(s, a) beside each other, [b, d + k]."""
    return jnp.concatenate([observations, actions], axis=-1)


class Gaussian(NamedTuple):
    """The distribution of actions tanh u with a Gaussian u."""

    mean: Array
    """Of u, [b, k]."""
    log_std: Array
    """The logarithm of its standard deviation, [b, k]."""

    @classmethod
    def of(cls, outputs: Array) -> "Gaussian":
        """From a network's outputs [b, 2 k]; log_std is squashed into `LOG_STD`."""
        mean, raw = jnp.split(outputs, 2, axis=-1)
        low, high = LOG_STD
        return cls(mean, low + (high - low) / 2 * (jnp.tanh(raw) + 1))

    def sample(self, key: Array) -> tuple[Array, Array]:
        """(actions [b, k], their log-densities [b]), differentiable in mean and log_std."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        u = self.mean + jnp.exp(self.log_std) * noise
        return jnp.tanh(u), self._density(u, noise)

    def log_prob(self, actions: Array) -> Array:
        """The log-density [b] at actions [b, k] in [-1, 1], moved `EDGE` inside.

        log pi(a) = sum over the k entries of log N(u; mean, std) - log(1 - tanh(u)^2) at u = artanh a.
        """
        u = jnp.arctanh(jnp.clip(actions, EDGE - 1, 1 - EDGE))
        return self._density(u, (u - self.mean) * jnp.exp(-self.log_std))

    def _density(self, u: Array, noise: Array) -> Array:
        """The log-density [b] of tanh u, where noise = (u - mean)/std.

        It has log(1 - tanh(u)^2) as 2 (log 2 - u - softplus(-2 u)), which does not cancel.
        """
        normal = -0.5 * noise**2 - self.log_std - 0.5 * jnp.log(2 * jnp.pi)
        return jnp.sum(normal - 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u)), axis=-1)
