"""Certified hypergradients: the true error never exceeds `error_bound`; AID's error after a few steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import (
    AID,
    CG,
    AsGiven,
    BilevelProblem,
    Constants,
    Dense,
    Full,
    Minimize,
    Newton,
    hypergradient,
    theory,
)
from bilevel.guarantees import Guarantee
from problems import strategies
from problems.guarantees.instances import (
    DIM,
    EPS,
    basis,
    lower_smooth,
    lower_strongly_convex,
    mask,
    normal,
    of_length,
    of_norm,
    origin,
    spectrum,
)

THIRD = 4 / 3**1.5  # the largest |third derivative| of log cosh


class Tilted(NamedTuple):
    """H [DIM, DIM], G [DIM, DIM] (x by y), h [DIM]; rows a_i of `along` and b_i of `across`, weight tau []."""

    H: Any
    G: Any
    h: Any
    along: Any
    across: Any
    tau: Any


class Bowl(NamedTuple):
    """P, Q, p, s of f(x, y) = y'P y/2 + x'Q y + |x|^2/2 + p'y + s'x."""

    P: Any
    Q: Any
    p: Any
    s: Any


def log_cosh(t: Array) -> Array:
    """Without overflow."""
    return jnp.logaddexp(t, -t) - jnp.log(jnp.asarray(2, t.dtype))


def tilted_lower(x: Array, y: Array, batch: Tilted) -> Array:
    """The lower objective g = y'H y/2 + x'G y + h'y + tau sum_i log cosh(a_i'y + b_i'x): not quadratic."""
    kinks = jnp.sum(log_cosh(batch.along @ y + batch.across @ x))
    return y @ batch.H @ y / 2 + x @ batch.G @ y + batch.h @ y + batch.tau * kinks


def bowl(x: Array, y: Array, batch: Bowl) -> Array:
    """The upper objective."""
    return y @ batch.P @ y / 2 + x @ batch.Q @ y + x @ x / 2 + batch.p @ y + batch.s @ x


class KnownTilted(NamedTuple):
    """Constants of f and g; |y - y(x)| at the start; |v(x)|; rounding of the reference gradient."""

    base: Constants
    distance: Array
    v_norm: Array
    rounding: Array


class Certified(NamedTuple):
    """The problem's data, the point x, a guess y, and the exact y(x), v(x) and grad F(x)."""

    f: Bowl
    g: Tilted
    x: Array
    y: Array
    y_star: Array
    v_star: Array
    gradient: Array
    constants: KnownTilted

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem."""
        return BilevelProblem(
            bowl, Minimize(tilted_lower), upper_data=Full(self.f), lower_data=Full(self.g), init=origin
        )


def _hessian(g: Tilted, x: Array, y: Array) -> Array:
    t = jnp.tanh(g.along @ y + g.across @ x)
    return g.H + g.tau * g.along.T @ jnp.diag(1 - t**2) @ g.along


def _residual(g: Tilted, x: Array, y: Array) -> Array:
    return g.H @ y + g.G.T @ x + g.h + g.tau * g.along.T @ jnp.tanh(g.along @ y + g.across @ x)


def certified(
    key: Array, dim: Array, condition: Array, scale: Array, pull: Array, bend: Array, cross: Array, tau: Array,
    reach: Array, offset: Array, away: Array,
) -> Certified:  # fmt: skip
    """All derivatives by hand, in NumPy-like algebra: nothing is shared with the library. |y - y(x)| = away."""
    keys = iter(jax.random.split(key, 16))
    some = jnp.outer(mask(dim), mask(dim))
    V = basis(next(keys))
    eigen = scale * spectrum(condition, jnp.ones(()), jnp.array(False))
    along = jnp.sqrt(scale) * normal(next(keys), DIM, DIM) @ V.T * reach
    across = jnp.sqrt(scale) * normal(next(keys), DIM, DIM) * reach
    P = of_norm(some * normal(next(keys), DIM, DIM), bend)
    f = Bowl(
        V @ (P + P.T) @ V.T / 2, of_norm(some * normal(next(keys), DIM, DIM), pull) @ V.T,
        offset * normal(next(keys), DIM), normal(next(keys), DIM),
    )  # fmt: skip
    G = of_norm(some * normal(next(keys), DIM, DIM), cross * scale) @ V.T
    x, y_star = normal(next(keys), DIM), offset * normal(next(keys), DIM)
    g = Tilted(V @ jnp.diag(eigen) @ V.T, G, jnp.zeros(DIM), along, across, tau)
    g = g._replace(h=-_residual(g, x, y_star))  # so that y_star = y(x)
    v_star = jnp.linalg.solve(_hessian(g, x, y_star), f.P @ y_star + f.Q.T @ x + f.p)
    t = jnp.tanh(g.along @ y_star + g.across @ x)
    Jv = g.G @ v_star + g.tau * g.across.T @ ((1 - t**2) * (g.along @ v_star))
    gradient = f.Q @ y_star + x + f.s - Jv
    y = y_star + V @ of_length(mask(dim) * normal(next(keys), DIM), away)

    length = jnp.linalg.norm
    rows, across_rows = jnp.max(length(along, axis=1)), jnp.max(length(across, axis=1))
    square = length(along, 2) ** 2
    base = Constants(
        mu=eigen[-1], L_g=eigen[0] + tau * square, L_fx=length(f.Q, 2), L_fy=length(f.P, 2),
        L_gxy=tau * THIRD * square * across_rows, L_gyy=tau * THIRD * square * rows,
        C_gxy=length(G, 2) + tau * length(along, 2) * length(across, 2),
    )  # fmt: skip
    size = base.L_g * length(y_star) + base.C_gxy * length(x) + length(g.h) + tau * length(along, 2) * DIM
    linear = base.L_g * length(v_star) + base.L_fy * length(y_star) + pull * length(x) + length(f.p)
    known = KnownTilted(base, away, length(v_star), jnp.zeros(()))
    root, adjoint = 30 * EPS * (size + base.L_g * away) / base.mu, 30 * EPS * linear / base.mu
    rounding = theory.aid_bias(base, root, adjoint, length(v_star)) + 30 * EPS * (length(gradient) + length(x))
    return Certified(f, g, x, y, y_star, v_star, gradient, known._replace(rounding=rounding))


points = strategies.recipes(
    certified, dim=strategies.dims(DIM), condition=strategies.conditions(6), scale=strategies.scales(),
    pull=strategies.terms(), bend=strategies.terms(), cross=strategies.sizes(), tau=strategies.sizes(),
    reach=strategies.sizes(), offset=strategies.switches, away=strategies.scales(),
)  # fmt: skip


def _excess(instance: Certified, h: Any) -> Array:
    """Error over bound, once the reference's own rounding is taken off the error."""
    error = jnp.linalg.norm(h.gradient - instance.gradient) - instance.constants.rounding
    return jnp.maximum(error, 0) / h.error_bound


