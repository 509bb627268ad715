"""Many points moved to a polyhedron, each to the nearest one of it, with the derivative of where they go.

    P(u) = argmin over y of |y - u|^2/2  with  lo <= C y <= hi.

With rows of length one, W = D C, and multipliers lam, y = u - W' lam and W y = W u - S lam, S = W W'. The method is
that of Goldfarb and Idnani, as in `least_distance`, on a tableau instead of factors: S swept on the active rows a,

    T_aa = -S_aa^-1,    T_ai = S_aa^-1 S_ai,    T_ii = S_ii - S_ia S_aa^-1 S_ai,

so that a row that comes in or leaves costs one sweep, of m^2 products without any call of LAPACK: for thousands of
points at once, under vmap, that is tens of times faster than a factorization for each active set. What sweeps lose in
digits two steps of refinement bring back, and what comes out is checked: see `Projection.exact`.

Where no constraint is only just active, y is differentiable: with beta the bounds of the active rows,

    dy = (I - W_a' S_aa^-1 W_a) du + W_a' S_aa^-1 d(D beta)_a,

and a function of y with the gradient G has the gradient D S_aa^-1 W_a G in the bounds (`Projection.pull`).

Reference: Goldfarb, Idnani. A numerically stable dual method for solving strictly convex quadratic programs.
Mathematical Programming 27, 1983, section 3. Sweeps: Goodnight. A tutorial on the SWEEP operator. The American
Statistician 33, 1979.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from bilevel.backend.tree import norm, row_norms
from bilevel.qp.active_set import Rows

_SEARCHING, _SOLVED, _EMPTY = range(3)
_FREE = -1  # no row is coming in
DEPENDENT = 30  # times a row's rounding error: what a row that depends on active ones may be violated by
SOFT = 1e-8  # of an elastic projection: how much a row of length one gives way for each unit of its multiplier


class Region(NamedTuple):
    """A polyhedron lo <= W y <= hi in rows of length one."""

    W: Array
    """[m, n]; zero where the row is."""
    S: Array
    """[m, m], W W'."""
    lo: Array
    """[m], like `hi`: infinite where there is no bound."""
    hi: Array
    d: Array
    """[m], one over the lengths of the rows that were given; one for a row of zeros."""

    @classmethod
    def of(cls, limits: Rows) -> "Region":
        """The polyhedron lo <= C y <= hi."""
        length = row_norms(limits.C)
        d = 1 / jnp.where(length > 0, length, 1)
        W = d[:, None] * limits.C
        return cls(W, W @ W.T, d * limits.lo, d * limits.hi, d)

    def project(self, u: Array, soft: Array | None = None, held: Array | None = None) -> "Projection":
        """The point nearest to u [n]: `project`."""
        return project(self, u, soft, held)


class Projection(NamedTuple):
    """Where a point goes, and how it moves with the bounds."""

    y: Array
    """[n]; where the polyhedron is empty, the point of an elastic one: see `project`."""
    multipliers: Array
    """[m], of the rows as given: y = u - C' multipliers; >= 0 at hi, <= 0 at lo."""
    active: Array
    """[m], 1 at hi, -1 at lo, 0 between: rows that are linearly independent and hold y."""
    inverse: Array
    """[m, m], of S on the active rows, and zero elsewhere."""
    empty: Array
    """[], whether rows contradict each other beyond rounding."""
    exact: Array
    """[], whether rows, signs of multipliers and y = u - C' multipliers hold up to rounding."""

    def pull(self, region: Region, G: Array) -> Array:
        """The gradient [m] in the rows' bounds of a function of y whose gradient is G [n]."""
        return region.d * (self.inverse @ (region.W @ G))


class _Search(NamedTuple):
    """Carry."""

    T: Array
    """[m, m], the tableau."""
    a: Array
    """[m], the active rows, as `Projection.active`."""
    lam: Array
    """[m], their multipliers, and that of the row that is coming in."""
    value: Array
    """[m], W y."""
    p: Array
    """[], the row that is coming in, or _FREE."""
    count: Array
    status: Array


