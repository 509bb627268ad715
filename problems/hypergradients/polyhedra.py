"""Boxes, linear rows and simplices around a solution y with its multipliers; `kinds` makes draws of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bilevel import BilevelProblem, Box, LinearCoupling, Minimize, Reals, Simplex
from bilevel.data import Full
from problems.hypergradients.answers import Rows, rows
from problems.hypergradients.draws import DIM_X, Draw
from problems.hypergradients.levels import Lower, Upper, upper


class Limits(NamedTuple):
    """The constraints of y; None for what a family has not. Rows are counted in the order of the fields."""

    A_eq: Any = None
    B_eq: Any = None
    b_eq: Any = None
    A: Any = None
    B: Any = None
    b: Any = None
    scale: Any = None
    """Of a simplex."""
    lo: Any = None
    hi: Any = None


class Data(NamedTuple):
    """f, g, the constraints, x and y0."""

    f: Upper
    g: Lower
    limits: Limits
    x: Any
    y0: Any


def build(objective: Callable, lower: Any = None) -> Callable:
    """The family's `build` for a lower objective, and a method for it."""

    def made(data: Data) -> Any:
        at, y_set, coupling = data.limits, Reals(), None
        if at.scale is not None:
            y_set = Simplex(at.scale)
        elif at.lo is not None:
            y_set = Box(at.lo, at.hi)
        if at.b is not None or at.b_eq is not None:
            coupling = LinearCoupling(at.A, at.B, at.b, at.A_eq, at.B_eq, at.b_eq)
        problem = BilevelProblem(
            upper, Minimize(objective), y_set=y_set, coupling=coupling, upper_data=Full(data.f),
            lower_data=Full(data.g), init=lambda key: (data.x, data.y0),
        )  # fmt: skip
        return problem, data.x, data.y0, {} if lower is None else {"lower": lower}

    return made


def in_rows(at: Limits, x: np.ndarray, n: int) -> Rows:
    """The same as rows, in exact arithmetic."""
    C, B, lo, hi = [], [], [], []

    def put(A: Any, by_x: Any, low: Any, high: Any) -> None:
        for part, more in ((C, A), (B, by_x), (lo, low), (hi, high)):
            part.extend(np.asarray(more, float).tolist())

    if at.b_eq is not None:
        put(at.A_eq, at.B_eq, at.b_eq, at.b_eq)
    if at.b is not None:
        put(at.A, at.B, np.full(len(at.b), -np.inf), at.b)
    if at.scale is not None:
        put(np.ones((1, n)), np.zeros((1, len(x))), [at.scale], [at.scale])
        put(np.eye(n), np.zeros((n, len(x))), np.zeros(n), np.full(n, np.inf))
    if at.lo is not None:
        put(np.eye(n), np.zeros((n, len(x))), at.lo, at.hi)
    return rows(C, B, lo, hi, x)


class Made(NamedTuple):
    """Constraints around a solution (x, y), with active rows [m] and multipliers [m]; normals C [m, n]."""

    x: np.ndarray
    y: np.ndarray
    limits: Limits
    C: np.ndarray
    active: np.ndarray
    lam: np.ndarray


def box(draw: Draw, count: int | None = None) -> Made:
    """A box of which `count` sides, or about half, are active; some have no end."""
    n = draw.n
    x, y = draw.point()
    active = draw.rng.choice([-1, 1], n) * chosen(draw, n, count)
    below, above = (draw.y * margins(draw, n) / np.where(draw.rng.random(n) < 0.3, 0, 1) for _ in range(2))
    lo, hi = np.where(active < 0, y, draw.cast(y - below)), np.where(active > 0, y, draw.cast(y + above))
    lam = active * margins(draw, n) * draw.g / draw.y
    return Made(x, y, Limits(lo=draw.cast(lo), hi=draw.cast(hi)), np.eye(n), active, lam)


def coupled(draw: Draw, count: int | None = None, size: int = 6) -> Made:
    """Rows A y + B x <= b of different lengths, of which `count`, or some, are active."""
    n = draw.n
    x, y = draw.point()
    A, B, length = normals(draw, size)
    count = int(draw.rng.integers(0, min(n, size))) if count is None else count
    active = chosen(draw, size, count)
    b = A.astype(float) @ y + B.astype(float) @ x + length * draw.y * np.where(active, 0, margins(draw, size))
    lam = active * margins(draw, size) * draw.g / draw.y / length
    return Made(x, y, Limits(A=A, B=B, b=draw.cast(b)), A.astype(float), active, lam)


def mixed(draw: Draw, count: int | None = None) -> Made:
    """Two equalities, two rows and a box; `count` of the rows and sides together, or some, are active."""
    n, rng = draw.n, draw.rng
    x, y = draw.point()
    rows = np.flatnonzero(chosen(draw, 2 + n, int(rng.integers(0, n - 2)) if count is None else count))
    A, B, length = normals(draw, 4)
    active = np.zeros(4 + n, int)
    active[:2], active[2 + rows] = 1, 1
    active[4:] *= rng.choice([-1, 1], n)
    slack = np.where(active[2:4], 0, margins(draw, 2))
    b = A.astype(float) @ y + B.astype(float) @ x + np.append([0, 0], length[2:] * draw.y * slack)
    below, above = (draw.y * margins(draw, n) / np.where(rng.random(n) < 0.3, 0, 1) for _ in range(2))
    lo, hi = (np.where(active[4:] * side > 0, y, draw.cast(y + side * gap)) for side, gap in ((-1, below), (1, above)))
    lam = active * margins(draw, 4 + n) * draw.g / draw.y / np.append(length, np.ones(n))
    lam[:2] *= rng.choice([-1, 1], 2)
    A, B, b, lo, hi = map(draw.cast, (A, B, b, lo, hi))
    limits = Limits(A[:2], B[:2], b[:2], A[2:], B[2:], b[2:], None, lo, hi)
    return Made(x, y, limits, np.concatenate([A.astype(float), np.eye(n)]), active, lam)


def simplex(draw: Draw, count: int | None = None) -> Made:
    """A simplex with `count`, or some, weights of zero."""
    n = draw.n
    x, y = draw.point()
    zero = chosen(draw, n, int(draw.rng.integers(0, n)) if count is None else count) > 0
    y = draw.cast(np.where(zero, 0, np.maximum(np.abs(y), draw.y / 4)))
    scale = draw.cast(np.sum(y.astype(float)))
    active = np.append(1, np.where(zero, -1, 0))
    lam = active * np.append(draw.normal(1), margins(draw, n)) * draw.g / draw.y
    return Made(x, y, Limits(scale=scale), np.concatenate([np.ones((1, n)), np.eye(n)]), active, lam)


def normals(draw: Draw, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A, B, the unit of each row's length)."""
    length = np.array([draw.size(1e-3, 1e3) for _ in range(size)])
    A, B = draw.normal(size, draw.n), draw.normal(size, DIM_X) * draw.y / draw.x
    return draw.cast(length[:, None] * A), draw.cast(length[:, None] * B), length


def chosen(draw: Draw, size: int, count: int | None) -> np.ndarray:
    """Zeros and ones [size], `count` ones; each with probability a half where that is None."""
    if count is None:
        return draw.rng.integers(0, 2, size)
    return draw.rng.permutation(np.arange(size) < count).astype(int)


def margins(draw: Draw, size: int) -> np.ndarray:
    """Slacks or multipliers, from 1e-3 to 1."""
    return np.array([draw.size(1e-3, 1) for _ in range(size)])
