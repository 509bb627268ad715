"""Minima over the follower's set, to rounding: v(x) with a duality gap, and the best f on the solutions of g.

Below linear rows, Y(x) = {y : lo <= C y <= hi}, two minima are taken one after the other, by the same steps:

1. of g(x, .), from which y* and multipliers lam come, g_y + C'lam = 0. The set of minimisers of a convex g is

       S(x) = {y in Y(x) : g(x, y) = v(x)},    and (C y)_i is at its bound on it wherever lam_i is not 0;

2. of f + rho g over Y(x) with those rows held at their bounds, rho large: its minimiser u is in S(x), or within
   O(1/rho) of it. Then

       F(x) = f(x, u) + 2 rho (g(x, u) - v(x)) + O(1/rho^2),     grad F = f_x + rho (g_x(x, u) - g_x(x, y*)) + B'mu

   with the multipliers mu of the second minimum, in which g counts as its Lagrangian g + lam'C y. Where g is linear, u
   is in S(x), and nothing depends on rho.

A step is that of Newton's method with the absolute values of the Hessian's eigenvalues, none below a small number
(`qp.step`): on a function without curvature it goes all the way, and what is convex takes a handful. Rows h(x, y) <= 0
are linearised at each y, and their curvature counts in H: sequential quadratic programming.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.tree import norm, row_norms
from bilevel.diagnostics.steepest import Look, steepest
from bilevel.problem import BilevelProblem, Minimize
from bilevel.qp.active_set import Rows
from bilevel.qp.step import step
from bilevel.sampled import covering, nets
from bilevel.sampled.blocks import Blocks, Objective
from bilevel.sampled.feasible import affine_rows, is_affine, local

PyTree = Any
LARGEST = 64  # unknowns of y beyond which no dense Hessians are formed here
MOST = 40  # steps of a minimisation


def suits(problem: BilevelProblem, x: PyTree, y: PyTree) -> bool:
    """Whether `minima` is for this problem: Y is a small polyhedron, coupled to x or below a quadratic g."""
    small = ravel_pytree(y)[0].size <= LARGEST and not problem.separable
    if not small or not isinstance(problem.lower, Minimize) or not problem.y_set.polyhedral:
        return False
    return problem.coupling is not None or oracles.constant_hessian(problem, x, y, problem.lower_data.full())


class Minima(NamedTuple):
    """What the two minimisations from one start find; m rows."""

    y: Array
    """y*, [n]; NaN where Y(x) is empty."""
    g: Array
    """g there, []."""
    u: Array
    """[n], the end of the second one."""
    f: Array
    """f there, []."""
    over: Array
    """The Lagrangian of g at u less that at y*, []: g(x, u) - g(x, y*) but for rounding, which rho would magnify."""
    lam: Array
    """[m], the multipliers of the first one."""
    mu: Array
    """[m], those of the second one."""
    error: Array
    """[], how far below g the least value may be: a duality gap, for a convex g; infinite where g_yy was seen with a
    negative eigenvalue.
    """
    empty: Array
    """[], whether Y(x) is empty, by more than is allowed."""
    slack: Array
    """[], by how much the rows were let out."""
    weights: Array
    """[m], where it is: w with C'w = 0 and w'bound < 0."""


class _Local(NamedTuple):
    """A Lagrangian at a point."""

    value: Array
    r: Array
    """[n], its gradient."""
    H: Array
    """[n, n], its Hessian."""
    size: Array
    """[], of the terms whose rounding is in the value."""
    outside: Array
    """[], the largest violation of a row, where rows are not affine; else 0."""


class _Walk(NamedTuple):
    """Carry of a minimisation."""

    y: Array
    at: _Local
    multipliers: Array
    factor: Array
    """What the least eigenvalue is raised by: 1, and more after steps that did not lower the value."""
    left: Array
    """How many steps are still to come once they are short; `MOST` before."""
    count: Array
    empty: Array
    """Whether the rows contradict each other."""
    slack: Array
    """By how much the rows are let out: more where they contradict each other without."""
    bent: Array
    """Whether a negative eigenvalue of H was seen."""


class _Stage(NamedTuple):
    """What one minimisation starts from; the second one takes it over from the first."""

    y: Array
    second: Array
    lam: Array
    """[m], the multipliers of the first one, else zeros, as the next three."""
    held: Array
    """[m], 1 for rows held at hi, -1 at lo."""
    g: Array
    slack: Array


class Allowed(NamedTuple):
    """By how much rows are let out."""

    slack: Any
    """Always."""
    more: Any
    """Where Y(x) is empty without."""


def minima(view: Blocks, x: PyTree, start: Array, rho: Array, allowed: Allowed, both: bool = True) -> Minima:
    """Both minima at x from a start [n], which need not be in Y(x); the first alone where not `both`. Pure."""
    nothing, zero = jnp.zeros_like(_rows(view, x, start).lo), jnp.zeros((), start.dtype)

    def stage(at: _Stage, second: Array) -> tuple[_Stage, tuple[_Walk, Array]]:
        at = at._replace(second=second)
        local = partial(_local, view, x, rho, at)
        end = lax.while_loop(_goes_on, partial(_advance, local, partial(_rows, view, x), at, allowed), _first(at))
        end = end._replace(empty=end.empty | (end.at.outside > allowed.slack + allowed.more))
        g = oracles.lower_value(view.problem, x, view.unpack(end.y[None]), view.lower)
        held = _strong(_rows(view, x, end.y), end)
        return _Stage(end.y, second, end.multipliers, held, g, end.slack), (end, g)

    begin = _Stage(start, jnp.array(False), nothing, nothing, zero, zero + allowed.slack)
    _, (walks, g) = lax.scan(stage, begin, jnp.arange(2 if both else 1) > 0)
    low, up = jax.tree.map(lambda leaf: leaf[0], walks), jax.tree.map(lambda leaf: leaf[-1], walks)
    return Minima(
        y=jnp.where(low.empty, jnp.nan, low.y),
        g=jnp.where(low.empty, jnp.nan, g[0]),
        u=up.y,
        f=oracles.upper_value(view.problem, x, view.unpack(up.y[None]), view.upper),
        over=jnp.maximum(g[-1] - g[0] + low.multipliers @ (_at(view, x, up.y) - _at(view, x, low.y)), 0),
        lam=low.multipliers,
        mu=up.multipliers,
        error=_duality_gap(view, _rows(view, x, low.y), low) if is_affine(view) else jnp.full_like(zero, jnp.inf),
        empty=low.empty,
        weights=jnp.where(low.empty, low.multipliers, 0),
        slack=low.slack,
    )


def _rows(view: Blocks, x: PyTree, y: Array) -> Rows:
    """The rows of Y(x); those of a coupling that is not affine are linearised at y [n], and come first."""
    if is_affine(view):
        return affine_rows(view, x, y[None])
    limits = local(view, x, y[None]).limits
    return limits._replace(B=jnp.zeros((len(limits.lo), ravel_pytree(x)[0].size), y.dtype))


def _at(view: Blocks, x: PyTree, y: Array) -> Array:
    """What the rows are at y, [m]."""
    limits = _rows(view, x, y)
    if is_affine(view):
        return limits.C @ y
    return limits.C @ y - jnp.where(jnp.arange(len(limits.lo)) < _num_smooth(view, x, y), limits.hi, 0)


def _num_smooth(view: Blocks, x: PyTree, y: Array) -> int:
    """How many rows are linearised."""
    return len(jax.eval_shape(lambda: view.coupling_rows(x, y[None]).values))


def _held(limits: Rows, at: _Stage, slack: Array) -> Rows:
    """The rows, let out by the slack; in the second stage those that are held have two equal bounds."""
    lo, hi = limits.lo - slack, limits.hi + slack
    return limits._replace(
        lo=jnp.where(at.second & (at.held > 0), hi, lo), hi=jnp.where(at.second & (at.held < 0), lo, hi)
    )


def _strong(limits: Rows, end: _Walk) -> Array:
    """Which rows have a multiplier that is more than rounding: 1 at hi, -1 at lo."""
    eps = float(jnp.finfo(end.y.dtype).eps)
    size = jnp.abs(end.multipliers) * row_norms(limits.C)
    noise = 100 * eps * (jnp.max(row_norms(end.at.H)) * norm(end.y) + norm(end.at.r))
    return jnp.where(size > eps**0.6 * jnp.max(size, initial=0) + noise, jnp.sign(end.multipliers), 0)


def _local(view: Blocks, x: PyTree, rho: Array, at: _Stage, y: Array, multipliers: Array) -> _Local:
    """The function g(x, .), or f + rho (g + lam'c) less its value at y*, c the rows, around y: H with the curvature of
    the rows, by their multipliers.
    """

    def around(objective: Objective) -> _Local:
        model = objective.model(y[None])
        H = jax.vmap(lambda v: model.product(v[None])[0])(jnp.eye(y.size, dtype=y.dtype))
        return _Local(model.terms[0], model.gradient[0], (H + H.T) / 2, jnp.abs(model.terms[0]), 0 * y[0])

    low, up = around(Objective(view, x)), around(Objective(view, x, 1.0, rho))
    limits = _rows(view, x, y)
    up = up._replace(
        value=up.value - rho * at.g, r=up.r + rho * (at.lam @ limits.C), size=up.size + rho * jnp.abs(at.g)
    )
    found = jax.tree.map(partial(jnp.where, at.second), up, low)
    if is_affine(view):
        return found
    c = view.coupling_rows(x, y[None])
    before = jnp.where(at.second, rho * at.lam[: len(c.values)], 0)
    outside = jnp.where(c.equality, jnp.abs(c.values), jnp.maximum(c.values, 0))
    pull = lambda y: view.coupling_pull(x, y[None, None], (before + multipliers[: len(c.values)])[None])[1][0, 0]  # noqa: E731
    bend = jax.vmap(jax.linearize(pull, y)[1])(jnp.eye(y.size, dtype=y.dtype))
    return found._replace(
        value=found.value + before @ c.values, H=found.H + (bend + bend.T) / 2, outside=jnp.max(outside, initial=0)
    )


def _first(at: _Stage) -> _Walk:
    """Before the first step, which projects on the rows and looks at the objective there."""
    n, dtype, no = at.y.size, at.y.dtype, jnp.array(False)
    zero = jnp.zeros((), dtype)
    nowhere = _Local(zero + jnp.inf, jnp.zeros(n, dtype), jnp.eye(n, dtype=dtype), zero, zero)
    return _Walk(at.y, nowhere, jnp.zeros_like(at.lam), zero + 1, jnp.array(MOST), jnp.array(0), no, at.slack, no)


def _goes_on(c: _Walk) -> Array:
    return (c.left > 0) & (c.count < MOST) & ~c.empty


def _advance(local: Any, rows: Any, at: _Stage, allowed: Allowed, c: _Walk) -> _Walk:
    """One step, taken where it lowers the value; the first one again with rows let out, if it has to be."""
    eps, first, size = float(jnp.finfo(c.y.dtype).eps), jnp.isinf(c.at.value), 1 + norm(c.y)
    bend, steep = jnp.max(row_norms(c.at.H)), norm(c.at.r) / size
    least = jnp.maximum(jnp.where(at.second, eps**0.58, eps**0.45) * bend, eps**0.38 * steep)
    least = jnp.where(c.left == 1, jnp.maximum(least, 1e-2 * steep), least)  # the last one mends rounding
    least = c.factor * jnp.where(least > 0, least, 1)
    limits = rows(c.y)
    found = step(c.at.H, c.at.r, _held(limits, at, c.slack), c.y, least)
    there = local(c.y + jnp.where(found.empty, 0, found.p), jnp.where(found.empty, 0, found.multipliers))
    weight = 2 * (jnp.sum(jnp.abs(found.multipliers)) + jnp.sum(jnp.abs(c.multipliers)))
    rise = weight * (there.outside - c.at.outside)
    fell = there.value + rise <= c.at.value + eps**0.55 * (c.at.size + norm(c.at.r) * size)
    ok = ~found.empty & (first | fell | (c.left < MOST))  # what is outside by rounding may have less
    short = ~first & ok & (norm(found.p) <= eps**0.3 * size)
    again = found.empty & first & (c.slack == allowed.slack)
    chosen = partial(jnp.where, ok)
    return _Walk(
        y=chosen(c.y + found.p, c.y),
        at=jax.tree.map(chosen, there, c.at),
        multipliers=jnp.where(ok | found.empty, found.multipliers, c.multipliers),
        factor=jnp.where(ok, jnp.maximum(c.factor / 100, 1), 100 * c.factor),
        left=jnp.where(c.left < MOST, c.left - 1, jnp.where(short, 2, MOST)),
        count=c.count + 1,
        empty=found.empty & ~again,
        slack=jnp.where(again, allowed.slack + allowed.more, c.slack).astype(c.slack.dtype),
        bent=c.bent | (found.lowest < -1e3 * eps * bend),
    )


def _duality_gap(view: Blocks, limits: Rows, end: _Walk) -> Array:
    """By how much the linear function g_y'(z - y) may fall over the rows, by the multipliers; a bound for convex g."""
    lam, at, R = end.multipliers, limits.C @ end.y, end.at.r + end.multipliers @ limits.C
    above, below = (jnp.where(jnp.isfinite(room), room, 0) for room in (limits.hi - at, at - limits.lo))
    slack = jnp.sum(jnp.maximum(lam, 0) * jnp.abs(above) + jnp.maximum(-lam, 0) * jnp.abs(below))
    bounds = view.problem.y_set.bounds(view.unpack(end.y[None]))
    reach = 2 * (1 + norm(end.y))
    if bounds is not None:
        width = jnp.linalg.norm(ravel_pytree(bounds[1])[0] - ravel_pytree(bounds[0])[0])
        reach = jnp.where(jnp.isfinite(width), width, reach)
    return jnp.where(end.bent, jnp.inf, slack + norm(R) * reach)


class Found(NamedTuple):
    """What is known at x."""

    v: Array
    """The least g over Y(x), []; NaN where that is empty, as F."""
    F: Array
    """The least f over the minimisers of g, []."""
    y: Array
    """The y* of all starts, [K, n]."""
    g: Array
    """g there, [K]."""
    best: Array
    """The number of the start that led to v."""
    error: Array
    """[], how far v may be too large; infinite where that is not known."""
    slack: Array
    """[], by how much rows had to be let out."""
    empty: Array


def taken(view: Blocks, x: PyTree, rho: Array, found: Minima) -> tuple[Look, Found]:
    """What the minima from several starts, stacked, say of F at x."""
    eps = float(jnp.finfo(found.g.dtype).eps)
    g = jnp.where(jnp.isfinite(found.g), found.g, jnp.inf)
    v = jnp.min(g)
    least = jnp.isfinite(g) & (g <= v + eps**0.55 * (1 + jnp.abs(v)))
    F = jnp.where(least, found.f + 2 * rho * found.over, jnp.inf)
    k = jnp.argmin(F)
    y, u = (view.unpack(part[k][None]) for part in (found.y, found.u))
    limits = _rows(view, x, found.y[k])
    f_x, _ = oracles.upper_gradients(view.problem, x, u, view.upper)
    g_x, _ = oracles.value_gap_gradients(view.problem, x, u, y, view.lower)
    slope = ravel_pytree(f_x)[0] + rho * ravel_pytree(g_x)[0] + found.mu[k] @ limits.B
    if not is_affine(view):
        weights = jnp.stack([-rho * found.lam[k], found.mu[k] + rho * found.lam[k]])
        ends = jnp.stack([found.y[k], found.u[k]])[:, None]
        pulled = view.coupling_pull(x, ends, weights[:, : _num_smooth(view, x, found.y[k])])
        slope = slope + ravel_pytree(pulled[0])[0]
    empty = found.empty.all()
    nan = jnp.where(jnp.isfinite(F[k]), 0, jnp.nan)
    error = jnp.where(jnp.isfinite(found.error).all(), found.error[jnp.argmin(g)], jnp.inf)
    known = Found(v + nan, F[k] + nan, found.y, found.g, jnp.argmin(g), error, found.slack[0], empty)
    return Look(F[k], slope, jnp.where(empty, found.weights[0] @ limits.B, 0)), known


def descent(view: Blocks, x: PyTree, starts: Array, tol: Any) -> tuple[Found, Array, Array]:
    """(what is known at x from the starts [K, n], the rate of F's steepest descent there, its resolution)."""
    flat, unravel = ravel_pytree(x)
    eps = float(jnp.finfo(flat.dtype).eps)
    rho = penalty(view, x, eps**-0.38)
    radius = eps**0.25 * (1 + norm(flat))

    def look(point: Array, before: Found, first: Array) -> tuple[Look, Found]:
        at, begin = unravel(point), jnp.where(first, starts, before.y)
        allowed = Allowed(jnp.where(first, 0, before.slack), jnp.where(first, tol, eps**0.6))
        return taken(view, at, rho, jax.vmap(lambda y: minima(view, at, y, rho, allowed))(begin))

    project = lambda point: ravel_pytree(view.problem.x_set.project(unravel(point)))[0]  # noqa: E731
    zero = jnp.zeros((), flat.dtype)
    like = Found(zero, zero, starts, 0 * starts[:, 0], jnp.array(0), zero, zero, jnp.array(False))
    found = steepest(look, project, flat, like, radius)
    at_x: Found = found.at_x
    resolution = 4 * eps * (jnp.abs(at_x.F) + 2 * rho * jnp.abs(at_x.v)) / radius
    return at_x, found.rate, resolution


def penalty(view: Blocks, x: PyTree, factor: float) -> Array:
    """The rho of this module and of `descent`: `factor` std f/std g over points that cover Y."""
    uniform = nets.kronecker(64, view.m, view.dtype)
    cover = covering.cover_blocks(view, jax.random.key(22), 64, uniform[:, None])
    f, g = (jnp.std(jnp.where(jnp.isfinite(part), part, 0)) for part in view.values(x, cover))
    return factor * jnp.where(f > 0, f, 1) / jnp.where(g > 0, g, 1)
