"""Small problems that some solver once got wrong, with formulas of our own and right answers proved by hand.

What went wrong, and where, is in docs/regressions.md. Each case is a line of the table below; y(x) is the follower's
answer, and F(x) = f(x, y(x)).

    late_cap       F = -x, and the leader needs y <= 0. The follower maximises y <= 2, so that y = 2: infeasible.
    follower_max   y = 4 - x, F = y - x = 4 - 2x falls on [0, 3]: x = 3, y = 1, F = -2.
    follower_min   the same rows, y = max(0, x/2 - 1), F = max(-x, -1 - x/2): x = 3, y = 1/2, F = -5/2.
    market         q1 = q2 = (12 - Q)/3 where both firms are active, F = -(4 - Q/3) Q: Q = 6, q = (2, 2), F = -12.
    free_dual      y = 1 + x, though y up to 4 would please the leader: F = -x - 3y = -3 - 4x, x = 1, y = 2, F = -7.
    capped         y = min(x + 3, 10), F = x + y on x >= 2: x = 2, y = 5, F = 7.
    uncapped       the same without y <= 10, and the same answer.
    four_rows      y = max(3 - x, 3x/2 - 2), below 2x and 12 - 2x: x in [1, 4]. F = x - 4y = 5x - 12 up to x = 2, then
                   8 - 5x: x = 4, y = 4, F = -12.
    two_rows       y = 0 for x <= 2, and else y <= 4 - 2x < 0: F = -4x - 3y = -8 at x = 2.
    slack_row      y is x but for y0 <= 1, F = |y - (-1, 2, -3)|^2/2: x = (-1, 2, -3), F = 0; the row holds nothing.
    held_row       the same with (2, 2, -3): y0 = 1 at best, F = 1/2.
    kink           y = ((2x - 1)/3, (x + 1)/3) up to x = 1, (x/2, x/2) beyond: F = -y0 + 3 y1/2 has the slopes -1/6 and
                   1/4, x = 1, F = 1/4.
    near_rows      y = (x0, (x1 - x0)/eps), F = (y0 - 1)^2 + (y1 - 3)^2: x = (1, 1 + 3 eps), F = 0.
    active_row     y = c - (sum c - x)/2 (1, 1) with c = (3, 1), x <= 4; F = -y0 - y1 + x^2/2 = x^2/2 - x: x = 1,
                   y = (3/2, -1/2), F = -1/2; the row's multiplier is 3/2, so that a factor of it would show.
    softmax        y = (1, e^(-2x))/(1 + e^(-2x)), F = (y0 - 7/10)^2: x = log(7/3)/2, F = 0.

    make(case="free_dual")

Settings that work: `BranchAndBound()` where the tag "exact" is; `LBFGS()` for `market` and `softmax`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import BilevelProblem, Box, Full, LinearCoupling, Minimize, Simplex, UpperConstraints
from bilevel.diagnostics import GLOBAL, IMPLICIT
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

PyTree = Any
EPS = 1e-4  # of near_rows


class Case(NamedTuple):
    """The sizes, functions and constraints of a case, and what is right."""

    n: int
    m: int
    f: Callable[[Any, Any, Any], Any]
    g: Callable[[Any, Any, Any], Any]
    parts: dict[str, Any]
    """Sets, constraints and data of the `BilevelProblem`."""
    value: float | None
    """F*; None where no x is feasible."""
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    exact: bool = True
    """Whether `certify` takes it."""


def _rows(A: Any, B: Any, b: Any) -> LinearCoupling:
    """A y + B x <= b."""
    return LinearCoupling(*(floats(np.asarray(part, float)) for part in (A, B, b)))


def _box(lo: float, hi: float) -> Box:
    return Box(floats(np.asarray(lo)), floats(np.asarray(hi)))


def _answer(x: Any, y: Any) -> Any:
    return y


def _late_cap() -> Case:
    leader = UpperConstraints(inequality=_answer)
    parts = {"x_set": _box(0, 5), "y_set": _box(-np.inf, 2), "upper_constraints": leader}
    return Case(1, 1, lambda x, y, batch: -x[0], lambda x, y, batch: -y[0], parts, None)


def _follower_max() -> Case:
    rows = _rows([[1], [-1]], [[1], [0.5]], [4, 1])  # y <= 4 - x, y >= x/2 - 1
    parts = {"x_set": _box(0, 3), "y_set": _box(0, np.inf), "coupling": rows}
    return Case(1, 1, lambda x, y, batch: y[0] - x[0], lambda x, y, batch: -y[0], parts, -2.0, (3,), (1,))


def _follower_min() -> Case:
    return _follower_max()._replace(g=lambda x, y, batch: y[0], value=-2.5, y=(0.5,))


def _market() -> Case:
    """Two followers in Cournot's competition are the minimiser of one function, since their gains have its slopes."""
    price = lambda x, y: 13 - x[0] - y[0] - y[1]  # noqa: E731
    g = lambda x, y, batch: y[0] ** 2 + y[1] ** 2 + y[0] * y[1] + (x[0] - 12) * (y[0] + y[1])  # noqa: E731
    parts = {"x_set": _box(0, 100), "y_set": _box(0, np.inf)}
    return Case(1, 2, lambda x, y, batch: -(price(x, y) - 1) * x[0], g, parts, -12.0, (6,), (2, 2), exact=False)


def _free_dual() -> Case:
    parts = {"x_set": _box(0, 1), "y_set": _box(-np.inf, 4), "coupling": _rows([[-1]], [[1]], [-1])}
    return Case(1, 1, lambda x, y, batch: -x[0] - 3 * y[0], lambda x, y, batch: y[0], parts, -7.0, (1,), (2,))


