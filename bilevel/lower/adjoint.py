"""Derivatives of F through a lower level without constraints, at any y that a `LowerMethod` found.

`differentiate` is the hypergradient with its error, as `bilevel.hypergradient` defines it. `implicit_value` is F for
`jax.grad`: with R(x, y(x)) = 0 the derivative of y along d is -R_y^-1 R_x d, and its adjoint -R_x' R_y^-T w: one linear
system with the lower level's last factor, or by an iterative solver.
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
from bilevel.backend.tree import norm
from bilevel.linear import LinearSolution, LinearSolver, default_solver, gram, pack_scalars, refine
from bilevel.linear.nystrom import Nystrom
from bilevel.lower.directions import apply_inverse
from bilevel.lower.method import Adjoint, LowerSolution, Unrolled
from bilevel.problem import BilevelProblem, Constants, Minimize, check_like
from bilevel.record import Hypergradient, Status

PyTree = Any
ESTIMATE_TOL = 1e-3  # relative residual of the corrections that an error is estimated by


def differentiate(problem: BilevelProblem, x: PyTree, found: LowerSolution, adjoint: Adjoint) -> Hypergradient:
    """The hypergradient at (x, y) for y = found.y, with its error."""
    y, constants, lower_residual = found.y, adjoint.constants, found.residual
    if adjoint.v is not None:
        check_like("v", adjoint.v, y, "init's y0")
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    if isinstance(adjoint.method, Unrolled):
        return _unrolled(problem, x, y, adjoint.method, found.status)

    flat_y, unravel = ravel_pytree(y)
    flat_x, unravel_x = ravel_pytree(x)
    dtype = flat_y.dtype
    inverse = _inverse(problem, x, y, lower_batch, adjoint.method, found.factor, found.sketch)

    def look(y: Array, v: Array) -> _Look:
        value, gradients = oracles.upper_value_and_gradients(problem, x, unravel(y), upper_batch)
        directions = oracles.directions(problem, x, unravel(y), unravel(v), lower_batch)[1:]
        fx, fy, Hv, cross = (ravel_pytree(part)[0] for part in (*gradients, *directions))
        return _Look(value, fx - cross, cross, fy - Hv, fy)

    start = jnp.zeros_like(flat_y) if adjoint.v is None else ravel_pytree(adjoint.v)[0]
    estimated = adjoint.estimate and constants is None
    flat_v, gradient, seen = _passes(look, inverse, flat_x.size, flat_y, start, found.R, lower_residual, estimated)
    value, linear_residual = seen.value, seen.r_v
    rounding = jnp.finfo(dtype).eps * (flat_y.size + flat_x.size)
    if constants is not None:
        error = _proved(constants, x, flat_y, flat_v, seen.fx, lower_residual, linear_residual, rounding)
        good = jnp.where(jnp.isfinite(error), Status.CONVERGED, Status.UNCHECKED)
    elif adjoint.estimate:
        scale = seen.fx + seen.cross + seen.moved / jnp.where(seen.shifted > 0, seen.shifted, 1) * seen.fy
        error = 2 * seen.change + rounding * scale
        error = jnp.where(seen.unsolved > 0, jnp.inf, error)  # an estimate by a solver that has not solved is none
        good = jnp.where(jnp.isfinite(error), Status.ESTIMATED, Status.UNSOLVED_LINEAR)
    else:
        error, good = jnp.full((), jnp.nan, dtype), jnp.array(Status.UNCHECKED)
    solved = jnp.where(found.status == Status.CONVERGED, good, found.status)
    finite = jnp.isfinite(seen.fx + seen.cross + value + lower_residual + linear_residual)
    return Hypergradient(
        value=value,
        gradient=unravel_x(jnp.where(finite, gradient, jnp.nan)),  # a failure is never a number
        y=y,
        lower_residual=lower_residual,
        linear_residual=linear_residual,
        error_bound=jnp.where(finite & ~(jnp.isnan(error) & (constants is not None)), error, jnp.inf),
        active_margin=jnp.full((), jnp.inf, dtype),
        status=jnp.where(finite, solved, Status.NONFINITE),
        v=unravel(flat_v),
    )


def implicit_value(
    problem: BilevelProblem, x: PyTree, y: PyTree, solve_lower: Callable[..., LowerSolution],
    method: LinearSolver | None,
) -> Array:  # fmt: skip
    """f(x, y(x)), differentiable in x in both modes and again; y(x) by `solve_lower` from the warm start y.

    NaN where the lower level has no finite solution.
    """
    symmetric = isinstance(problem.lower, Minimize)
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    found = solve_lower(problem, lax.stop_gradient(x), lax.stop_gradient(y), lower_batch)
    flat, unravel = ravel_pytree(found.y)
    flat = jnp.where(found.status == Status.NONFINITE, jnp.nan, flat)
    linear = default_solver(flat.size, symmetric, found.sketch) if method is None else method

    def residual(flat: Array) -> Array:
        return ravel_pytree(oracles.residual(problem, x, unravel(flat), lower_batch))[0]

    def solve(transpose: bool, matvec: Callable, b: Array) -> Array:
        if method is None and jax.tree.leaves(found.factor):
            return refine(matvec, partial(apply_inverse, found.factor, symmetric, transpose=transpose), b)
        return linear.iterate(matvec, b)[0]

    def tangent(matvec: Callable, b: Array) -> Array:
        return lax.custom_linear_solve(
            matvec, b, partial(solve, False), transpose_solve=partial(solve, True), symmetric=symmetric
        )

    solution = lax.custom_root(residual, lax.stop_gradient(flat), lambda _, y: y, tangent)
    return oracles.upper_value(problem, x, unravel(solution), upper_batch)


class _Look(NamedTuple):
    """What (y, v) shows: f; f_x - R_x' v; R_x' v; f_y - R_y' v; f_y."""

    value: Array
    gradient: Array
    cross: Array
    r_v: Array
    fy: Array


