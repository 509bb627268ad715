"""Small nonlinear programs of the literature, from memory of the papers that they are named after, optima verified.

    min f(x, y)  over x in a box with G(x, y) <= 0,   y in argmin { g(x, y) : h(x, y) <= 0, y in a box },

one unknown of each level, but for "allende_still". Followers are convex or not, rows move with x or bend, the leader
has constraints with y, and F jumps where the best answer does. That each value is the optimum was shown by hand (in a
line at each case) and is tested on a grid of x and y; of several answers the leader has the choice. Formulas may differ
from those of the papers; the optima are those of the formulas here.

    make(case="mirrlees")

Settings that work: `SampledPenalty()`; `MPEC()` where g is convex in y.

Reference: the collections of Mitsos and Barton, A test set for bilevel programs, 2006, and of Zhou, Zemkoho and
Tin, BOLIB: Bilevel optimization library of test problems, 2020, which have many of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, LinearCoupling, Minimize, SmoothCoupling, UpperConstraints
from bilevel.diagnostics import BY_VALUE
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

Function = Callable[[Any, Any], Any]


class Case(NamedTuple):
    """A program; its functions take (x, y), lists of numbers or of arrays, and are smooth."""

    f: Function
    g: Function
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    value: float
    """F*."""
    why: str
    """Why that is the optimum."""
    rows: tuple[Function, ...] = ()
    """h, one function a row."""
    leader: tuple[Function, ...] = ()
    """G, likewise."""
    linear: bool = True
    """Whether h is affine."""
    convex: bool = True
    """Whether g is convex in y, and so are the rows."""
    dim: int = 1
    """Unknowns of x, and of y."""


def _exp(z: Any) -> Any:
    return np.exp(z) if isinstance(z, np.ndarray) else jnp.exp(z)


UNIT, ONE = (0.0, 1.0), (-1.0, 1.0)
QUARTIC = lambda x, y: x[0] * (16 * y[0] ** 4 + 2 * y[0] ** 3 - 8 * y[0] ** 2 - 1.5 * y[0] + 0.5)  # noqa: E731

CASES: dict[str, Case] = {
    "allende_still": Case(
        lambda x, y: x[0] ** 2 - 2 * x[0] + x[1] ** 2 - 2 * x[1] + y[0] ** 2 + y[1] ** 2,
        lambda x, y: y[0] ** 2 - 2 * x[0] * y[0] + y[1] ** 2 - 2 * x[1] * y[1],
        (0.0, 2.0), (0.5, 1.5), -1.0, "y = clip(x, 1/2, 3/2): each coordinate is least at x = y = 1/2, -1/2", dim=2,
    ),
    "anandalingam_white": Case(
        lambda x, y: -x[0] - 3 * y[0], lambda x, y: 3 * y[0], (0.0, 20.0), (0.0, 12.0), -49.0,
        "y = max(5 - x/2, x/2 - 3, 2 x - 21) grows from x = 8 on, until x = 16, where it is 11",
        rows=(
            lambda x, y: 10 - x[0] - 2 * y[0], lambda x, y: x[0] - 2 * y[0] - 6, lambda x, y: 2 * x[0] - y[0] - 21,
            lambda x, y: x[0] + 2 * y[0] - 38, lambda x, y: 2 * y[0] - x[0] - 18,
        ),
    ),
    "bard": Case(
        lambda x, y: (x[0] - 5) ** 2 + (2 * y[0] + 1) ** 2, lambda x, y: (y[0] - 1) ** 2 - 1.5 * x[0] * y[0],
        (0.0, 6.0), (0.0, 6.0), 17.0,
        "y = min(1 + 3 x/4, 3 x - 3, 7 - x), so x >= 1; F grows from 17 there, and is 25 at the other end, x = 5",
        rows=(lambda x, y: y[0] - 3 * x[0] + 3, lambda x, y: x[0] - y[0] / 2 - 4, lambda x, y: x[0] + y[0] - 7),
    ),
    "bialas_karwan": Case(
        lambda x, y: -y[0], lambda x, y: y[0], (0.0, 20.0), (0.0, 12.0), -11.0, "y as for anandalingam_white",
        rows=(
            lambda x, y: 10 - x[0] - 2 * y[0], lambda x, y: x[0] - 2 * y[0] - 6, lambda x, y: 2 * x[0] - y[0] - 21,
            lambda x, y: x[0] + 2 * y[0] - 38, lambda x, y: 2 * y[0] - x[0] - 18,
        ),
    ),
    "clark_westerberg": Case(
        lambda x, y: (x[0] - 3) ** 2 + (y[0] - 2) ** 2, lambda x, y: (y[0] - 5) ** 2, (0.0, 8.0), (0.0, 10.0), 5.0,
        "y = min(5, 1 + 2 x, 7 - x/2): on 1 + 2 x least at x = 1, 9 at y = 5, more on the last",
        rows=(lambda x, y: y[0] - 2 * x[0] - 1, lambda x, y: x[0] - 2 * y[0] + 2, lambda x, y: x[0] + 2 * y[0] - 14),
    ),
    "colson_cubes": Case(
        lambda x, y: (10 - x[0]) ** 3 + (10 - y[0]) ** 3, lambda x, y: (x[0] + 2 * y[0] - 15) ** 4, (0.0, 5.0),
        (0.0, 20.0), 250.0, "y = (15 - x)/2, at most x only at x = 5",
        rows=(lambda x, y: x[0] + y[0] - 20,), leader=(lambda x, y: y[0] - x[0],),
    ),
    "colson_exponential": Case(
        lambda x, y: (x[0] - 5) ** 4 + (2 * y[0] + 1) ** 4,
        lambda x, y: _exp(y[0] - x[0]) + x[0] ** 2 + 2 * x[0] * y[0] + y[0] ** 2 + 2 * x[0] + 6 * y[0],
        (0.0, 10.0), (0.0, 10.0), 2.0, "g grows in y, so that y = 0 and x <= 4",
        rows=(lambda x, y: y[0] - x[0] - 2,), leader=(lambda x, y: x[0] + y[0] - 4,),
    ),
    "colson_cubic": Case(
        lambda x, y: x[0] ** 2 + (y[0] - 10) ** 2, lambda x, y: x[0] ** 3 + 2 * y[0] ** 3 + x[0] - 2 * y[0] - x[0] ** 2,
        (0.0, 10.0), (0.0, 10.0), (10 - 3**-0.5) ** 2, "y = 1/sqrt(3) for all x, so x = 0",
        rows=(lambda x, y: 2 * y[0] - x[0] - 3,), leader=(lambda x, y: x[0] + 2 * y[0] - 6,),
    ),
    "dempe_root": Case(
        lambda x, y: (x[0] - 3.5) ** 2 + (y[0] + 4) ** 2, lambda x, y: (y[0] - 3) ** 2, (0.0, 10.0), (-10.0, 10.0),
        28.25,
        "y = min(3, sqrt(x)), and the slope of F, 2 x - 6 + 4/sqrt(x), is never negative: x = 0",
        rows=(lambda x, y: y[0] ** 2 - x[0],), linear=False,
    ),
    "dempe_dutta": Case(
        lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2, lambda x, y: x[0] ** 2 * y[0], (-3.0, 3.0), (-3.0, 3.0), 0.0,
        "y^2 <= 0 leaves y = 0; without a Slater point there are no multipliers but at x = 0",
        rows=(lambda x, y: y[0] ** 2,), linear=False,
    ),
    "gumus_floudas": Case(
        lambda x, y: 16 * x[0] ** 2 + 9 * y[0] ** 2, lambda x, y: (x[0] + y[0] - 20) ** 4, (0.0, 12.5), (0.0, 50.0),
        2250.0, "y = min(20 - x, 50 - 4 x): 2304 on the first, 2250 at x = 11.25 on the second",
        rows=(lambda x, y: 4 * x[0] + y[0] - 50,), leader=(lambda x, y: y[0] - 4 * x[0],),
    ),
    "handbook_quadratic": Case(
        lambda x, y: (x[0] - 1) ** 2 + 2 * y[0] ** 2 - 2 * x[0],
        lambda x, y: (2 * y[0] - 4) ** 2 + (2 * y[0] - 1) ** 2 + x[0] * y[0], (0.0, 2.0), (0.0, 2.0), -38 / 27,
        "y = min(1 + x, (20 - x)/16, (12 - 4 x)/5): F falls along the last one, to x = 17/9, y = 8/9",
        rows=(
            lambda x, y: 4 * x[0] + 5 * y[0] - 12, lambda x, y: 4 - 4 * x[0] - 5 * y[0],
            lambda x, y: 4 * x[0] - 4 * y[0] - 4, lambda x, y: 4 * y[0] - 4 * x[0] - 4,
        ),
    ),
    "henderson_quandt": Case(
        lambda x, y: x[0] ** 2 / 2 + x[0] * y[0] / 2 - 95 * x[0], lambda x, y: y[0] ** 2 + (x[0] / 2 - 100) * y[0],
        (0.0, 200.0), (0.0, 200.0), -9800 / 3, "y = 50 - x/4, F = 3 x^2/8 - 70 x, least at x = 280/3",
    ),
    "kleniati_adjiman": Case(
        lambda x, y: x[0] - y[0], lambda x, y: x[0] * y[0] ** 2 / 2 - x[0] ** 3 * y[0], ONE, ONE, -1.0,
        "at x = 0 any y, so 1; y = -1 for x < 0, and x^2 for x > 0", convex=False,
    ),
    "lucchetti": Case(
        lambda x, y: (1 - x[0]) / 2 + x[0] * y[0], lambda x, y: (x[0] - 1) * y[0], UNIT, UNIT, 0.0,
        "y = 1 for x < 1, and any y at x = 1",
    ),
    "macal_hurter": Case(
        lambda x, y: (x[0] - 1) ** 2 + (y[0] - 1) ** 2, lambda x, y: y[0] ** 2 / 2 + 500 * y[0] - 50 * x[0] * y[0],
        (9.0, 11.0), (-100.0, 100.0), 451**2 / 2501, "y = 50 x - 500: the distance of (1, 1) to that line",
    ),
    "mirrlees": Case(
        lambda x, y: (x[0] - 2) ** 2 + (y[0] - 1) ** 2,
        lambda x, y: -x[0] * _exp(-((y[0] + 1) ** 2)) - _exp(-((y[0] - 1) ** 2)), (0.0, 2.0), (-2.0, 2.0),
        1.0018059078149288, "y is beside 1 for x <= 1, 0.957504 at x = 1, where both wells are equal; then near -1",
        convex=False,
    ),
    "mitsos_cubic": Case(
        lambda x, y: x[0], lambda x, y: y[0] ** 3, (-10.0, 10.0), ONE, -1.0, "y = -1 <= x",
        leader=(lambda x, y: y[0] - x[0],), convex=False,
    ),
    "mitsos_quartic": Case(
        lambda x, y: y[0], QUARTIC, (0.1, 1.0), ONE, 0.5, "the quartic is least at 1/2 alone, for any x > 0",
        convex=False,
    ),
    "mitsos_sign": Case(
        lambda x, y: y[0], QUARTIC, ONE, (-0.8, 1.0), -0.8, "at x = 0 any y, and none is less", convex=False,
    ),
    "mitsos_well": Case(
        lambda x, y: -x[0] + x[0] * y[0] + 10 * y[0] ** 2, lambda x, y: -x[0] * y[0] ** 2 + y[0] ** 4 / 2, ONE, ONE,
        0.0,
        "y = 0 for x <= 0, F = -x; else y^2 = x and F = 9 x +- x^1.5 >= 0", convex=False,
    ),
    "mitsos_fold": Case(
        lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2, lambda x, y: y[0] ** 3 / 3 - x[0] * y[0], ONE, ONE, 0.25,
        "y = sqrt(x) from x = 1/4 on, where g is the same at -1; before y = -1", convex=False,
    ),
    "mitsos_ends": Case(
        lambda x, y: x[0] + y[0], lambda x, y: x[0] * y[0] ** 2 / 2 - y[0] ** 3 / 3, ONE, ONE, 0.0,
        "x <= 2/3: y = 1, F = x + 1 >= 0; beyond y = 0 or 1, F > 0", convex=False,
    ),
    "mitsos_double": Case(
        lambda x, y: 2 * x[0] + y[0], lambda x, y: -x[0] * y[0] ** 2 / 2 - y[0] ** 4 / 4, ONE, ONE, -2.0,
        "y = 0 for x <= -1/2, F >= -2 at x = -1; else y = -1, and -2 at x = -1/2", convex=False,
    ),
    "mitsos_pitchfork": Case(
        lambda x, y: (x[0] + 0.5) ** 2 + y[0] ** 2 / 2, lambda x, y: x[0] * y[0] ** 2 / 2 + y[0] ** 4 / 4, ONE, ONE,
        0.1875, "y^2 = -x for x < 0: (x + 1/2)^2 - x/2 is least at -1/4", convex=False,
    ),
    "mitsos_flat": Case(
        lambda x, y: -(x[0] ** 2) + y[0] ** 2, lambda x, y: x[0] * y[0] ** 2 - y[0] ** 4 / 2, ONE, ONE, -1.0,
        "y = 0 at x = 1", convex=False,
    ),
    "mitsos_branch": Case(
        lambda x, y: x[0] * y[0] - y[0] + y[0] ** 2 / 2, lambda x, y: -x[0] * y[0] ** 2 + y[0] ** 4 / 2, ONE, ONE,
        float(np.polyval([1, 0.5, -1, 0], (13**0.5 - 1) / 6)),
        "y^2 = x for x > 0: y^3 + y^2/2 - y is least at (sqrt(13) - 1)/6; else y = 0, F = 0", convex=False,
    ),
    "mitsos_jump": Case(
        lambda x, y: (x[0] - 0.25) ** 2 + y[0] ** 2, lambda x, y: y[0] ** 3 / 3 - x[0] ** 2 * y[0], ONE, ONE, 0.3125,
        "y = |x| from |x| = 1/2 on, where g is the same at -1; before y = -1", convex=False,
    ),
    "morgan_patrone": Case(
        lambda x, y: -x[0] - y[0], lambda x, y: x[0] * y[0], (-0.5, 0.5), ONE, -1.0,
        "y = 1 for x < 0, -1 for x > 0, and any at 0",
    ),
    "paulavicius_sum": Case(
        lambda x, y: x[0] + y[0], lambda x, y: x[0] * y[0] ** 2 / 2 - x[0] ** 3 * y[0], ONE, ONE, -2.0,
        "y = -1 at x = -1", convex=False,
    ),
    "paulavicius_squares": Case(
        lambda x, y: x[0] ** 2 + y[0] ** 2, lambda x, y: x[0] * y[0] ** 2 - y[0] ** 4 / 2, ONE, ONE, 0.25,
        "y = 0 from x = 1/2 on; before |y| = 1", convex=False,
    ),
    "shimizu_aiyoshi": Case(
        lambda x, y: x[0] ** 2 + (y[0] - 10) ** 2, lambda x, y: (x[0] + 2 * y[0] - 30) ** 2, (0.0, 15.0), (0.0, 20.0),
        100.0, "y = min(15 - x/2, 20 - x), at most x from x = 10 on, where F grows",
        rows=(lambda x, y: x[0] + y[0] - 20,), leader=(lambda x, y: y[0] - x[0],),
    ),
    "tuy": Case(
        lambda x, y: x[0] ** 2 + y[0] ** 2, lambda x, y: -y[0], (0.0, 5.0), (0.0, 10.0), 22.5,
        "y = min(5 - x/3, 7 - x, 15 - 3 x): on the last least at x = 9/2; 25 - 10 x/3 + 10 x^2/9 >= 22.5 on the first",
        rows=(lambda x, y: 3 * x[0] + y[0] - 15, lambda x, y: x[0] + y[0] - 7, lambda x, y: x[0] + 3 * y[0] - 15),
    ),
    "vogel": Case(
        lambda x, y: (y[0] + 1) ** 2, lambda x, y: y[0] ** 3 - 3 * y[0], (-3.0, 2.0), (-3.0, 2.0), 1.0,
        "y = x up to x = -2, where g is the same at 1, then y = max(1, x)",
        rows=(lambda x, y: x[0] - y[0],), convex=False,
    ),
    "yezza": Case(
        lambda x, y: -(4 * x[0] - 3) * y[0] + 2 * x[0] + 1, lambda x, y: -(1 - 4 * x[0]) * y[0] - 2 * x[0] - 2, UNIT,
        UNIT, 1.5, "y = 1 for x < 1/4, 0 beyond, and any y at 1/4",
    ),
}  # fmt: skip


@functools.cache
def _objective(case: str, name: str) -> Callable[[Array, Array, None], Array]:
    function = getattr(CASES[case], name)
    return lambda x, y, batch: function(x, y)


@functools.cache
def _stacked(case: str, name: str) -> Callable[[Array, Array], Array]:
    rows = getattr(CASES[case], name)
    return lambda x, y: jnp.stack([row(x, y) for row in rows])


@functools.cache
def _init(case: str) -> Callable[[Array], tuple[Array, Array]]:
    given = CASES[case]

    def init(key: Array) -> tuple[Array, Array]:
        u = jax.random.uniform(key, (2, given.dim), float)
        ends = (given.x_ends, given.y_ends)
        x, y = (lo + (hi - lo) * part for (lo, hi), part in zip(ends, u, strict=True))
        return x, y

    return init


def _coupling(case: str) -> LinearCoupling | SmoothCoupling | None:
    given = CASES[case]
    if not given.rows:
        return None
    if not given.linear:
        return SmoothCoupling(_stacked(case, "rows"))
    at = lambda *z: np.array([float(row([z[0]], [z[1]])) for row in given.rows])  # noqa: E731
    b = -at(0.0, 0.0)
    return LinearCoupling(floats((at(0.0, 1.0) + b)[:, None]), floats((at(1.0, 0.0) + b)[:, None]), floats(b))


def make(case: str = "mirrlees") -> Instance:
    """The program of that name.

    Args:
        case: one of `CASES`.

    Raises:
        InvalidInput: another name.
    """
    if case not in CASES:
        invalid("case (classics)", repr(case), " or ".join(CASES), "Choose one.")
    given = CASES[case]
    problem = BilevelProblem(
        _objective(case, "f"),
        Minimize(_objective(case, "g")),
        x_set=Box(*given.x_ends),
        y_set=Box(*given.y_ends),
        coupling=_coupling(case),
        init=_init(case),
        upper_constraints=UpperConstraints(inequality=_stacked(case, "leader")) if given.leader else None,
    )
    tags = {"known-optimum", "textbook"} | (set() if given.convex else {"nonconvex-lower"})
    return Instance(problem, Truth(given.value), tags=frozenset(tags), referee=BY_VALUE)
