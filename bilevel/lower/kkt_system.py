"""The equations of a polyhedral lower level's solution and of its adjoint, and how far rounding may carry their roots.

On the active rows a at y(x), with H = g_yy, G = g_yx and the rows' bounds moving with x by -B,

    K (d, dlam) = (-grad_y g - C_a'lam, bound - C_a y),    K (u, v) = (f_y, 0),    K = [H  C_a'; C_a  0],
    grad F = f_x - G'u - B'v.

A Newton step on both gives (y, lam, u, v) to rounding error. What that is worth is found by steps with the residuals
off by what rounding may make of them, entry by entry and with chosen signs: those of (u, v), and then those of where
the step before led. These are signs by which the inverse of K is largest, as in Higham's estimate of |K^-1| e: where a
soft direction dominates, the first and every later step see all of it.

Reference: Higham. FORTRAN codes for estimating the one-norm of a real or complex matrix, with applications to condition
estimation. ACM Transactions on Mathematical Software 14, 1988.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.lower.polyhedral import PolyhedralSolution
from bilevel.lower.rounding import SEEN_OF_ROWS, noise_of
from bilevel.lower.sides import UNITS, row_terms, sign, terms
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import Rows, kkt_solve

PyTree = Any
TRIALS = 3  # steps with wrong residuals


class Point(NamedTuple):
    """A root of the KKT system and of its adjoint, or an approximation: y, u [n] and lam, v [rows]."""

    y: Array
    lam: Array
    u: Array
    v: Array


class Residuals(NamedTuple):
    """What is left of the two systems at a point, zero at their roots; or what rounding may make of that."""

    R: Array
    """[n], grad_y g + C' lam."""
    off: Array
    """[rows], bound - C y on the active rows, else 0."""
    r_u: Array
    """[n], f_y - H u - C' v."""
    r_v: Array
    """[rows], -C u on the active rows, else 0."""


class Seen(NamedTuple):
    """What else is seen at a point; all [] but f_y and gradient."""

    value: Array
    """f(x, y)."""
    gradient: Array
    """[dim x], f_x - G' u - B' v."""
    fy: Array
    """[n], f_y."""
    lower_residual: Array
    linear_residual: Array
    sizes: Array
    """|f_x| + |G' u + B' v|, for rounding error."""


class System(NamedTuple):
    """The KKT system of the active rows at one x, and its adjoint. Not a pytree of arrays: it stays in one trace."""

    problem: BilevelProblem
    x: PyTree
    found: PolyhedralSolution
    """With factors for the Hessian at its y."""
    limits: Rows
    unravel: Callable[[Array], PyTree]

    @property
    def inside(self) -> Array:
        """[rows], which are active."""
        return self.found.active != 0

    @property
    def bound(self) -> Array:
        """[rows], where active rows are."""
        return jnp.where(self.found.active > 0, self.limits.hi, jnp.where(self.inside, self.limits.lo, 0))

    def solve(self, r: Array, s: Array | None = None) -> tuple[Array, Array]:
        """(u, v) with H u + C_a' v = r, C_a u = s_a."""
        return kkt_solve(self.found.factor, self.found.inverse, self.found.active, r, s)

    def fy(self, y: PyTree) -> Array:
        """f_y at y, [n]."""
        return ravel_pytree(oracles.upper_gradients(self.problem, self.x, y, self.problem.upper_data.full())[1])[0]

    def look(self, at: Point) -> tuple[Residuals, Seen]:
        """Residuals, value and gradient at a point."""
        problem, x, limits, y, u = self.problem, self.x, self.limits, self.unravel(at.y), self.unravel(at.u)
        value, gradients = oracles.upper_value_and_gradients(problem, x, y, problem.upper_data.full())
        directions = oracles.directions(problem, x, y, u, problem.lower_data.full())
        fx, fy, R, Hu, cross = (ravel_pytree(part)[0] for part in (*gradients, *directions))
        implicit = cross + limits.B.T @ at.v
        left = Residuals(
            R=R + limits.C.T @ at.lam,
            off=jnp.where(self.inside, self.bound - limits.C @ at.y, 0),
            r_u=fy - Hu - limits.C.T @ at.v,
            r_v=jnp.where(self.inside, -(limits.C @ at.u), 0),
        )
        return left, Seen(
            value=value,
            gradient=fx - implicit,
            fy=fy,
            lower_residual=norm(jnp.append(left.R, left.off)),
            linear_residual=norm(jnp.append(left.r_u, left.r_v)),
            sizes=norm(fx) + norm(implicit),
        )

    def corrected(self, at: Point, left: Residuals) -> Point:
        """A Newton step on both systems."""
        (d, dlam), (du, dv) = self.solve(-left.R, left.off), self.solve(left.r_u, left.r_v)
        return Point(at.y + d, at.lam + dlam, at.u + du, at.v + dv)

    def by_x(self) -> Array:
        """What x has in the terms of R, [n]: |G| |x| but for the signs of the sum."""
        flat, unravel = ravel_pytree(self.x)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], flat.size)
        batch, d = self.problem.lower_data.full(), unravel(flat * jnp.asarray(signs, flat.dtype))
        moved = oracles.cross_forward(self.problem, self.x, self.found.iterate, d, batch)
        return jnp.abs(ravel_pytree(moved)[0])

    def rounding(self, at: Point, fy: Array, by_x: Array) -> Residuals:
        """What rounding may make of the residuals: eps times the terms of each entry (`sides`)."""
        unit, factor = UNITS * float(jnp.finfo(at.y.dtype).eps), self.found.factor
        off = row_terms(self.limits, ravel_pytree(self.x)[0], at.y)
        return Residuals(
            R=unit * (terms(self.limits, factor, at.y, at.lam) + by_x),
            off=jnp.where(self.inside, unit * off, 0),
            r_u=unit * (terms(self.limits, factor, at.u, at.v) + jnp.abs(fy)),
            r_v=jnp.where(self.inside, unit * (jnp.abs(self.limits.C) @ jnp.abs(at.u)), 0),
        )


