"""Derivatives of F through a lower level solved by `projected`: the hypergradient with its error, F for `jax.grad`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.loops import once_if
from bilevel.backend.tree import norm, poisoned, row_norms, take
from bilevel.linear import DENSE_LIMIT, UNSOLVED, verified
from bilevel.lower import projected, sides
from bilevel.lower.method import Solved
from bilevel.lower.polyhedral_gradient import conclude
from bilevel.lower.projected import ProjectedSolution, Settings
from bilevel.lower.rounding import SEEN_OF_FACES, noise_of, underflow
from bilevel.problem import BilevelProblem
from bilevel.qp.face import Face
from bilevel.record import Hypergradient, Status, solved

PyTree = Any
NEAR = 1e3  # a move with the worst signs may be so many times one with others
FAR = 0.1  # part of y's size, beyond which it may not go where entries next to their bounds leave them


class _Point(NamedTuple):
    """Where the systems stand, [n]: y, the adjoint u, what is left of their equations, and the face."""

    y: Array
    u: Array
    R: Array
    left: Array
    """f_y - (H + D) u."""
    face: Face
    wrong: Array
    """By which R is off on purpose, and so what a step makes of it, but for rounding."""


class _Seen(NamedTuple):
    """What else is seen at a point; [] but y, u [n] and gradient [dim x]."""

    y: Array
    u: Array
    value: Array
    gradient: Array
    """f_x - g_yx' u."""
    linear_residual: Array
    """|P (f_y - (H + D) u)|."""
    sizes: Array
    """|f_x| + |g_yx' u|, for rounding error."""
    fy: Array
    """|f_y|."""
    room: Array
    """[n], of each entry to where another face begins; negative where it is beyond."""
    noise: Array
    """[], by how much more than supposed rounding makes of R (`rounding.noise_of`)."""


def differentiate(
    problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings, estimate: bool = True
) -> Hypergradient:
    """The hypergradient from the warm start y, by corrections of y and of the adjoint u in the face's tangent space:

        y <- Proj(y + d),  P (H + D) P d = -P R,        u <- u + du,  P (H + D) P du = P (f_y - (H + D) u).

    The first solves for u and gives the gradient; with `estimate` a second one gives a gradient that is right to higher
    order: three times the distance, plus an allowance for rounding, estimates the first one's error. Before each that
    follows, what is left of the equations, and on a ball the face, is taken off by what rounding may make of it, with
    the signs of u, which move the gradient. On balls there is a third; on other sets where another face is within
    `NEAR` times what the second moved, now with the signs of that move, which move y and so the multipliers. It
    supposes that the face is the right one; where these moves reach another, `_resolved` says so. No proof from
    constants is offered here.
    """
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    found = projected.solve(problem, x, y, lower_batch, settings)
    face, (flat, unravel) = found.face, ravel_pytree(found.y)
    round_set = not problem.y_set.polyhedral
    passes = (3 if problem.constrained_lower else 2) if estimate else 1  # without constraints there is no other face

    def correct(at: _Point, count: Array) -> tuple[_Point, _Seen]:
        """Solve for the corrections of y and u, the first where `count` is 0, and look at the corrected point."""
        face, u, left = at.face, at.u, at.left
        solve = projected.tangent_solve(problem, x, found.y, lower_batch, face, found.sketch)
        if round_set:  # the face may have turned
            u = face.tangent(u)
            off = at.u - u
            left = left + face.mu * off + oracles.flat_operator(problem, x, found.y, lower_batch)(off)
        step = solve(-face.tangent(at.R))
        flat = ravel_pytree(problem.y_set.project(unravel(at.y + step)))[0]
        u = u + solve(face.tangent(left))
        value, gradients = oracles.upper_value_and_gradients(problem, x, unravel(flat), upper_batch)
        directions = oracles.directions(problem, x, unravel(flat), unravel(u), lower_batch)
        fx, fy, R, Hu, cross = (ravel_pytree(part)[0] for part in (*gradients, *directions))
        left = fy - Hu - face.mu * u
        size = norm(face.tangent(left))
        room = _room(problem, unravel, at.y + step, R, face)
        noise = noise_of(face.tangent(R + at.wrong), face.tangent(at.wrong), SEEN_OF_FACES)
        noise = jnp.where((count == 0) | round_set, 1, noise)
        seen = _Seen(flat, u, value, fx - cross, size, norm(fx) + norm(cross), norm(fy), room, noise)
        signs = sides.sign(jnp.where((count == 0) | round_set, u, step))
        return _off(problem, unravel, _Point(flat, u, R, left, face, at.wrong), seen.fy, signs), seen

    R = ravel_pytree(oracles.residual(problem, x, found.y, lower_batch))[0]
    fy = ravel_pytree(oracles.upper_gradients(problem, x, found.y, upper_batch)[1])[0]
    begin = _Point(flat, jnp.zeros_like(flat), R, fy, face, jnp.zeros_like(flat))
    corrections = _corrections(correct, begin, ravel_pytree(x)[0].size, passes, round_set)
    seen = take(corrections, 0)
    if estimate:
        error = _error(seen, corrections.gradient[1:], jnp.max(corrections.noise), begin)
        good = jnp.where(jnp.isfinite(error), Status.ESTIMATED, Status.UNSOLVED_LINEAR)
    else:
        error = jnp.full((), jnp.nan, flat.dtype)
        good = jnp.where(_solved(seen, begin), Status.UNCHECKED, Status.UNSOLVED_LINEAR)
    lower = found.status
    if estimate:
        wide = found
        if problem.constrained_lower and not round_set:
            lower, wide = _resolved(problem, x, found, corrections)
        lower = jnp.where(_is_flat(problem, x, wide), Status.UNDETERMINED, lower)
    return conclude(
        lower, good, x, seen.value, seen.gradient, error, y=unravel(seen.y), v=unravel(seen.u),
        lower_residual=found.residual, linear_residual=seen.linear_residual, active_margin=face.margin,
    )  # fmt: skip


