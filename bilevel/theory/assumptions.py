"""Checks of what theorems assume. Each gives a margin, shape []: >= 0 where the assumption holds, < 0 where not.

They look at single points, with dense matrices, and are exact up to rounding: one point checks a quadratic everywhere,
other functions are checked at the points given. The margin is relative, with SLACK = 1e-9 added, so that constants that
are attained pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.linear import dense_matrix
from bilevel.problem import BilevelProblem

PyTree = Any
SLACK = 1e-9


def lower_jacobian(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
    """R_y at (x, y) on all of the data, shape [dim y, dim y]: g_yy, or I - T_y."""
    flat = ravel_pytree(y)[0]
    return dense_matrix(oracles.flat_operator(problem, x, y, problem.lower_data.full()), flat.size, flat.dtype)


def strongly_convex(matrix: Array, mu: Any) -> Array:
    """Whether the symmetric part of a matrix, R_y or a Hessian, is at least mu > 0."""
    smallest = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
    return jnp.minimum(smallest / mu - 1 + SLACK, jnp.sign(mu))


def smooth(matrix: Array, L: Any) -> Array:
    """Whether |matrix|_2 <= L."""
    return 1 + SLACK - jnp.linalg.norm(matrix, 2) / L


def licq(rows: Array, active: Array, least: Any = 1e-8) -> Array:
    """Whether the active rows [k, n] (`active` [k] booleans) are linearly independent.

    The smallest singular value of the normalised active rows is at least `least`, and k roundings; no active row is
    fine. Rows of zeros never are.
    """
    if not len(rows):
        return jnp.ones((), rows.dtype)
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    unit = jnp.where(active[:, None], rows / jnp.where(length > 0, length, 1), 0)
    apart = jnp.diag(jnp.where(active, 0.0, 1.0).astype(rows.dtype))  # an inactive row is a direction of its own
    smallest = jnp.linalg.svd(jnp.concatenate([unit, apart], axis=1), compute_uv=False)[-1]
    return smallest - jnp.maximum(least, len(rows) * jnp.finfo(rows.dtype).eps)


def strict_complementarity(multipliers: Array, slacks: Array, least: Any = 1e-8) -> Array:
    """Whether of each multiplier and slack, both [k] and >= 0, exactly one is at least `least` and the other is zero.

    The margin is min over rows of max(multiplier, slack) - least, and of least - |min(multiplier, slack)|.
    """
    if not multipliers.size:
        return jnp.ones((), multipliers.dtype)
    high, low = jnp.maximum(multipliers, slacks), jnp.minimum(multipliers, slacks)
    return jnp.minimum(jnp.min(high) - least, least - jnp.max(jnp.abs(low)))


def contraction(T: Callable[[Array], Array], y: Array, q: Any) -> Array:
    """Whether the Jacobian of T at y, on raveled entries, is at most q < 1 in the maximum norm.

    That is its largest row sum of absolute values.
    """
    flat, unravel = ravel_pytree(y)
    jacobian = jax.jacfwd(lambda z: ravel_pytree(T(unravel(z)))[0])(flat)
    modulus = jnp.max(jnp.sum(jnp.abs(jacobian), axis=1))
    return jnp.minimum(q + SLACK - modulus, 1 - q)


def bounded_variance(samples: PyTree, sigma: Any) -> Array:
    """Whether the mean over axis 0 of |sample - mean|^2, all leaves together, is at most sigma^2."""
    deviation = jax.tree.map(lambda leaf: leaf - leaf.mean(axis=0, keepdims=True), samples)
    flat = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(deviation)], axis=1)
    return sigma * (1 + SLACK) + 1e-12 - jnp.sqrt(jnp.mean(jnp.sum(flat**2, axis=1)))
