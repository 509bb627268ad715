"""Linear algebra in 80 decimal digits: what hypergradients are compared with. It shares nothing with the library.

A float is a decimal number exactly, so that the data are those which the library sees. Vectors are lists of `Decimal`,
matrices lists of rows; `digits` sets the precision.
"""

import decimal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import numpy as np

DIGITS = 80
Vector = list[Decimal]
Matrix = list[Vector]


class Unsolved(ArithmeticError):
    """A singular matrix, or an iteration that does not end."""


@contextmanager
def digits(number: int = DIGITS) -> Iterator[None]:
    """Calculate with so many digits and exponents of any size."""
    context = decimal.Context(
        prec=number, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[decimal.InvalidOperation]
    )
    with decimal.localcontext(context):
        yield


def exact(array: Any) -> Any:
    """The numbers of an array [], [n] or [m, n] as they are."""
    array = np.asarray(array, float)
    return Decimal(float(array)) if array.ndim == 0 else [exact(part) for part in array]


def dot(a: Sequence[Decimal], b: Sequence[Decimal]) -> Decimal:
    """The product a'b."""
    return sum((p * q for p, q in zip(a, b, strict=True)), Decimal(0))


def times(M: Matrix, v: Vector) -> Vector:
    """The product M v."""
    return [dot(row, v) for row in M]


def transposed(M: Matrix, v: Vector, size: int) -> Vector:
    """The product M'v, of `size` entries, for M that may have no rows."""
    return [sum((row[j] * p for row, p in zip(M, v, strict=True)), Decimal(0)) for j in range(size)]


def add(*vectors: Vector) -> Vector:
    """The sum."""
    return [sum(parts, Decimal(0)) for parts in zip(*vectors, strict=True)]


def minus(a: Vector, b: Vector) -> Vector:
    """The difference a - b."""
    return [p - q for p, q in zip(a, b, strict=True)]


def norm(v: Vector) -> Decimal:
    """The 2-norm."""
    return dot(v, v).sqrt()


def solve(M: Matrix, b: Vector) -> Vector:
    """The v with M v = b, by elimination with rows of unit size and partial pivoting.

    Raises:
        Unsolved: where M is singular to 60 digits.
    """
    rows, n = [], len(b)
    for row, right in zip(M, b, strict=True):
        size = max((abs(p) for p in row), default=Decimal(0))
        if size == 0:
            raise Unsolved("a row of zeros")
        rows.append([p / size for p in row] + [right / size])
    for k in range(n):
        best = max(range(k, n), key=lambda i: abs(rows[i][k]))
        if abs(rows[best][k]) < Decimal(10) ** -60:
            raise Unsolved("singular")
        rows[k], rows[best] = rows[best], rows[k]
        top, pivot = rows[k], rows[k][k]
        for i in range(k + 1, n):
            factor = rows[i][k] / pivot
            if factor:
                rows[i] = [p if j <= k else p - factor * q for j, (p, q) in enumerate(zip(rows[i], top, strict=True))]
    v = [Decimal(0)] * n
    for k in reversed(range(n)):
        v[k] = (rows[k][n] - sum((rows[k][j] * v[j] for j in range(k + 1, n)), Decimal(0))) / rows[k][k]
    return v


def definite(M: Matrix) -> bool:
    """Whether a symmetric M is positive definite, by its pivots."""
    rows, n = [list(row) for row in M], len(M)
    for k in range(n):
        if rows[k][k] <= 0:
            return False
        for i in range(k + 1, n):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [p - factor * q for p, q in zip(rows[i], rows[k], strict=True)]
    return True


def root(equations: Callable[[Vector], tuple[Vector, Matrix]], z: Vector, passes: int = 60) -> tuple[Vector, Matrix]:
    """(z, the Jacobian there) with F(z) = 0, by Newton's method from z; equations: z -> (F, its Jacobian).

    Raises:
        Unsolved: where 60 digits are not reached.
    """
    for _ in range(passes):
        F, J = equations(z)
        step = solve(J, F)
        z = minus(z, step)
        if norm(step) <= Decimal(10) ** -60 * norm(z):
            return z, equations(z)[1]
    raise Unsolved("Newton's method")