class _Passes(NamedTuple):
    """Carry of the corrections: where they stand, what each saw, how many there were, whether there is one more."""

    at: _Point
    seen: _Seen
    count: Array
    more: Array


def _corrections(correct: Callable, begin: _Point, size_x: int, passes: int, always: bool) -> _Seen:
    """What each pass saw, [passes, ...]; the third, where it is not made, what the second did.

    A loop, so that `correct` is compiled once.
    """
    numbers, vectors = jnp.zeros(passes, begin.y.dtype), jnp.zeros((passes, begin.y.size), begin.y.dtype)
    gradients = jnp.zeros((passes, size_x), begin.y.dtype)
    nothing = _Seen(vectors, vectors, numbers, gradients, numbers, numbers, numbers, vectors, numbers)

    def once(c: _Passes) -> _Passes:
        at, now = correct(c.at, c.count)
        later = jnp.arange(passes) >= c.count
        seen = jax.tree.map(lambda rows, row: jnp.where(later.reshape(-1, *[1] * row.ndim), row, rows), c.seen, now)
        near = jnp.any(seen.room[0] <= NEAR * jnp.abs(seen.room[-1] - seen.room[0]))
        return _Passes(at, seen, c.count + 1, (c.count == 0) | always | near)

    first = _Passes(begin, nothing, jnp.array(0), jnp.array(True))
    return lax.while_loop(lambda c: c.more & (c.count < passes), once, first).seen


def _room(problem: BilevelProblem, unravel: Callable[[Array], PyTree], y: Array, R: Array, face: Face) -> Array:
    """How far the entries of y - s R are from where another face begins, negative where they are beyond: [n]."""
    there = problem.y_set.face(unravel(y), unravel(R), face.s)
    return jnp.where(there.free == face.free, there.room, -there.room)


