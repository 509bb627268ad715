"""The penalised objective over samples of the lower level, its weights and its gradient.

With f_i = f(x, y_i), g_i = g(x, y_i) and the smooth minimum M of `smoothing`, at a penalty rho and a temperature t:

    lifted:  P(x) = M_{rho t}[f_i + rho g_i](x) - rho M_t[g_i](x)
    joint:   P(x, y) = f(x, y) + rho (g(x, y) - M_t[g_i](x)),       y the last of the samples.

Samples of a coupled set Y(x) are moved into it (`feasible.near_all`); both objectives have the squared violation that
is left (`blocks.uncoupled`). Weights on samples never trade a violation at one against slack at
another.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.backend.tree import join
from bilevel.sampled.blocks import Blocks
from bilevel.sampled.feasible import Motion, is_affine, motion, pressed
from bilevel.sampled.refine import multipliers
from bilevel.sampled.renewal import Samples
from bilevel.sampled.smoothing import SmoothMin, smooth_min

PyTree = Any


class Form(NamedTuple):
    """Which penalised objective; known when traced."""

    joint: bool
    """Whether y is a variable, the last sample; else the lifted form."""

    entropic: bool
    """Whether minima are smoothed entropically; else quadratically."""

    frozen: bool
    """Whether samples stay as drawn: a variable y is then no sample of v."""


class Rung(NamedTuple):
    """Where a lane is on its ladder; shapes []."""

    rho: Array
    """The penalty."""

    smooth: Array
    """rho t, the temperature of f + rho g."""

    weight: Array
    """Of a coupling's squared violation in f, in units of f's spread."""


class Value(NamedTuple):
    """P, and the weights of the samples in it."""

    value: Array
    """P, the sum over the blocks, shape []."""

    upper: Array
    """Of the minimum over f + rho g, shape [N, n]; of the joint form 1 at y."""

    lower: Array
    """Of the minimum over g, shape [N, n]."""


class Direction(NamedTuple):
    """A gradient of P."""

    x: PyTree
    """In x."""

    last: Array
    """In the last sample, shape [n, m]: 0 for the lifted form."""

    motion: Motion | None
    """How the samples of a coupled set with affine rows move with x, stacked; else None."""


@dataclasses.dataclass(frozen=True)
class Penalised:
    """P on the blocks `view`, at the penalty rho and the temperature t = smooth/rho, shapes [].

    chunk: how many samples are in memory at once.
    """

    view: Blocks
    form: Form
    rho: Array
    smooth: Array
    chunk: int

    def at(self, f: Array, g: Array) -> Value:
        """P where the samples have the values f and g, [N, n]."""
        rho, smooth, (joint, entropic, frozen) = self.rho, self.smooth, self.form
        blocks: Any = 0, 1  # the axis of blocks in the value and in the weights
        least = jax.vmap(lambda values, t: smooth_min(values, t, entropic), (1, None), SmoothMin(*blocks))
        v = least(g.at[-1].set(jnp.inf) if joint and frozen else g, smooth / rho)
        if joint:
            y_alone = jnp.zeros_like(f).at[-1].set(1)
            return Value(jnp.sum(f[-1] + rho * (g[-1] - v.value)), y_alone, v.weights)
        u = least(f + rho * g, smooth)
        return Value(jnp.sum(u.value - rho * v.value), u.weights, v.weights)

    def gradient(self, x: PyTree, samples: Samples, lift: Array, weights: Value) -> Direction:
        """The gradient of P at the samples, N of them, in x, and in y where it is joint (Danskin).

        lift: `Feasible.lift` of the first samples, which were moved onto their rows at this x; that of the other ones,
        the slots, is found here: see `feasible.pressed`.
        """
        if self.view.problem.coupling is not None:
            return self._coupled_gradient(x, samples, lift, weights)
        a, b, rho = weights.upper, weights.lower, self.rho
        by_x, by_y = self.view.gradients(x, samples.points, a, rho * (a - b), self.chunk)
        return Direction(by_x, self._last(by_y), None)

    def _last(self, by_y: Array) -> Array:
        """The gradient in the last sample, where it is a variable."""
        return by_y[-1] if self.form.joint else jnp.zeros_like(by_y[-1])

    def _coupled_gradient(self, x: PyTree, samples: Samples, lift: Array, weights: Value) -> Direction:
        """The same with the motion of every sample: see `feasible`."""
        view, rho, a, b, points = self.view, self.rho, weights.upper, weights.lower, samples.points
        by_x, by_y = view.gradients(x, points, a, rho * a, self.chunk)
        minus, low = view.gradients(x, points, jnp.zeros_like(b), rho * b, self.chunk)
        both = jnp.concatenate([by_y, low], axis=1)
        if is_affine(view):
            first = len(lift)
            now = jax.vmap(partial(pressed, view, x))(points[first:], samples.held[first:], both[first:])
            slots = jax.vmap(partial(motion, view, x))(points[first:], now)
            motions = join(Motion(samples.held[:first], lift), slots)
            num = len(view.coupling_rows(x, points[0]).values)
            lam = jax.vmap(lambda motion, G: motion.multipliers(G[0]))(motions, by_y - low)[:, :num]
        else:
            motions, lam = None, jax.vmap(partial(multipliers, view, x))(points, both)
            lam = lam[:, 0] - lam[:, 1]
        pull = view.coupling_pull(x, points, lam)[0]
        slope = jax.tree.map(lambda up, low, row: up - low + row, by_x, minus, pull)
        return Direction(slope, self._last(by_y), motions)
