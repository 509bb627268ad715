"""Runs of DSBLO on the kink, in one dimension: momentum, the stationary law, and Goldstein distances that fall.

    g = h (y - x)^2/2,  0 <= y <= 1,    f = slope y - alpha x + mu ((1 + x^2)^(1/2) - 1),   alpha < mu,
    grad F_q(x) = slope 1{0 < x - q/h < 1} - alpha + mu x/(1 + x^2)^(1/2),    |.| <= L = max(alpha, slope - alpha) + mu.

With q ~ N(0, sigma^2) the mean of F_q has the slope

    G(x) = slope (Phi(h x/sigma) - Phi(h (x - 1)/sigma)) - alpha + mu x/(1 + x^2)^(1/2),

from which gradients deviate with a variance of at most slope^2/4, and its infimum is at least (mu^2 - alpha^2)^(1/2)
- mu, since y >= 0. `bilevel.theory.nonsmooth` has the theorems.

**The law.** With a = 1 - beta, a g_{t+1} = m_{t+1} - beta m_t and m_t = (gamma1 |m_t| + gamma2) (x_t - x_{t+1}). So the
mean of g over T steps is gamma2 (x_1 - x_{T+1})/T, up to 2 L/(a T) + gamma1 L^2/gamma2. g_{t+1} - G(xbar) are
martingale differences in an interval of length `slope`; G is Lipschitz with l = slope h/(sigma (2 pi)^(1/2)) + mu, and
|xbar - x_t| <= rho. By Azuma's inequality, over all RUNS runs, with probability 1 - LEVEL,

    |mean (G(x_t) - gamma2 (x_1 - x_{T+1})/T)| <= 2 L/(a T) + gamma1 L^2/gamma2 + l rho
                                                  + slope (log(2/LEVEL)/(2 T RUNS))^(1/2):

G is zero at about sigma Phi^-1(alpha/slope)/h, which is where the iterates have to be on average.

LEVEL is that of one test. A search of 200 draws makes a few thousand, so that a false alarm has a probability below 1%.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import DSBLO, BilevelProblem, Box, Full, Minimize
from bilevel.guarantees import Guarantee
from bilevel.theory import nonsmooth as theory_nonsmooth
from bilevel.theory.nonsmooth import Momentum
from problems import strategies
from problems.guarantees.ds_blo import kink_lower
from problems.guarantees.instances import EPS, origin_of

LEVEL, RUNS = 1e-6, 16
STUDENT = 7.4644  # the quantile 1 - LEVEL of Student's t with RUNS - 1 degrees of freedom
BUDGETS = (64, 256, 1024)


class Slopes(NamedTuple):
    """h, slope, alpha, mu of the module's docstring."""

    h: Any
    slope: Any
    alpha: Any
    mu: Any


def slopes_upper(x: Array, y: Array, batch: Slopes) -> Array:
    """The upper objective."""
    return jnp.sum(batch.slope * y - batch.alpha * x + batch.mu * (jnp.sqrt(1 + x**2) - 1))


class KnownRun(NamedTuple):
    """The kink; sigma; L; F(x_1) - inf F at most; beta, gamma1, gamma2, rho where they are drawn; the radius."""

    kink: Slopes
    sigma: Array
    L: Array
    gap: Array
    momentum: Momentum
    radius: Array


