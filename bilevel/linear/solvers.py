"""Linear systems M v = b from products with M: CG, MINRES, Neumann, Dense; `gmres` has GMRES.

Each solver is a pytree with `prepare(matvec, n, dtype) -> solve`, and `solve(b, v0) -> LinearSolution(v, residual,
iterations)` with the *recomputed* residual norm |b - M v|. Vectors are flat, shape [n]; without v0 the start is 0,
which saves a product. The loop ends at |residual| <= max(tol, eps/10) |b|, at `max_iterations`, or where rounding or
indefiniteness stops progress; a NaN ends it at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.norms import norms
from bilevel.backend.tree import norm, poisoned
from bilevel.struct import static, struct

Matvec = Callable[[Array], Array]
UNSOLVED = 0.1  # what has a larger residual, relative to b, is no solution


class LinearSolution(NamedTuple):
    """v [n]; residual |b - M v| []; iterations [] (products with M)."""

    v: Array
    residual: Array
    iterations: Array


class LinearSolver:
    """The protocol."""

    def prepare(self, matvec: Matvec, n: int, dtype: Any) -> Callable[..., LinearSolution]:
        """A function (b [n], v0 [n] or None) -> LinearSolution for this M; what is done once is done here."""

        def solve(b: Array, v0: Array | None = None) -> LinearSolution:
            v, iterations = self.iterate(matvec, b, v0)
            return LinearSolution(v, norm(b - matvec(v)), iterations)

        return solve

    def iterate(self, matvec: Matvec, b: Array, v0: Array | None = None) -> tuple[Array, Array]:
        """(v, iterations) without the final residual: for solvers that run a fixed number of iterations."""
        raise NotImplementedError

    def max_products(self, n: int) -> int:
        """Products with M that `iterate` takes at most for n unknowns."""
        raise NotImplementedError


def first_residual(matvec: Matvec, b: Array, v0: Array | None) -> tuple[Array, Array]:
    """(v0, b - M v0), v0 = 0 for None."""
    return (jnp.zeros_like(b), b) if v0 is None else (v0, b - matvec(v0))


def target_residual(tol: Any, b: Array, r: Array) -> Array:
    """The residual norm to stop at: tol |b|, but never below rounding, where going on only feeds on noise."""
    eps = jnp.finfo(b.dtype).eps
    floor = 0.1 * eps * jnp.maximum(norm(b), norm(r))
    return jnp.maximum((10 * eps if tol is None else tol) * norm(b), floor)


@struct
class CG(LinearSolver):
    """Conjugate gradients for symmetric positive definite M (Hestenes and Stiefel, 1952).

    The error in the energy norm falls at every iteration in exact arithmetic. Two rules keep rounding from undoing
    that:
    a direction of non-positive curvature ends the loop, and so does the recurrence's residual at rounding level of b.
    `tol` relative, default 10 eps; `max_iterations` defaults to 10 n, since rounding can cost CG several times n.
    `preconditioner`: a pytree that is callable, r -> C^-1 r, for a symmetric positive definite C near a multiple of M,
    as `nystrom.sketch` finds one; the residual that counts stays b - M v.
    """

    tol: Any = None
    max_iterations: int | None = static(default=None)
    preconditioner: Any = None

    def _limit(self, n: int) -> int:
        return 10 * n if self.max_iterations is None else self.max_iterations

    def max_products(self, n: int) -> int:
        return 1 + self._limit(n)

    def iterate(self, matvec: Matvec, b: Array, v0: Array | None = None) -> tuple[Array, Array]:
        return self.run(matvec, b, v0)[:2]

    def run(self, matvec: Matvec, b: Array, v0: Array | None = None) -> tuple[Array, Array, Array]:
        """(v, iterations, whether every direction had positive curvature)."""
        limit = self._limit(b.size)
        v0, r = first_residual(matvec, b, v0)
        size = norm(r)
        unit = jnp.where(
            (size > 0) & jnp.isfinite(size), size, 1
        )  # in units of |r|: squares neither over- nor underflow
        target = (target_residual(self.tol, b, r) / unit) ** 2
        r = r / unit

        def go_on(carry: tuple) -> Array:
            _, _, _, _, squared, k, good = carry
            return good & (squared > target) & (k < limit)

        def conditioned(r: Array) -> tuple[Array, Array, Array]:
            """(z = C^-1 r, r'z, |r|^2)."""
            if self.preconditioner is None:
                return r, r @ r, r @ r
            z = self.preconditioner(r)
            return z, r @ z, r @ r

        def body(carry: tuple) -> tuple:
            v, r, p, product, _, k, _ = carry
            Mp = matvec(p)
            curvature = p @ Mp
            good = (curvature > 0) & jnp.isfinite(curvature)
            step = jnp.where(good, product / jnp.where(good, curvature, 1), 0)
            r_next = r - step * Mp
            z, product_next, squared = conditioned(r_next)
            return v + (unit * step) * p, r_next, z + (product_next / product) * p, product_next, squared, k + 1, good

        z, product, squared = conditioned(r)
        start = v0, r, z, product, squared, jnp.array(0), jnp.array(True)
        v, *_, k, positive = lax.while_loop(go_on, body, start)
        return v, k, positive


@struct
class MINRES(LinearSolver):
    """Minimal residuals for symmetric, possibly indefinite M (Paige and Saunders, 1975).

    The residual never grows in exact arithmetic. In floating point its attainable accuracy is about eps cond(M)^2; what
    ends worse than it began is dropped for v0. Use GMRES or Dense for condition numbers above 1e6.
    """

    tol: Any = None
    max_iterations: int | None = static(default=None)

    def _limit(self, n: int) -> int:
        return 10 * n if self.max_iterations is None else self.max_iterations

    def max_products(self, n: int) -> int:
        return 2 + self._limit(n)

    def iterate(self, matvec: Matvec, b: Array, v0: Array | None = None) -> tuple[Array, Array]:
        limit = self._limit(b.size)
        v0, r = first_residual(matvec, b, v0)
        beta = norm(r)
        target = target_residual(self.tol, b, r)
        zero, nought = jnp.zeros_like(b), jnp.zeros((), b.dtype)

        # Lanczos vectors q_old, q; two Givens rotations (c, s) act on the new column of the tridiagonal matrix; the
        # directions d_old, d are the columns of Q R^-1; |phi| is the residual's norm.
        def go_on(carry: tuple) -> Array:
            return (jnp.abs(carry[-2]) > target) & (carry[-1] < limit)

        def body(carry: tuple) -> tuple:
            v, q_old, q, beta, c_old, s_old, c, s, d_old, d, phi, k = carry
            w = matvec(q) - beta * q_old
            alpha = q @ w
            w = w - alpha * q
            beta_next = norm(w)
            epsilon, rest = s_old * beta, c_old * beta
            delta, gamma_bar = c * rest + s * alpha, -s * rest + c * alpha
            gamma = jnp.hypot(gamma_bar, beta_next)
            safe = jnp.where(gamma > 0, gamma, 1)
            c_next, s_next = gamma_bar / safe, beta_next / safe
            d_next = jnp.where(gamma > 0, (q - delta * d - epsilon * d_old) / safe, 0)
            v = v + (c_next * phi) * d_next
            q_next = jnp.where(beta_next > 0, w / jnp.where(beta_next > 0, beta_next, 1), 0)
            phi = jnp.where(gamma > 0, -s_next * phi, 0)  # gamma = 0: the Krylov space is exhausted
            return v, q, q_next, beta_next, c, s, c_next, s_next, d, d_next, phi, k + 1

        one = nought + 1
        q = r / jnp.where(beta > 0, beta, 1)
        start = (v0, zero, q, nought, one, nought, one, nought, zero, zero, beta, jnp.array(0))
        carry = lax.while_loop(go_on, body, start)
        worse = norm(b - matvec(carry[0])) > beta
        return jnp.where(worse, v0, carry[0]), carry[-1]


@struct
class Neumann(LinearSolver):
    """The Neumann series as a recursion, v <- v + step_size (b - M v); converges where |I - step_size M| < 1.

    From v0 = 0, k iterations give step_size * sum of (I - step_size M)^j b for j < k.
    """

    step_size: Any = 1.0
    tol: Any = None
    max_iterations: int = static(default=1000)

    def max_products(self, n: int) -> int:
        return 1 + self.max_iterations

    def iterate(self, matvec: Matvec, b: Array, v0: Array | None = None) -> tuple[Array, Array]:
        limit = self.max_iterations
        v0, r0 = first_residual(matvec, b, v0)
        target = target_residual(self.tol, b, r0)

        def go_on(carry: tuple) -> Array:
            _, r, k = carry
            return (norm(r) > target) & (k < limit)

        def body(carry: tuple) -> tuple:
            v, r, k = carry
            v = v + jnp.asarray(self.step_size, b.dtype) * r
            return v, b - matvec(v), k + 1

        v, _, k = lax.while_loop(go_on, body, (v0, r0, jnp.array(0)))
        return v, k


@struct
class Dense(LinearSolver):
    """Form M by n products (one vmap) and factor it once: Cholesky where `positive_definite`, else LU."""

    positive_definite: bool = static(default=False)

    def max_products(self, n: int) -> int:
        return n

    def iterate(self, matvec: Matvec, b: Array, v0: Array | None = None) -> tuple[Array, Array]:
        return self.prepare(matvec, b.size, b.dtype)(b, v0).v, jnp.array(b.size)

    def prepare(self, matvec: Matvec, n: int, dtype: Any) -> Callable[..., LinearSolution]:
        M = dense_matrix(matvec, n, dtype)
        if self.positive_definite:
            factor = jax.scipy.linalg.cho_factor(M)
            apply = lambda b: jax.scipy.linalg.cho_solve(factor, b)  # noqa: E731
        else:
            lu = jax.scipy.linalg.lu_factor(M)
            apply = lambda b: jax.scipy.linalg.lu_solve(lu, b)  # noqa: E731

        def solve(b: Array, v0: Array | None = None) -> LinearSolution:
            v = apply(b)
            return LinearSolution(v, norm(b - M @ v), jnp.array(n))

        return solve


class _Refinement(NamedTuple):
    """v and the next correction, [n]; |b - M v|; corrections made; whether to make the next one."""

    v: Array
    step: Array
    size: Array
    count: Array
    go_on: Array


def refine(matvec: Matvec, inverse: Matvec, b: Array) -> Array:
    """Solve M v = b by v <- v + C^-1 (b - M v), C close to M, while that halves the residual; at most 20 times.

    NaN where what is left is more than `UNSOLVED` |b|.
    """

    def body(c: _Refinement) -> _Refinement:
        trial = c.v + c.step
        r = b - matvec(trial)
        (size,) = norms(r)
        better = (size < c.size) | (c.count == 0)
        go_on = (size <= c.size / 2) & (size > 0) & (c.count < 20)
        return _Refinement(
            jnp.where(better, trial, c.v), inverse(r), jnp.where(better, size, c.size), c.count + 1, go_on
        )

    nothing, far = jnp.zeros_like(b), jnp.full((), jnp.inf, b.dtype)
    start = _Refinement(nothing, nothing, far, jnp.array(0), jnp.array(True))
    end = lax.while_loop(lambda c: c.go_on, body, start)
    return poisoned(end.v, end.size <= UNSOLVED * norm(b))


def verified(matvec: Matvec, v: Array, b: Array) -> Array:
    """The solution v of M v = b as a solver gave it; NaN where |b - M v| is more than `UNSOLVED` |b|."""
    return poisoned(v, norm(b - matvec(v)) <= UNSOLVED * norm(b))


def dense_matrix(matvec: Matvec, n: int, dtype: Any) -> Array:
    """M [n, n] from n products."""
    return jax.vmap(matvec, out_axes=1)(jnp.eye(n, dtype=dtype))
