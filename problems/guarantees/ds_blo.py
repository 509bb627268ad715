"""DSBLO's lemmas on the kink: its theorem's constants are vacuous at horizons that can be run.

    g = h |y - x|^2/2,  0 <= y <= 1,    f = slope 1'y - alpha 1'x + mu |x|^2/2,    y_q = clip(x - q/h, 0, 1),
    grad F_q(x) = slope 1{0 < x - q/h < 1} - alpha + mu x    coordinate by coordinate.

From (x, m), one step must give |x+ - x| <= min(1/gamma1, |m|/gamma2); a momentum with m+ - beta m = (1 - beta)
grad F_q(xbar), from which xbar = x + s (x+ - x) is read off with *one* s in [0, 1]; and y = y_q(xbar), where
|y_q - y_0| <= |q|/h and so |F_q - F| <= L_f |q|/h, L_f = slope dim^(1/2), tested with q on a sphere. With
q ~ N(0, sigma^2 I) fresh in each step, the indicators at x are independent, with P = Phi(h x/sigma)
- Phi(h (x - 1)/sigma): by Hoeffding their mean over n draws is off by more than (log(2/level)/(2 n))^(1/2) with
probability at most `LEVEL`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import DSBLO, BilevelProblem, Box, Full, Minimize
from bilevel.guarantees import Guarantee
from problems import strategies
from problems.guarantees.instances import EPS, normal, of_length

SIZE, DRAWS, LEVEL = 3, 64, 1e-9
TINY = 1e-14  # an active bound holds up to rounding
DEVIATION = float(np.sqrt(np.log(2 / LEVEL) / (2 * SIZE * DRAWS)))


class Kink(NamedTuple):
    """h, slope, alpha, mu of the module's docstring."""

    h: Any
    slope: Any
    alpha: Any
    mu: Any


def kink_upper(x: Array, y: Array, batch: Kink) -> Array:
    """The upper objective."""
    return batch.slope * jnp.sum(y) - batch.alpha * jnp.sum(x) + batch.mu * x @ x / 2


def kink_lower(x: Array, y: Array, batch: Kink) -> Array:
    """The lower objective h |y - x|^2/2."""
    return batch.h * (y - x) @ (y - x) / 2


def start(key: Array) -> tuple[Array, Array]:
    """Zeros."""
    return jnp.zeros(SIZE, float), jnp.zeros(SIZE, float)


class KnownStep(NamedTuple):
    """The kink; sigma; beta, gamma1, gamma2; |m|."""

    kink: Kink
    sigma: Array
    beta: Array
    gamma1: Array
    gamma2: Array
    momentum: Array


