r"""Explicit non-asymptotic bounds, and the step sizes that they ask for. Everything can be traced.

**Comparison of errors (our derivation).** With y(x) the lower solution, v(x) = R_y^-T f_y its adjoint, x* the minimiser
of F over X, and F mu_F-strongly convex with an L_F-Lipschitz gradient, put

    e = |x - x*|,   d = |y - y(x)|,   u = |v - v(x)|,   and  l_y = C_gxy/mu >= |dy/dx|,
    V >= sup |v(x)|,   X = L_fx + L_gxy V,   Y = L_fy + L_gyy V,
    l_v = (L_fx + L_fy l_y + (L_gxy + L_gyy l_y) V)/mu >= |dv/dx|

(V is needed only where g is not quadratic in (x, y)). The direction h = f_x - R_x' v at (x, y, v) differs from
grad F(x) by f_x(y) - f_x(y(x)) - R_x(y)'(v - v(x)) - (R_x(y) - R_x(y(x)))' v(x),
hence by at most X d + C_gxy u. So after
x+ = Proj_X(x - c h), with r = max(|1 - c mu_F|, |1 - c L_F|) (x* is a fixed point of the exact step, which is
r-Lipschitz because the projection is non-expansive),

    |x+ - x*| <= r e + c (X d + C_gxy u),        |x+ - x| <= c (L_F e + X d + C_gxy u)    [the second where X = R^n].

A single loop (SOBA) has y+ = y - a R and v+ = v - b (R_y' v - f_y). With q_a = max(|1 - a mu|, |1 - a L_g|), likewise
q_b, and v+ - v(x) = (I - b R_y)(v - v(x)) + b (f_y(y) - f_y(y(x)) - (R_y(y) - R_y(y(x))) v(x)),

    |y+ - y(x+)| <= q_a d + l_y |x+ - x|,        |v+ - v(x+)| <= q_b u + b Y d + l_v |x+ - x|.

These are three linear inequalities z+ <= M z with a matrix M >= 0, hence z_k <= M^k z_0 in every component: an explicit
bound at each k, linear convergence where the spectral radius of M is below one, as it is for small c.

Batches: noise of mean zero adds in quadrature, |E-part|^2 + c^2 Var, and Minkowski's inequality in L^2 carries the same
recursion over to e = (E|x - x*|^2)^(1/2) and so on. See `expected_step`.

**AID** takes T lower steps and j iterations of CG, with u in the energy norm |.|_H of H = R_y (g quadratic):

    |y+ - y(x)| <= q_a^T d,    |v+ - v(x)|_H <= s u + (1 + s) L_fy q_a^T d/sqrt(mu),   s = 1/T_j((L_g + mu)/(L_g - mu)),

T_j the Chebyshev polynomial; h is then taken at (y+, v+), where C_gxy |v+ - v(x)| <= (C_gxy/sqrt(mu)) |v+ - v(x)|_H.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.problem import Constants

HALVINGS = 48  # of the upper step: a contraction is within reach at any condition number up to about 1e6


class Errors(NamedTuple):
    """e = |x - x*|, d = |y - y(x)|, u = |v - v(x)|, each []; in expectation, roots of mean squares."""

    e: Any
    d: Any
    u: Any


class Steps(NamedTuple):
    """Step sizes: lower a, linear b, upper c."""

    lower: Any
    linear: Any
    upper: Any


class Sensitivity(NamedTuple):
    """X, Y, l_y, l_v of the module's docstring."""

    X: Any
    Y: Any
    l_y: Any
    l_v: Any


def sensitivity(constants: Constants, v_bound: Any = 0.0) -> Sensitivity:
    """How far errors of one level move the other; v_bound = V >= sup |v(x)|."""
    k, V = constants, v_bound
    l_y = k.C_gxy / k.mu
    l_v = (k.L_fx + k.L_fy * l_y + (k.L_gxy + k.L_gyy * l_y) * V) / k.mu
    return Sensitivity(k.L_fx + k.L_gxy * V, k.L_fy + k.L_gyy * V, l_y, l_v)


def contraction(step: Any, mu: Any, L: Any) -> Array:
    """Max(|1 - step mu|, |1 - step L|): the Lipschitz constant of z - step grad h(z), h mu-convex and L-smooth."""
    return jnp.maximum(jnp.abs(1 - step * mu), jnp.abs(1 - step * L))


def chebyshev(condition: Any, k: Any) -> Array:
    """1/T_k((condition + 1)/(condition - 1)) = 2 p^k/(1 + p^2k), p = (sqrt(condition) - 1)/(sqrt(condition) + 1).

    The error of k CG iterations in the energy norm, and the residual of k MINRES or GMRES iterations, on a symmetric
    positive definite matrix, are at most this times the first one; itself at most 2 p^k. Saad, Iterative methods for
    sparse linear systems, SIAM 2003, Section 6.11.
    """
    root = jnp.sqrt(condition)
    p = (root - 1) / (root + 1)
    return 2 * p**k / (1 + p ** (2 * k))


