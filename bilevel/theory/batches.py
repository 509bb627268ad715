r"""Bounds for single loops on batches, in expectation, and the step sizes that they ask for. Everything can be traced.

**Comparison of errors in the mean square (our derivation).** The names are those of `bilevel.theory.bounds`. Noise of
mean zero adds in quadrature, |mean|^2 + c^2 variance, and Minkowski's inequality in L^2 carries the recursion of
`bilevel.theory.bounds` over to e = (E|x - x*|^2)^(1/2), d = (E|y - y(x)|^2)^(1/2), u = (E|v - v(x)|^2)^(1/2). See
`expected_step`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.problem import Constants
from bilevel.theory.bounds import Errors, Steps, contraction, halves, sensitivity, single_loop_matrix


class Noise(NamedTuple):
    """How far single blocks of quadratic f and g differ from their means: roots of mean squares over the blocks."""

    lipschitz_f: Any
    """Of |grad^2 f_j|, the Hessian in (x, y) of block j."""
    lipschitz_g: Any
    """Of |[g_yy, g_yx]_i| of block i."""
    spread_f: Any
    """Of |grad^2 f_j - grad^2 f|."""
    spread_g: Any
    """Of |[g_yy, g_yx]_i - [g_yy, g_yx]|."""
    optimum_f: Any
    """Of the deviation of (f_x, f_y)_j from its mean at the solution (x*, y*)."""
    optimum_g: Any
    """Of the deviation of (R, R_y' v, R_x' v)_i from its mean at the solution (x*, y*, v*)."""
    num_f: Any
    """The number of blocks of f."""
    num_g: Any
    """The number of blocks of g."""


class Tables(NamedTuple):
    """How far SABA's stored values are from those at (x*, y*, v*): roots of mean squares over the blocks."""

    f: Any
    """Of the entries (f_x, f_y)_j."""
    g: Any
    """Of the entries (R, R_y' v, R_x' v)_i."""


class Expected(NamedTuple):
    """Bounds after a step, all of roots of mean squares."""

    errors: Errors
    """Of the new iterate."""
    tables: Tables | None
    """Of SABA's new tables; None for SOBA."""
    moved: tuple[Array, Array, Array]
    """Of the ways |x+ - x|, |y+ - y| and |v+ - v|."""


def expected_step(
    constants: Constants, mu_F: Any, L_F: Any, steps: Steps, noise: Noise, errors: Errors, tables: Tables | None
) -> Expected:
    """Bounds of (E|x+ - x*|^2)^(1/2) and so on after a step of SOBA (tables None) or SABA, on quadratics.

    Our derivation. On quadratics y(x) and v(x) are affine, so that

        y+ - y(x+) = (I - a H)(y - y(x)) - dy/dx (mean of x+ - x) - a (noise of R) + dy/dx c (noise of the direction)

    with noise of mean zero, and likewise for v: means add up, noise adds in quadrature.

    The noise is bounded by deviations from the mean over blocks, in L^2. SOBA's are at most spread z + optimum, where z
    is the distance to (x*, y*) or (x*, y*, v*). SABA's estimate new_i - old_i + mean has a variance of at most the mean
    of |new_i - old_i|^2, so the deviation is at most lipschitz z + table. Its tables follow
    t+^2 = (1 - 1/n) t^2 + (lipschitz z)^2/n.
    """
    a, b, c = steps
    e, d, u = errors
    _, _, l_y, l_v = sensitivity(constants)
    off_y, off_v = d + l_y * e, u + l_v * e
    z_f = jnp.sqrt(e**2 + off_y**2)
    z_g = jnp.sqrt(e**2 + off_y**2 + off_v**2)
    if tables is None:
        nu_f, nu_g = noise.spread_f * z_f + noise.optimum_f, noise.spread_g * z_g + noise.optimum_g
    else:
        nu_f, nu_g = noise.lipschitz_f * z_f + tables.f, noise.lipschitz_g * z_g + tables.g
    both = jnp.sqrt(nu_f**2 + nu_g**2)  # f's block and g's are drawn independently
    z = jnp.stack([jnp.asarray(part, float) for part in errors])
    means = single_loop_matrix(constants, mu_F, L_F, steps) @ z
    moved = jnp.hypot(means[3], c * both)
    q_a, q_b = contraction(a, constants.mu, constants.L_g), contraction(b, constants.mu, constants.L_g)
    after = Errors(
        e=jnp.hypot(means[0], c * both),
        d=jnp.hypot(q_a * d + l_y * means[3], a * nu_g + l_y * c * both),
        u=jnp.hypot(q_b * u + b * constants.L_fy * d + l_v * means[3], (b + l_v * c) * both),
    )
    moved_y = a * jnp.hypot(constants.L_g * d, nu_g)
    moved_v = b * jnp.hypot(constants.L_g * u + constants.L_fy * d, both)
    if tables is not None:
        tables = Tables(
            jnp.sqrt((1 - 1 / noise.num_f) * tables.f**2 + (noise.lipschitz_f * z_f) ** 2 / noise.num_f),
            jnp.sqrt((1 - 1 / noise.num_g) * tables.g**2 + (noise.lipschitz_g * z_g) ** 2 / noise.num_g),
        )
    return Expected(after, tables, (moved, moved_y, moved_v))


