"""The right answer: y(x) and the gradient of F by its optimality conditions, which are verified, in exact arithmetic.

R + C_a'lam = 0,  (C y)_a = its bound,    [R_y  C_a'; C_a  0]' (u, v) = (f_y, 0),    grad F = f_x - R_x'u - B_a'v.
"""

import itertools
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from problems.hypergradients.exact import (
    Matrix,
    Unsolved,
    Vector,
    add,
    dot,
    exact,
    minus,
    norm,
    root,
    solve,
    transposed,
)
from problems.hypergradients.levels import Level, Upper, upper_at

ZERO = Decimal(0)


class Rows(NamedTuple):
    """lo - B x <= C y <= hi - B x in exact arithmetic, at one x: C [m, n], B [m, dim x], lo and hi [m], with B x
    taken off.
    """

    C: Matrix
    B: Matrix
    lo: Vector
    hi: Vector


def rows(C: Any, B: Any, lo: Any, hi: Any, x: Any) -> Rows:
    """From arrays."""
    C, B, lo, hi, x = map(exact, (C, B, lo, hi, x))
    moved = [dot(row, x) for row in B]
    return Rows(C, B, minus(lo, moved), minus(hi, moved))


def _face(level: Level, limits: Rows, active: Sequence[int]) -> Any:
    """The equations of y and the multipliers of the active rows: z -> (F, its Jacobian)."""
    inside = [i for i, a in enumerate(active) if a]
    C = [limits.C[i] for i in inside]
    bound = [limits.hi[i] if active[i] > 0 else limits.lo[i] for i in inside]

    def equations(z: Vector) -> tuple[Vector, Matrix]:
        y, lam = z[: level.n], z[level.n :]
        at = level.at(y)
        R = [p + q for p, q in zip(at.R, transposed(C, lam, level.n), strict=True)]
        top = [row + [c[i] for c in C] for i, row in enumerate(at.H)]
        return R + minus([dot(c, y) for c in C], bound), top + [c + [ZERO] * len(C) for c in C]

    return equations


class Solution(NamedTuple):
    """On an active set [m], 1 at hi, -1 at lo, 0 between: y, the multipliers [m] and the Jacobian of its equations."""

    y: Vector
    lam: Vector
    active: list[int]
    jacobian: Matrix


def on_face(level: Level, limits: Rows, active: Sequence[int], y: Vector) -> Solution:
    """The root on an active set, from y, with multipliers of the wrong signs as they may come."""
    inside = [i for i, a in enumerate(active) if a]
    z, J = root(_face(level, limits, active), y + [ZERO] * len(inside))
    lam = [ZERO] * len(active)
    for i, value in zip(inside, z[level.n :], strict=True):
        lam[i] = value
    return Solution(z[: level.n], lam, list(active), J)


def wrong(limits: Rows, found: Solution) -> list[int]:
    """The rows that are violated, or have multipliers of the wrong sign."""
    out = []
    for i, a in enumerate(found.active):
        at, equal = dot(limits.C[i], found.y), limits.lo[i] == limits.hi[i]
        if (a and not equal and a * found.lam[i] < 0) or (not a and not limits.lo[i] <= at <= limits.hi[i]):
            out.append(i)
    return out


def minimise(level: Level, limits: Rows, active: Sequence[int], y: Vector, passes: int = 100) -> Solution:
    """y(x), from the active set that it was made for: rounded data may have another. One row is changed at a time, the
    last that is wrong (Kostreva's rule).

    Raises:
        Unsolved: no active set was found, or one of dependent rows was met.
    """
    for _ in range(passes):
        found = on_face(level, limits, active, y)
        rows = wrong(limits, found)
        if not rows:
            return found
        i, active = rows[-1], list(active)
        active[i] = 0 if active[i] else (1 if dot(limits.C[i], found.y) > limits.hi[i] else -1)
    raise Unsolved("no active set")


def gradient(level: Level, limits: Rows, f: Upper, found: Solution) -> Vector:
    """The gradient of F on the face of `found`."""
    x, inside = level.x, [i for i, a in enumerate(found.active) if a]
    at = upper_at(f, x, found.y)
    uv = _adjoint(found.jacobian, at.y + [ZERO] * len(inside))
    by_rows = transposed([limits.B[i] for i in inside], uv[level.n :], len(x))
    by_level = transposed(level.at(found.y).G, uv[: level.n], len(x))
    return _sum(at.x, [-p for p in by_level], [-p for p in by_rows])


def _sum(*vectors: Vector) -> Vector:
    """Their sum, where what cancels to 50 digits is zero."""
    sums = add(*vectors)
    size = max(abs(p) for vector in vectors for p in vector)
    return [p if abs(p) > Decimal(10) ** -50 * size else ZERO for p in sums]


def _adjoint(J: Matrix, b: Vector) -> Vector:
    return solve([list(column) for column in zip(*J, strict=True)], b)


def sides(level: Level, limits: Rows, f: Upper, found: Solution, near: Sequence[int]) -> list[Vector]:
    """The gradients on the faces where rows of `near` are active or not, of all that have one: the branches of a kink.

    near [m]: 1 for a row at hi, -1 at lo, 0 for one that keeps its place.
    """
    loose, out = [i for i, a in enumerate(near) if a], []
    for chosen in itertools.product((False, True), repeat=len(loose)):
        active = list(found.active)
        for i, inside in zip(loose, chosen, strict=True):
            active[i] = near[i] if inside else 0
        try:
            out.append(gradient(level, limits, f, on_face(level, limits, active, found.y)))
        except Unsolved:
            continue
    return out


def on_ball(level: Level, f: Upper, middle: Any, radius: Any, y: Vector, mu: Decimal) -> Vector:
    """The gradient of F below a ball, from (y, mu) nearby: R + mu (y - middle) = 0 on its boundary, where mu > 0.

    Raises:
        Unsolved: neither the boundary nor the interior has a solution.
    """
    middle, radius = exact(middle), exact(radius)

    def boundary(z: Vector) -> tuple[Vector, Matrix]:
        y, mu = z[:-1], z[-1]
        at, away = level.at(y), minus(y, middle)
        R = [p + mu * q for p, q in zip(at.R, away, strict=True)]
        top = [[p + (mu if i == j else 0) for j, p in enumerate(row)] + [away[i]] for i, row in enumerate(at.H)]
        return [*R, (dot(away, away) - radius * radius) / 2], [*top, [*away, ZERO]]

    nothing = Rows([], [], [], [])
    if mu > 0:
        z, J = root(boundary, [*y, mu])
        if z[-1] > 0:
            at = upper_at(f, level.x, z[:-1])
            u = _adjoint(J, [*at.y, ZERO])[:-1]
            return _sum(at.x, [-p for p in transposed(level.at(z[:-1]).G, u, len(level.x))])
    found = on_face(level, nothing, [], y)
    if norm(minus(found.y, middle)) > radius:
        raise Unsolved("outside of the ball")
    return gradient(level, nothing, f, found)