def _resolved(
    problem: BilevelProblem, x: PyTree, found: ProjectedSolution, corrections: _Seen
) -> tuple[Array, ProjectedSolution]:
    """The lower level's status, with what the corrections say of the face, as `polyhedral_gradient` does by rows:
    WEAKLY_ACTIVE where what rounding makes of y and the multipliers may turn an entry, STALLED where y moves much by
    that, on this face or on the one where such entries leave their bounds; and `found` on that face.
    """
    flat, face = ravel_pytree(found.y)[0], found.face
    s, eps, room = face.s, float(jnp.finfo(flat.dtype).eps), corrections.room
    size, pull = norm(flat), s * norm(found.R)
    apart = jnp.where(jnp.isfinite(room[:1]), jnp.abs(room[1:] - room[:1]), 0)
    moved = jnp.max(apart, axis=0) + sides.UNITS * eps / flat.size**0.5 * (size + pull) + s * found.residual
    unit = jnp.where(pull > 0, pull, jnp.inf)  # at y = 0, but for rounding: what the multipliers make of y
    natural = jnp.where(size > 10 * eps * pull, size, unit)
    entries = sides.Sides(room[0], moved, jnp.broadcast_to(natural, moved.shape))
    leaving = entries.near & (face.inward != 0)
    forces = jnp.where(leaving, face.inward * moved / s, 0)
    left = found._replace(face=face.opened(leaving))
    reach = once_if(jnp.any(leaving), lambda _: _pulled(problem, x, left, forces), moved)
    touching = (found.status == Status.CONVERGED) & jnp.any(entries.near)
    status = jnp.where(touching, Status.WEAKLY_ACTIVE, found.status)
    unknown = entries.unknown | entries._replace(moved=jnp.where(leaving, reach, moved)).unknown
    unknown = unknown | jnp.any(leaving & (reach > FAR * natural))
    wide = found._replace(face=face.opened(leaving & entries.open))
    return jnp.where(solved(status) & unknown, Status.STALLED, status), wide


def _pulled(problem: BilevelProblem, x: PyTree, found: ProjectedSolution, forces: Array) -> Array:
    """By how much the entries of y move along the face where R is off by these `forces`, [n]."""
    solve = projected.tangent_solve(problem, x, found.y, problem.lower_data.full(), found.face, found.sketch)
    return jnp.abs(solve(found.face.tangent(forces)))


def _is_flat(problem: BilevelProblem, x: PyTree, found: ProjectedSolution) -> Array:
    """Whether g has no curvature beyond rounding along some direction of the face, []; up to `DENSE_LIMIT` unknowns.

    A random w of the tangent space is found again from (H + D) w, by the solver that everything else rests on, but for
    what it cannot see. If the rest z is some part of w, with a curvature z'(H + D) z/|z|^2 that is rounding error of
    the largest one, minimisers are not unique, or the adjoint is anything.
    """
    batch, flat, face = problem.lower_data.full(), ravel_pytree(found.y)[0], found.face
    n, eps = flat.size, float(jnp.finfo(flat.dtype).eps)
    if n > DENSE_LIMIT or oracles.lower_diagonal(problem, x, found.y, batch) is not None:
        return jnp.array(False)
    hessian = oracles.flat_operator(problem, x, found.y, batch)
    product = lambda v: face.tangent(hessian(v)) + face.mu * v  # noqa: E731
    w = face.tangent(jax.random.normal(jax.random.key(0), flat.shape, flat.dtype))
    z = face.tangent(w - projected.tangent_solve(problem, x, found.y, batch, face, found.sketch)(product(w)))
    length = norm(z)
    z = z / jnp.where(length > 0, length, 1)
    return (length > 1e-3 * norm(w)) & (jnp.abs(z @ product(z)) <= n * eps / face.s)