def aid_bias(constants: Constants, d: Any, linear_error: Any, v_norm: Any) -> Any:
    """The error of f_x - R_x' v at |y - y(x)| <= d, |v - R_y^-T f_y| <= linear_error (both at y), |v(x)| <= v_norm.

    R_y^-T f_y at y differs from v(x) by R_y^-T (f_y - f_y(y(x)) + (R_y(y(x)) - R_y)' v(x)), at most
    (L_fy + L_gyy |v(x)|) d/mu. Our derivation, with the constants explicit; the same order as Grazzi et al., ICML 2020.
    """
    k = constants
    u = linear_error + (k.L_fy + k.L_gyy * v_norm) * d / k.mu
    return (k.L_fx + k.L_gxy * v_norm) * d + k.C_gxy * u


def single_loop_matrix(
    constants: Constants, mu_F: Any, L_F: Any, steps: Steps, v_bound: Any = 0.0, projected: bool = False
) -> Array:
    """Rows of (e, d, u)+ and of |x+ - x| as multiples of (e, d, u), shape [4, 3]; the first three are M.

    With `projected`, X is any closed convex set, and |x+ - x| <= |x+ - x*| + e.
    """
    a, b, c = steps
    X, Y, l_y, l_v = sensitivity(constants, v_bound)
    r, q_a = contraction(c, mu_F, L_F), contraction(a, constants.mu, constants.L_g)
    q_b = contraction(b, constants.mu, constants.L_g)
    nearer = _row(r, c * X, c * constants.C_gxy)
    moved = nearer + _row(1, 0, 0) if projected else c * _row(L_F, X, constants.C_gxy)
    return jnp.stack(
        [
            nearer,
            _row(0, q_a, 0) + l_y * moved,
            _row(0, b * Y, q_b) + l_v * moved,
            moved,
        ]
    )


def aid_matrix(
    constants: Constants, mu_F: Any, L_F: Any, lower: Any, upper: Any, num_lower_steps: int, num_products: int
) -> Array:
    """As `single_loop_matrix` for AID with CG on a quadratic g: u in the energy norm of R_y; y+ and v+ come first."""
    k, c = constants, upper
    X, _, l_y, _ = sensitivity(k)
    root = jnp.sqrt(k.mu)
    q = contraction(lower, k.mu, k.L_g) ** num_lower_steps
    s = chebyshev(k.L_g / k.mu, num_products)
    u = _row(0, (1 + s) * k.L_fy * q / root, s)  # |v+ - v(x)|_H
    off = _row(0, X * q, 0) + k.C_gxy / root * u  # |h - grad F(x)|
    moved = c * (_row(L_F, 0, 0) + off)
    e = _row(contraction(c, mu_F, L_F), 0, 0) + c * off
    l_v = (k.L_fx + k.L_fy * l_y) / root  # of v(x) in the energy norm
    return jnp.stack([e, _row(0, q, 0) + l_y * moved, u + l_v * moved, moved])


def _row(*entries: Any) -> Array:
    return jnp.stack([jnp.asarray(entry, float) for entry in entries])


