"""Default steps of x: from 1/L with L the curvature of F at the start, and less where F turns out to be more curved.

A single sweep leaves Q behind x. Where x has one entry and Q - Q(x) shrinks by r > 0, that does no harm: steps up to
2/L (1 + r)/(1 - r) are stable. But gamma P Pi has complex and negative eigenvalues where states follow each other in
turns, and Q then swings against x. Of 60 drawn MDPs (2 to 20 states, 2 to 5 actions, discounts from 0.5 to 0.99) all
were stable, linearised, at 0.79/L, and half of them at 1/L. So `MLIRL` starts with half of 1/L.

L is that of the start alone. Where the policy becomes surer, F can be flatter or more curved, fourfold and more there.
So the step follows what is seen (`watched`),

    a_k = min(reach a_0, GROWTH a_{k-1}, share |x_k - x_{k-1}|/|h_k - h_{k-1}|),    h the direction.

The quotient is that of Malitsky and Mishchenko, Adaptive gradient descent without descent, ICML 2020,
arXiv:1910.09529. Differences of sampled directions are mostly noise: then the step falls
like k^(-1/2), as the theory wants (`decaying`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel.backend.tree import distance, norm
from bilevel.step import Stepper, StepRule

PyTree = Any
GROWTH = 1.05  # by which a step recovers, once F is flatter again


class Watched(NamedTuple):
    """The state of a step that is watched."""

    size: Array
    """The step a_{k-1}, []."""
    most: Array
    """The largest step, reach a_0, []."""
    share: Array
    """The part of the quotient that a step may have, []."""
    x: PyTree
    """The point x_{k-1}."""
    direction: PyTree
    """The direction there."""


class Decaying(NamedTuple):
    """The state of a step that falls like k^(-1/2)."""

    most: Array
    """The step a_0, []."""
    count: Array
    """The index k, []."""


def watched(size: Array, x: PyTree, share: float, reach: float) -> Stepper:
    """The stepper of this file's docstring with a_0 = size; share and reach are > 0."""
    nothing = jax.tree.map(jnp.zeros_like, x)
    state = Watched(size, reach * size, jnp.asarray(share, size.dtype), x, nothing)
    return Stepper(StepRule(transformation=_WATCHED), state)


def decaying(size: Array) -> Stepper:
    """The stepper with a_k = size (k + 1)^(-1/2)."""
    return Stepper(StepRule(transformation=_DECAYING), Decaying(size, jnp.zeros((), size.dtype)))


def _watch(direction: PyTree, state: Watched, x: PyTree) -> tuple[PyTree, Watched]:
    moved, turned = distance(x, state.x), distance(direction, state.direction)
    rounding = jnp.finfo(moved.dtype).eps ** 0.5 * (1 + norm(x))
    told = moved > rounding  # at first x has not moved
    limit = jnp.where(turned > 0, state.share * moved / turned, jnp.inf)
    size = jnp.minimum(jnp.minimum(state.most, GROWTH * state.size), limit)
    size = jnp.where(told, size, state.size)
    step = jax.tree.map(lambda d: -size.astype(d.dtype) * d, direction)
    return step, state._replace(size=size, x=x, direction=direction)


def _decay(direction: PyTree, state: Decaying, x: PyTree) -> tuple[PyTree, Decaying]:
    size = state.most * (state.count + 1) ** -0.5
    step = jax.tree.map(lambda d: -size.astype(d.dtype) * d, direction)
    return step, state._replace(count=state.count + 1)


def _made_here(params: PyTree) -> Any:
    raise NotImplementedError("`watched` and `decaying` make the state, which needs the first step's size.")


_WATCHED = optax.GradientTransformation(_made_here, _watch)  # pyright: ignore[reportArgumentType]
_DECAYING = optax.GradientTransformation(_made_here, _decay)  # pyright: ignore[reportArgumentType]
