"""GMRES for general M."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from bilevel.backend.tree import norm
from bilevel.linear.solvers import LinearSolver, Matvec, first_residual, target_residual
from bilevel.struct import static, struct

MEMORY = 2**18  # numbers that the Krylov basis may take by default
LEAST = 50  # dimension of the Krylov space, by default, however many unknowns there are
BLOCK = 64  # rows of the basis that a new vector is made orthogonal to at a time


@struct
class GMRES(LinearSolver):
    """Restarted GMRES for general M (Saad and Schultz, 1986).

    Arnoldi's vectors are made orthogonal twice, so that rounding does not part them; Givens rotations keep the small
    least-squares problem triangular and tell the residual after each product, so that a cycle ends where it is small
    enough. Each cycle starts from the recomputed residual, which never grows from one to the next: a cycle that fails
    to reduce it ends the loop.

    Args:
        tol: relative, |b - M v| <= tol |b|; default 10 eps.
        restart: dimension of the Krylov space, capped at n; memory is restart x n. Default: what fits into 2^18
            numbers, so n itself up to 512 unknowns, and never less than 50. A general M may need n, and a smaller one
            can stagnate at any residual.
        max_iterations: products at most; default 20 restarts or 10 n, whatever is more.
    """

    tol: Any = None
    restart: int | None = static(default=None)
    max_iterations: int | None = static(default=None)

    def _cycles(self, n: int) -> tuple[int, int]:
        """(products per cycle, cycles)."""
        m = min(max(LEAST, MEMORY // n) if self.restart is None else self.restart, n)
        limit = max(20 * m, 10 * n) if self.max_iterations is None else self.max_iterations
        m = min(m, limit)
        return m, -(-limit // m)

    def max_products(self, n: int) -> int:
        m, cycles = self._cycles(n)
        return 1 + (m + 1) * cycles

    def iterate(self, matvec: Matvec, b: Array, v0: Array | None = None) -> tuple[Array, Array]:
        m, cycles = self._cycles(b.size)
        v0, r0 = first_residual(matvec, b, v0)
        target = target_residual(self.tol, b, r0)

        def go_on(c: _Restarts) -> Array:
            return c.progress & (c.size > target) & (c.count < cycles)

        def body(c: _Restarts) -> _Restarts:
            step, products = _cycle(matvec, c.r, c.size, target, m)
            r = b - matvec(c.v + step)
            size = norm(r)
            progress = size < c.size
            v, r, size = (jnp.where(progress, new, old) for new, old in ((c.v + step, c.v), (r, c.r), (size, c.size)))
            return _Restarts(v, r, size, c.products + products, c.count + 1, progress)

        start = _Restarts(v0, r0, norm(r0), jnp.array(0), jnp.array(0), jnp.array(True))
        end = lax.while_loop(go_on, body, start)
        return end.v, end.products


class _Restarts(NamedTuple):
    """Between two cycles: v [n]; r = b - M v, recomputed; its norm; products and cycles so far; whether the last cycle
    made |r| smaller.
    """

    v: Array
    r: Array
    size: Array
    products: Array
    count: Array
    progress: Array


class _Arnoldi(NamedTuple):
    """A cycle after k products: M Q_k' = Q_(k+1)' H, and W H = R upper triangular.

    Q: orthonormal rows, k + 1 of them, then zeros, [rows, n]. R: its first k columns, then those of the identity,
    [m, m]. W: the product of the rotations, [m + 1, m + 1]. rank: columns of R that are solved with, k, or k - 1 where
    the last one vanished. size: |r| after them. alive: the Krylov space is not exhausted.
    """

    Q: Array
    R: Array
    W: Array
    k: Array
    rank: Array
    size: Array
    alive: Array


def _cycle(matvec: Matvec, r: Array, size: Array, target: Array, m: int) -> tuple[Array, Array]:
    """(the step d in a Krylov space of r that makes |r - M d| least, products): of dimension m, or as soon as that is
    at most `target`.
    """
    eps, n, dtype = jnp.finfo(r.dtype).eps, r.size, r.dtype
    block = min(BLOCK, m + 1)
    rows = -(-(m + 1) // block) * block

    def go_on(c: _Arnoldi) -> Array:
        return c.alive & (c.size > target) & (c.k < m)

    def body(c: _Arnoldi) -> _Arnoldi:
        k, w = c.k, matvec(c.Q[c.k])
        full = norm(w)
        w, h = _orthogonal(c.Q, w, k, block)
        w, again = _orthogonal(c.Q, w, k, block)
        length = norm(w)
        alive = length > 10 * eps * full  # else w is rounding error
        h = (h + again)[: m + 1].at[k + 1].set(jnp.where(alive, length, 0))
        column = c.W @ h
        a, below = column[k], column[k + 1]
        diagonal = jnp.hypot(a, below)
        good = diagonal > 10 * eps * full  # else M is singular on the space: this direction changes nothing
        safe = jnp.where(good, diagonal, 1)
        cosine, sine = jnp.where(good, a / safe, 1), jnp.where(good, below / safe, 0)
        upper, lower = c.W[k], c.W[k + 1]
        W = c.W.at[k].set(cosine * upper + sine * lower).at[k + 1].set(cosine * lower - sine * upper)
        column = jnp.where(jnp.arange(m) < k, column[:m], 0).at[k].set(safe)
        R = c.R.at[:, k].set(jnp.where(good, column, c.R[:, k]))
        Q = c.Q.at[k + 1].set(jnp.where(alive, w / jnp.where(alive, length, 1), 0))
        left = jnp.where(good, jnp.abs(size * W[k + 1, 0]), c.size)
        return _Arnoldi(Q, R, W, k + 1, jnp.where(good, k + 1, k), left, alive)

    Q = jnp.zeros((rows, n), dtype).at[0].set(r / jnp.where(size > 0, size, 1))
    start = _Arnoldi(Q, jnp.eye(m, dtype=dtype), jnp.eye(m + 1, dtype=dtype), jnp.array(0), jnp.array(0), size,
                     jnp.array(True))  # fmt: skip
    end = lax.while_loop(go_on, body, start)
    rhs = jnp.where(jnp.arange(m) < end.rank, size * end.W[:m, 0], 0)
    return solve_triangular(end.R, rhs) @ end.Q[:m], end.k


def _orthogonal(Q: Array, w: Array, k: Array, block: int) -> tuple[Array, Array]:
    """(w less its part in the first k + 1 rows of Q, that part's coefficients [rows]), block by block: what a product
    costs grows with k, not with the rows that there is room for.
    """

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w, h = carry
        part = lax.dynamic_slice_in_dim(Q, i * block, block)
        coefficients = part @ w
        return w - coefficients @ part, lax.dynamic_update_slice_in_dim(h, coefficients, i * block, 0)

    return lax.fori_loop(0, k // block + 1, body, (w, jnp.zeros(len(Q), w.dtype)))
