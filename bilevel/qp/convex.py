"""Factors of a Hessian that is only positive semidefinite, as below a linear program or a lasso written as u - v.

The active rows may make the minimiser of a convex quadratic unique where its Hessian H does not:

1. A proximal step, with H + diag(shift) in place of H, is unique. Repeated from where it ends it comes to a minimiser;
   a linear g takes a finite number of steps.
2. On the active rows C_a that have a multiplier the solution is that of

       [H + C_a'D C_a   C_a'] [u]   [r         ]
       [C_a             0   ] [v] = [s         ],    and  v + D s  is the multiplier with H alone,

   for any diagonal D > 0. The matrix in the corner is positive definite exactly where H is on the face of these rows,
   that is where the minimiser is unique, but for what rows without a multiplier may add.

Reference: Rockafellar. Monotone operators and the proximal point algorithm. SIAM Journal on Control and Optimization
    14, 1976.
"""

import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.loops import once_if
from bilevel.backend.tree import row_norms
from bilevel.qp.active_set import Factor, with_rows


def definite(L: Array, diagonal: Array) -> Array:
    """Whether the pivots of L [n, n], a matrix's Cholesky factor, are more than rounding of its diagonal [n], []."""
    eps, n = float(jnp.finfo(L.dtype).eps), len(diagonal)
    return jnp.all(jnp.diagonal(L) ** 2 > n * eps * diagonal)


def factorize_convex(H: Array, C: Array, unit: Array) -> Factor:
    """The factors of H [n, n] and the rows C [m, n]; where H is not definite, but for rounding, of H + diag(shift).

    The shift is sqrt(eps) times the diagonal of H, and where that is zero times `unit` [], a curvature. NaN where that
    does not help: H has a negative eigenvalue.
    """
    diagonal = jnp.diagonal(H)
    small = float(jnp.finfo(H.dtype).eps) ** 0.5
    most = small * jnp.where(diagonal > 0, diagonal, unit)

    L = lax.linalg.cholesky(H, symmetrize_input=False)
    again = lambda _: (lax.linalg.cholesky(H + jnp.diag(most), symmetrize_input=False), most)  # noqa: E731
    L, shift = once_if(~definite(L, diagonal), again, (L, jnp.zeros_like(diagonal)))
    nothing = jnp.zeros(len(C), H.dtype)
    return with_rows(L, diagonal, C)._replace(shift=shift, pin=nothing)


def shifted(factor: Factor) -> Array:
    """Whether these are the factors of a shifted Hessian, []."""
    return jnp.array(False) if factor.shift is None else jnp.any(factor.shift != 0)


def pinned(factor: Factor, C: Array, held: Array) -> Factor:
    """The factors of H + C_a'D C_a, from those of H + diag(shift), for the rows `held` [m]; NaN where H is not definite
    on the face of these.
    """
    assert factor.shift is not None
    H = factor.L @ factor.L.T - jnp.diag(factor.shift)
    length = row_norms(C)
    rows = C / jnp.where(length > 0, length, 1)[:, None]
    size = rows**2 @ (factor.shift / float(jnp.finfo(C.dtype).eps) ** 0.5)  # the curvature of H along a row's entries
    weight = jnp.where(held, size, 0)
    corner = H + rows.T @ (weight[:, None] * rows)
    L = lax.linalg.cholesky(corner, symmetrize_input=False)
    L = jnp.where(definite(L, jnp.diagonal(corner)), L, jnp.nan)
    more = with_rows(L, factor.diagonal, C)
    return more._replace(shift=jnp.zeros_like(factor.shift), pin=weight / jnp.where(length > 0, length, 1) ** 2)
