"""Solve the lower level: y with R(x, y) = 0, and a certificate.

Newton's method, on the dense Hessian up to `DENSE_LIMIT` unknowns and matrix-free beyond. Sets and coupling (projected,
polyhedral) are not here yet: `solve` says so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.linear import CG, DENSE_LIMIT, GMRES, dense_matrix
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Status
from bilevel.step import Stepper
from bilevel.struct import static, struct

PyTree = Any


class LowerSolution(NamedTuple):
    """y; residual = |R(x, y)|_2 at that y, recomputed; steps taken; status (CONVERGED, MAX_STEPS, STALLED, NONFINITE)."""

    y: PyTree
    residual: Array
    steps: Array
    status: Array


@struct
class Newton:
    """Newton's method for the lower level, with backtracking (Minimize) or Picard steps (FixedPoint) as safeguard.

    Minimize: d = -H^-1 R; H made positive definite by a Gershgorin shift where Cholesky fails (dense) or CG stopped at
    negative curvature (matrix-free, forcing term min(0.1, |R|/|R_0|)); the step is halved until g decreases
    (Armijo, 1e-4), or |R| halves while g does not rise beyond rounding.
    FixedPoint: d = -(I - T_y)^-1 R by LU or 20 GMRES products, taken where it halves |R|, else y <- T(x, y), which is
    the safe step of a contraction.

    A step that is predicted to leave an error below tol (1 + |y|) ends the loop: eta |d| + |d|^2/(1 + |y|), with eta the
    accuracy of the linear solve. That rule does not depend on the scale of g.

    Args:
        tol: relative accuracy of y; default 10 eps of y's dtype.
        max_steps: Newton steps.
        dense: form the Hessian; default where y has at most DENSE_LIMIT entries.
    """

    tol: Any = None
    max_steps: int = static(200)
    dense: bool | None = static(None)


def require_unconstrained(problem: BilevelProblem, what: str) -> None:
    """Raise `NotImplementedError` for lower levels with sets or coupling."""
    if problem.constrained_lower:
        raise NotImplementedError(
            f"{what}: got a lower level with y_set = {type(problem.y_set).__name__} and coupling = "
            f"{type(problem.coupling).__name__}; expected an unconstrained lower level. Sets and linear coupling are not supported yet."
        )


def solve(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Newton | None = None
) -> LowerSolution:
    """The lower-level solution from the warm start y."""
    require_unconstrained(problem, "lower.solve")
    settings = Newton() if settings is None else settings
    flat, unravel = ravel_pytree(y)
    dense = flat.size <= DENSE_LIMIT if settings.dense is None else settings.dense
    tol = 10 * jnp.finfo(flat.dtype).eps if settings.tol is None else settings.tol

    def residual(flat: Array) -> Array:
        return ravel_pytree(oracles.residual(problem, x, unravel(flat), batch))[0]

    def operator(flat: Array) -> Callable[[Array], Array]:
        product = oracles.hvp_operator(problem, x, unravel(flat), batch)
        return lambda v: ravel_pytree(product(unravel(v)))[0]

    if isinstance(problem.lower, Minimize):
        move = _minimize_step(
            lambda flat: oracles.lower_value(problem, x, unravel(flat), batch), residual, operator, dense
        )
    else:
        move = _fixed_point_step(residual, operator, dense)

    def go_on(carry: tuple) -> Array:
        _, _, _, steps, status = carry
        return (status == Status.MAX_STEPS) & (steps < settings.max_steps)

    def body(carry: tuple) -> tuple:
        flat, R, norms, steps, _ = carry
        new, R_new, length, eta, moved = move(flat, R, norms)
        scale = 1 + jnp.linalg.norm(new)
        done = eta * length + length**2 / scale <= tol * scale
        status = jnp.where(done, Status.CONVERGED, jnp.where(moved, Status.MAX_STEPS, Status.STALLED))
        finite = jnp.isfinite(R_new).all() & jnp.isfinite(new).all()
        status = jnp.where(finite, status, Status.NONFINITE)
        best = jnp.minimum(norms[1], jnp.linalg.norm(R_new))
        return jnp.where(finite, new, flat), R_new, norms.at[1].set(best), steps + 1, status

    R = residual(flat)
    norm = jnp.linalg.norm(R)
    status = jnp.where(jnp.isfinite(norm), jnp.where(norm == 0, Status.CONVERGED, Status.MAX_STEPS), Status.NONFINITE)
    start = (
        flat,
        R,
        jnp.stack([norm, norm]),
        jnp.array(0),
        status,
    )  # norms: at the start, and the best so far
    flat, R, _, steps, status = lax.while_loop(go_on, body, start)
    return LowerSolution(unravel(flat), jnp.linalg.norm(R), steps, status)


def _minimize_step(value: Callable, residual: Callable, operator: Callable, dense: bool) -> Callable:
    """(y, R, norms) -> (y_new, R_new, |d|, eta, moved) for a lower level that is minimised."""

    def solver_at(flat: Array, R: Array, norms: Array) -> tuple[Callable, Array]:
        """(R -> H^-1 R, eta) with H at `flat` made positive definite."""
        if dense:
            H = dense_matrix(operator(flat), flat.size, flat.dtype)
            factor = jnp.linalg.cholesky(H)

            def shifted() -> Array:
                off = jnp.sum(jnp.abs(H), axis=1) - jnp.abs(jnp.diag(H))
                lowest = jnp.min(jnp.diag(H) - off)  # Gershgorin: no eigenvalue lies below
                shift = jnp.maximum(-lowest, 0) + 1e-3 * jnp.maximum(jnp.max(jnp.abs(H)), 1e-8)
                return jnp.linalg.cholesky(H + shift * jnp.eye(flat.size, dtype=flat.dtype))

            good = jnp.isfinite(factor).all()
            factor = lax.cond(good, lambda: factor, shifted)
            return lambda R: jax.scipy.linalg.cho_solve((factor, True), R), jnp.where(good, 0.0, 1.0).astype(flat.dtype)
        eta = jnp.minimum(0.1, jnp.linalg.norm(R) / norms[0]).astype(flat.dtype)
        solve = CG(tol=jnp.maximum(eta, 10 * jnp.finfo(flat.dtype).eps)).prepare(operator(flat), flat.size, flat.dtype)

        def direction(R: Array) -> Array:
            v = solve(R, jnp.zeros_like(R)).v
            return jnp.where(jnp.any(v != 0), v, R)  # negative curvature at once: steepest descent

        return direction, eta

    def move(flat: Array, R: Array, norms: Array) -> tuple:
        direction, eta = solver_at(flat, R, norms)
        d, g = -direction(R), value(flat)
        slope = R @ d
        slack = 1e3 * jnp.finfo(flat.dtype).eps * (1 + jnp.abs(g))

        def rejected(carry: tuple) -> Array:
            t, _, _, accepted = carry
            return ~accepted & (t > 1e-9)

        def halve(carry: tuple) -> tuple:
            return attempt(carry[0] * 0.5)

        def attempt(t: Array) -> tuple:
            new = flat + t * d
            g_new, R_new = value(new), residual(new)
            halved = (jnp.linalg.norm(R_new) <= 0.5 * norms[1]) & (g_new <= g + slack)
            return t, new, R_new, ((g_new <= g + 1e-4 * t * slope) & (slope < 0)) | halved

        t, new, R_new, accepted = lax.while_loop(rejected, halve, attempt(jnp.ones((), flat.dtype)))
        new, R_new = jnp.where(accepted, new, flat), jnp.where(accepted, R_new, R)
        length = jnp.linalg.norm(d)  # of the full step: a short accepted one is no sign of convergence
        if dense:  # one more step with the same factor costs n^2, and finishes a quadratic
            chord = -direction(R_new)
            R_chord = residual(new + chord)
            better = jnp.linalg.norm(R_chord) <= jnp.linalg.norm(R_new)
            length = jnp.where(accepted, jnp.minimum(length, jnp.linalg.norm(chord)), length)
            new, R_new = jnp.where(better, new + chord, new), jnp.where(better, R_chord, R_new)
            accepted = accepted | better
        return new, R_new, length, eta, accepted

    return move


def _fixed_point_step(residual: Callable, operator: Callable, dense: bool) -> Callable:
    """(y, R, norms) -> (y_new, R_new, |d|, eta, moved) for a fixed point."""

    def move(flat: Array, R: Array, norms: Array) -> tuple:
        del norms
        M = operator(flat)
        if dense:
            d = -jnp.linalg.solve(dense_matrix(M, flat.size, flat.dtype), R)
        else:
            d = -GMRES(restart=20, max_iterations=20).prepare(M, flat.size, flat.dtype)(R, jnp.zeros_like(R)).v
        d = jnp.where(jnp.isfinite(d).all(), d, 0)
        eta = jnp.linalg.norm(R + M(d)) / jnp.linalg.norm(R)
        newton = flat + d
        R_newton = residual(newton)
        take = jnp.linalg.norm(R_newton) <= 0.5 * jnp.linalg.norm(R)
        picard = flat - R
        new, R_new = lax.cond(take, lambda: (newton, R_newton), lambda: (picard, residual(picard)))
        # At rounding level nothing halves R any more: a Newton step this small is the end, whichever was taken.
        small = jnp.linalg.norm(d) <= 1e-7 * (1 + jnp.linalg.norm(flat)) * jnp.sqrt(jnp.finfo(flat.dtype).eps / 2.2e-16)
        length = jnp.where(take | small, jnp.linalg.norm(d), jnp.linalg.norm(R) + 1)
        return new, R_new, length, jnp.where(small & (eta < 1), jnp.minimum(eta, 1e-8), eta), jnp.array(True)

    return move


def descend(
    problem: BilevelProblem, x: PyTree, y: PyTree, step_y: Stepper, source: PyTree, key: Array, num_steps: int
) -> tuple[PyTree, Stepper, PyTree]:
    """(y, stepper, source state) after num_steps of y <- y - a R(x, y; batch), a fresh batch of the lower source each."""

    def body(carry: tuple[PyTree, Stepper, PyTree], key: Array) -> tuple[tuple[PyTree, Stepper, PyTree], None]:
        y, step_y, source = carry
        batch, source = problem.lower_data.next(source, key, x, y)
        y, step_y = step_y(y, oracles.residual(problem, x, y, batch))
        return (y, step_y, source), None

    return lax.scan(body, (y, step_y, source), jax.random.split(key, num_steps))[0]


def spectrum(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, num_products: int = 30
) -> tuple[Array, Array]:
    """Estimates (L, mu) of the largest and smallest eigenvalue of the symmetric part of R_y at (x, y).

    Lanczos with full re-orthogonalisation, `num_products` products; exact for at most that many unknowns, else L is
    slightly below and mu above the truth. Used to choose default step sizes, never to certify.
    """
    flat, unravel = ravel_pytree(y)
    n, m = flat.size, min(num_products, flat.size)
    forward = oracles.hvp_operator(problem, x, y, batch)
    backward = oracles.hvp_operator(problem, x, y, batch, transpose=True)

    def product(v: Array) -> Array:
        both = (
            (forward(unravel(v)),)
            if isinstance(problem.lower, Minimize)
            else (forward(unravel(v)), backward(unravel(v)))
        )
        return sum((ravel_pytree(part)[0] for part in both), jnp.zeros(n, flat.dtype)) / len(both)

    def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        Q, T = carry
        w = product(Q[k])
        h = Q @ w
        w = w - h @ Q
        w = w - (Q @ w) @ Q
        norm = jnp.linalg.norm(w)
        alive = norm > 1e3 * jnp.finfo(flat.dtype).eps * jnp.linalg.norm(h)
        return Q.at[k + 1].set(jnp.where(alive, w / jnp.where(alive, norm, 1), 0)), T.at[:, k].set(h)

    first = jax.random.normal(jax.random.key(0), (n,), flat.dtype)
    Q = jnp.zeros((m + 1, n), flat.dtype).at[0].set(first / jnp.linalg.norm(first))
    Q, T = lax.fori_loop(0, m, body, (Q, jnp.zeros((m + 1, m), flat.dtype)))
    used = jnp.linalg.norm(Q[:m], axis=1) > 0.5  # an exhausted Krylov space leaves zero rows: keep their zeros out
    first_value = T[0, 0]
    T = jnp.where(used[:, None] & used[None, :], (T[:m] + T[:m].T) / 2, 0) + jnp.diag(jnp.where(used, 0, first_value))
    values = jnp.linalg.eigvalsh(T)
    return values[-1], values[0]
