"""Derivatives of F through a lower level solved by `projected`: the hypergradient with its error, F for `jax.grad`."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.lower import projected
from bilevel.lower.polyhedral_gradient import conclude, lower_failed
from bilevel.lower.projected import Settings
from bilevel.problem import BilevelProblem
from bilevel.record import Hypergradient, Status

PyTree = Any


def differentiate(
    problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings, estimate: bool = True
) -> Hypergradient:
    """The hypergradient from the warm start y, by corrections of y and of the adjoint u in the face's tangent space.

    The first solves for u and gives the gradient; with `estimate` a second one gives a gradient that is right to higher
    order: twice the distance of the two, plus an allowance for rounding, estimates the first one's error. It supposes
    that the face is the right one, which the margin shows; no proof from constants is offered here.
    """
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    found = projected.solve(problem, x, y, lower_batch, settings)
    face = found.face
    flat, unravel = ravel_pytree(found.y)
    solve = projected.tangent_solve(problem, x, found.y, lower_batch, face, found.sketch)

    def correct(carry: tuple, _: None) -> tuple:
        """Solve for the corrections of y and u, and look at the corrected point."""
        flat, u, r_y, r_u = carry
        flat = ravel_pytree(problem.y_set.project(unravel(flat + solve(-r_y))))[0]
        u = u + solve(r_u)
        value, gradients = oracles.upper_value_and_gradients(problem, x, unravel(flat), upper_batch)
        directions = oracles.directions(problem, x, unravel(flat), unravel(u), lower_batch)
        fx, fy, R, Hu, cross = (ravel_pytree(part)[0] for part in (*gradients, *directions))
        r_y, r_u = face.tangent(R), face.tangent(fy - Hu - face.mu * u)
        sizes = jnp.stack([jnp.linalg.norm(part) for part in (r_u, fx, cross, fy)])
        return (flat, u, r_y, r_u), (flat, u, value, fx - cross, sizes)

    R = ravel_pytree(oracles.residual(problem, x, found.y, lower_batch))[0]
    fy = ravel_pytree(oracles.upper_gradients(problem, x, found.y, upper_batch)[1])[0]
    begin = flat, jnp.zeros_like(flat), face.tangent(R), face.tangent(fy)
    ys, us, values, slopes, sizes = lax.scan(correct, begin, length=2 if estimate else 1)[1]
    eps = jnp.finfo(flat.dtype).eps
    if estimate:
        error = 2 * jnp.linalg.norm(slopes[1] - slopes[0]) + eps * flat.size * jnp.sum(sizes[0, 1:3])
        solved = sizes[0, 0] <= jnp.maximum(0.1 * jnp.linalg.norm(begin[3]), 10 * eps * flat.size * sizes[0, 3])
        error = jnp.where(solved, error, jnp.inf)  # an estimate by a solver that has not solved is none
        good = jnp.where(jnp.isfinite(error), Status.ESTIMATED, Status.UNSOLVED_LINEAR)
    else:
        error, good = jnp.full((), jnp.nan, flat.dtype), jnp.array(Status.UNCHECKED)
    return conclude(
        found.status, good, x, values[0], slopes[0], error,
        y=unravel(ys[0]), lower_residual=found.residual, linear_residual=sizes[0, 0], active_margin=face.margin,
        v=unravel(us[0]),
    )  # fmt: skip


def implicit_value(problem: BilevelProblem, x: PyTree, y: PyTree, settings: Settings) -> Array:
    """f(x, y(x)), differentiable in x in both modes and again: a root of y - Proj(y - s R(x, y)), s fixed.

    With K = P/(1 + s mu) the projection's Jacobian, (I - K (I - s H)) v = b splits into v = b outside of the tangent
    space, and P (H + D) P v = P b (1 + s mu)/s - P H (b - P b) within; its transpose (I - (I - s H) K) w = c into
    P (H + D) P t = P c/s and w = c + (I - s H) t. NaN where the lower level is unsolved.
    """
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    fixed_x = lax.stop_gradient(x)
    found = lax.stop_gradient(projected.solve(problem, fixed_x, lax.stop_gradient(y), lower_batch, settings))
    face, s = found.face, found.face.s
    flat, unravel = ravel_pytree(found.y)
    hessian = oracles.flat_operator(problem, fixed_x, found.y, lower_batch)
    within = projected.tangent_solve(problem, fixed_x, found.y, lower_batch, face, found.sketch)

    def residual(flat: Array) -> Array:
        R = ravel_pytree(oracles.residual(problem, x, unravel(flat), lower_batch))[0]
        return flat - ravel_pytree(problem.y_set.project(unravel(flat - s * R)))[0]

    def forward(_: Any, b: Array) -> Array:
        normal = b - face.tangent(b)
        return normal + within(b * (1 + s * face.mu) / s - hessian(normal))

    def backward(_: Any, c: Array) -> Array:
        t = within(c / s)
        return c + t - s * hessian(t)

    def tangent(matvec: Any, b: Array) -> Array:
        return lax.custom_linear_solve(matvec, b, forward, transpose_solve=backward)

    start = jnp.where(lower_failed(found.status), jnp.nan, flat)
    solution = lax.custom_root(residual, start, lambda _, y: y, tangent)
    return oracles.upper_value(problem, x, unravel(solution), upper_batch)
