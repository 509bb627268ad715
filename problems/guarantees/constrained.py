"""Implicit gradients through linear constraints: accuracy in y implies accuracy of the gradient; F_q at drawn q.

Instances have a known solution with independent active rows and strict complementarity, both checked. The gradient
under test is the one that DSBLO, SSIGD, DSIGD and PIGD take (`bilevel.parts.tracking`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import BilevelProblem, Constants, Full, LinearCoupling, Minimize
from bilevel.guarantees import Guarantee
from bilevel.parts import tracking
from bilevel.theory import assumptions
from bilevel.theory.nonsmooth import constrained_bias
from problems import strategies
from problems.guarantees.certified import THIRD, Bowl, Tilted, bowl, tilted_lower
from problems.guarantees.instances import (
    EPS,
    basis,
    lower_smooth,
    lower_strongly_convex,
    normal,
    of_length,
    of_norm,
    origin_of,
    spectrum,
)

SIZE, ROWS = 4, 3
STEP = 1e-4  # of differences of F_q, which is quadratic while the active set stays


class KnownRows(NamedTuple):
    """Constants of f and g; |u*|; s; |B| of the active rows; |q|; the size of the numbers."""

    base: Constants
    u_norm: Array
    singular: Array
    rows_x: Array
    q: Array
    size: Array


class Rows(NamedTuple):
    """f, g and rows A y + B x <= b; exact y, multipliers, active and gradient at x; a guess y + error; q; d [SIZE]."""

    f: Bowl
    g: Tilted
    A: Array
    B: Array
    b: Array
    x: Array
    y: Array
    multipliers: Array
    active: Array
    gradient: Array
    error: Array
    q: Array
    d: Array
    constants: KnownRows

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem."""
        return BilevelProblem(
            bowl, Minimize(tilted_lower), coupling=LinearCoupling(self.A, self.B, self.b), upper_data=Full(self.f),
            lower_data=Full(self.g), init=origin_of(SIZE),
        )  # fmt: skip


def rows(
    key: Array, num_active: Array, condition: Array, pull: Array, bend: Array, cross: Array, tau: Array, reach: Array,
    margin: Array, away: Array, sigma: Array,
) -> Rows:  # fmt: skip
    """The first `num_active` rows are active, with multipliers from margin to 2 margin; |error| = away, |q| = sigma."""
    keys = iter(jax.random.split(key, 20))
    V = basis(next(keys), SIZE)
    eigen = spectrum(condition, jnp.ones(()), jnp.array(False), SIZE)
    along, across = (reach * normal(next(keys), SIZE, SIZE) for _ in range(2))
    P = normal(next(keys), SIZE, SIZE)
    f = Bowl(
        of_norm(P + P.T, bend), of_norm(normal(next(keys), SIZE, SIZE), pull), normal(next(keys), SIZE),
        normal(next(keys), SIZE),
    )  # fmt: skip
    H, G = V @ jnp.diag(eigen) @ V.T, of_norm(normal(next(keys), SIZE, SIZE), cross)
    A, B = normal(next(keys), ROWS, SIZE), normal(next(keys), ROWS, SIZE)
    x, y = normal(next(keys), SIZE), normal(next(keys), SIZE)
    active = jnp.where(jnp.arange(ROWS) < num_active, 1.0, 0.0)
    away_from_zero = margin * (1 + jax.random.uniform(next(keys), (ROWS,), float))
    multipliers, slacks = active * away_from_zero, (1 - active) * away_from_zero
    b = A @ y + B @ x + slacks

    t = jnp.tanh(along @ y + across @ x)
    h = -(H @ y + G.T @ x + tau * along.T @ t + A.T @ multipliers)
    g = Tilted(H, G, h, along, across, tau)
    curved = tau * along.T @ jnp.diag(1 - t**2)
    top = jnp.concatenate([H + curved @ along, A.T], axis=1)
    kkt = jnp.concatenate([top, jnp.concatenate([jnp.diag(active) @ A, jnp.diag(1 - active)], axis=1)])
    fy = f.P @ y + f.Q.T @ x + f.p
    uw = jnp.linalg.solve(kkt, jnp.concatenate([fy, jnp.zeros(ROWS)]))
    u, w = uw[:SIZE], active * uw[SIZE:]
    gradient = f.Q @ y + x + f.s - (G + (curved @ across).T) @ u - B.T @ w

    length = jnp.linalg.norm
    longest, longest_x, square = jnp.max(length(along, axis=1)), jnp.max(length(across, axis=1)), length(along, 2) ** 2
    gram = jnp.diag(active) @ A @ A.T @ jnp.diag(active) + jnp.diag(jnp.where(active > 0, 0, jnp.inf))
    gram = jnp.where(jnp.isinf(gram), 1e12, gram)
    singular = jnp.sqrt(jnp.linalg.eigvalsh(gram)[0])
    base = Constants(
        mu=1 / condition, L_g=1 + tau * square, L_fx=length(f.Q, 2), L_fy=length(f.P, 2),
        L_gxy=tau * THIRD * square * longest_x, L_gyy=tau * THIRD * square * longest,
        C_gxy=length(G, 2) + tau * length(along, 2) * length(across, 2),
    )  # fmt: skip
    size = 1 + length(x) + length(y) + length(h) + length(u) + length(w) + length(gradient)
    known = KnownRows(base, length(u), singular, length(jnp.diag(active) @ B, 2), sigma, size)
    error, q, d = (normal(next(keys), SIZE) for _ in range(3))
    return Rows(
        f, g, A, B, b, x, y, multipliers, active, gradient, of_length(error, away), of_length(q, sigma),
        of_length(d, jnp.ones(())), known,
    )  # fmt: skip