class Error(NamedTuple):
    """How far a point may be from the root."""

    gradient: Array
    """[], the hypergradient's distance."""
    y: Array
    """[n], by entries."""
    lam: Array
    """[rows]"""


class _Trial(NamedTuple):
    """Carry of `solved_with_error`."""

    at: Point
    left: Residuals
    first: tuple[Point, Seen]
    """The point without wrong residuals, which is the answer."""
    signs: tuple[Array, Array]
    """[n], [rows], of the residuals of the next step."""
    noise: Array
    """[], the largest factor of `rounding.noise_of` so far."""
    error: Error
    """So far."""


def solved_with_error(system: System, at: Point, left: Residuals) -> tuple[Point, Seen, Error]:
    """(the point after a Newton step, what is seen there, how far it may be from the root).

    The distances are the largest of those to where `TRIALS` steps with wrong residuals lead, one after the other; the
    gradient's is more where such a step shows that R is noisier than supposed.
    """
    by_x = system.by_x()

    def step(c: _Trial, first: Array) -> tuple[_Trial, None]:
        (base, seen), (by_y, by_rows) = c.first, c.signs
        wrong = system.rounding(base, seen.fy, by_x)
        wrong = Residuals(by_y * wrong.R, -by_rows * wrong.off, by_y * wrong.r_u, by_rows * wrong.r_v)
        residuals = [jnp.where(first, r, r + w) for r, w in zip(c.left, wrong, strict=True)]
        at = system.corrected(c.at, Residuals(*residuals))
        left, now = system.look(at)
        base, seen = (_select(first, new, old) for new, old in ((at, base), (now, seen)))
        far = Error(norm(now.gradient - seen.gradient), jnp.abs(at.y - base.y), jnp.abs(at.lam - base.lam))
        moved = (at.y - base.y, at.lam - base.lam)
        signs = [jnp.where(first, sign(a), sign(b)) for a, b in zip((at.u, at.v), moved, strict=True)]
        error = Error(*(jnp.maximum(a, b) for a, b in zip(c.error, far, strict=True)))
        noise = jnp.maximum(c.noise, jnp.where(first, 1, noise_of(left.R + wrong.R, wrong.R, SEEN_OF_ROWS)))
        return _Trial(at, left, (base, seen), (signs[0], signs[1]), noise, error), None

    nought = jnp.zeros((), at.y.dtype)
    shapes = ravel_pytree(system.x)[0]
    blank = Seen(nought, jnp.zeros_like(shapes), jnp.zeros_like(at.y), nought, nought, nought)
    error = Error(nought, jnp.zeros_like(at.y), jnp.zeros_like(at.lam))
    begin = _Trial(at, left, (at, blank), (sign(at.y), sign(at.lam)), jnp.ones_like(nought), error)
    end = lax.scan(step, begin, jnp.arange(TRIALS + 1) == 0)[0]  # a scan, so that `look` is compiled once
    return *end.first, end.error._replace(gradient=end.noise * end.error.gradient)


def _select(first: Array, new: Any, old: Any) -> Any:
    return type(new)(*(jnp.where(first, a, b) for a, b in zip(new, old, strict=True)))