def growth(M: Array, squarings: int = 16) -> Array:
    """|M^n|^(1/n) in the maximum row sum for n = 2^squarings: at least the spectral radius, and close to it."""

    def square(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        power, log_size = carry  # M^n = exp(log_size) power
        power = power @ power
        size = jnp.max(jnp.sum(jnp.abs(power), axis=1))
        return power / jnp.where(size > 0, size, 1), 2 * log_size + jnp.log(jnp.where(size > 0, size, 1e-300))

    start = jnp.max(jnp.sum(jnp.abs(M), axis=1))
    _, log_size = jax.lax.fori_loop(0, squarings, square, (M / start, jnp.log(start)))
    return jnp.exp(log_size / 2**squarings)


def _halves(count: int) -> Array:
    """1, 1/2, 1/4, …"""
    return 0.5 ** jnp.arange(count, dtype=float)


def _best(steps: Array, growths: Array) -> Array:
    return steps[jnp.argmin(growths)]


def single_loop_steps(constants: Constants, mu_F: Any, L_F: Any, v_bound: Any = 0.0) -> Steps:
    """A = b = 2/(mu + L_g); c = 2/(mu_F + L_F) halved as often as makes M's growth smallest."""
    a = jnp.asarray(2 / (constants.mu + constants.L_g), float)
    uppers = jnp.asarray(2 / (mu_F + L_F), float) * _halves(HALVINGS)
    rate = lambda c: growth(single_loop_matrix(constants, mu_F, L_F, Steps(a, a, c), v_bound)[:3])  # noqa: E731
    return Steps(a, a, _best(uppers, jax.vmap(rate)(uppers)))


def aid_steps(
    constants: Constants, mu_F: Any, L_F: Any, num_lower_steps: int, num_products: int
) -> tuple[Array, Array]:
    """(a, c): a = 2/(mu + L_g), c as in `single_loop_steps` for AID's matrix."""
    a = jnp.asarray(2 / (constants.mu + constants.L_g), float)
    uppers = jnp.asarray(2 / (mu_F + L_F), float) * _halves(HALVINGS)
    rate = lambda c: growth(aid_matrix(constants, mu_F, L_F, a, c, num_lower_steps, num_products)[:3])  # noqa: E731
    return a, _best(uppers, jax.vmap(rate)(uppers))


class Noise(NamedTuple):
    """Of n_f blocks of f and n_g blocks of g, quadratic. lipschitz_f: root mean square over blocks of |grad^2 f_j|;

    lipschitz_g: of |[g_yy, g_yx]_i|. spread_f, spread_g: the same of the deviations from the mean; optimum_f,
    optimum_g: of the deviations of (f_x, f_y)_j and (R, R_y' v, R_x' v)_i at (x*, y*, v*).
    """

    lipschitz_f: Any
    lipschitz_g: Any
    spread_f: Any
    spread_g: Any
    optimum_f: Any
    optimum_g: Any
    num_f: Any
    num_g: Any


class Tables(NamedTuple):
    """Root mean squares over blocks of the distance of SABA's entries to the values at (x*, y*, v*)."""

    f: Any
    g: Any


class Expected(NamedTuple):
    """Bounds of roots of mean squares after a step: errors, SABA's tables, and |x+ - x|, |y+ - y|, |v+ - v|."""

    errors: Errors
    tables: Tables | None
    moved: tuple[Array, Array, Array]


def expected_step(
    constants: Constants, mu_F: Any, L_F: Any, steps: Steps, noise: Noise, errors: Errors, tables: Tables | None
) -> Expected:
    """Bounds of (E|x+ - x*|^2)^(1/2), … after a step of SOBA (tables None) or SABA, on quadratics (our derivation).

    There y(x) and v(x) are affine, so that y+ - y(x+) = (I - a H)(y - y(x)) - dy/dx (mean of x+ - x) plus noise of mean
    zero, -a (noise of R) + dy/dx c (noise of the direction), and likewise v: means add up, noise adds in quadrature.
    Deviations from the mean over blocks, in L^2: SOBA's are at most spread z + optimum, z the distance to (x*, y*) or
    (x*, y*, v*). SABA's estimate new_i - old_i + mean has a variance of at most the mean of |new_i - old_i|^2, so the
    deviation is at most lipschitz z + table. Its tables follow t+^2 = (1 - 1/n) t^2 + (lipschitz z)^2/n.
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
    """Bounds of (E|x_k - x*|^2)^(1/2), … after k = num_steps steps.

    `expected_step` holds given any state; its right-hand sides are lengths of vectors whose entries are linear in the
    errors with coefficients >= 0, so that Minkowski's inequality in L^2 lets the roots of mean squares take the
    errors' place: it may be iterated.
    """
    body = lambda _, carry: expected_step(constants, mu_F, L_F, steps, noise, *carry)[:2]  # noqa: E731
    carry = jax.tree.map(lambda part: jnp.asarray(part, float), (errors, tables))
    return jax.lax.fori_loop(0, num_steps, body, carry)


def soba_steps(constants: Constants, mu_F: Any, L_F: Any, noise: Noise, errors: Errors, num_steps: int) -> Steps:
    """Of a = b = 8^-i 2/(mu + L_g), c = 4^-j 2/(mu_F + L_F): SOBA's with batches that make the bound of E|x - x*|^2

    after `num_steps` steps least. With constant steps the bound ends at a level that the noise sets; with these it
    falls with their number.
    """
    a = jnp.asarray(2 / (constants.mu + constants.L_g), float) * _halves(18)[::3]
    c = jnp.asarray(2 / (mu_F + L_F), float) * _halves(30)[::2]

    def end(a: Array, c: Array) -> Array:
        return after_steps(constants, mu_F, L_F, Steps(a, a, c), noise, errors, None, num_steps)[0].e

    ends = jax.vmap(lambda a: jax.vmap(lambda c: end(a, c))(c))(a)
    i, j = jnp.unravel_index(jnp.nanargmin(ends), ends.shape)
    return Steps(a[i], a[i], c[j])


def saba_steps(constants: Constants, mu_F: Any, L_F: Any, noise: Noise, rounds: int = 5) -> tuple[Steps, Array]:
    """(steps, factor): of a = b = 8^-i 2/(mu + L_g), c = 16^-j 2/(mu_F + L_F) those whose `expected_step` grows least.

    `expected_step` is a monotone, convex and positively homogeneous map T: where T w <= factor w for a w > 0, all
    errors and tables are below factor^k times a multiple of w. w is found by policy iteration: the dominant eigenvector
    of T's derivative at the last w. A factor of one or more: no contraction was found.
    """
    a = jnp.asarray(2 / (constants.mu + constants.L_g), float) * _halves(24)[::3]
    c = jnp.asarray(2 / (mu_F + L_F), float) * _halves(48)[::4]

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
