"""A Stackelberg market: a leader announces a quantity, firms behind him settle in Cournot's equilibrium.

The price is a - x - Y, Y = sum of y_i, firm i produces 0 <= y_i <= k_i at the cost c_i, the leader at the cost c:

    max over x in [0, a] of (a - x - Y - c) x,     y_i in argmax (a - x - Y - c_i) y_i  for each i.

With a linear price the firms' equilibrium is the one minimiser of a convex quadratic, their potential,

    g = sum_i (c_i - a + x) y_i + Y^2/2 + |y|^2/2,    0 <= y <= k,

so that a single follower stands for all of them. Each firm is out, in between or at its capacity: x falls into
intervals on which y is affine and F quadratic. All 3^firms patterns are looked at, which gives the optimum.

    make(firms=3, seed=0)

Settings that work: `MPEC()`, `LBFGS()`, from several starts: F has kinks where a firm enters or comes to its capacity,
and may have several minima. `BranchAndBound` refuses it, since f is convex in no form that it knows.

Reference: Sherali, Soyster, Murphy. Stackelberg-Nash-Cournot equilibria: characterizations and computations. Operations
Research 31, 1983. Monderer, Shapley. Potential games. Games and Economic Behavior 14, 1996, the potential.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, Full, Minimize
from bilevel.backend.checks import is_count
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

MOST = 8  # firms: 3^8 patterns


class Market(NamedTuple):
    """The numbers."""

    a: float
    c: float
    costs: np.ndarray
    """c_i, [firms]."""
    capacities: np.ndarray
    """k_i, [firms]."""


def upper(x: Array, y: Array, batch: dict[str, Array]) -> Array:
    """Minus the leader's profit, shape []."""
    return -(batch["a"] - x[0] - jnp.sum(y) - batch["c"]) * x[0]


def lower(x: Array, y: Array, batch: dict[str, Array]) -> Array:
    """The firms' potential, shape []."""
    return (batch["costs"] - batch["a"] + x[0]) @ y + jnp.sum(y) ** 2 / 2 + jnp.sum(y**2) / 2


@functools.cache
def _init(firms: int) -> Callable[[Array], tuple[Array, Array]]:
    return lambda key: (jax.random.uniform(key, (1,), float, 0, 10), jnp.zeros(firms, float))


def best(market: Market) -> tuple[float, float, np.ndarray]:
    """(F*, x*, y*), by all patterns of firms."""
    found = np.inf, 0.0, market.costs * 0
    for pattern in itertools.product((-1, 0, 1), repeat=len(market.costs)):
        state = np.array(pattern)
        inside, full = state == 0, state == 1
        held, count = market.capacities[full].sum(), inside.sum()
        # for firms in between y_i = a - c_i - x - Y: Y = p + s x
        p = ((market.a - market.costs[inside]).sum() + held) / (1 + count)
        s = -count / (1 + count)
        ahead = np.stack(
            [market.a - market.costs - p, np.full(len(state), -1 - s)]
        )  # a - c_i - x - Y = ahead0 + ahead1 x
        lo, hi = 0.0, market.a
        wrong = [
            (-ahead[0], -ahead[1], inside | full),
            (ahead[0], ahead[1], state == -1),
            (ahead[0] - market.capacities, ahead[1], inside),
            (market.capacities - ahead[0], -ahead[1], full),
        ]
        for constant, slope, rows in wrong:  # constant + slope x <= 0
            for u, v in zip(constant[rows], slope[rows], strict=True):
                if v > 0:
                    hi = min(hi, -u / v)
                elif v < 0:
                    lo = max(lo, -u / v)
        if lo > hi:
            continue
        top = (market.a - p - market.c) / (2 * (1 + s))  # of (a - c - p - (1 + s) x) x
        for x in (lo, hi, min(max(top, lo), hi)):
            value = -(market.a - market.c - p - (1 + s) * x) * x
            if value < found[0]:
                y = np.where(full, market.capacities, np.where(inside, ahead[0] + ahead[1] * x, 0.0))
                found = float(value), float(x), y
    return found


def make(firms: int = 3, seed: int = 0) -> Instance:
    """The market with a number.

    Args:
        firms: in [1, 8].
        seed: >= 0.

    Raises:
        InvalidInput: a number out of range.
    """
    if not (is_count(firms, 1) and firms <= MOST):
        invalid("firms (stackelberg)", firms, f"a whole number in [1, {MOST}]", "All patterns are looked at.")
    rng = np.random.default_rng([firms, seed])
    market = Market(20.0, float(rng.integers(1, 9)), rng.integers(1, 13, firms).astype(float),
                    rng.integers(1, 6, firms).astype(float))  # fmt: skip
    batch = {name: floats(np.asarray(part)) for name, part in market._asdict().items() if name != "capacities"}
    value, x, y = best(market)
    problem = BilevelProblem(
        upper,
        Minimize(lower),
        x_set=Box(0.0, market.a),
        y_set=Box(floats(np.zeros(firms)), floats(market.capacities)),
        upper_data=Full(batch),
        lower_data=Full(batch),
        init=_init(firms),
    )
    tags = frozenset({"known-optimum", "qp-follower", "nonsmooth"})
    return Instance(problem, Truth(value, floats(np.array([x])), floats(y)), tags=tags)
