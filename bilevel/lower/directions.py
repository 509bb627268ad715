"""Directions of Newton's method for a lower level without constraints, and the factors that give them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.linear import CG, GMRES, dense_matrix

PyTree = Any


def apply_inverse(factor: PyTree, minimize: bool, b: Array, transpose: bool = False) -> Array:
    """R_y^-1 b, or its transpose, by a factor of `solve`; NaN where that is not finite."""
    if minimize:
        return jax.scipy.linalg.cho_solve((factor[0].T, True), b)
    return jax.scipy.linalg.lu_solve(factor, b, trans=int(transpose))


def directions(operator: Callable, like: Array, minimize: bool, dense: bool) -> tuple[Callable, Callable, PyTree]:
    """prepare: y -> factor; apply: (factor, y, R, eta) -> (d = -R_y^-1 R, definite, trusted); zeros like a factor.

    eta is the accuracy asked for where d is iterative; trusted says that it came within a tenth of |R|.
    """
    n, dtype = like.size, like.dtype
    rounding = 10 * n * float(jnp.finfo(dtype).eps)
    yes = jnp.array(True)

    def cholesky(flat: Array) -> tuple[Array, Array]:
        """(U, s) with U'U = H + s diag(rows), rows = absolute row sums of H, with the first s of 0, rounding,
        1/256, 1/64, ... that suffices; s > 1 does (Gershgorin). A zero row gets a one on the diagonal.
        """
        with oracles.times(n):
            H = jax.vmap(operator(flat))(jnp.eye(n, dtype=dtype))  # symmetric: rows are columns
        rows = jnp.abs(H) @ jnp.ones_like(like)

        zero = jnp.zeros((), dtype)

        def go_on(carry: tuple[Array, Array, Array]) -> Array:
            upcoming, U, _ = carry
            return (upcoming == 0) | (~jnp.isfinite(U[-1]) & (upcoming <= 4))

        def attempt(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            s = carry[0]
            upcoming = jnp.where(s == 0, rounding, jnp.maximum(4 * s, 1 / 256)).astype(dtype)
            shift = jnp.where(rows <= jnp.minimum(s, 0), 1, s * rows)
            shifted = H.ravel() + lax.pad(shift, zero, [(0, 0, n)])
            L = lax.linalg.cholesky_p.bind(shifted.reshape(n, n).T)
            return upcoming, L.T.ravel(), s

        _, U, s = lax.while_loop(go_on, attempt, (zero, H.ravel(), zero))
        return U.reshape(n, n), s

    def by_cholesky(factor: tuple[Array, Array], flat: Array, R: Array, eta: Array) -> tuple[Array, Array, Array]:
        U, s = factor
        finite = jnp.isfinite(U[-1, -1])  # else steepest descent
        return -jnp.where(finite, apply_inverse(factor, True, R), R), finite & (s <= rounding), yes

    if dense and minimize:
        return cholesky, by_cholesky, (jnp.zeros((n, n), dtype), jnp.zeros((), dtype))

    def lu(flat: Array) -> PyTree:
        with oracles.times(n):
            return jax.scipy.linalg.lu_factor(dense_matrix(operator(flat), n, dtype))

    if dense:
        return (
            lu,
            lambda lu, flat, R, eta: (-apply_inverse(lu, False, R), yes, yes),
            (jnp.zeros((n, n), dtype), jnp.zeros(n, jnp.int32)),
        )

    def iterative(_: PyTree, flat: Array, R: Array, eta: Array) -> tuple[Array, Array, Array]:
        product = operator(flat)
        if minimize:
            v, _, positive = CG(tol=eta).run(product, R)
            v = jnp.where(jnp.any(v != 0), v, R)  # negative curvature at once: steepest descent
        else:
            (v, _), positive = GMRES(tol=eta).iterate(product, R), yes
        return -v, positive, norm(R - product(v)) <= 0.1 * norm(R)

    return lambda flat: (), iterative, ()