def _capped(top: float = 10.0) -> Case:
    parts = {"x_set": _box(2, np.inf), "y_set": _box(0, top), "coupling": _rows([[1]], [[-1]], [3])}
    return Case(1, 1, lambda x, y, batch: x[0] + y[0], lambda x, y, batch: -x[0] - y[0], parts, 7.0, (2,), (5,))


def _uncapped() -> Case:
    return _capped(np.inf)


def _four_rows() -> Case:
    rows = _rows([[-1], [1], [1], [-2]], [[-1], [-2], [2], [3]], [-3, 0, 12, 4])
    parts = {"x_set": _box(0, np.inf), "y_set": _box(0, np.inf), "coupling": rows}
    return Case(1, 1, lambda x, y, batch: x[0] - 4 * y[0], lambda x, y, batch: y[0], parts, -12.0, (4,), (4,))


def _two_rows() -> Case:
    rows = _rows([[1], [2], [0]], [[2], [1], [-1]], [4, 4, 0])  # the last one, x >= 0, is the follower's as well
    parts = {"y_set": _box(0, np.inf), "coupling": rows}
    return Case(1, 1, lambda x, y, batch: -4 * x[0] - 3 * y[0], lambda x, y, batch: y[0], parts, -8.0, (2,), (0,))


def _off_target(x: Any, y: Any, batch: Any) -> Any:
    return jnp.sum((y - batch) ** 2) / 2


def _off_x(x: Any, y: Any, batch: Any) -> Any:
    return jnp.sum((y - x) ** 2) / 2


def _slack_row(first: float = -1.0) -> Case:
    target = Full(floats(np.array([first, 2.0, -3.0])))
    rows = _rows([[1, 0, 0]], np.zeros((1, 3)), [1])
    parts = {"coupling": rows, "x_set": _box(-10, 10), "upper_data": target}
    best = min(first, 1.0)
    return Case(3, 3, _off_target, _off_x, parts, (best - first) ** 2 / 2, (), (best, 2, -3))


def _held_row() -> Case:
    return _slack_row(2.0)


def _kink() -> Case:
    rows = LinearCoupling(
        *(floats(np.array(part)) for part in ([[1.0, -2.0]], [[0.0]], [-0.5], [[1.0, 1.0]], [[-1.0]], [0.0]))
    )
    parts = {"x_set": _box(0, 2), "coupling": rows}
    f, g = (lambda x, y, batch: -y[0] + 1.5 * y[1]), (lambda x, y, batch: jnp.sum(y**2) / 2)
    return Case(1, 2, f, g, parts, 0.25, (1,), (0.5, 0.5))


def _near_rows() -> Case:
    rows = LinearCoupling(A_eq=floats(np.array([[1, 0], [1, EPS]])), B_eq=floats(-np.eye(2)), b_eq=floats(np.zeros(2)))
    f, g = (lambda x, y, batch: (y[0] - 1) ** 2 + (y[1] - 3) ** 2), (lambda x, y, batch: jnp.sum(y**2) / 2)
    return Case(2, 2, f, g, {"x_set": _box(-5, 5), "coupling": rows}, 0.0, (1, 1 + 3 * EPS), (1, 3))


def _active_row() -> Case:
    parts = {"coupling": _rows([[1, 1]], [[-1]], [0]), "x_set": _box(-5, 3)}
    g = lambda x, y, batch: ((y[0] - 3) ** 2 + (y[1] - 1) ** 2) / 2  # noqa: E731
    return Case(1, 2, lambda x, y, batch: -y[0] - y[1] + x[0] ** 2 / 2, g, parts, -0.5, (1,), (1.5, -0.5))


def _softmax() -> Case:
    f = lambda x, y, batch: (y[0] - 0.7) ** 2  # noqa: E731
    g = lambda x, y, batch: jnp.sum(y * jnp.log(y)) / 2 - x[0] * y[0]  # noqa: E731
    parts = {"x_set": _box(-2, 2), "y_set": Simplex(floats(np.asarray(1.0)))}
    return Case(1, 2, f, g, parts, 0.0, (math.log(7 / 3) / 2,), (0.7, 0.3), exact=False)


CASES: dict[str, Callable[[], Case]] = {
    "late_cap": _late_cap, "follower_max": _follower_max, "follower_min": _follower_min, "market": _market,
    "free_dual": _free_dual, "capped": _capped, "uncapped": _uncapped, "four_rows": _four_rows, "two_rows": _two_rows,
    "slack_row": _slack_row, "held_row": _held_row, "kink": _kink, "near_rows": _near_rows, "active_row": _active_row,
    "softmax": _softmax,
}  # fmt: skip


@functools.cache
def _functions(case: str) -> tuple[Any, Any]:
    """(f, g), the same objects each time, so that nothing is compiled again."""
    given = CASES[case]()
    return given.f, given.g


@functools.cache
def _init(n: int, m: int) -> Any:
    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.full(n, 1 / 4), jnp.full(m, 1 / m)

    return init


def make(case: str = "free_dual", seed: int = 0) -> Instance:
    """A case by its name; the seed counts for nothing.

    Raises:
        InvalidInput: another name.
    """
    if case not in CASES:
        invalid("case (regressions)", repr(case), " or ".join(CASES), "Choose one.")
    given = CASES[case]()
    f, g = _functions(case)
    problem = BilevelProblem(f, Minimize(g), init=_init(given.n, given.m), **given.parts)
    truth = None
    if given.value is not None:
        x, y = (floats(np.array(part, float)) if part else None for part in (given.x, given.y))
        truth = Truth(given.value, x, y)
    tags = {"regression"} | ({"exact"} if given.exact else set())
    tags |= {"infeasible"} if truth is None else {"known-optimum"}
    return Instance(problem, truth, tags=frozenset(tags), referee=GLOBAL if given.exact else IMPLICIT)