def _off(
    problem: BilevelProblem, unravel: Callable[[Array], PyTree], at: _Point, size_fy: Array, signs: Array
) -> _Point:
    """The point with R, and what is left of the adjoint, off by what rounding may make of them: eps |y|/s, with these
    `signs`, and eps (|u|/s + |f_y|), with those of u, 1/s the largest curvature; and the face of a ball, turned.
    """
    n, s = at.y.size, at.face.s
    units = sides.UNITS if problem.y_set.polyhedral else 2 * sides.UNITS  # the multiplier's own rounding counts as much
    unit = units * float(jnp.finfo(at.y.dtype).eps) / n**0.5
    wrong = unit * norm(at.y) / s
    R = at.R + wrong * signs
    more = unit * (norm(at.u) / s + size_fy) * sides.sign(at.u)
    left = at.left + sides.sign(more @ at.left) * more
    if problem.y_set.polyhedral:
        return at._replace(R=R, left=left, wrong=wrong * signs)
    y = at.y + unit * norm(at.y) * signs
    longer = at.R + wrong * sides.sign(at.R)  # by which the multiplier changes most
    return at._replace(R=R, left=left, face=problem.y_set.face(unravel(y), unravel(longer), s))


def _error(seen: _Seen, better: Array, noise: Array, begin: _Point) -> Array:
    """Three times the largest distance of the `better` gradients, [passes, dim x], more by `noise` [], and an allowance
    for rounding; infinite where the first adjoint is not solved: an estimate by a solver that has not solved is none.
    """
    eps, n = jnp.finfo(begin.y.dtype).eps, begin.y.size
    apart = jnp.max(row_norms(better - seen.gradient[None]))
    error = 3 * noise * apart + eps * n * seen.sizes + underflow(seen.sizes, seen.u)
    return jnp.where(_solved(seen, begin), error, jnp.inf)


def _solved(seen: _Seen, begin: _Point) -> Array:
    """Whether the adjoint is, to a tenth of where it began or to rounding, []."""
    eps, n = jnp.finfo(begin.y.dtype).eps, begin.y.size
    return seen.linear_residual <= jnp.maximum(UNSOLVED * norm(begin.face.tangent(begin.left)), 10 * eps * n * seen.fy)


def implicit_solution(problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings) -> Solved:
    """y(x), differentiable in x and the problem's arrays in both modes and again: a root of y - Proj(y - s R), s fixed.

    With K = P/(1 + s mu) the projection's Jacobian, (I - K (I - s H)) v = b splits into v = b outside of the tangent
    space, and P (H + D) P v = P b (1 + s mu)/s - P H (b - P b) within; its transpose (I - (I - s H) K) w = c into
    P (H + D) P t = P c/s and w = c + (I - s H) t. NaN where the lower level is unsolved.
    """
    lower_batch = problem.lower_data.full()
    fixed, fixed_x = lax.stop_gradient((problem, x))
    fixed_batch = fixed.lower_data.full()
    found = lax.stop_gradient(projected.solve(fixed, fixed_x, lax.stop_gradient(y), fixed_batch, settings))
    face, s = found.face, found.face.s
    flat, unravel = ravel_pytree(found.y)
    hessian = oracles.flat_operator(fixed, fixed_x, found.y, fixed_batch)
    within = projected.tangent_solve(fixed, fixed_x, found.y, fixed_batch, face, found.sketch)

    def residual(flat: Array) -> Array:
        R = ravel_pytree(oracles.residual(problem, x, unravel(flat), lower_batch))[0]
        return flat - ravel_pytree(problem.y_set.project(unravel(flat - s * R)))[0]

    def forward(matvec: Any, b: Array) -> Array:
        normal = b - face.tangent(b)
        return verified(matvec, normal + within(b * (1 + s * face.mu) / s - hessian(normal)), b)

    def backward(matvec: Any, c: Array) -> Array:
        t = within(c / s)
        return verified(matvec, c + t - s * hessian(t), c)

    def tangent(matvec: Any, b: Array) -> Array:
        return lax.custom_linear_solve(matvec, b, forward, transpose_solve=backward)

    start = poisoned(flat, solved(found.status))
    solution = lax.custom_root(residual, start, lambda _, y: y, tangent)
    return Solved(unravel(solution), found.status)
