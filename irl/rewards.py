"""Rewards r(s, a; x) on finite spaces: pytrees that turn parameters x into a table [S, A]."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.struct import invalid, static, struct

PyTree = Any


class Reward:
    """The protocol. Anything with these two members is a reward, if it is a pytree with its arrays as leaves."""

    def table(self, x: PyTree) -> Array:
        """r(., .; x), shape [S, A]."""
        raise NotImplementedError

    @property
    def init(self) -> Callable[[Array], PyTree]:
        """A function key -> x0; the same function for equal sizes, so that another instance compiles nothing."""
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
        features = np.asarray(features)
        if features.ndim == 2 and num_actions is not None:
            features = np.repeat(features[:, None, :], num_actions, axis=1)
        if features.ndim != 3 or features.size == 0:
            expected = "shape [S, A, F], or [S, F] together with num_actions"
            invalid(
                "features (LinearReward)", f"shape {features.shape}", expected, "Index it by state, action, feature."
            )
        if not np.isfinite(features).all():
            where = np.argwhere(~np.isfinite(features))[0].tolist()
            invalid(
                "features (LinearReward)", f"a non-finite entry at {where}", "finite numbers", "Clean the features."
            )
        return cls(jnp.asarray(features, float))

    def table(self, x: Array) -> Array:
        return self.features @ x

    @property
    def init(self) -> Callable[[Array], Array]:
        return _zeros(self.features.shape[-1])


@struct
class TableReward(Reward):
    """One parameter for each state and action: r(., .; x) = x, shape [S, A]; x0 = 0.

    The likelihood does not see r - gamma E phi(s') + phi(s) for any phi [S], nor bounds it along pairs that no
    demonstration visits: give `to_bilevel` an x_set where x matters.
    """

    num_states: int = static()
    num_actions: int = static()

    def table(self, x: Array) -> Array:
        return x

    @property
    def init(self) -> Callable[[Array], Array]:
        return _zeros(self.num_states, self.num_actions)
