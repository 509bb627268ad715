"""Instances for executable theorems: built in JAX from a key and a few numbers, with exactly known constants.

All are padded to DIM unknowns a level, or `size`; `dim` (1 to DIM) is how many take part. With dim = 1 every direction
is aligned, which is where inequalities between norms are tight.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import BilevelProblem, Constants, Full, Minimize
from bilevel.theory import Errors, assumptions
from problems.quadratic import Lower, Upper, lower, upper

DIM = 6
EPS = 2.0**-52


def normal(key: Array, *shape: int) -> Array:
    """Standard normal entries, in JAX's default float."""
    return jax.random.normal(key, shape, float)


def basis(key: Array, dim: int = DIM) -> Array:
    """A random orthogonal matrix [dim, dim]."""
    return jnp.linalg.qr(normal(key, dim, dim))[0]


def spectrum(condition: Array, spread: Array, flip: Array, dim: int = DIM) -> Array:
    """Eigenvalues in [1/condition, 1], both ends taken; a larger `spread` gathers them at one end; flip turns them."""
    t = jnp.linspace(0.0, 1.0, dim) ** spread
    return condition ** -jnp.where(flip, 1 - t, t)


def mask(dim: Array, size: int = DIM) -> Array:
    """Ones for the first `dim` of `size` directions, zeros for the others."""
    return jnp.where(jnp.arange(size) < dim, 1.0, 0.0)


def of_norm(matrix: Array, size: Array) -> Array:
    """`matrix` scaled to the 2-norm `size`."""
    return matrix * (size / jnp.maximum(jnp.linalg.norm(matrix, 2), 1e-300))


def of_length(vector: Array, size: Array) -> Array:
    """`vector` scaled to the length `size`."""
    return vector * (size / jnp.maximum(jnp.linalg.norm(vector), 1e-300))


class Known(NamedTuple):
    """Constants of a quadratic: those of f and g; mu_F, L_F of F; errors at the start; the size of the numbers."""

    base: Constants
    mu_F: Array
    L_F: Array
    start: Errors
    size: Array


class Quadratic(NamedTuple):
    """The problem of `problems.quadratic` with y(x) = A x + c, v(x) = W x + w, grad F(x) = M (x - x_star)."""

    f: Upper
    g: Lower
    A: Array
    c: Array
    W: Array
    w: Array
    M: Array
    x_star: Array
    x: Array
    y: Array
    v: Array
    constants: Known

    @property
    def problem(self) -> BilevelProblem:
        """With all of the data in every batch."""
        return BilevelProblem(
            upper, Minimize(lower), upper_data=Full(self.f), lower_data=Full(self.g), init=origin_of(self.x.size)
        )

    def lower_solution(self, x: Array) -> Array:
        """The lower solution y(x)."""
        return self.A @ x + self.c

    def adjoint(self, x: Array) -> Array:
        """The adjoint v(x) = H^-1 f_y(x, y(x))."""
        return self.W @ x + self.w

    def gradient(self, x: Array) -> Array:
        """The gradient of F at x."""
        return self.M @ (x - self.x_star)

    def errors(self, x: Array, y: Array, v: Array) -> Errors:
        """How far x, y and v are from x*, y(x) and v(x)."""
        length = jnp.linalg.norm
        return Errors(length(x - self.x_star), length(y - self.lower_solution(x)), length(v - self.adjoint(x)))


@functools.cache
def origin_of(size: int) -> Callable[[Array], tuple[Array, Array]]:
    """Zeros: states are moved to an instance's own start afterwards, `init` being a function of a key alone."""
    return lambda key: (jnp.zeros(size, float), jnp.zeros(size, float))


origin = origin_of(DIM)


def quadratic(
    key: Array,
    dim: Array,
    condition_x: Array,
    condition_y: Array,
    coupling: Array,
    pull: Array,
    bend: Array,
    spread: Array,
    flip_x: Array,
    flip_y: Array,
    offset: Array,
    e: Array,
    d: Array,
    u: Array,
    size: int = DIM,
) -> Quadratic:
    """A quadratic with |H| = |M| = 1, |A| = coupling, |Q| = pull, |P| = bend and start errors e, d, u."""
    keys = iter(jax.random.split(key, 16))
    some = mask(dim, size)
    U, V = basis(next(keys), size), basis(next(keys), size)
    eigen_x, eigen_y = (
        spectrum(condition, spread, flip, size) for condition, flip in ((condition_x, flip_x), (condition_y, flip_y))
    )
    M, H = U @ jnp.diag(eigen_x) @ U.T, V @ jnp.diag(eigen_y) @ V.T
    inverse = V @ jnp.diag(1 / eigen_y) @ V.T

    def between(key: Array, length: Array) -> Array:
        return V @ of_norm(normal(key, size, size) * jnp.outer(some, some), length) @ U.T

    A, Q = between(next(keys), coupling), between(next(keys), pull).T
    P = normal(next(keys), size, size) * jnp.outer(some, some)
    P = V @ of_norm(P + P.T, bend) @ V.T
    G = -(A.T @ H)
    x_star, c, p = (offset * normal(next(keys), size) for _ in range(3))
    S = M - A.T @ P @ A - Q @ A - A.T @ Q.T
    s = -(M @ x_star + A.T @ (P @ c + p) + Q @ c)
    f = Upper(*(part[None] for part in (P, Q, (S + S.T) / 2, p, s)))
    g = Lower(*(part[None] for part in (H, G, -H @ c)))
    W, w = inverse @ (P @ A + Q.T), inverse @ (P @ c + p)

    x = x_star + of_length(U @ (normal(next(keys), size) * some), e)
    y = A @ x + c + of_length(V @ (normal(next(keys), size) * some), d)
    v = W @ x + w + of_length(V @ (normal(next(keys), size) * some), u)
    base = Constants(
        mu=1 / condition_y, L_g=jnp.ones(()), L_fx=pull, L_fy=bend, L_gxy=jnp.zeros(()), L_gyy=jnp.zeros(()),
        C_gxy=jnp.linalg.norm(G, 2),
    )  # fmt: skip
    length = jnp.linalg.norm
    reach = 1 + length(x) + length(y) + length(v) + length(s) + length(p) + length(W, 2) * (length(x_star) + e)
    known = Known(base, 1 / condition_x, jnp.ones(()), Errors(e, d, u), reach)
    return Quadratic(f, g, A, c, W, w, M, x_star, x, y, v, known)


def lower_strongly_convex(instance: Any) -> Array:
    """Assumption: R_y >= mu at the instance's (x, y)."""
    jacobian = assumptions.lower_jacobian(instance.problem, instance.x, instance.y)
    return assumptions.strongly_convex(jacobian, instance.constants.base.mu)


def lower_smooth(instance: Any) -> Array:
    """Assumption: |R_y| <= L_g at the instance's (x, y)."""
    jacobian = assumptions.lower_jacobian(instance.problem, instance.x, instance.y)
    return assumptions.smooth(jacobian, instance.constants.base.L_g)


def upper_strongly_convex(instance: Quadratic) -> Array:
    """Assumption: grad^2 F >= mu_F."""
    return assumptions.strongly_convex(instance.M, instance.constants.mu_F)


def upper_smooth(instance: Quadratic) -> Array:
    """Assumption: |grad^2 F| <= L_F."""
    return assumptions.smooth(instance.M, instance.constants.L_F)


REGULAR = (lower_strongly_convex, lower_smooth, upper_strongly_convex, upper_smooth)
