"""Smooth minima over finitely many values, and the constants that a step size by theory asks for.

Points y_1, …, y_N of Y with covering radius d give, for v(x) = min_{y in Y} g(x, y) and g_i = g(x, y_i),

    v_N = min_i g_i = min { sum_i w_i g_i : w >= 0, sum_i w_i = 1 },        0 <= v_N - v <= L_y d,

with L_y the Lipschitz constant of g in y (and <= (l_yy/2) d^2 at an interior minimiser). `smooth_min` smooths v_N:

    entropic:   v_t = -t log sum_i exp(-g_i/t) in [v_N - t log N, v_N],     w = softmax(-g/t),
    quadratic:  v_t = min_w sum_i w_i g_i + (t/2) |w|^2 in [v_N, v_N + t/2],   w = the simplex's point nearest to -g/t,

both with the gradient sum_i w_i grad_x g_i (Danskin). Of a separable problem every minimum is taken for each block.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from bilevel.sets import Simplex


class Smoothness(NamedTuple):
    """Constants over X x Y, 2-norms, for a step size by theory: L_f, L_g, Lipschitz constants of the gradients of f and
    g in (x, y); D_f, D_g, the largest |grad_x f(x, y) - grad_x f(x, y')| and the same of g.
    """

    L_f: Any
    L_g: Any
    D_f: Any
    D_g: Any


class SmoothMin(NamedTuple):
    """A smooth minimum of N values."""

    value: Array
    """Shape []."""

    weights: Array
    """Of the values, shape [N]: its gradient in them, at least 0 and of sum 1."""


def smooth_min(values: Array, t: Any, entropic: bool) -> SmoothMin:
    """The smooth minimum of `values` [N] at temperature t > 0, entropic or quadratic: see the module's docstring."""
    if entropic:
        least = lax.stop_gradient(jnp.min(values))  # any number would do
        weights = jnp.exp((least - values) / t)  # the largest is 1
        total = jnp.sum(weights)
        return SmoothMin(least - t * jnp.log(total), weights / total)
    least = jnp.min(values)
    weights = Simplex().project((least - values) / t)
    finite = jnp.where(weights > 0, values - least, 0)  # infinite values carry no weight
    return SmoothMin(least + weights @ finite + t / 2 * weights @ weights, weights)
