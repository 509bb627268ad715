"""Rewards r(s, a; x) on finite spaces: pytrees that turn parameters x into a table [S, A]."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend.extras import extra
from bilevel.struct import invalid, static, struct

PyTree = Any


class Reward:
    """The protocol: a pytree with its arrays as leaves and these two members is a reward."""

    def table(self, x: PyTree) -> Array:
        """r(., .; x), shape [S, A]."""
        raise NotImplementedError

    @property
    def init(self) -> Callable[[Array], PyTree]:
        """The start, a function key -> x0; one function for equal sizes, so that another instance compiles nothing."""
        raise NotImplementedError


@functools.cache
def _zeros(*shape: int) -> Callable[[Array], Array]:
    return lambda key: jnp.zeros(shape, float)


@struct
class LinearReward(Reward):
    """r(s, a; x) = features(s, a) . x with features [S, A, F] and x [F]; x0 = 0.

    Build it with `LinearReward.of`, which converts and checks.
    """

    features: Any

    @classmethod
    def of(cls, features: Any, num_actions: int | None = None) -> "LinearReward":
        """From features [S, A, F], or from features of the state [S, F] and the number of actions.

        Raises:
            InvalidInput: for other shapes, or entries that are not finite.
        """
        return cls(pair_inputs("features (LinearReward)", features, num_actions))

    def table(self, x: Array) -> Array:
        return self.features @ x

    @property
    def init(self) -> Callable[[Array], Array]:
        return _zeros(self.features.shape[-1])


@struct
class TableReward(Reward):
    """One parameter for each state and action: r(., .; x) = x, shape [S, A]; x0 = 0.

    The likelihood is the same for r - gamma E phi(s') + phi(s) with any phi [S], and need not bound the reward of pairs
    that no demonstration visits: give `to_bilevel` an x_set where x itself matters.
    """

    num_states: int = static()
    num_actions: int = static()

    def table(self, x: Array) -> Array:
        return x

    @property
    def init(self) -> Callable[[Array], Array]:
        return _zeros(self.num_states, self.num_actions)


@struct
class NetworkReward(Reward):
    """r(s, a; x) = the first output of a flax module at inputs(s, a), x its parameters; `linen` and `nnx` modules.

    Build it with `NetworkReward.of`. Modules with state of their own (batch statistics, dropout) do not fit: a reward
    is a function of x.

    Attributes:
        inputs: what the module sees of each pair, [S, A, d].
        apply: (x, inputs) -> [S, A, outputs].
        start: key -> x0.
    """

    inputs: Any
    apply: Callable = static()
    start: Callable = static()

    @classmethod
    def of(cls, module: Any, inputs: Any, num_actions: int | None = None) -> "NetworkReward":
        """From a module and inputs [S, A, d], or inputs of the state [S, d] and the number of actions.

        A linen module is initialised with `init`'s key; an nnx module starts from the parameters that it has.

        Raises:
            InvalidInput: for other modules or shapes, or inputs that are not finite.
        """
        with extra("irl"):
            from flax import linen, nnx

        inputs = pair_inputs("inputs (NetworkReward)", inputs, num_actions)
        if isinstance(module, linen.Module):
            apply, start = _linen(module, inputs.shape[-1])
        elif isinstance(module, nnx.Module):
            apply, start = _nnx(module)
        else:
            do = "Wrap a function in flax.linen or flax.nnx, or write a reward with table and init of its own."
            invalid("module (NetworkReward)", type(module).__name__, "a flax.linen or flax.nnx module", do)
        return cls(inputs, apply, start)

    def table(self, x: PyTree) -> Array:
        return self.apply(x, self.inputs)[..., 0]

    @property
    def init(self) -> Callable[[Array], PyTree]:
        return self.start


def _linen(module: Any, size: int) -> tuple[Callable, Callable]:
    """The pair (apply, start): the same for equal modules, so that another instance compiles nothing.

    A module whose fields hold lists is unhashable and gets a pair of its own.
    """
    try:
        return _cached_linen(module, size)
    except TypeError:  # unhashable
        return _cached_linen.__wrapped__(module, size)


@functools.cache
def _cached_linen(module: Any, size: int) -> tuple[Callable, Callable]:
    def start(key: Array) -> PyTree:
        with jax.numpy_dtype_promotion("standard"):  # parameters may start in float32
            return _in_floats(module.init(key, jnp.zeros(size, float)))

    return module.apply, start


def _in_floats(params: PyTree) -> PyTree:
    """The parameters in JAX's default precision, as everything else of a reward."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)


def _nnx(module: Any) -> tuple[Callable, Callable]:
    with extra("irl"):
        from flax import nnx

    graph, params = nnx.split(module, nnx.Param)
    start = _in_floats(nnx.to_pure_dict(params))

    def apply(x: PyTree, inputs: Array) -> Array:
        state = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(state, x)
        return nnx.merge(graph, state)(inputs)

    return apply, lambda key: start


def pair_inputs(name: str, inputs: Any, num_actions: int | None = None) -> Array:
    """Inputs [S, A, d] as floats; from [S, d], the same for every action.

    Raises:
        InvalidInput: for other shapes, or entries that are not finite.
    """
    inputs = np.asarray(inputs)
    if inputs.ndim == 2 and num_actions is not None:
        inputs = np.repeat(inputs[:, None, :], num_actions, axis=1)
    if inputs.ndim != 3 or inputs.size == 0:
        expected = "shape [S, A, d], or [S, d] together with num_actions"
        invalid(name, f"shape {inputs.shape}", expected, "Index it by state, action, feature.")
    if not np.isfinite(inputs).all():
        where = np.argwhere(~np.isfinite(inputs))[0].tolist()
        invalid(name, f"a non-finite entry at {where}", "finite numbers", "Clean it.")
    return jnp.asarray(inputs, float)


@struct
class TwoLayer:
    """f(z; D) = m^(-1/2) sum over j of b_j ReLU((W_j + D_j) . z): a wide network near its initialisation W.

    b_j = +-1 is fixed and W_j ~ N(0, I); unit j + m/2 has the weights of unit j and the other sign, so that f(.; 0) =
    0. For |z| <= 1: |f(z; D) - f(z; D')| <= |D - D'|, so that |f| <= B in the ball |D| <= B.

    Attributes:
        weights: [m/2, d], the first half of W.
    """

    weights: Any

    @classmethod
    def draw(cls, key: Array, width: int, size: int) -> "TwoLayer":
        """A network of m = width units, an even number, on inputs of `size` entries.

        Raises:
            InvalidInput: for other widths.
        """
        if not (isinstance(width, int) and width >= 2 and width % 2 == 0):
            invalid("width", width, "an even whole number >= 2", "Units come in pairs of opposite sign.")
        return cls(jax.random.normal(key, (width // 2, size), float))

    @property
    def origin(self) -> Array:
        """D = 0, shape [2, m/2, d]: first the units with b = 1."""
        return jnp.zeros((2, *self.weights.shape), self.weights.dtype)

    def __call__(self, D: Array, z: Array) -> Array:
        """The values f(z; D), shape [...], at inputs z [..., d]."""
        return self._signed([jnp.sum(jax.nn.relu(z @ (self.weights + half).T), axis=-1) for half in D])

    def at_unit_vectors(self, D: Array) -> Array:
        """The values f(z; D), shape [d], at the d unit vectors z."""
        return self._signed([jnp.sum(jax.nn.relu(self.weights + half), axis=0) for half in D])

    def _signed(self, sums: list[Array]) -> Array:
        """The sums over the units with b = 1 and b = -1, as f has them."""
        return (sums[0] - sums[1]) / (2 * self.weights.shape[0]) ** 0.5


@struct
class TwoLayerReward(Reward):
    """r(s, a; x) = scale f(inputs(s, a); x), where f is `TwoLayer` and x = D [2, m/2, d] its distance from the start.

    So x0 = 0, where r = 0; x_set = Ball(B) is the ball around the initialisation, in which |r| <= scale B; and weight
    decay pulls towards the initialisation. Build it with `TwoLayerReward.of`.
    """

    network: TwoLayer
    inputs: Any
    scale: Any = 1.0

    @classmethod
    def of(
        cls, inputs: Any, width: int, key: Array, num_actions: int | None = None, scale: float = 1.0
    ) -> "TwoLayerReward":
        """From inputs [S, A, d], or [S, d] and the number of actions; each is divided by its norm.

        Raises:
            InvalidInput: for wrong shapes or an odd width.
        """
        inputs = pair_inputs("inputs (TwoLayerReward)", inputs, num_actions)
        inputs = inputs / jnp.maximum(jnp.linalg.norm(inputs, axis=-1, keepdims=True), 1e-12)
        return cls(TwoLayer.draw(key, width, inputs.shape[-1]), inputs, jnp.asarray(scale, float))

    def table(self, x: Array) -> Array:
        return self.scale * self.network(x, self.inputs)

    @property
    def init(self) -> Callable[[Array], Array]:
        return _zeros(2, *self.network.weights.shape)


def one_hot_pairs(num_states: int, num_actions: int) -> Array:
    """Unit inputs [S, A, S + A] of the pairs: the two one-hot vectors beside each other, over sqrt(2)."""
    state = jnp.broadcast_to(jnp.eye(num_states)[:, None, :], (num_states, num_actions, num_states))
    action = jnp.broadcast_to(jnp.eye(num_actions)[None], (num_states, num_actions, num_actions))
    return jnp.concatenate([state, action], axis=-1) / 2**0.5
