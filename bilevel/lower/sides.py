"""On which side of its bound each row is, and whether rounding error leaves that clear.

At a solution (y, lam) on active rows a, an inactive row has a slack and an active one a multiplier of the right sign,
all measured in rows of unit length in the norm of H^-1: the room that it has. Rounding leaves of the KKT residuals eps
times their terms, and (y, lam) is uncertain by what K^-1 makes of that, K = [H C_a'; C_a 0]. A row whose room is not
more than what it moves by then may be on either side. Where that is little, next to the row itself, the solution is at
a kink, but for rounding of the data. Where it is much the active set is not known.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.loops import once_if
from bilevel.backend.tree import norm, row_norms
from bilevel.qp.active_set import Factor, Rows, kkt_solve

WIDE = 4.0  # a row is next to its other side up to so many times what rounding moves it
UNITS = 4.0  # rounding errors, each of the size of eps times a term, that one entry of a residual may have


def terms(limits: Rows, factor: Factor, y: Array, lam: Array) -> Array:
    """The size of the terms of grad_y g + C'lam, [n], entry by entry.

    Those of H y are at most (h'|y|) h, h the root of H's diagonal, since H is positive semidefinite.
    """
    h = jnp.sqrt(jnp.maximum(factor.diagonal, 0))
    return (h @ jnp.abs(y)) * h + jnp.abs(limits.C).T @ jnp.abs(lam)


def row_terms(limits: Rows, x: Array, y: Array) -> Array:
    """The size of the terms of C y - bound, [m]; x and y raveled."""
    return jnp.abs(limits.C) @ jnp.abs(y) + ends(limits) + jnp.abs(limits.B) @ jnp.abs(x)


def ends(limits: Rows) -> Array:
    """The larger of the two bounds' sizes, [m], of those that are finite."""
    finite = [jnp.where(jnp.isfinite(end), jnp.abs(end), 0) for end in (limits.lo, limits.hi)]
    return jnp.maximum(*finite)


def sign(v: Array) -> Array:
    """Minus one for negative entries, else one."""
    return jnp.where(v < 0, -1, 1).astype(v.dtype)


class Solved(NamedTuple):
    """A solution on the active rows [m], with what it was solved by."""

    limits: Rows
    factor: Factor
    inverse: Array
    active: Array
    y: Array
    lam: Array

    def uncertain(self, x: Array) -> tuple[Array, Array]:
        """By how much y [n] and lam [m] are, entry by entry: by two solves for residuals of the size of rounding, the
        second with the signs of what the first gave, for which K^-1 is large.
        """
        unit = UNITS * float(jnp.finfo(self.y.dtype).eps)
        inside = self.active != 0
        wrong = unit * terms(self.limits, self.factor, self.y, self.lam)
        off = jnp.where(inside, unit * row_terms(self.limits, x, self.y), 0)

        def answer(signs: Array, row_signs: Array) -> tuple[Array, Array]:
            d, dlam = kkt_solve(self.factor, self.inverse, self.active, signs * wrong, row_signs * off)
            return d, jnp.where(inside, dlam, 0)

        def again(found: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            found = answer(sign(found[0]), sign(found[1]))
            return found, found

        both = lax.scan(again, (self.y, self.lam), length=2)[1]  # a scan, so that the solve is compiled once
        return jnp.max(jnp.abs(both[0]), axis=0), jnp.max(jnp.abs(both[1]), axis=0)

    def lost(self) -> Array:
        """Whether an equality is not among the active rows, and no combination of them, [].

        One that is, and moves with x as they do, holds by itself.
        """
        limits, factor = self.limits, self.factor
        out = (limits.lo == limits.hi) & (self.active == 0) & (factor.length > 0)

        def differ(_: Array) -> Array:
            by_x = factor.d[:, None] * limits.B
            most = jnp.max(row_norms(by_x), initial=0)
            rows = jnp.concatenate([factor.W, by_x / jnp.where(most > 0, most, 1)], axis=1)
            weights = (jnp.where(out[:, None], factor.S, 0) @ self.inverse.T) @ self.inverse
            size = jnp.sum(jnp.abs(weights), axis=1) + 1
            left = row_norms(rows - weights @ rows)
            return jnp.any(out & (left > 100 * float(jnp.finfo(size.dtype).eps) * size))

        return once_if(jnp.any(out), differ, jnp.array(False))

    def sides(self, y_off: Array, lam_off: Array) -> "Sides":
        """What y and lam say of the rows, where they are off by so much."""
        limits, (d, length) = self.limits, (self.factor.d, self.factor.length)
        inside, at = self.active != 0, self.limits.C @ self.y
        slack = d * jnp.minimum(limits.hi - at, at - limits.lo)
        room = jnp.where(inside, self.active * self.lam / d, slack)
        moved = jnp.where(inside, lam_off / d, d * (jnp.abs(limits.C) @ y_off))
        if self.factor.pin is not None:  # the curvature along a row is that of H and other rows, not of its own pin
            own = jnp.maximum(1 - self.factor.pin / d**2, float(jnp.finfo(d.dtype).eps))
            room, moved = (jnp.where(inside, part / own, part) for part in (room, moved))
        L, eps = self.factor.L, float(jnp.finfo(d.dtype).eps)
        pull = norm(self.lam @ limits.C)
        somewhere = norm(L @ (L.T @ self.y)) > 10 * eps * pull
        natural = length * norm(self.y) + d * ends(limits)
        unit = length * pull / jnp.where(self.factor.trace > 0, self.factor.trace, jnp.inf)
        known = pull > 10 * norm(lam_off @ jnp.abs(limits.C))
        unit = jnp.where(known & (unit > 0), unit, jnp.inf)  # at y = 0, but for rounding: what multipliers make of y
        equal = (limits.lo == limits.hi) & inside
        natural = jnp.where(somewhere & (natural > 0), natural, unit)
        return Sides(jnp.where(equal | (length == 0), jnp.inf, room), moved, natural)


class Sides(NamedTuple):
    """Of each row [m], in rows of unit length: its room, negative where it is on the wrong side; by how much rounding
    may move that; and its natural size.
    """

    room: Array
    moved: Array
    natural: Array

    @property
    def open(self) -> Array:
        """[m], rows that may be on either side."""
        return self.room <= self.moved / 2

    @property
    def near(self) -> Array:
        """[m], rows that are next to the other side, but for some rounding."""
        return self.room <= WIDE * self.moved

    @property
    def unknown(self) -> Array:
        """Whether the active set is not known, or wrong, []."""
        eps = float(jnp.finfo(self.moved.dtype).eps)
        little, nothing = eps**0.5 / 4 * self.natural, 10 * eps * self.natural
        return jnp.any((self.open & (self.moved > little)) | (self.room < -self.moved - nothing))