class _Program(NamedTuple):
    """What a search looks up."""

    region: Region
    noise: Array
    """[m], the rounding error of a row's value."""
    ridge: Array
    """[m], by how much rows give way for each unit of their multipliers: 0, or `SOFT`."""


def project(region: Region, u: Array, soft: Array | None = None, held: Array | None = None) -> Projection:
    """The point nearest to u [n]. Static shapes: jit, vmap over u, and over the polyhedron.

    Args:
        region: the polyhedron.
        u: [n].
        soft: [m], rows that give way where all rows together contradict each other: y then has the least
            |y - u|^2 + |r|^2/SOFT, r their violations. Without it, or where the others alone contradict each other, y
            is where the search stopped.
        held: [m], rows that are equalities, 1 at hi and -1 at lo, where the polyhedron has such points; 0 for others.
    """
    chex.assert_shape([region.W, region.S], [(len(region.d), u.size), (len(region.d), len(region.d))])
    if soft is None and held is None:
        return _search(region, u, jnp.zeros_like(region.d))
    ridge = jnp.zeros_like(region.d) if soft is None else jnp.where(soft, SOFT, 0).astype(u.dtype)
    on = jnp.zeros_like(region.d) if held is None else held
    stay = region._replace(lo=jnp.where(on > 0, region.hi, region.lo), hi=jnp.where(on < 0, region.lo, region.hi))

    def again(at: _Tries) -> _Tries:
        """With rows held, then with none, then with soft ones."""
        now = jax.tree.map(lambda kept, all: jnp.where(at.count == 0, kept, all), stay, region)
        found = _search(now, u, jnp.where(at.count == 2, ridge, 0))
        elastic = found._replace(empty=jnp.ones_like(found.empty), exact=jnp.zeros_like(found.exact))
        return _Tries(jax.tree.map(lambda a, b: jnp.where(at.count == 2, a, b), elastic, found), at.count + 1)

    m, no = len(region.d), jnp.array(False)
    nothing = Projection(u, 0 * region.d, 0 * region.d, jnp.zeros((m, m), u.dtype), ~no, no)
    first, last = 0 if held is not None else 1, 3 if soft is not None else 2
    return jax.lax.while_loop(
        lambda at: at.found.empty & (at.count < last), again, _Tries(nothing, jnp.array(first))
    ).found


class _Tries(NamedTuple):
    """Carry of searches, one after the other where rows contradict each other."""

    found: Projection
    count: Array


def _search(region: Region, u: Array, ridge: Array) -> Projection:
    """The method, from no active rows."""
    eps, m = float(jnp.finfo(u.dtype).eps), len(region.d)
    finite = lambda end: jnp.where(jnp.isfinite(end), jnp.abs(end), 0)  # noqa: E731
    size = jnp.abs(region.W) @ jnp.abs(u) + jnp.maximum(finite(region.lo), finite(region.hi))
    program = _Program(region, 10 * eps * size, ridge)
    nothing = jnp.zeros_like(region.d)
    begin = _Search(
        T=region.S + jnp.diag(ridge),
        a=nothing,
        lam=nothing,
        value=region.W @ u,
        p=jnp.array(_FREE),
        count=jnp.array(0),
        status=jnp.array(_SEARCHING),
    )
    limit = 10 * (m + u.size)
    end = jax.lax.while_loop(lambda c: (c.status == _SEARCHING) & (c.count < limit), partial(_step, program), begin)
    return _refined(program, u, end)