class _Seen(NamedTuple):
    """|r_v|, f, |f_x|, |f_y|, |R_x' v| at (y, v); then |r_v| at (y + d, v), and how far R_x' v and the gradient moved
    by dv, and by d and dv. unsolved: a correction is not solved. In the passes' loop packed in one vector, the norms
    squared: each array that leaves it and each root is a kernel to compile.
    """

    r_v: Array
    value: Array
    fx: Array
    fy: Array
    cross: Array
    shifted: Array
    moved: Array
    change: Array
    unsolved: Array


def _passes(
    look: Callable, inverse: "_Inverse", size_x: int, y: Array, v: Array, R: Array, lower_residual: Array,
    estimate: bool,
) -> tuple[Array, Array, _Seen]:  # fmt: skip
    """(v, f_x - R_x' v, what is seen) at (y, v) with v solved, then at (y + d, v) and at (y + d, v + dv).

    d = -R_y^-1 R and dv = R_y^-T r_v at y + d: the last gradient is right to higher order, so its distance to the first
    is the first one's error. One loop with one look and one solve a pass, so that each is compiled once.
    Stage 0 solves for v, 1 is at y + d, 2 at v + dv; without `estimate` stage 0 is all.
    """
    dtype, stages = y.dtype, 3 if estimate else 1
    enough = (10 * jnp.finfo(dtype).eps) ** 2  # the linear solvers' default, squared

    def body(carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        y, v, first_v, kept, scalars = carry  # kept: the gradient of stage 0, the last stage's R_x' v; zeros before
        stage, count, *rest = scalars
        c, at = _Seen(*rest), look(y, v)
        difference = jnp.stack([at.gradient, at.cross]) - kept
        by_y, by_x = gram(jnp.stack([at.r_v, at.fy])), gram(difference)
        r_v, fy, change, moved = by_y[0, 0], by_y[1, 1], by_x[0, 0], by_x[1, 1]
        refine = (stage == 0) & (count < inverse.max_solves) & (r_v <= c.r_v / 4) & (r_v > enough * fy)
        solved = (stage == 0) & ~refine
        rhs = jnp.where(solved, R if estimate else 0, jnp.where(stage == 2, 0, at.r_v))
        step, residual = inverse.correct(solved, refine, rhs, jnp.sqrt(fy / jnp.where(r_v > 0, r_v, 1)))
        unsolved = (c.unsolved > 0) | (solved & (r_v > 0.01 * fy))
        if residual is not None:
            scale = jnp.where(solved, lower_residual, jnp.where(stage == 1, jnp.sqrt(r_v), jnp.inf))
            unsolved = unsolved | (residual > 0.1 * scale)
        fx = jnp.maximum(change + 2 * by_x[0, 1] + moved, 0)
        now = _Seen(r_v, at.value, fx, fy, moved, r_v, moved, change, unsolved)
        held = [stage > 0] * 5 + [stage != 1]
        seen = [*(jnp.where(*args) for args in zip(held, c, now, strict=False)), *now[6:]]
        return (
            y - jnp.where(solved, step, 0),
            v + jnp.where(solved, 0, step),
            jnp.where(stage == 0, v, first_v),
            kept + jnp.where(jnp.arange(2)[:, None] >= jnp.where(refine, 2, stage).astype(int), difference, 0),
            pack_scalars([jnp.where(refine, 0, stage + 1), count + 1, *seen], dtype, count),
        )

    start = y, v, v, jnp.zeros((2, size_x), dtype), jnp.zeros(2 + len(_Seen._fields), dtype).at[2].set(jnp.inf)
    _, _, v, kept, scalars = lax.while_loop(lambda carry: carry[-1][0] < stages, body, start)
    roots = _Seen(*jnp.sqrt(jnp.abs(scalars[2:])))
    return v, kept[0], roots._replace(value=scalars[3], unsolved=scalars[-1])


class _Inverse(NamedTuple):
    """correct(forward, exactly, r, scale) -> (R_y^-1 r where `forward`, else R_y^-T r; its residual or None), to be
    repeated `max_solves` times; by iterative methods `exactly` to their accuracy times scale |r|, the size of what r
    is the rest of, else to `ESTIMATE_TOL` |r|: an error needs few digits.
    """

    correct: Callable[[Array, Array, Array, Array], tuple[Array, Array | None]]
    max_solves: int


def _inverse(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, method: LinearSolver | None, factor: PyTree,
    sketch: Nystrom | None,
) -> _Inverse:  # fmt: skip
    """By the lower level's last factor, with refinement, where there is one and no method is asked for."""
    flat = ravel_pytree(y)[0]
    symmetric = isinstance(problem.lower, Minimize)
    if method is None and jax.tree.leaves(factor):

        def by_factor(forward: Array, exactly: Array, r: Array, scale: Array) -> tuple[Array, None]:
            apply = partial(apply_inverse, factor, symmetric, r)
            found = apply() if symmetric else lax.cond(forward, apply, partial(apply, transpose=True))
            return found, None

        return _Inverse(by_factor, 20)
    method = default_solver(flat.size, symmetric, sketch) if method is None else method

    def prepare(transpose: bool) -> Callable[[Array, Array, Array], LinearSolution]:
        matvec = oracles.flat_operator(problem, x, y, batch, transpose)
        if not hasattr(method, "tol"):  # a factor, made once
            solve = method.prepare(matvec, flat.size, flat.dtype)
            return lambda exactly, r, scale: solve(r)
        settings: Any = method
        tol = 10 * jnp.finfo(flat.dtype).eps if settings.tol is None else settings.tol

        def solve_to(exactly: Array, r: Array, scale: Array) -> LinearSolution:
            to = dataclasses.replace(settings, tol=jnp.where(exactly, tol * scale, jnp.maximum(tol, ESTIMATE_TOL)))
            return to.prepare(matvec, flat.size, flat.dtype)(r)

        return solve_to

    backward = prepare(True)
    onward = backward if symmetric else prepare(False)

    def by_method(forward: Array, exactly: Array, r: Array, scale: Array) -> tuple[Array, Array]:
        solve = backward if symmetric else lambda *args: lax.cond(forward, onward, backward, *args)
        found = solve(exactly, r, scale)
        return found.v, found.residual

    return _Inverse(by_method, 1)


def _proved(
    c: Constants,
    x: PyTree,
    y: Array,
    v: Array,
    size_fx: Array,
    lower_residual: Array,
    linear_residual: Array,
    rounding: Array,
) -> Array:
    """The bound of the module's docstring, each computed residual raised by what rounding may have hidden in it."""
    size_x, size_y, size_v = norm(x), jnp.linalg.norm(y), jnp.linalg.norm(v)
    R = lower_residual + rounding * (c.L_g * size_y + c.C_gxy * size_x + lower_residual)
    r_v = linear_residual + rounding * (c.L_g * size_v + c.L_fy * size_y)
    delta = R / c.mu
    eps_v = (r_v + c.L_fy * delta + c.L_gyy * size_v * delta) / c.mu
    bound = c.L_fx * delta + c.L_gxy * size_v * delta + c.C_gxy * eps_v
    return bound + rounding * (size_fx + c.L_fx * size_y + c.C_gxy * size_v)


def _unrolled(problem: BilevelProblem, x: PyTree, y: PyTree, method: Unrolled, status: Array) -> Hypergradient:
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    (value, last), gradient = oracles.unrolled_objective(
        problem, x, y, method.num_steps, method.step_size, upper_batch, lower_batch
    )
    nan = jnp.full((), jnp.nan, value.dtype)
    finite = jnp.isfinite(ravel_pytree(gradient)[0]).all() & jnp.isfinite(value)
    return Hypergradient(
        value=value,
        gradient=gradient,
        y=last,
        lower_residual=norm(oracles.residual(problem, x, last, lower_batch)),
        linear_residual=nan,
        error_bound=jnp.where(finite, nan, jnp.inf),
        active_margin=jnp.full((), jnp.inf, value.dtype),
        status=jnp.where(finite, jnp.where(status == Status.CONVERGED, Status.UNCHECKED, status), Status.NONFINITE),
        v=jax.tree.map(jnp.zeros_like, last),
    )
