"""The objectives of the draws, twice: as functions of JAX, and in exact arithmetic with all their derivatives.

    f = y'P y/2 + x'Q y + p'y + s'x + r |x|^2/2,
    g = y'H y/2 + y'(G x + h) + w(x, y),

with w = 0 (`quadratic`), tau sum softplus(K y + J x + k) (`curved`), sum a y log y (`entropy`), -sum a log y
(`barrier`) or sum a (y log y + (1 - y) log(1 - y)) (`fermi`); and the fixed points T = M y + G x + h - tau tanh(a y).
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from problems.hypergradients.exact import Matrix, Vector, add, exact, times, transposed


class Upper(NamedTuple):
    """The parts of f: P [n, n], Q [dim x, n], p [n], s [dim x], r []."""

    P: Any
    Q: Any
    p: Any
    s: Any
    r: Any


class Lower(NamedTuple):
    """The parts of g, or of T, where H is M: H [n, n], G [n, dim x], h [n], and of w: tau [], K [terms, n],
    J [terms, dim x], k [terms], a [n].
    """

    H: Any
    G: Any
    h: Any
    tau: Any
    K: Any
    J: Any
    k: Any
    a: Any


def upper(x: Array, y: Array, f: Upper) -> Array:
    """The upper objective."""
    return y @ (f.P @ y) / 2 + x @ (f.Q @ y) + f.p @ y + f.s @ x + f.r * (x @ x) / 2


def quadratic(x: Array, y: Array, g: Lower) -> Array:
    """The lower objective without w."""
    return y @ (g.H @ y) / 2 + y @ (g.G @ x + g.h)


def curved(x: Array, y: Array, g: Lower) -> Array:
    """With a softplus of a few directions."""
    return quadratic(x, y, g) + g.tau * jnp.sum(jax.nn.softplus(g.K @ y + g.J @ x + g.k))


def entropy(x: Array, y: Array, g: Lower) -> Array:
    """With an entropy, defined for y > 0."""
    return quadratic(x, y, g) + jnp.sum(g.a * y * jnp.log(y))


def barrier(x: Array, y: Array, g: Lower) -> Array:
    """With a logarithmic barrier, defined for y > 0."""
    return quadratic(x, y, g) - jnp.sum(g.a * jnp.log(y))


def fermi(x: Array, y: Array, g: Lower) -> Array:
    """With the entropy of a coin in each entry, defined for 0 < y < 1."""
    return quadratic(x, y, g) + jnp.sum(g.a * (y * jnp.log(y) + (1 - y) * jnp.log(1 - y)))


def fixed(x: Array, y: Array, g: Lower) -> Array:
    """The map T."""
    return g.H @ y + g.G @ x + g.h - g.tau * jnp.tanh(g.a * y)


def logistic(t: Decimal) -> Decimal:
    """The function 1/(1 + exp(-t))."""
    return 1 / (1 + (-t).exp()) if t > 0 else t.exp() / (1 + t.exp())


class Bend(NamedTuple):
    """What w adds at a point, y: to R [n], to its derivative by y [n, n] and by x [n, dim x]."""

    R: Vector
    H: Matrix
    G: Matrix


class Level:
    """A lower level at one x in exact arithmetic: its residual R with its derivatives by y and x."""

    def __init__(self, g: Lower, x: Any, objective: Callable) -> None:
        """Take the data as they are; `objective` is one of the functions above."""
        self.g, self.x = Lower(*map(exact, g)), exact(x)
        self.n, self.objective = len(self.g.h), objective

    def at(self, y: Vector) -> Bend:
        """(R, R_y, R_x) at y."""
        g, w = self.g, _BENDS[self.objective](self, y)
        if self.objective is fixed:
            R = [p - q for p, q in zip(y, add(times(g.H, y), times(g.G, self.x), g.h, w.R), strict=True)]
            eye = _diagonal([Decimal(1)] * self.n)
            return Bend(R, _plus(eye, _negative(_plus(g.H, w.H))), _negative(g.G))
        R = add(times(_symmetric(g.H), y), times(g.G, self.x), g.h, w.R)
        return Bend(R, _plus(_symmetric(g.H), w.H), _plus(g.G, w.G))

    def zeros(self) -> Bend:
        """Nothing."""
        row, by_x = [Decimal(0)] * self.n, [Decimal(0)] * len(self.x)
        return Bend(row, [row] * self.n, [by_x] * self.n)


def _symmetric(H: Matrix) -> Matrix:
    """The symmetric part, all that y'H y knows of H."""
    return [[(p + H[j][i]) / 2 for j, p in enumerate(row)] for i, row in enumerate(H)]


def _plus(a: Matrix, b: Matrix) -> Matrix:
    return [add(p, q) for p, q in zip(a, b, strict=True)]


def _negative(a: Matrix) -> Matrix:
    return [[-p for p in row] for row in a]


def _diagonal(d: Vector) -> Matrix:
    return [[p if i == j else Decimal(0) for j in range(len(d))] for i, p in enumerate(d)]


def _terms(rows: Matrix, weights: Vector, by: Matrix, columns: int) -> Matrix:
    """The sum over terms of weight times row' by, [n, columns]."""
    n = len(rows[0])
    scaled = [[w * p for p in row] for w, row in zip(weights, by, strict=True)]
    return [[sum((row[i] * other[j] for row, other in zip(rows, scaled, strict=True)), Decimal(0))
             for j in range(columns)] for i in range(n)]  # fmt: skip


def _softplus(level: Level, y: Vector) -> Bend:
    g = level.g
    slope = [logistic(t) for t in add(times(g.K, y), times(g.J, level.x), g.k)]
    bend = [g.tau * p * (1 - p) for p in slope]
    R = transposed(g.K, [g.tau * p for p in slope], level.n)
    return Bend(R, _terms(g.K, bend, g.K, level.n), _terms(g.K, bend, g.J, len(level.x)))


def _tanh(level: Level, y: Vector) -> Bend:
    g = level.g
    value = [2 * logistic(2 * p * t) - 1 for p, t in zip(g.a, y, strict=True)]
    H = _diagonal([-g.tau * p * (1 - t * t) for p, t in zip(g.a, value, strict=True)])
    return level.zeros()._replace(R=[-g.tau * t for t in value], H=H)


def _separable(first: Callable, second: Callable) -> Callable:
    """The bend of sum a w(y), by the two derivatives of w."""

    def bend(level: Level, y: Vector) -> Bend:
        a = level.g.a
        H = _diagonal([p * second(t) for p, t in zip(a, y, strict=True)])
        return level.zeros()._replace(R=[p * first(t) for p, t in zip(a, y, strict=True)], H=H)

    return bend


_BENDS: dict[Callable, Callable] = {
    quadratic: lambda level, y: level.zeros(),
    curved: _softplus,
    fixed: _tanh,
    entropy: _separable(lambda t: t.ln() + 1, lambda t: 1 / t),
    barrier: _separable(lambda t: -1 / t, lambda t: 1 / (t * t)),
    fermi: _separable(lambda t: (t / (1 - t)).ln(), lambda t: 1 / (t * (1 - t))),
}


class UpperAt(NamedTuple):
    """f at (x, y): its gradients by x and by y."""

    x: Vector
    y: Vector


def upper_at(f: Upper, x: Vector, y: Vector) -> UpperAt:
    """The gradients of f."""
    e = Upper(*map(exact, f))
    fx = add(times(e.Q, y), e.s, [e.r * p for p in x])
    return UpperAt(fx, add(times(_symmetric(e.P), y), transposed(e.Q, x, len(y)), e.p))
