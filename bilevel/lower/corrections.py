"""The adjoint at a point y, and how far the gradient would move if y and the adjoint were exact.

At (y, v) with lower residual R and adjoint residual r_v = f_y - R_y' v, d = -R_y^-1 R is a Newton step of the lower
level, and dv = R_y^-T r_v, with r_v at y + d, the adjoint's answer to it: the gradient f_x - R_x' v at (y + d, v + dv)
is right to higher order, so that its distance from the one at (y, v) is the error of that one. Both residuals are taken
off by what rounding may have left in them (`rounding`), so that the distance knows how large R_y^-1 is.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.norms import norms
from bilevel.backend.once import in_turn
from bilevel.backend.tree import norm
from bilevel.linear import UNSOLVED, LinearSolution, LinearSolver, default_solver
from bilevel.lower.directions import apply_inverse
from bilevel.lower.method import LowerSolution
from bilevel.lower.rounding import Rounding, rounding_of, seen_noise, wrong_adjoint, wrong_lower
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any
ESTIMATE_TOL = 1e-3  # relative residual of the corrections that an error is estimated by


class Look(NamedTuple):
    """What (y, v) shows: f_x - R_x' v and R_x' v, [dim x]; R and r_v = f_y - R_y' v, [dim y]; f and sizes."""

    gradient: Array
    cross: Array
    R: Array
    r_v: Array
    sizes: "Sizes"


class Sizes(NamedTuple):
    """f, and the norms of f_x, f_y, R_x' v and r_v, [] each."""

    value: Array
    fx: Array
    fy: Array
    cross: Array
    r_v: Array


class Move(NamedTuple):
    """A correction to make: y <- y - R_y^-1 r where `forward`, else v <- v + R_y^-T r, r [dim y].

    An iterative method finds it `exactly` to its own accuracy times `scale` |r|, the size of what r is the rest of;
    else to `ESTIMATE_TOL` |r|, since an error needs few digits.
    """

    r: Array
    forward: Array
    exactly: Array
    scale: Array


class Point(NamedTuple):
    """(y, v), what is seen there, and the residual that the move there left of its linear system, 0 after a factor."""

    y: Array
    v: Array
    at: Look
    left: Array


class Findings(NamedTuple):
    """What the stages find out.

    v [dim y], gradient [dim x], sizes: at (y, v), v solved. cross: R_x' v [dim x], there and then at (y + d, v).
    shifted: |r_v| at (y + d, v), with what rounding may make of it. moved: how far R_x' v moved by dv. change: how far
    the gradient moved by d and dv. noise: by how much more rounding leaves of R than `rounding` supposes, at least 1.
    unsolved: the adjoint, or a correction, is not solved. looks: taken so far.
    """

    v: Array
    gradient: Array
    sizes: Sizes
    cross: Array
    shifted: Array
    moved: Array
    change: Array
    noise: Array
    unsolved: Array
    looks: Array


def start(y: Array, v: Array, size_x: int) -> Point:
    """The point (y, v) before anything is seen there."""
    nought, gradient = jnp.zeros((), y.dtype), jnp.zeros(size_x, y.dtype)
    sizes = Sizes(nought, nought, nought, nought, jnp.full_like(nought, jnp.inf))
    zero = jnp.zeros_like(y)
    return Point(y, v, Look(gradient, gradient, zero, zero, sizes), nought)


def correct(
    look: Callable[[Array, Array], Look], system: "System", found: LowerSolution, begin: Point, estimate: bool
) -> Findings:
    """Solve the adjoint at y, the iterate, from `begin`; with `estimate` at (y + d, v) and (y + d, v + dv)."""
    nought, no = begin.left, jnp.array(False)

    def take(point: Point, move: Move) -> Point:
        step, left = system.correct(move)
        y, v = point.y - jnp.where(move.forward, step, 0), point.v + jnp.where(move.forward, 0, step)
        return Point(y, v, look(y, v), left)

    nothing = Findings(
        begin.v, begin.at.gradient, begin.at.sizes, begin.at.cross, nought, nought, nought, nought + 1, no, jnp.array(0)
    )
    stay = Move(jnp.zeros_like(begin.y), no, no, nought + 1)
    settle = partial(_settle, system, found.R if estimate else stay.r)
    stages = [settle, partial(_shift, system, begin.y, found.residual), _compare] if estimate else [settle]
    return in_turn(take, begin, stay, nothing, stages)


