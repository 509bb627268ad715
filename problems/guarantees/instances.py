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


class Numbers(NamedTuple):
    """What a quadratic is drawn with, beside a key; all []."""

    dim: Array
    """How many directions of each level take part, 1 to `size`."""
    condition_x: Array
    """The condition number of grad^2 F, >= 1."""
    condition_y: Array
    """The condition number of H = g_yy, >= 1."""
    coupling: Array
    """The norm of A = dy/dx."""
    pull: Array
    """The norm of Q = f_xy."""
    bend: Array
    """The norm of P = f_yy."""
    spread: Array
    """The exponent of `spectrum`, for both levels."""
    flip_x: Array
    """Whether the spectrum of grad^2 F is turned, as in `spectrum`."""
    flip_y: Array
    """Whether that of H is."""
    offset: Array
    """The scale of x*, of y(0) and of f_y's constant part."""
    e: Array
    """The distance |x - x*| at the start."""
    d: Array
    """The distance |y - y(x)| at the start."""
    u: Array
    """The distance |v - v(x)| at the start."""


class Draws(NamedTuple):
    """All that is random: two bases, and standard normal entries for what `Parts` and the start are made of.

    A, Q, P [size, size] and x, y, v [size] are zero outside of the first `dim` directions; x_star, c, p [size] are not.
    """

    U: Array
    """The eigenvectors of grad^2 F, [size, size]."""
    V: Array
    """The eigenvectors of H, [size, size]."""
    A: Array
    Q: Array
    P: Array
    x_star: Array
    c: Array
    p: Array
    x: Array
    """The direction from x* to the start."""
    y: Array
    """The direction from y(x) to the start."""
    v: Array
    """The direction from v(x) to the start."""


class Parts(NamedTuple):
    """What a proof speaks of, chosen before f and g, which follow from it."""

    M: Array
    """The Hessian of F."""
    H: Array
    """g_yy."""
    inverse: Array
    """H^-1."""
    A: Array
    """The slope of y(x) = A x + c."""
    c: Array
    """The lower solution y(0)."""
    P: Array
    """f_yy."""
    Q: Array
    """f_xy."""
    p: Array
    """f_y at (0, 0)."""
    x_star: Array
    """The minimiser of F."""


def quadratic(key: Array, size: int = DIM, **numbers: Array) -> Quadratic:
    """A quadratic with |H| = |grad^2 F| = 1 and the `Numbers` given: norms, condition numbers, errors at the start.

    It is made backwards. H, y(x), grad F and what of f depends on y are drawn; then g is the quadratic with this H and
    this y(x), and f's part in x alone is set so that F has this gradient.
    """
    n = Numbers(**numbers)
    drawn = draw(key, take_part=mask(n.dim, size))
    parts = parts_of(drawn, n)
    f, g = upper_of(parts), lower_of(parts)
    W, w = adjoint_of(parts)
    x = parts.x_star + of_length(drawn.U @ drawn.x, n.e)
    y = parts.A @ x + parts.c + of_length(drawn.V @ drawn.y, n.d)
    v = W @ x + w + of_length(drawn.V @ drawn.v, n.u)
    length = jnp.linalg.norm
    largest = length(W, 2) * (length(parts.x_star) + n.e)  # of v on the way to x*
    reach = 1 + length(x) + length(y) + length(v) + length(f.s[0]) + length(parts.p) + largest
    known = Known(constants_of(g, n), 1 / n.condition_x, jnp.ones(()), Errors(n.e, n.d, n.u), reach)
    return Quadratic(f, g, parts.A, parts.c, W, w, parts.M, parts.x_star, x, y, v, known)


def draw(key: Array, take_part: Array) -> Draws:
    """The random arrays of a quadratic; `take_part` [size] has ones for the directions that take part."""
    size, both = take_part.size, jnp.outer(take_part, take_part)
    keys = jax.random.split(key, 16)
    return Draws(
        U=basis(keys[0], size),
        V=basis(keys[1], size),
        A=normal(keys[2], size, size) * both,
        Q=normal(keys[3], size, size) * both,
        P=normal(keys[4], size, size) * both,
        x_star=normal(keys[5], size),
        c=normal(keys[6], size),
        p=normal(keys[7], size),
        x=normal(keys[8], size) * take_part,
        y=normal(keys[9], size) * take_part,
        v=normal(keys[10], size) * take_part,
    )


def parts_of(drawn: Draws, n: Numbers) -> Parts:
    """The drawn arrays brought to their norms, spectra and bases: x in U, y in V."""
    U, V = drawn.U, drawn.V
    eigen_x = spectrum(n.condition_x, n.spread, n.flip_x, len(U))
    eigen_y = spectrum(n.condition_y, n.spread, n.flip_y, len(V))
    return Parts(
        M=U @ jnp.diag(eigen_x) @ U.T,
        H=V @ jnp.diag(eigen_y) @ V.T,
        inverse=V @ jnp.diag(1 / eigen_y) @ V.T,
        A=V @ of_norm(drawn.A, n.coupling) @ U.T,
        c=n.offset * drawn.c,
        P=V @ of_norm(drawn.P + drawn.P.T, n.bend) @ V.T,
        Q=(V @ of_norm(drawn.Q, n.pull) @ U.T).T,
        p=n.offset * drawn.p,
        x_star=n.offset * drawn.x_star,
    )


def lower_of(parts: Parts) -> Lower:
    """The g with g_yy = H and the solution A x + c: g_y = H y + G'x + h, so that G = -A'H and h = -H c."""
    return Lower(*(part[None] for part in (parts.H, -(parts.A.T @ parts.H), -parts.H @ parts.c)))


def upper_of(parts: Parts) -> Upper:
    """The f with the given P, Q and p for which grad F = M (x - x*).

    Along y = A x + c it is grad F = (S + A'P A + Q A + A'Q') x + s + A'(P c + p) + Q c; S and s make up the difference.
    """
    M, A, c, P, Q, p = parts.M, parts.A, parts.c, parts.P, parts.Q, parts.p
    S = M - A.T @ P @ A - Q @ A - A.T @ Q.T
    s = -(M @ parts.x_star + A.T @ (P @ c + p) + Q @ c)
    return Upper(*(part[None] for part in (P, Q, (S + S.T) / 2, p, s)))


def adjoint_of(parts: Parts) -> tuple[Array, Array]:
    """(W, w) of the adjoint v(x) = H^-1 f_y(x, y(x)) = W x + w, where f_y = P y + Q'x + p."""
    P, inverse = parts.P, parts.inverse
    return inverse @ (P @ parts.A + parts.Q.T), inverse @ (P @ parts.c + parts.p)


def constants_of(g: Lower, n: Numbers) -> Constants:
    """The constants of f and g, exact: both are quadratic, and |H| = 1."""
    return Constants(
        mu=1 / n.condition_y, L_g=jnp.ones(()), L_fx=n.pull, L_fy=n.bend, L_gxy=jnp.zeros(()), L_gyy=jnp.zeros(()),
        C_gxy=jnp.linalg.norm(g.G[0], 2),
    )  # fmt: skip


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
