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

With batches the same recursion holds for roots of mean squares: `bilevel.theory.batches`.

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
    """How far an iterate (x, y, v) is off, each a number; for random iterates the roots of mean squares."""

    e: Any
    """|x - x*|: the upper variable from the minimiser of F."""
    d: Any
    """|y - y(x)|: the lower variable from the lower solution at x."""
    u: Any
    """|v - v(x)|: the adjoint from the one at the lower solution."""


class Steps(NamedTuple):
    """The step sizes of a single loop, each a number > 0."""

    lower: Any
    """The step a of y."""
    linear: Any
    """The step b of the adjoint v."""
    upper: Any
    """The step c of x."""


class Sensitivity(NamedTuple):
    """How far errors of one variable move another: the constants X, Y, l_y, l_v of the module's docstring."""

    X: Any
    """An error d of y changes the direction in x by at most X d."""
    Y: Any
    """An error d of y changes the direction in v by at most Y d."""
    l_y: Any
    """A Lipschitz constant of x -> y(x)."""
    l_v: Any
    """A Lipschitz constant of x -> v(x)."""


def sensitivity(constants: Constants, v_bound: Any = 0.0) -> Sensitivity:
    """The constants X, Y, l_y and l_v of a problem.

    Args:
        constants: of f and g.
        v_bound: V >= sup |v(x)|; 0 will do where g is quadratic in (x, y), since V is then multiplied by zeros.
    """
    k, V = constants, v_bound
    l_y = k.C_gxy / k.mu
    l_v = (k.L_fx + k.L_fy * l_y + (k.L_gxy + k.L_gyy * l_y) * V) / k.mu
    return Sensitivity(k.L_fx + k.L_gxy * V, k.L_fy + k.L_gyy * V, l_y, l_v)


def contraction(step: Any, mu: Any, L: Any) -> Array:
    """The Lipschitz constant of z -> z - step grad h(z) for a mu-strongly convex and L-smooth h.

    It is max(|1 - step mu|, |1 - step L|), below one where 0 < step < 2/L.
    """
    return jnp.maximum(jnp.abs(1 - step * mu), jnp.abs(1 - step * L))


def chebyshev(condition: Any, k: Any) -> Array:
    """What k Krylov iterations leave of the first error, by Chebyshev's polynomial of degree k.

    On a symmetric positive definite matrix of this condition number, the error of CG in the energy norm and the
    residual of MINRES or GMRES after k iterations are at most

        1/T_k((condition + 1)/(condition - 1)) = 2 p^k/(1 + p^2k),   p = (sqrt(condition) - 1)/(sqrt(condition) + 1),

    times the first one, which is itself at most 2 p^k. Saad, Iterative methods for sparse linear systems, SIAM 2003,
    Section 6.11.
    """
    root = jnp.sqrt(condition)
    p = (root - 1) / (root + 1)
    return 2 * p**k / (1 + p ** (2 * k))


def aid_bias(constants: Constants, d: Any, linear_error: Any, v_norm: Any) -> Any:
    """A bound of |f_x - R_x' v - grad F(x)|, the error of an implicit gradient at an inexact (y, v).

    The exact adjoint at y, R_y^-T f_y, differs from v(x) by R_y^-T (f_y - f_y(y(x)) + (R_y(y(x)) - R_y)' v(x)), which
    is at most (L_fy + L_gyy |v(x)|) d/mu. Our derivation, with the constants explicit; the same order as Grazzi et
    al., ICML 2020.

    Args:
        constants: of f and g.
        d: >= |y - y(x)|.
        linear_error: >= |v - R_y^-T f_y|, with R_y and f_y at y.
        v_norm: >= |v(x)|.
    """
    k = constants
    u = linear_error + (k.L_fy + k.L_gyy * v_norm) * d / k.mu
    return (k.L_fx + k.L_gxy * v_norm) * d + k.C_gxy * u


def single_loop_matrix(
    constants: Constants, mu_F: Any, L_F: Any, steps: Steps, v_bound: Any = 0.0, projected: bool = False
) -> Array:
    """The comparison matrix of a single-loop step, shape [4, 3]: errors after it from those before it.

    Rows bound e, d, u after the step and the way |x+ - x|, as combinations of e, d, u before it; the first three rows
    are M of the module's docstring.

    Args:
        constants: of f and g.
        mu_F: strong convexity of F.
        L_F: Lipschitz constant of grad F.
        steps: of y, v and x.
        v_bound: >= sup |v(x)|; needed only where g is not quadratic.
        projected: whether x is projected on a closed convex set X. The way is then bounded by |x+ - x*| + e only.
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
    """The comparison matrix of a step of AID with CG on a quadratic g, shape [4, 3], as `single_loop_matrix`.

    Here u is the error of v in the energy norm of R_y, and x moves last, by the new y and v.

    Args:
        constants: of f and g, with L_gxy = L_gyy = 0.
        mu_F: strong convexity of F.
        L_F: Lipschitz constant of grad F.
        lower: the step a of y.
        upper: the step c of x.
        num_lower_steps: T >= 1, steps in y.
        num_products: j >= 1, iterations of CG.
    """
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
    """An upper estimate of the spectral radius of a matrix M >= 0, shape [].

    It is |M^n|^(1/n) in the maximum row sum for n = 2^squarings: never below the spectral radius, and close to it.
    """

    def square(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        power, log_size = carry  # M^n = exp(log_size) power
        power = power @ power
        size = jnp.max(jnp.sum(jnp.abs(power), axis=1))
        return power / jnp.where(size > 0, size, 1), 2 * log_size + jnp.log(jnp.where(size > 0, size, 1e-300))

    start = jnp.max(jnp.sum(jnp.abs(M), axis=1))
    _, log_size = jax.lax.fori_loop(0, squarings, square, (M / start, jnp.log(start)))
    return jnp.exp(log_size / 2**squarings)


def halves(count: int) -> Array:
    """The numbers 1, 1/2, 1/4, …, shape [count]."""
    return 0.5 ** jnp.arange(count, dtype=float)


def _best(steps: Array, growths: Array) -> Array:
    return steps[jnp.argmin(growths)]


def single_loop_steps(constants: Constants, mu_F: Any, L_F: Any, v_bound: Any = 0.0) -> Steps:
    """Steps for which `single_loop_matrix` contracts fastest.

    The steps of y and v are a = b = 2/(mu + L_g), the best for each of them alone; c is 2/(mu_F + L_F), halved as often
    as makes `growth` of M the smallest.
    """
    a = jnp.asarray(2 / (constants.mu + constants.L_g), float)
    uppers = jnp.asarray(2 / (mu_F + L_F), float) * halves(HALVINGS)
    rate = lambda c: growth(single_loop_matrix(constants, mu_F, L_F, Steps(a, a, c), v_bound)[:3])  # noqa: E731
    return Steps(a, a, _best(uppers, jax.vmap(rate)(uppers)))


def aid_steps(
    constants: Constants, mu_F: Any, L_F: Any, num_lower_steps: int, num_products: int
) -> tuple[Array, Array]:
    """The steps (a, c) of AID for which `aid_matrix` contracts fastest, found as in `single_loop_steps`."""
    a = jnp.asarray(2 / (constants.mu + constants.L_g), float)
    uppers = jnp.asarray(2 / (mu_F + L_F), float) * halves(HALVINGS)
    rate = lambda c: growth(aid_matrix(constants, mu_F, L_F, a, c, num_lower_steps, num_products)[:3])  # noqa: E731
    return a, _best(uppers, jax.vmap(rate)(uppers))