class Run(NamedTuple):
    """A start x [1]."""

    x: Array
    constants: KnownRun

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem."""
        data = Full(self.constants.kink)
        return BilevelProblem(
            slopes_upper, Minimize(kink_lower), y_set=Box(0.0, 1.0), upper_data=data, lower_data=data, init=origin_of(1)
        )


def smoothed_slope(known: KnownRun, x: Array) -> Array:
    """G(x)."""
    kink, cdf = known.kink, jax.scipy.stats.norm.cdf
    inside = cdf(kink.h * x / known.sigma) - cdf(kink.h * (x - 1) / known.sigma)
    return kink.slope * inside - kink.alpha + kink.mu * x / jnp.sqrt(1 + x**2)


def start(
    key: Array, h: Array, slope: Array, share: Array, mu: Array, sigma: Array, x: Array, beta: Array, gamma1: Array,
    gamma2: Array, radius: Array,
) -> Run:  # fmt: skip
    """A run on a kink with alpha = share min(slope, mu)."""
    alpha = share * jnp.minimum(slope, mu)
    L = jnp.maximum(alpha, slope - alpha) + mu
    first = slope * (jnp.clip(x, 0, 1) + 0.8 * sigma / h) - alpha * x + mu * (jnp.sqrt(1 + x**2) - 1)
    gap = first - (jnp.sqrt(mu**2 - alpha**2) - mu)
    momentum = Momentum(beta, gamma1 / L, gamma2, jnp.zeros(()), L / (gamma1 + gamma2))
    return Run(x[None], KnownRun(Slopes(h, slope, alpha, mu), sigma, L, gap, momentum, radius))


def starts(**changed: Any) -> Any:
    """Recipes of `start`; gamma1 is in units of 1/L."""
    numbers = {
        "h": strategies.fractions(0.5, 2.0),
        "slope": strategies.fractions(0.5, 2.0),
        "share": strategies.fractions(0.1, 0.9),
        "mu": strategies.fractions(0.2, 1.0),
        "sigma": strategies.fractions(0.02, 0.3),
        "x": strategies.fractions(-1.0, 2.0),
        "beta": strategies.fractions(0.0, 0.98),
        "gamma1": strategies.fractions(0.5, 100.0),
        "gamma2": strategies.fractions(1.0, 100.0),
        "radius": strategies.just(0.5),
    }
    return strategies.recipes(start, **(numbers | changed))


def paths(
    instance: Run, make: Callable[..., Any], settings: Momentum, keys: Array, num_steps: int
) -> tuple[Array, Array, Any]:
    """(x_1, …, x_{T+1}; m_1, …, m_{T+1}) of runs, shapes [runs, T + 1], and y_1, …."""
    known = instance.constants
    solver = make(
        beta=settings.beta, gamma_1=settings.gamma1, gamma_2=settings.gamma2, sigma=known.sigma, option="I",
        num_lower_steps=1,
    )  # fmt: skip
    problem = dataclasses.replace(instance.problem, init=lambda key: (instance.x, jnp.zeros(1)))

    def one(key: Array) -> Any:
        def body(state: Any, k: Array) -> Any:
            new = solver.step(problem, state, jax.random.fold_in(key, k))[0]
            return new, (new.x[0], new.m[0], new.y[0])

        first = solver.init(problem, key)
        rest = jax.lax.scan(body, first, jnp.arange(num_steps))[1]
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), (first.x, first.m, first.y), rest
        )  # fmt: skip

    return jax.vmap(one)(keys)


def momentum(make: Callable[..., Any] = DSBLO) -> Guarantee:
    """Deterministic statements at each step of one run."""
    length = 80

    def measure(instance: Run, horizon: tuple[int, ...]) -> Array:
        known = instance.constants
        keys = jax.random.split(jax.random.key(3), 1)
        x, m, _ = (part[0] for part in paths(instance, make, known.momentum, keys, length))
        kink, rows = known.kink, []

        def slope_of(x: Array) -> Array:
            return kink.mu * x / jnp.sqrt(1 + x**2) - kink.alpha

        for K in horizon:
            before, now = x[:-K], m[K:]
            reach = K * known.momentum.rho
            low, high = slope_of(before - reach), kink.slope + slope_of(before + reach)  # of all gradients that near
            outside = jnp.maximum(jnp.maximum(low - now, now - high), 0)
            rows.append(jnp.stack([jnp.max(jnp.abs(m)), jnp.max(jnp.abs(x[K:] - before)) / K, jnp.max(outside)]))
        return jnp.stack(rows)

    def bound(known: KnownRun, K: int) -> Array:
        return jnp.stack([known.L, known.momentum.rho, 2 * known.L * known.momentum.beta**K])

    return Guarantee(
        "ds-blo-momentum", "ours, bilevel.theory_nonsmooth", (), starts(), measure, bound, (1, 2, 5, 10, 20, 40),
        lambda known: 1e3 * EPS * (1 + known.L),
        "|m| <= L; |x_{t+K} - x_t| <= K rho; m is within 2 L beta^K of the hull of gradients within K rho",
        "", 16,
    )  # fmt: skip


def law(make: Callable[..., Any] = DSBLO) -> Guarantee:
    """Time averages of G over RUNS runs."""

    def measure(instance: Run, horizon: tuple[int, ...]) -> Array:
        known = instance.constants
        keys = jax.random.split(jax.random.key(4), RUNS)
        x, _, _ = paths(instance, make, known.momentum, keys, horizon[-1])
        slopes = smoothed_slope(known, x)
        rows = []
        for T in horizon:
            drift = known.momentum.gamma2 * jnp.mean(x[:, 0] - x[:, T]) / T
            rows.append(jnp.abs(jnp.mean(slopes[:, :T]) - drift))
        return jnp.stack(rows)

    def bound(known: KnownRun, T: int) -> Array:
        kink, settings = known.kink, known.momentum
        lipschitz = kink.slope * kink.h / (known.sigma * np.sqrt(2 * np.pi)) + kink.mu
        ends = 2 * known.L / ((1 - settings.beta) * T) + settings.gamma1 * known.L**2 / settings.gamma2
        chance = kink.slope * np.sqrt(np.log(2 / LEVEL) / (2 * T * RUNS))
        return ends + lipschitz * settings.rho + chance

    drawn = starts(
        gamma1=strategies.just(1e-3), gamma2=strategies.fractions(50.0, 500.0), beta=strategies.fractions(0.0, 0.9)
    )
    return Guarantee(
        "ds-blo-law", "ours, in problems.guarantees", (), drawn, measure, bound, (400, 1600),
        lambda known: 1e3 * EPS * known.L,
        "the mean of the smoothed slope over the iterates is what moved them: zero in the limit (level 1e-6)", "", 4,
    )  # fmt: skip


def distances(known: KnownRun, x: Array) -> Array:
    """How far 0 is from the hull of G at points within the radius of x, shaped like x: at least the true distance."""
    near = known.sigma / known.kink.h * jnp.linspace(-4, 4, 33)
    kinks, evenly = jnp.concatenate([near, 1 + near]), known.radius * jnp.linspace(-1.0, 1.0, 17)

    def one(x: Array) -> Array:
        around = jnp.clip(kinks, x - known.radius, x + known.radius)
        values = smoothed_slope(known, jnp.concatenate([x + evenly, around]))
        return jnp.maximum(jnp.maximum(jnp.min(values), -jnp.max(values)), 0)

    return jax.vmap(one)(x.ravel()).reshape(x.shape)


def goldstein(make: Callable[..., Any] = DSBLO) -> Guarantee:
    """Expected Goldstein distance, and momentum, with settings made for each budget."""

    def measure(instance: Run, horizon: tuple[int, ...]) -> Array:
        known, rows = instance.constants, []
        keys = jax.random.split(jax.random.key(5), RUNS)
        for T in horizon:
            settings = _settings(known, T)
            x, m, _ = paths(instance, make, settings, keys, T)
            kept = jnp.where(jnp.arange(T, dtype=float)[None] < T - settings.K, 1.0, 0.0)
            far = jnp.sum(kept * distances(known, x[:, :T]), axis=1) / jnp.sum(kept)
            size = jnp.abs(m[:, :T])
            energy = jnp.mean(size**2 / (settings.gamma1 * size + settings.gamma2), axis=1)
            rows.append(jnp.stack([_surely(far), _length(known, settings, _surely(energy))]))
        return jnp.stack(rows)

    def bound(known: KnownRun, T: int) -> Array:
        settings = _settings(known, T)
        far = theory_nonsmooth.goldstein_distance(known.L, known.gap, known.kink.slope / 2, settings, float(T))
        energy = theory_nonsmooth.mean_momentum(known.L, known.gap, known.L, settings, float(T))
        return jnp.stack([far, _length(known, settings, energy)])

    drawn = starts(radius=strategies.fractions(0.1, 1.0))
    return Guarantee(
        "ds-blo-goldstein", "ours, bilevel.theory_nonsmooth", (), drawn, measure, bound, BUDGETS,
        lambda known: 1e3 * EPS * known.L,
        "mean Goldstein distance, and length of the momentum, over T steps made for T (Student's t, level 1e-6)",
        "power", 2,
    )  # fmt: skip


def _settings(known: KnownRun, T: int) -> Momentum:
    return theory_nonsmooth.momentum_settings(known.L, known.gap, known.kink.slope / 2, known.radius, float(T))


def _length(known: KnownRun, settings: Momentum, energy: Array) -> Array:
    """The bound of (E|m|^2)^(1/2) by the mean of eta |m|^2."""
    return jnp.sqrt((settings.gamma1 * known.L + settings.gamma2) * jnp.maximum(energy, 0))


def _surely(values: Array) -> Array:
    """The lower end of a confidence interval of the mean over runs."""
    return jnp.mean(values) - STUDENT * jnp.std(values, ddof=1) / np.sqrt(RUNS)


MOMENTUM = momentum()
LAW = law()
GOLDSTEIN = goldstein()