def after_steps(
    constants: Constants, mu_F: Any, L_F: Any, steps: Steps, noise: Noise, errors: Errors, tables: Tables | None,
    num_steps: int | Array,
) -> tuple[Errors, Tables | None]:  # fmt: skip
    """Bounds of errors and tables after k = num_steps steps: of (E|x_k - x*|^2)^(1/2) and so on.

    The bound of `expected_step` holds given any state. Its right-hand sides are lengths of vectors whose entries are
    linear in the errors with coefficients >= 0, so that Minkowski's inequality in L^2 lets the roots of mean squares
    take the errors' place: it may be iterated.
    """
    body = lambda _, carry: expected_step(constants, mu_F, L_F, steps, noise, *carry)[:2]  # noqa: E731
    carry = jax.tree.map(lambda part: jnp.asarray(part, float), (errors, tables))
    return jax.lax.fori_loop(0, num_steps, body, carry)


def soba_steps(constants: Constants, mu_F: Any, L_F: Any, noise: Noise, errors: Errors, num_steps: int) -> Steps:
    """The steps of SOBA with batches for which the bound of E|x - x*|^2 after `num_steps` steps is least.

    They are sought among a = b = 8^-i 2/(mu + L_g) and c = 4^-j 2/(mu_F + L_F), i < 6, j < 15. With the same steps for
    every number of steps the bound would end at a level that the noise sets; with these it falls with the number.

    Args:
        constants: of f and g, quadratic.
        mu_F: strong convexity of F.
        L_F: Lipschitz constant of grad F.
        noise: how far the blocks differ.
        errors: bounds of the errors at the start.
        num_steps: >= 1.
    """
    a = jnp.asarray(2 / (constants.mu + constants.L_g), float) * halves(18)[::3]
    c = jnp.asarray(2 / (mu_F + L_F), float) * halves(30)[::2]

    def end(a: Array, c: Array) -> Array:
        return after_steps(constants, mu_F, L_F, Steps(a, a, c), noise, errors, None, num_steps)[0].e

    ends = jax.vmap(lambda a: jax.vmap(lambda c: end(a, c))(c))(a)
    i, j = jnp.unravel_index(jnp.nanargmin(ends), ends.shape)
    return Steps(a[i], a[i], c[j])


def saba_steps(constants: Constants, mu_F: Any, L_F: Any, noise: Noise, rounds: int = 5) -> tuple[Steps, Array]:
    """(steps, factor): the steps of SABA for which all errors fall fastest, and by which factor a step.

    A factor of one or more says that no contraction was found. The steps are sought among a = b = 8^-i 2/(mu + L_g) and
    c = 16^-j 2/(mu_F + L_F), i < 8, j < 12.

    As a function of errors and tables `expected_step` is a monotone, convex and positively homogeneous map T: where
    T w <= factor w for a w > 0, all of them stay below factor^k times a multiple of w. Such a w is found by policy
    iteration, `rounds` times the dominant eigenvector of T's derivative at the last w.

    Args:
        constants: of f and g, quadratic.
        mu_F: strong convexity of F.
        L_F: Lipschitz constant of grad F.
        noise: how far the blocks differ.
        rounds: >= 0.
    """
    a = jnp.asarray(2 / (constants.mu + constants.L_g), float) * halves(24)[::3]
    c = jnp.asarray(2 / (mu_F + L_F), float) * halves(48)[::4]

    def factor(a: Array, c: Array) -> Array:
        def T(w: Array) -> Array:
            errors, tables = Errors(*w[:3]), Tables(*w[3:])
            errors, tables, _ = expected_step(constants, mu_F, L_F, Steps(a, a, c), noise, errors, tables)
            assert tables is not None
            return jnp.stack([*errors, *tables])

        def improve(_: Array, w: Array) -> Array:
            def square(_: Array, M: Array) -> Array:
                M = M @ M
                return M / jnp.maximum(jnp.max(M), 1e-300)

            w = jax.lax.fori_loop(0, 14, square, jax.jacfwd(T)(w)) @ w
            return w / jnp.max(w) + 1e-9

        w = jax.lax.fori_loop(0, rounds, improve, jnp.ones(5))
        return jnp.max(T(w) / w)

    factors = jax.vmap(lambda a: jax.vmap(lambda c: factor(a, c))(c))(a)
    i, j = jnp.unravel_index(jnp.nanargmin(factors), factors.shape)
    return Steps(a[i], a[i], c[j]), factors[i, j]
