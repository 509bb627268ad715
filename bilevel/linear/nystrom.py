"""A preconditioner for CG from a random sketch of the matrix."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.norms import gram
from bilevel.backend.tree import norm
from bilevel.linear.solvers import Matvec
from bilevel.struct import struct


@struct
class Nystrom:
    """r -> C^-1 r, C = I + rows' rows, rows [rank, n]: identity plus low rank, inverted by Woodbury's formula."""

    rows: Array
    weights: Array

    def __call__(self, r: Array) -> Array:
        return r - (self.weights @ r) @ self.weights

    def within(self, project: Matvec) -> "Nystrom":
        """The same for P C P on the range of an orthogonal projection P."""
        return _woodbury(jax.vmap(project)(self.rows))


def _woodbury(rows: Array) -> Nystrom:
    """With K K' = I + rows rows' and weights = K^-1 rows, C^-1 = I - weights' weights."""
    K = jnp.linalg.cholesky(jnp.eye(len(rows), dtype=rows.dtype) + gram(rows))
    return Nystrom(rows, jax.scipy.linalg.solve_triangular(K, rows, lower=True))


def sketch(matvec: Matvec, n: int, dtype: Any, rank: int = 20) -> Nystrom:
    """A preconditioner from `rank` products of a symmetric M with random vectors, rows of W: with Y = W M,

        M ~ Y' (Y W')^-1 Y = U' diag(l_1 >= ... >= l_rank) U,    C = I + U' diag(l_i / l_rank - 1) U.

    It takes the largest eigenvalues down to l_rank, so that CG sees the rest of the spectrum alone; C = I where M shows
    itself indefinite. One product at a time: memory is about five times rank n at most. l_rank is held
    above sqrt(eps) l_1, where rounding would show in C^-1.

    Reference: Frangella, Tropp, Udell. Randomized Nyström preconditioning. SIAM Journal on Matrix Analysis and
        Applications 44, 2023, Algorithm 2.1 and equation (1.3).
    Differs from the paper: no shift is known, so that l_rank stands for it; W is not made orthogonal.
    """
    rank, eps = min(rank, n), jnp.finfo(dtype).eps
    W = jax.random.normal(jax.random.key(0), (rank, n), dtype)
    Y = lax.map(matvec, W)
    shift = n**0.5 * eps * norm(Y)
    Y = Y + shift * W
    B = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(Y @ W.T), Y, lower=True)  # M ~ B' B
    lengths, V = jnp.linalg.eigh(gram(B))
    lengths = jnp.maximum(lengths, 0)
    least = jnp.maximum(lengths[0] - shift, eps**0.5 * lengths[-1])
    excess = jnp.maximum(lengths - shift - least, 0) / least
    size = jnp.sqrt(excess / jnp.where(lengths > 0, lengths, 1))
    rows = size[:, None] * (V.T @ B)
    return _woodbury(jnp.where(jnp.isfinite(rows).all(), rows, 0))