def _settle(system: "System", R: Array, seen: Point, found: Findings) -> tuple[Move, Findings, Array]:
    """Correct v until its residual is rounding error or no longer halves; then the Newton step from y."""
    at, size = seen.at, seen.at.sizes
    enough = 10 * jnp.finfo(R.dtype).eps * size.fy  # the linear solvers' default
    again = (found.looks < system.max_solves) & (size.r_v <= found.sizes.r_v / 2) & (size.r_v > enough)
    scale = size.fy / jnp.where(size.r_v > 0, size.r_v, 1)
    R = wrong_lower(system.rounding, R, seen.y, seen.v, at.cross)
    move = Move(jnp.where(again, at.r_v, R), ~again, again, scale)
    unsolved = size.r_v > UNSOLVED * size.fy
    found = found._replace(
        v=seen.v, gradient=at.gradient, sizes=size, cross=at.cross, unsolved=unsolved, looks=found.looks + 1
    )
    return move, found, ~again


def _shift(
    system: "System", y: Array, lower_residual: Array, seen: Point, found: Findings
) -> tuple[Move, Findings, Array]:
    """At (y + d, v): correct v."""
    unsolved = found.unsolved | (seen.left > UNSOLVED * lower_residual)
    r_v, size = seen.at.r_v, seen.at.sizes.r_v
    noise = found.noise
    if system.rounding is not None:
        noise = seen_noise(system.rounding, seen.at.R, y, seen.v, found.cross)
        r_v = wrong_adjoint(system.rounding, r_v, seen.v, seen.y - y)
        size = norm(r_v)
    move = Move(r_v, jnp.array(False), jnp.array(False), jnp.ones_like(lower_residual))
    found = found._replace(cross=seen.at.cross, shifted=size, noise=noise, unsolved=unsolved)
    return move, found, jnp.array(True)


def _compare(seen: Point, found: Findings) -> tuple[Move, Findings, Array]:
    """At (y + d, v + dv): how far everything has moved."""
    at, no = seen.at, jnp.array(False)
    moved, change = norms(at.cross - found.cross, at.gradient - found.gradient)
    unsolved = found.unsolved | (seen.left > UNSOLVED * found.shifted)
    stay = Move(jnp.zeros_like(seen.y), no, no, jnp.ones_like(moved))
    return stay, found._replace(moved=moved, change=change, unsolved=unsolved), jnp.array(True)


class System(NamedTuple):
    """The linear systems with R_y at y. correct: Move -> (step [dim y], residual []), worth repeating `max_solves`
    times. rounding: what residuals may be off by, where that is known.
    """

    correct: Callable[[Move], tuple[Array, Array]]
    max_solves: int
    rounding: Rounding | None


def system_of(
    problem: BilevelProblem, x: PyTree, found: LowerSolution, batch: PyTree, method: LinearSolver | None
) -> System:
    """By the lower level's last factor, with refinement, where there is one and no method is asked for."""
    minimize = isinstance(problem.lower, Minimize)
    rounding = rounding_of(found.factor, minimize, norm(x))
    if method is None and jax.tree.leaves(found.factor):
        return System(partial(_by_factor, found.factor, minimize), 20, rounding)
    return System(_by_method(problem, x, found, batch, method), 1, rounding)


def _by_factor(factor: PyTree, symmetric: bool, move: Move) -> tuple[Array, Array]:
    apply = partial(apply_inverse, factor, symmetric, move.r)
    step = apply() if symmetric else lax.cond(move.forward, apply, partial(apply, transpose=True))
    return step, jnp.zeros((), step.dtype)


def _by_method(
    problem: BilevelProblem, x: PyTree, found: LowerSolution, batch: PyTree, method: LinearSolver | None
) -> Callable[[Move], tuple[Array, Array]]:
    """By a solver from `linear`; what it prepares is prepared once."""
    flat, symmetric = ravel_pytree(found.iterate)[0], isinstance(problem.lower, Minimize)
    solver: Any = default_solver(flat.size, symmetric, found.sketch) if method is None else method

    def prepare(transpose: bool) -> Callable[[Move], LinearSolution]:
        matvec = oracles.flat_operator(problem, x, found.iterate, batch, transpose)
        if not hasattr(solver, "tol"):  # a factor, made once
            solve = solver.prepare(matvec, flat.size, flat.dtype)
            return lambda move: solve(move.r)
        tol = 10 * jnp.finfo(flat.dtype).eps if solver.tol is None else solver.tol

        def solve_to(move: Move) -> LinearSolution:
            goal = jnp.where(move.exactly, tol * move.scale, jnp.maximum(tol, ESTIMATE_TOL))
            return dataclasses.replace(solver, tol=goal).prepare(matvec, flat.size, flat.dtype)(move.r)

        return solve_to

    backward = prepare(True)
    onward = backward if symmetric else prepare(False)

    def correct(move: Move) -> tuple[Array, Array]:
        solution = backward(move) if symmetric else lax.cond(move.forward, onward, backward, move)
        return solution.v, solution.residual

    return correct
