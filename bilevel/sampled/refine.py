"""Local work on the lower level: minimisers of a f + b g over Y(x) found to full precision.

`improve` is a projected truncated Newton method: a penalty
f + rho g has condition numbers of the order of rho, which gradient steps do not survive and Newton's do not notice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel import oracles
from bilevel.problem import LinearCoupling
from bilevel.sampled.blocks import Blocks, Model, Objective, pick
from bilevel.sampled.dual import MAX_CG, Conjugate, dual, safe
from bilevel.sampled.feasible import is_near, near_all, restore

PyTree = Any
FEASIBLE = 1e-10
LENGTHS, SIZES = (1.0, 0.2), (4.0, 1.0, 0.25)  # trials along a Newton direction, and of the gradient's last length


def multipliers(view: Blocks, x: PyTree, y: Array, gradients: Array) -> Array:
    """The multipliers lam [K, R] for which |gradient + J' lam| is least, for each of `gradients` [K, m].

    Of the rows of the coupling, those active at y have one, at least 0 on inequalities; the others have 0.
    """
    c, J, equality = view.coupling_rows(x, y)
    reach = 1e-6 * (1 + jnp.linalg.norm(y)) * jnp.linalg.norm(J, axis=1)
    J = jnp.where((equality | (c >= -reach))[:, None], J, 0)
    K = J @ J.T
    return jax.vmap(lambda G: dual(K, -J @ G, equality))(gradients)


class Tangent(NamedTuple):
    """Where a step from y may go without leaving Y(x) to first order."""

    part: Callable[[Array], Array]
    """v [n, m] -> its part along which y may move: not into faces of Y, nor across active rows."""

    bend: Callable[[Array], Array]
    """v [n, m] -> sum_i lam_i c_i'' v, what the active rows of a smooth coupling add to a Hessian's product with v."""


def tangent(view: Blocks, x: PyTree, y: Array, G: Array) -> Tangent:
    """The tangent space of the faces and rows that a step from y [n, m] along -G would meet, G [n, m] a gradient."""
    steep = jnp.linalg.norm(G, axis=1, keepdims=True)
    h = 1e-6 * (1 + jnp.linalg.norm(y, axis=1, keepdims=True)) / safe(steep)
    probe = y - h * G
    free = jnp.abs(view.project(probe) - probe) <= h * (0.1 * jnp.abs(G) + 1e-3 * steep)
    if view.problem.coupling is None:
        return Tangent(lambda v: jnp.where(free, v, 0), lambda v: 0 * v)
    c, J, equality = view.coupling_rows(x, probe)
    lam = dual(J @ J.T, c, equality)
    part = _along_rows(free, jnp.where(free & (equality | (lam > 0))[:, None], J, 0))
    if isinstance(view.problem.coupling, LinearCoupling):
        return Tangent(part, lambda v: 0 * v)
    slope = lambda y: view.coupling_pull(x, y[None], lam[None] / h)[1][0]  # noqa: E731
    return Tangent(part, jax.linearize(slope, y)[1])


def _along_rows(free: Array, A: Array) -> Callable[[Array], Array]:
    """v [1, m] -> its part in the free entries [1, m] at right angles to the rows A [R, m]."""
    K = A @ A.T
    ridge = 1e-12 * jnp.trace(K) + jnp.finfo(A.dtype).tiny
    pull = jnp.linalg.solve(K + ridge * jnp.eye(len(A), dtype=A.dtype), A)

    def part(v: Array) -> Array:
        v = jnp.where(free, v, 0)
        return v - (A.T @ (pull @ v[0]))[None]

    return part


class Descent(NamedTuple):
    """A point that descends, and how far gradient steps went last."""

    y: Array
    """Shape [n, m]."""

    size: Array
    """The gradient's length for each block, shape [n]; 0 for a guess."""


def improve(view: Blocks, x: PyTree, y: Array, a: Any, b: Any, num_steps: int, size: Any = 0.0) -> Descent:
    """The end of `num_steps` >= 1 descent steps from y [n, m] on a f + b g over Y(x); on g where a is None.

    Each step tries, for each block, two lengths along a truncated Newton direction within the free variables and three
    of the projected gradient, and takes the best or stays. size: the gradient's first length, 0 for a guess.
    """
    objective = Objective(view, x, a, b)
    start = Descent(y, jnp.zeros(view.n, y.dtype) + size)
    return lax.scan(lambda at, _: (_descend(objective, at), None), start, length=num_steps)[0]


def _descend(objective: Objective, at: Descent) -> Descent:
    """One step of `improve`."""
    view, x, y = objective.view, objective.x, at.y
    model = objective.model(y)
    G = model.gradient
    d = _newton(model, tangent(view, x, y, G), view.m)
    steep = jnp.linalg.norm(G, axis=1)
    size = jnp.where(at.size > 0, at.size, 0.05 * (1 + jnp.linalg.norm(y, axis=1)) / safe(steep))
    trials = _trials(view, x, y, d, -size[:, None] * G)
    k = jnp.argmin(_judge(objective, model, trials), axis=0)
    factors = jnp.asarray((1.0,) * len(LENGTHS) + SIZES + (1 / 16,), y.dtype)
    return Descent(pick(trials, k), size * factors[k])