def _step(program: _Program, c: _Search) -> _Search:
    """One row comes in, or the one that blocks it leaves; or the end is seen."""
    region, eps, m = program.region, float(jnp.finfo(c.value.dtype).eps), len(c.a)
    above, below = c.value - region.hi, region.lo - c.value
    excess = jnp.where(c.a == 0, jnp.maximum(above, below), -jnp.inf)
    fresh = c.p < 0
    p = jnp.where(fresh, jnp.argmax(excess - program.noise), c.p)
    side = jnp.where(above[p] >= below[p], 1, -1).astype(c.a.dtype)
    solved = fresh & (excess[p] <= program.noise[p])

    column = c.T[:, p]
    fall = side * column * c.a  # by how much signed multipliers of active rows fall as that of p grows by one
    fixed = region.lo == region.hi
    blocks = (c.a != 0) & ~fixed & (fall > eps)
    ratios = jnp.where(blocks, c.a * c.lam / jnp.where(blocks, fall, 1), jnp.inf)
    leaving = jnp.argmin(ratios)
    independent = column[p] > 1e3 * eps * m
    full = jnp.where(independent, excess[p] / jnp.where(independent, column[p], 1), jnp.inf)
    joins = full <= ratios[leaving]
    t = jnp.maximum(jnp.minimum(full, ratios[leaving]), 0)
    # sweeps lose digits: rows that depend on active ones are not contradicted by a little more than rounding
    solved = solved | (fresh & ~jnp.isfinite(t) & (excess[p] <= DEPENDENT * program.noise[p]))
    empty = ~solved & ~jnp.isfinite(t)
    t = jnp.where(solved | empty, 0, t) * side

    at_p = jnp.arange(m) == p
    k = jnp.where(joins, p, leaving)
    at_k = jnp.arange(m) == k
    going = ~(solved | empty)
    lam = c.lam + t * jnp.where(at_p, 1, jnp.where(c.a != 0, -column, 0))
    value = c.value - t * jnp.where(c.a != 0, 0, column)
    return _Search(
        T=jnp.where(going, _swept(c.T, k, joins), c.T),
        a=jnp.where(going & at_k, jnp.where(joins, side, 0), c.a),
        lam=jnp.where(going & at_k & ~joins, 0, lam),
        value=value,
        p=jnp.where(joins, _FREE, p),
        count=c.count + 1,
        status=jnp.where(solved, _SOLVED, jnp.where(empty, _EMPTY, _SEARCHING)),
    )


def _swept(T: Array, k: Array, joins: Array) -> Array:
    """The tableau after row k has come in, or left."""
    at, row = jnp.arange(len(T)) == k, T[k]
    pivot = row[k]
    scaled = row / jnp.where(pivot == 0, 1, pivot)
    edge = jnp.where(joins, scaled, -scaled)
    inside = T - row[:, None] * scaled[None]
    swept = jnp.where(at[:, None], edge[None], jnp.where(at[None], edge[:, None], inside))
    return jnp.where(at[:, None] & at[None], -scaled[k] / jnp.where(pivot == 0, 1, pivot), swept)


def _refined(program: _Program, u: Array, end: _Search) -> Projection:
    """The point on the active rows, by two steps of refinement."""
    region, eps = program.region, float(jnp.finfo(u.dtype).eps)
    on = end.a != 0
    inverse = jnp.where(on[:, None] & on[None], -end.T, 0)
    bound = jnp.where(end.a > 0, region.hi, region.lo)
    lam = jnp.where(on, end.lam, 0)
    for _ in range(2):
        y = u - lam @ region.W
        lam = lam + inverse @ jnp.where(on, region.W @ y - program.ridge * lam - bound, 0)
    y = u - lam @ region.W
    value = region.W @ y - program.ridge * lam
    error = 4 * program.noise + 50 * eps * norm(lam)
    inside = jnp.all((value <= region.hi + error) & (value >= region.lo - error))
    held = jnp.all(jnp.where(on, jnp.abs(value - bound) <= error, True))
    fixed = region.lo == region.hi
    signs = jnp.all(fixed | (end.a * lam >= -error))
    exact = inside & held & signs & (end.status == _SOLVED)
    return Projection(y, region.d * lam, end.a, inverse, end.status == _EMPTY, exact)