class Step(NamedTuple):
    """A point x and a momentum m."""

    x: Array
    m: Array
    constants: KnownStep

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem."""
        return BilevelProblem(
            kink_upper, Minimize(kink_lower), y_set=Box(0.0, 1.0), upper_data=Full(self.constants.kink),
            lower_data=Full(self.constants.kink), init=start,
        )  # fmt: skip


def step(
    key: Array, h: Array, slope: Array, mu: Array, sigma: Array, near: Array, right: Array, beta: Array, gamma1: Array,
    gamma2: Array, length: Array,
) -> Step:  # fmt: skip
    """A step from x within near sigma/h of the kink at 0, or at 1 where `right`; |m| = length."""
    key_x, key_m, key_alpha = jax.random.split(key, 3)
    x = jnp.where(right, 1.0, 0.0) + near * sigma / h * jax.random.uniform(key_x, (SIZE,), float, -1, 1)
    kink = Kink(h, slope, jax.random.uniform(key_alpha, (), float), mu)
    m = of_length(normal(key_m, SIZE), length)
    return Step(x, m, KnownStep(kink, sigma, beta, gamma1, gamma2, length))


steps = strategies.recipes(
    step, h=strategies.fractions(0.5, 4.0), slope=strategies.fractions(0.5, 2.0), mu=strategies.fractions(0.1, 1.0),
    sigma=strategies.fractions(0.001, 0.1), near=strategies.sizes(), right=strategies.booleans,
    beta=strategies.fractions(0.0, 0.99), gamma1=strategies.fractions(1.0, 1e4), gamma2=strategies.fractions(1.0, 1e3),
    length=strategies.sizes(),
)  # fmt: skip


def lemmas(make: Callable[..., Any] = DSBLO) -> Guarantee:
    """One step from DRAWS keys."""

    def measure(instance: Step, horizon: tuple[int, ...]) -> Array:
        known, problem, x = instance.constants, instance.problem, instance.x
        kink = known.kink
        settings = {"beta": known.beta, "gamma_1": known.gamma1, "gamma_2": known.gamma2, "sigma": known.sigma}

        def states(distribution: str) -> tuple[Any, Array, Array]:
            """(the states after a step from each key, where y is inside of (0, 1), xbar as grad F_q says)."""
            solver = make(**settings, option="I", distribution=distribution)
            state = solver.init(problem, jax.random.key(0))._replace(x=x, m=instance.m)
            keys = jax.random.split(jax.random.key(1), DRAWS)
            after = jax.vmap(lambda key: solver.step(problem, state, key)[0])(keys)
            g = (after.m - known.beta * instance.m[None]) / (1 - known.beta)
            inside = jnp.where((after.y > TINY) & (after.y < 1 - TINY), 1.0, 0.0)
            return after, inside, (g + kink.alpha - kink.slope * inside) / kink.mu

        after, inside, xbar = states("gaussian")
        moved = after.x - x[None]
        square = jnp.sum(moved**2, axis=1)
        s = jnp.sum((xbar - x[None]) * moved, axis=1) / jnp.maximum(square, 1e-300)
        s = jnp.where(square > 1e-12, s, 0)  # too short a step says nothing about s
        off_segment = jnp.linalg.norm(xbar - x[None] - s[:, None] * moved, axis=1)
        reach = jnp.max(jnp.sqrt(square))
        outside = jnp.max(jnp.maximum(s - 1, -s)) * reach
        cdf = jax.scipy.stats.norm.cdf
        p = cdf(kink.h * x / known.sigma) - cdf(kink.h * (x - 1) / known.sigma)
        # q has a density of at most 0.4/sigma: at xbar in place of x, P differs by at most reach h/sigma.
        frequency = jnp.abs(jnp.mean(inside) - jnp.mean(p)) - reach * kink.h / known.sigma

        after, _, xbar = states("sphere")
        change = jnp.max(jnp.linalg.norm(after.y - jnp.clip(xbar, 0, 1), axis=1))
        bias = jax.vmap(lambda x, y: kink_upper(x, y, kink) - kink_upper(x, jnp.clip(x, 0, 1), kink))(xbar, after.y)
        return jnp.stack([reach, jnp.max(off_segment), outside, frequency, change, jnp.max(jnp.abs(bias))])[None, :]

    def bound(known: KnownStep, k: int) -> Array:
        zero = jnp.zeros(())
        reach = jnp.minimum(1 / known.gamma1, known.momentum / known.gamma2)
        change = known.sigma / known.kink.h
        bias = known.kink.slope * SIZE**0.5 * change
        return jnp.stack([reach, zero, zero, jnp.full((), DEVIATION), change, bias])

    def rounding(known: KnownStep) -> Array:
        size = 2 + known.kink.slope + known.momentum
        return 1e3 * EPS * size / ((1 - known.beta) * known.kink.mu)

    return Guarantee(
        "ds-blo", "lemmas: theorem vacuous", (), steps, measure, bound, (1,), rounding,
        "|x+ - x| <= min(1/gamma1, |m|/gamma2); grad F_q on the segment; |F_q - F| <= L_f |q|/mu; fresh q (level 1e-9)",
    )  # fmt: skip


DS_BLO = lemmas()