def _trials(view: Blocks, x: PyTree, y: Array, d: Array, away: Array) -> Array:
    """`LENGTHS` along d [n, m], `SIZES` along `away`, and y itself, all in Y(x): shape [6, n, m].

    In a polyhedron that moves with x the longest move of either kind and the shortest one along `away` are projected;
    the others are between y and these, as good as projected ones and at no cost.
    """
    lengths, sizes = (jnp.asarray(row, y.dtype)[:, None, None] for row in (LENGTHS, SIZES))
    if view.problem.coupling is None or is_near(view):
        moves = [lengths * d[None], sizes * away[None], jnp.zeros_like(y)[None]]
        return near_all(view, x, y[None] + jnp.concatenate(moves)).y
    moves = jnp.stack([LENGTHS[0] * d, SIZES[0] * away, SIZES[-1] * away, jnp.zeros_like(y)])
    newton, longest, shortest, stay = near_all(view, x, y[None] + moves).y
    between = [stay + LENGTHS[1] / LENGTHS[0] * (newton - stay), stay + SIZES[1] / SIZES[0] * (longest - stay)]
    return jnp.stack([newton, between[0], longest, between[1], shortest, stay])


def _newton(model: Model, along: Tangent, m: int) -> Array:
    """A truncated Newton direction [n, m] in the tangent space: conjugate gradients until curvature turns negative."""
    rows = lambda u, v: jnp.sum(u * v, axis=1, keepdims=True)  # noqa: E731
    start = -along.part(model.gradient)
    first = rows(start, start)

    def step(at: Conjugate, _: None) -> tuple[Conjugate, None]:
        r, p = at.residual, at.direction
        Hp = along.part(model.product(p) + along.bend(p))
        curvature, rr = rows(p, Hp), rows(r, r)
        goes = (curvature > 0) & (rr > 1e-24 * first)
        length = jnp.where(goes, rr / safe(curvature), 0)
        d, r = at.solution + length * p, r - length * Hp
        return Conjugate(d, r, jnp.where(goes, r + rows(r, r) / safe(rr) * p, 0)), None

    begin = Conjugate(jnp.zeros_like(start), start, start)
    return lax.scan(step, begin, length=min(m, MAX_CG))[0].solution


def _judge(objective: Objective, model: Model, trials: Array) -> Array:
    """What the trials [K, n, m] of a step are compared by, shape [K, n]: the objective, inf where it is not finite."""
    view = objective.view
    values = oracles.batched(objective.terms)(trials)
    rounding = 10 * float(jnp.finfo(values.dtype).eps)
    values = values.at[0].add(-rounding * jnp.abs(model.terms))  # where rounding hides the fall, Newton shows the way
    if view.problem.coupling is not None:  # what `restore` did not bring back does not count as lower
        outside = jax.vmap(lambda y: view.violation(objective.x, y))(trials)[:, None]
        weight = 1e4 * (1 + jnp.linalg.norm(model.gradient, axis=1)[0] + jnp.abs(model.terms[0]))
        values = values + jnp.where(outside > FEASIBLE, weight * outside, 0)
    return jnp.where(jnp.isfinite(values), values, jnp.inf)


def polish(view: Blocks, x: PyTree, y: Array, num_steps: int = 20) -> Array:
    """A local minimiser of g(x, .) over Y(x) near y [n, m]; without coupling it may sit at a kink of g."""
    y = restore(view, x, improve(view, x, y, None, None, num_steps).y)
    return y if view.problem.coupling is not None else _by_coordinates(view, x, y)


class Search(NamedTuple):
    """A search along the coordinates."""

    y: Array
    """Shape [n, m]."""

    g: Array
    """Its values, one a block, shape [n]."""

    h: Array
    """How far each block moves next, shape [n]."""


def _by_coordinates(view: Blocks, x: PyTree, y: Array, rounds: int = 40) -> Array:
    """Move y by +-h in the coordinate that lowers g most, with h quartered where none does: for kinks of g."""
    rounding = 1e3 * float(jnp.finfo(y.dtype).eps)
    unit = jnp.eye(view.m, dtype=y.dtype)
    moves = jnp.concatenate([unit, -unit])[:, None]  # [2 m, 1, m]
    objective = Objective(view, x)

    def step(at: Search, _: None) -> tuple[Search, None]:
        trials = jax.vmap(view.project)(at.y[None] + at.h[None, :, None] * moves)
        values = oracles.batched(objective.terms)(trials)
        k = jnp.argmin(values, axis=0)
        best = pick(values, k)
        falls = best < at.g - rounding * jnp.abs(at.g)
        y = jnp.where(falls[:, None], pick(trials, k), at.y)
        return Search(y, jnp.where(falls, best, at.g), jnp.where(falls, 2 * at.h, at.h / 4)), None

    start = Search(y, objective.terms(y), 1e-2 * (1 + jnp.max(jnp.abs(y), axis=1)))
    return lax.scan(step, start, length=rounds)[0].y
