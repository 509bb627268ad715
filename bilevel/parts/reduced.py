"""The reduced problem: what upper constraints are in x alone, to first order.

    min over x in X of F(x)   with   G(x, y(x)) <= 0,   H(x, y(x)) = 0,

X a polyhedron. With J_G and J_H the gradients through y(x) (`Hypergradient.constraints`), x is stationary where

    grad F + J_G' lam + J_H' mu + nu = 0,    lam >= 0,    lam'G = 0,    nu normal to X at x.

How far it is from that is the size over s of the step d which is nearest to -s grad F among those that keep x in X, and
constraints to first order,

    d in X - x,    J_G d <= max(-G, 0),    J_H d = 0.

Without upper constraints d/s is the gradient mapping. The multipliers of the projection, over s, are (lam, mu, nu).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular

from bilevel.backend.tree import norm
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import Rows
from bilevel.qp.projection import Region
from bilevel.record import ConstraintGradients, Hypergradient

PyTree = Any


class Multipliers(NamedTuple):
    """Those of G and of H, shapes [rows]; F* falls by lam_i for each unit by which row i gives way, to first order."""

    inequality: Array
    """Of G, >= 0."""
    equality: Array
    """Of H."""


class Stationarity(NamedTuple):
    """How far a point is from stationary, and the multipliers that say so."""

    residual: Array
    """|d|/s, shape []; NaN where the program for d was not solved."""
    error: Array
    """By how much the errors of the gradients may change it, shape []."""
    multipliers: Multipliers
    """Of the projection: those of a solution where the residual is 0, and where gradients are independent the only
    ones."""
    violation: Array
    """|(max(G, 0), H)|, shape []."""


def flat_jacobian(found: ConstraintGradients) -> Array:
    """The gradients of the rows, shape [rows, dim x], x raveled."""
    return jax.vmap(lambda row: ravel_pytree(row)[0])(found.jacobian)


def split(problem: BilevelProblem, x: PyTree, y: PyTree, values: Array) -> tuple[Array, Array]:
    """Numbers [rows], one for each row, as (those of G, those of H); y gives shapes only."""
    assert problem.upper_constraints is not None
    G, _ = jax.eval_shape(problem.upper_constraints.values, x, y)
    return values[: G.size], values[G.size :]


def step_rows(problem: BilevelProblem, x: PyTree, y: PyTree, c: Array, J: Array, keep: bool) -> Rows:
    """The rows, on the raveled step d, of c + J d <= 0 for G and c + J d = 0 for H, and of x + d in X.

    c [rows] and J [rows, dim x] are those of G and H; y gives shapes only. keep: constraints that do not hold at x are
    only kept from growing, as in the module's program for d.
    """
    flat, blocks = ravel_pytree(x)[0], []
    if problem.upper_constraints is not None:
        G, H = split(problem, x, y, c)
        equal = jnp.zeros_like(H) if keep else -H
        hi = jnp.concatenate([jnp.maximum(-G, 0) if keep else -G, equal])
        blocks.append((J, jnp.concatenate([jnp.full_like(G, -jnp.inf), equal]), hi))
    for C, low, high in problem.x_set.rows(x):
        low, high = low - C @ flat, high - C @ flat
        if keep:  # an x beside X by rounding
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        blocks.append((C, low, high))
    none = jnp.zeros(0, flat.dtype)
    blocks = blocks or [(jnp.zeros((0, flat.size), flat.dtype), none, none)]
    C, lo, hi = (jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
    return Rows(C, lo, hi, jnp.zeros((len(lo), 0), flat.dtype))


def violation(values: tuple[Array, Array]) -> Array:
    """|(max(G, 0), H)|, shape [], of the values (G, H)."""
    G, H = values
    return norm((jnp.maximum(G, 0), H))


def upper_violation(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array | float:
    """The same of the problem's upper constraints at (x, y), 0 without any."""
    rows = problem.upper_constraints
    return 0.0 if rows is None else violation(rows.values(x, y))


def short_length(x: PyTree, gradient: PyTree) -> Array:
    """s = min(1, eps^0.4 (1 + |x|)/|gradient|), []: the length of a step along the gradient that is short against x, so
    that a small X does not hide a large gradient, and long against rounding.
    """
    eps, length = jnp.finfo(ravel_pytree(x)[0].dtype).eps, norm(gradient)
    return jnp.minimum(1, eps**0.4 * (1 + norm(x)) / jnp.where(length > 0, length, 1))


def stationarity(problem: BilevelProblem, x: PyTree, found: Hypergradient) -> Stationarity:
    """How far x is from stationary, by the hypergradient there."""
    assert found.constraints is not None
    rows, s = found.constraints, short_length(x, found.gradient)
    limits = step_rows(problem, x, found.y, rows.values, flat_jacobian(rows), keep=True)
    nearest = Region.of(limits).project(-s * ravel_pytree(found.gradient)[0])
    weights = nearest.multipliers[: len(rows.values)] / s
    residual = jnp.where(nearest.exact & ~nearest.empty, norm(nearest.y) / s, jnp.nan)
    more = jnp.where(weights != 0, jnp.abs(weights) * rows.error_bound, 0)
    return Stationarity(
        residual=residual,
        error=found.error_bound + jnp.sum(more),
        multipliers=Multipliers(*split(problem, x, found.y, weights)),
        violation=violation(split(problem, x, found.y, rows.values)),
    )


class Way(NamedTuple):
    """The step of a quadratic program."""

    d: Array
    """[dim x]"""
    multipliers: Array
    """[rows], of the upper constraints, G first."""


def quadratic_step(
    problem: BilevelProblem, x: PyTree, y: PyTree, gradient: Array, c: Array, J: Array, B: Array, before: Array
) -> Way:
    """The d [dim x] of least gradient'd + d'B d/2 with c + J d <= 0 for G, c + J d = 0 for H, and x + d in X.

    It is a projection in z = L'd, B = L L'. Where the rows contradict each other those of the upper constraints give
    way, to where they are violated least, and the multipliers are those from `before`. y gives shapes only.
    """
    limits = step_rows(problem, x, y, c, J, keep=False)
    L = lax.linalg.cholesky(B, symmetrize_input=False)
    z, multipliers = -solve_triangular(L, gradient, lower=True), before
    if len(limits.lo):
        W = solve_triangular(L, limits.C.T, lower=True).T
        found = Region.of(limits._replace(C=W)).project(z, jnp.arange(len(limits.lo)) < len(c))
        z, multipliers = found.y, jnp.where(found.empty, before, found.multipliers[: len(c)])
    return Way(solve_triangular(L, z, lower=True, trans=1), multipliers)