def bound(name: str, settings: Callable[[int], dict[str, Any]], statement: str, compute: Callable) -> Guarantee:
    """The error over `error_bound` of hypergradients computed with `settings(k)`."""

    def measure(instance: Certified, horizon: tuple[int, ...]) -> Array:
        found = [
            compute(instance.problem, instance.x, instance.y, constants=instance.constants.base, **settings(k))
            for k in horizon
        ]
        return jnp.stack([_excess(instance, h) for h in found])

    return Guarantee(
        name, "ours, bilevel.hypergradient", (lower_strongly_convex, lower_smooth), points, measure,
        lambda known, k: jnp.ones(()), (1, 3, 6), lambda known: 0.0, statement,
    )  # fmt: skip


def unsolved(compute: Callable = hypergradient) -> Guarantee:
    """At any y, with k iterations of CG."""
    return bound(
        "certified-unsolved", lambda k: {"lower": AsGiven(), "method": CG(tol=0.0, max_iterations=k)},
        "|h - grad F| <= error_bound at any y, after k iterations of CG", compute,
    )  # fmt: skip


def solved(compute: Callable = hypergradient) -> Guarantee:
    """After k steps of Newton's method, linear systems solved densely."""
    return bound(
        "certified-newton", lambda k: {"lower": Newton(max_steps=k), "method": Dense()},
        "|h - grad F| <= error_bound after k Newton steps", compute,
    )  # fmt: skip


def aid_bias(make: Callable[..., Any] = AID) -> Guarantee:
    """The error of one AID direction with k lower steps and k CG iterations from v = 0."""

    def measure(instance: Certified, horizon: tuple[int, ...]) -> Array:
        known, problem, key = instance.constants, instance.problem, jax.random.key(0)
        errors = []
        for k in horizon:
            linear = CG(tol=0.0, max_iterations=k)
            a = 2 / (known.base.mu + known.base.L_g)
            solver = make(lower_step_size=a, upper_step_size=jnp.ones(()), num_lower_steps=k, linear=linear)
            state = solver.init(problem, key)._replace(x=instance.x, y=instance.y)
            after = solver.step(problem, state, key)[0]
            errors.append(jnp.linalg.norm(state.x - after.x - instance.gradient))
        return jnp.stack(errors)

    def bound(known: KnownTilted, k: int) -> Array:
        base = known.base
        d = theory.contraction(2 / (base.mu + base.L_g), base.mu, base.L_g) ** k * known.distance
        condition = base.L_g / base.mu
        factor = jnp.minimum(1, jnp.sqrt(condition) * theory.chebyshev(condition, k))
        start = known.v_norm + (base.L_fy + base.L_gyy * known.v_norm) * d / base.mu  # |v at y| at most
        return theory.aid_bias(base, d, factor * start, known.v_norm)

    return Guarantee(
        "aid-bias", "ours, bilevel.theory", (lower_strongly_convex, lower_smooth), points,
        measure, bound, (1, 2, 5, 10, 20), lambda known: 4 * known.rounding,
        "|direction - grad F| after k lower steps and k CG iterations <= theory.aid_bias", "geometric",
    )  # fmt: skip


UNSOLVED = unsolved()
SOLVED = solved()
AID_BIAS = aid_bias()