def independent(instance: Rows) -> Array:
    """Assumption: the active rows are linearly independent (LICQ)."""
    return assumptions.licq(instance.A, instance.active > 0)


def strict(instance: Rows) -> Array:
    """Assumption: strict complementarity, and that y solves the lower level: rows hold, multipliers balance."""
    slacks = instance.b - instance.A @ instance.y - instance.B @ instance.x
    complementary = assumptions.strict_complementarity(instance.multipliers, slacks)
    residual = jax.grad(tilted_lower, argnums=1)(instance.x, instance.y, instance.g)
    balance = jnp.linalg.norm(residual + instance.A.T @ instance.multipliers)
    return jnp.minimum(complementary, 1e-9 * instance.constants.size - balance)


ASSUMPTIONS = (lower_strongly_convex, lower_smooth, independent, strict)
NUMBERS = {
    "num_active": strategies.dims(ROWS + 1).map(lambda k: k - 1),
    "condition": strategies.conditions(3),
    "pull": strategies.terms(),
    "bend": strategies.terms(),
    "cross": strategies.sizes(),
    "tau": strategies.sizes(),
    "reach": strategies.sizes(),
    "margin": strategies.fractions(0.01, 1.0),
    "away": strategies.sizes(),
    "sigma": strategies.fractions(0.001, 0.1),
}


def gradient_at(instance: Rows, x: Array, y: Array, active: Array, q: Array, num_steps: int) -> Any:
    """(grad F_q at x after num_steps SQP steps from (y, active); y; active)."""
    problem, lower = instance.problem, instance.problem.lower_data.full()
    found = tracking.track(problem, x, y, active, q, lower, num_steps)
    return tracking.gradient(problem, x, found, instance.f, lower), found.solution.y, found.solution.active


def _amplified(known: KnownRows) -> Array:
    """Rounding of the linear systems: the condition of the reduced Hessian and of the active rows."""
    return 1e3 * EPS * known.size * (1 + known.base.L_g) ** 2 / known.base.mu * (1 + 1 / known.singular) ** 2


def accuracy(compute: Callable = gradient_at) -> Guarantee:
    """The gradient at a wrong y with the right active rows."""

    def measure(instance: Rows, horizon: tuple[int, ...]) -> Array:
        known, errors = instance.constants, []
        for k in horizon:
            error = instance.error / 2.0**k
            y = instance.y + error
            found = compute(instance, instance.x, y, instance.active, jnp.zeros(SIZE), 0)[0]
            bias = constrained_bias(
                known.base, jnp.linalg.norm(error), known.u_norm, known.singular, known.rows_x
            )  # fmt: skip
            errors.append(jnp.linalg.norm(found - instance.gradient) / (bias + _amplified(known)))
        return jnp.stack(errors)

    return Guarantee(
        "ds-blo-accuracy", "ours, bilevel.theory_nonsmooth", ASSUMPTIONS, strategies.recipes(rows, **NUMBERS), measure,
        lambda known, k: jnp.ones(()), (0, 3, 10), lambda known: 0.0,
        "|y - y_q| <= d with the same active rows implies |gradient - grad F_q| <= constrained_bias(d)",
    )  # fmt: skip


def drawn(compute: Callable = gradient_at) -> Guarantee:
    """F_q of quadratics at a drawn q: near F, and differentiable with the implicit formula."""

    def measure(instance: Rows, horizon: tuple[int, ...]) -> Array:
        x, d = instance.x, instance.d
        gradient, y, active = compute(instance, x, instance.y, instance.active, instance.q, 1)

        def F(x: Array) -> tuple[Array, Array]:
            _, at, rows = compute(instance, x, y, active, instance.q, 1)
            return bowl(x, at, instance.f), rows

        (high, above), (low, below) = F(x + STEP * d), F(x - STEP * d)
        same = jnp.all((above == active) & (below == active))  # else a kink is nearer than STEP
        wrong = jnp.where(same, jnp.abs((high - low) / (2 * STEP) - gradient @ d), 0.0)
        return jnp.stack([wrong, jnp.linalg.norm(y - instance.y)])[None, :]

    def bound(known: KnownRows, k: int) -> Array:
        return jnp.stack([jnp.zeros(()), known.q / known.base.mu])

    quadratic = NUMBERS | {"tau": strategies.just(0.0), "away": strategies.just(0.0)}
    return Guarantee(
        "ds-blo-implicit", "ours, bilevel.tracking", ASSUMPTIONS, strategies.recipes(rows, **quadratic), measure, bound,
        (1,), lambda known: _amplified(known) * known.size / STEP,
        "F_q is differentiable at a drawn q with the implicit formula; |y_q - y_0| <= |q|/mu",
    )  # fmt: skip


ACCURACY = accuracy()
DRAWN = drawn()
