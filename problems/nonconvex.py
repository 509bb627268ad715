"""Lower levels that are not convex, one unknown on each level: problems of the literature with verified optima.

Every case has x, y of shape [1], boxes X and Y, and a start drawn uniformly from both by the key. F* is the optimistic
value: where g(x, .) has several global minimisers in Y(x), the best of them for f. The values were computed by brute
force on grids and are recomputed by the project's tests; where an often quoted number differs, the tests decided.

Several cases are discontinuous in x (tag "discontinuous"): F jumps down at isolated x, so that points whose lower gap
is tiny but not zero undercut F*. Judge them by F together with the true lower gap.

Settings that work: `SampledPenalty()`. Solvers that follow one y see local minima of g; `BLOCC()` on blocc_1 ends in
local minima of F.

References: Mitsos, Barton. A test set for bilevel programs. Technical report, MIT, 2007 (mb_<number>).
    Mirrlees. The theory of moral hazard and unobservable behaviour. Review of Economic Studies 66, 1999.
    Ye, Zhu. New necessary optimality conditions for bilevel programs by combining the MPEC and value function
    approaches. SIAM Journal on Optimization 20, 2010. Shen, Chen, arXiv:2302.05185 (vpbgd_toy).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, Full, LinearCoupling, Minimize, SmoothCoupling
from bilevel.diagnostics import BY_VALUE
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

PyTree = Any
Scalars = Callable[[Any, Any], Any]


class Case(NamedTuple):
    """f and g of numbers x, y; the ends of X and Y; F* and (x*, y*), None where not unique; coupling; jumps of F."""

    f: Scalars
    g: Scalars
    value: float
    point: tuple[float, float] | None
    x: tuple[float, float] = (-1.0, 1.0)
    y: tuple[float, float] = (-1.0, 1.0)
    linear: tuple[float, float, float] | None = None  # (A, B, b): A y + B x <= b
    smooth: Scalars | None = None  # h(x, y) <= 0
    discontinuous: bool = False


def _quartic(y: Any) -> Any:
    return 16 * y**4 + 2 * y**3 - 8 * y**2 - 1.5 * y + 0.5


def _p(x: Any, y: Any) -> Any:
    square = (-0.02 * x**2 + 0.16 * x - 0.4) * y**2
    return y**4 + (4 / 30) * (1 - x) * y**3 + square + (0.004 * x**3 - 0.036 * x**2 + 0.08 * x) * y


CASES = {
    "mb_3_10": Case(lambda x, y: y, lambda x, y: x * _quartic(y), 0.5, None, x=(0.1, 1.0)),
    "mb_3_11": Case(
        lambda x, y: y, lambda x, y: x * _quartic(y), -0.8, (0.0, -0.8), y=(-0.8, 1.0), discontinuous=True
    ),
    "mb_3_12": Case(
        lambda x, y: -x + x * y + 10 * y**2, lambda x, y: -x * y**2 + y**4 / 2, 0.0, (0.0, 0.0), discontinuous=True
    ),
    "mb_3_13": Case(
        lambda x, y: x - y, lambda x, y: x * y**2 / 2 - x**3 * y, -1.0, (0.0, 1.0), discontinuous=True
    ),
    "mb_3_15": Case(lambda x, y: x + y, lambda x, y: x * y**2 / 2 - y**3 / 3, 0.0, (-1.0, 1.0)),
    "mb_3_16": Case(lambda x, y: 2 * x + y, lambda x, y: -x * y**2 / 2 - y**4 / 4, -2.0, None),
    "mb_3_17": Case(
        lambda x, y: (x + 0.5) ** 2 + y**2 / 2, lambda x, y: x * y**2 / 2 + y**4 / 4, 0.1875, None, discontinuous=True
    ),
    "mb_3_18": Case(lambda x, y: -(x**2) + y**2, lambda x, y: x * y**2 - y**4 / 2, -1.0, (1.0, 0.0)),
    "mb_3_19": Case(
        lambda x, y: x * y - y + y**2 / 2, lambda x, y: -x * y**2 + y**4 / 2, -0.25808, (0.18894, 0.43467)
    ),
    "mb_3_22": Case(
        lambda x, y: (x - 0.6) ** 2 + y**2, _p, 0.19168, (0.6436, -0.4356),
        smooth=lambda x, y: 0.01 * (1 + x**2) - y**2,
    ),
    "ka_ex3": Case(
        lambda x, y: x - y, lambda x, y: x * y**2 / 2 - x * y**3, -1.0, (0.0, 1.0), discontinuous=True
    ),
    "mirrlees": Case(
        lambda x, y: (x - 2) ** 2 + (y - 1) ** 2,
        lambda x, y: -x * jnp.exp(-((y + 1) ** 2)) - jnp.exp(-((y - 1) ** 2)),
        1.0018, (1.0, 0.9575), x=(0.5, 2.0), y=(-2.0, 2.0), discontinuous=True,
    ),
    "ye_zhu_4_2": Case(
        lambda x, y: (x - 1) ** 2 + y**2, lambda x, y: y**3 - 3 * y, 1.0, (1.0, 1.0),
        x=(-3.0, 2.0), y=(-3.0, 3.0), linear=(-1.0, 1.0, 0.0),
    ),
    "iaptt": Case(
        lambda x, y: x + x * y, lambda x, y: -jnp.sin(x * y), -11 * np.pi / 4, (11 * np.pi / 4, -2.0),
        x=(1.0, 10.0), y=(-2.0, 2.0), discontinuous=True,
    ),
    "vpbgd_toy": Case(
        lambda x, y: jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x)) + 0.5 * jnp.log((4 * x - 2) ** 2 + 1),
        lambda x, y: (x + y) ** 2 + x * jnp.sin(x + y) ** 2,
        0.19991, (1.2152, -1.2152), x=(0.0, 3.0), y=(-4.0, 4.0),
    ),
    "blocc_1": Case(
        lambda x, y: jnp.exp(2 - y) / (2 + jnp.cos(4 * x)) + 0.5 * jnp.log((4 * x - 2) ** 2 + 1) + x**2,
        lambda x, y: (y - 2 * x) ** 2,
        2.6545, (0.3007, 0.3007), x=(0.0, 3.0), y=(-4.0, 4.0), linear=(1.0, -1.0, 0.0),
    ),
}  # fmt: skip


POLYNOMIALS = (
    "mb_3_10",
    "mb_3_11",
    "mb_3_12",
    "mb_3_13",
    "mb_3_15",
    "mb_3_16",
    "mb_3_17",
    "mb_3_18",
    "mb_3_19",
    "ka_ex3",
)


def _polynomial(x: Array, y: Array, batch: Array) -> Array:
    """sum_ij batch_ij x^i y^j: one function for all polynomials, so that they share what is compiled."""
    powers = lambda z: jnp.stack([jnp.ones_like(z[0]), z[0], z[0] ** 2, z[0] ** 3, z[0] ** 4])  # noqa: E731
    return powers(x) @ batch @ powers(y)


def _coefficients(function: Scalars) -> Array:
    """The coefficients [5, 5] of a polynomial of degree at most 4 in x and in y, from its values at 25 points."""
    points = np.arange(-2.0, 3.0)
    inverse = np.linalg.inv(np.vander(points, increasing=True))
    values = np.array([[float(function(x, y)) for y in points] for x in points])
    return floats(np.round(inverse @ values @ inverse.T, 13) + 0.0)


@functools.cache
def _init(x: tuple[float, float], y: tuple[float, float]) -> Callable[[Array], tuple[Array, Array]]:
    """Draw x and y uniformly between their ends."""

    def init(key: Array) -> tuple[Array, Array]:
        u, w = jax.random.uniform(key, (2, 1), float)
        return x[0] + u * (x[1] - x[0]), y[0] + w * (y[1] - y[0])

    return init


@functools.cache
def _functions(name: str) -> tuple[Callable, Callable, SmoothCoupling | None]:
    """f, g and a smooth coupling of a case: made once, so that nothing compiles twice."""
    case, smooth = CASES[name], CASES[name].smooth

    def upper(x: Array, y: Array, batch: None) -> Array:
        return jnp.asarray(case.f(x[0], y[0]))

    def lower(x: Array, y: Array, batch: None) -> Array:
        return jnp.asarray(case.g(x[0], y[0]))

    coupling = None if smooth is None else SmoothCoupling(lambda x, y: jnp.asarray(smooth(x[0], y[0]))[None])
    return upper, lower, coupling


def make(seed: int = 0, case: str = "mb_3_19") -> Instance:
    """One case of the table, `nonconvex.CASES`.

    Args:
        seed: has no influence; the start is drawn by the solver's key.
        case: its name.

    Raises:
        InvalidInput: an unknown case.
    """
    if case not in CASES:
        invalid("case (nonconvex)", repr(case), f"one of {', '.join(CASES)}", "Choose a case.")
    spec = CASES[case]
    data: dict[str, Any] = {}
    if case in POLYNOMIALS:
        upper = lower = _polynomial
        coupling = None
        data = {"upper_data": Full(_coefficients(spec.f)), "lower_data": Full(_coefficients(spec.g))}
    else:
        upper, lower, coupling = _functions(case)
    if spec.linear is not None:
        A, B, b = spec.linear
        coupling = LinearCoupling(floats([[A]]), floats([[B]]), floats([b]))
    problem = BilevelProblem(
        upper,
        Minimize(lower),
        Box(*map(floats, spec.x)),
        Box(*map(floats, spec.y)),
        coupling,
        init=_init(spec.x, spec.y),
        **data,
    )
    x, y = (None, None) if spec.point is None else (floats([part]) for part in spec.point)
    tags = {"nonconvex-lower", "known-optimum"} | ({"discontinuous"} if spec.discontinuous else set())
    tags |= {"coupled"} if coupling is not None else set()
    return Instance(problem, Truth(spec.value, x, y), tags=frozenset(tags), referee=BY_VALUE)
