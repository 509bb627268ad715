r"""Explicit bounds for linearly constrained lower levels: accuracy of the implicit gradient, and DS-BLO's momentum.

**Inner accuracy implies gradient accuracy (our derivation).** With active rows (A, B) of (y, x) that are independent,
the gradient at (x, y) is f_x - G u - B'w, where H u + A'w = f_y, A u = 0, H = g_yy, G = g_xy. So with Z an orthonormal
basis of the null space of A, u = Z (Z'H Z)^-1 Z' f_y and A'w = f_y - H u. At |y - y*| <= d with the same active rows,
and a star for values at y*, Z'H Z Z'(u - u*) = Z'(f_y - f_y* - (H - H*) u*), hence

    |u - u*| <= (L_fy + L_gyy |u*|) d/mu =: e,
    |w - w*| <= ((L_fy + L_gyy |u*|) d + L_g e)/s,          s the smallest singular value of A,
    |gradient - gradient*| <= (L_fx + L_gxy |u*|) d + C_gxy e + |B| |w - w*|.

**Normalised momentum (our derivation, after the method of the paper).** Let F be differentiable with |grad F| <= L, X
the whole space, a = 1 - beta, and

    x+ = x - m/(gamma1 |m| + gamma2),   m+ = beta m + a g,   |g| <= L,   E g = grad F(xbar),   xbar uniform on [x, x+].

(1) |m| <= L, a step is at most rho = L/(gamma1 L + gamma2) long, and m_t = a sum_{j<K} beta^j g_{t-j} + beta^K m_{t-K}:
so m_t is within 2 L beta^K of the hull of gradients in the ball of radius K rho around x_{t-K}.

(2) phi(m) = |m|/gamma1 - (gamma2/gamma1^2) log(1 + gamma1 |m|/gamma2) has the gradient eta m, eta = 1/(gamma1 |m| +
gamma2), and is 1/gamma2-smooth. With m+ - m = a (g - m), therefore

    eta <m, g> >= eta |m|^2 + (phi(m+) - phi(m))/a - a |g - m|^2/(2 gamma2),

while E eta <m, g> = E F(x) - E F(x+), *because* xbar is uniform on the segment. Over T steps, with |g - m| <= 2 L,

    mean E eta |m|^2 <= ((F(x_1) - inf F) + phi(m_1)/a)/T + 2 a L^2/gamma2.

(3) Let S = (a/(1 + beta)) (1 + beta^K)/(1 - beta^K) and v^2 >= E|g - grad F(xbar)|^2. These deviations are
uncorrelated, so that by (1)

    E dist(0, hull of grad F within K rho of x_{t-K}) <= (E|m_t| + beta^K L)/(1 - beta^K) + v S^(1/2),

and E|m|^2 <= (gamma1 L + gamma2) E eta |m|^2. For a ~ T^(-1/2) and K ~ log(T)/a this is O(T^(-1/4)) up to logarithms at
a fixed radius, the order of the paper, with constants that say something from some hundreds of steps on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.problem import Constants


def constrained_bias(
    constants: Constants, distance: Any, u_norm: Any, singular: Any, rows_x: Any
) -> Array:  # fmt: skip
    """The bound of |gradient - gradient*| at |y - y*| <= distance, with the same active rows.

    Args:
        constants: of f and g.
        distance: d >= 0.
        u_norm: |u*|.
        singular: s, the smallest singular value of the active rows A; infinite where none is active.
        rows_x: |B| of the active rows.
    """
    k = constants
    change = (k.L_fy + k.L_gyy * u_norm) * distance
    e = change / k.mu
    return (k.L_fx + k.L_gxy * u_norm) * distance + k.C_gxy * e + rows_x * (change + k.L_g * e) / singular


class Momentum(NamedTuple):
    """The settings of DS-BLO's momentum, as the module's docstring names them, each a number."""

    beta: Any
    """In (0, 1): how much of the last momentum is kept."""
    gamma1: Any
    """> 0; a step is m/(gamma1 |m| + gamma2)."""
    gamma2: Any
    """> 0, likewise."""
    K: Any
    """A whole number: beta^K is what is left of the momentum after K steps."""
    rho: Any
    """The length that no step exceeds, L/(gamma1 L + gamma2)."""


def potential(size: Any, gamma1: Any, gamma2: Any) -> Array:
    """The potential phi of the module's docstring, part (2), at |m| = size, shape []."""
    t = gamma1 * size / gamma2
    series = t**2 / 2 - t**3 / 3  # of t - log(1 + t), where the difference would cancel
    return gamma2 / gamma1**2 * jnp.where(t < 1e-4, series, t - jnp.log1p(t))


def mean_momentum(L: Any, gap: Any, first: Any, settings: Momentum, num_steps: Any) -> Array:
    """The bound (2) of the mean of E eta |m|^2 over T steps, shape [].

    Args:
        L: of F, |grad F| <= L.
        gap: >= F(x_1) - inf F.
        first: |m_1|, the momentum at the start.
        settings: of the momentum.
        num_steps: T.
    """
    a = 1 - settings.beta
    start = gap + potential(first, settings.gamma1, settings.gamma2) / a
    return start / num_steps + 2 * a * L**2 / settings.gamma2


def goldstein_distance(L: Any, gap: Any, deviation: Any, settings: Momentum, num_steps: Any) -> Array:
    """The bound (3) of the mean over x_1, …, x_{T-K} of the expected distance at radius K rho, shape [].

    It is infinite where num_steps <= K.

    Args:
        L: of F, |grad F| <= L.
        gap: >= F(x_1) - inf F.
        deviation: v, v^2 >= E|g - grad F(xbar)|^2.
        settings: of the momentum.
        num_steps: T.
    """
    beta, K = settings.beta, settings.K
    squares = (settings.gamma1 * L + settings.gamma2) * mean_momentum(L, gap, L, settings, num_steps)
    left = jnp.maximum(num_steps - K, 1e-9)
    forgotten = beta**K
    spread = (1 - beta) / (1 + beta) * (1 + forgotten) / (1 - forgotten)
    size = jnp.sqrt(squares * num_steps / left)
    return jnp.where(num_steps > K, (size + forgotten * L) / (1 - forgotten) + deviation * jnp.sqrt(spread), jnp.inf)


def momentum_settings(L: Any, gap: Any, deviation: Any, radius: Any, num_steps: Any) -> Momentum:
    """The settings with K rho = radius for which `goldstein_distance` is least, of 40 values of beta.

    The other numbers follow from beta: K is where beta^K = T^(-1/2), rounded up, and gamma1 L = gamma2/10.

    Args:
        L: of F, |grad F| <= L.
        gap: >= F(x_1) - inf F.
        deviation: v, v^2 >= E|g - grad F(xbar)|^2.
        radius: of the Goldstein subdifferential, > 0.
        num_steps: T.
    """

    def at(a: Array) -> Momentum:
        K = jnp.ceil(jnp.log(num_steps) / (-2 * jnp.log1p(-a)))
        gamma2 = K * L / (1.1 * radius)
        return Momentum(1 - a, gamma2 / (10 * L), gamma2, K, radius / K)

    choices = jax.vmap(at)(jnp.geomspace(0.5 / num_steps, 0.5, 40, dtype=float))
    bounds = jax.vmap(lambda settings: goldstein_distance(L, gap, deviation, settings, num_steps))(choices)
    best = jnp.nanargmin(bounds)
    return jax.tree.map(lambda part: part[best], choices)
