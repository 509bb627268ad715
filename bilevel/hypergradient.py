"""Hypergradients that carry their error, and the implicit objective F as a differentiable function.

With R = grad_y g (or y - T), y* = y(x) and v* = R_y(x, y*)^-T f_y(x, y*),

    F(x) = f(x, y*),    grad F(x) = f_x(x, y*) - R_x(x, y*)' v*.

At computed (y, v) with residuals |R(x, y)| and r_v = f_y - R_y' v, and constants `Constants`, in 2-norms:

    delta = |R|/mu  >=  |y - y*|                                              (strong monotonicity of R in y)
    eps_v = (|r_v| + L_fy delta + L_gyy |v| delta)/mu  >=  |v - v*|
    error <= L_fx delta + L_gxy |v| delta + C_gxy eps_v.

This is a proof in exact arithmetic. For rounding, each computed residual is raised to first order by what the constants
show of the sizes involved; data that cancel before they reach f or g (residuals of least squares, say) are not seen.

Without constants the error is estimated to first order: the Newton correction d = -R_y^-1 R and the change it makes in
the adjoint equations give the leading term of h - grad F; the estimate is twice its norm. It is an estimate: status
says so.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import lower as lower_level
from bilevel import oracles
from bilevel.linear import LinearSolver, default_solver
from bilevel.lower import Newton
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Status
from bilevel.struct import invalid, static, struct

PyTree = Any


@struct
class Constants:
    """Known constants of a problem, 2-norms, for y anywhere on the segment between the computed y and y*.

    mu: |y1 - y2| <= |R(x, y1) - R(x, y2)|/mu. Strong convexity for Minimize; 1 - q for a q-contraction in the 2-norm;
        (1 - q)/sqrt(dim y) for a q-contraction in the maximum norm.
    L_fx, L_fy: Lipschitz constants in y of f_x and f_y.
    L_gxy, L_gyy: Lipschitz constants in y of R_x and R_y (0 for quadratics).
    C_gxy: bound of |R_x|. L_g: Lipschitz constant of R in y, for the rounding allowance and for theory step sizes.
    """

    mu: Any
    L_fx: Any
    L_fy: Any
    L_gxy: Any
    L_gyy: Any
    C_gxy: Any
    L_g: Any


@struct
class Unrolled:
    """Differentiate `num_steps` steps y <- y - step_size R(x, y) instead of using the implicit function theorem."""

    step_size: Any
    num_steps: int = static(default=100)


@struct
class Hypergradient:
    """A hypergradient and how far to trust it.

    value: f(x, y), shape []. gradient: shaped like x. y: the lower-level point used. lower_residual: |R(x, y)|.
    linear_residual: |f_y - R_y' v| (NaN for `Unrolled`). error_bound: bound of |gradient - grad F(x)|, 2-norm:
    rigorous in exact arithmetic, with an allowance for rounding, where `constants` were given, else estimated; infinite
    where it is not known. active_margin: distance to a change of the active set, infinite without constraints.
    status: a `Status` as an integer array: CONVERGED (bound proved from the constants), ESTIMATED, UNCHECKED (no bound
    asked for), UNSOLVED_LINEAR, or why the lower level failed. v: the adjoint, a warm start.
    """

    value: Array
    gradient: PyTree
    y: PyTree
    lower_residual: Array
    linear_residual: Array
    error_bound: Array
    active_margin: Array
    status: Array
    v: PyTree

    def __str__(self) -> str:
        """Numbers and the status sentence."""
        status = Status(int(self.status))
        return (
            f"F = {float(self.value):.10g}, |gradient| = {float(_norm(self.gradient)):.4e}, "
            f"error <= {float(self.error_bound):.1e}, "
            f"lower residual {float(self.lower_residual):.1e}\n{status.name}: {status.advice}"
        )


def _norm(tree: PyTree) -> Array:
    return jnp.linalg.norm(ravel_pytree(tree)[0])


@partial(jax.jit, static_argnames="estimate")
def hypergradient(
    problem: BilevelProblem,
    x: PyTree,
    y: PyTree = None,
    *,
    method: LinearSolver | Unrolled | None = None,
    lower: Newton | None = Newton(),  # noqa: B008
    v: PyTree = None,
    constants: Constants | None = None,
    estimate: bool = True,
) -> Hypergradient:
    """Grad F(x) with its error. Pure; use it under jit and vmap.

    Args:
        problem: with an unconstrained lower level. All of its data is used.
        x: the point, shaped like init's x0.
        y: warm start of the lower level; default init's y0.
        method: `CG`, `MINRES`, `GMRES`, `Neumann`, `Dense` for the linear system, or `Unrolled`. Default: Dense up to
            `linear.DENSE_LIMIT` unknowns, then CG (Minimize) or GMRES (FixedPoint).
        lower: settings of the lower-level solve; None takes y as given, and the error says what that costs.
        v: warm start of the adjoint, shaped like y.
        constants: makes `error_bound` rigorous.
        estimate: without constants, estimate the error (two more linear solves); False gives error_bound = NaN.

    Raises:
        NotImplementedError: for a lower level with sets or coupling.
        InvalidInput: where x, y or v is not shaped like init's x0, y0.
    """
    lower_level.require_unconstrained(problem, "hypergradient")
    y = start_y(problem, x, y)
    if v is not None:
        check_like("v", v, y, "init's y0")
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    if lower is None:
        status = jnp.array(Status.CONVERGED)
    else:
        y, _, _, status = lower_level.solve(problem, x, y, lower_batch, lower)
    if isinstance(method, Unrolled):
        return _unrolled(problem, x, y, method, status)

    flat_y, unravel = ravel_pytree(y)
    value, (fx, fy) = oracles.upper_value_and_gradients(problem, x, y, upper_batch)
    fx, unravel_x = ravel_pytree(fx)
    fy = ravel_pytree(fy)[0]
    R = ravel_pytree(oracles.residual(problem, x, y, lower_batch))[0]
    symmetric = isinstance(problem.lower, Minimize)
    n, dtype = flat_y.size, flat_y.dtype
    method = default_solver(n, symmetric) if method is None else method
    product = oracles.hvp_operator(problem, x, y, lower_batch, transpose=True)
    solve = method.prepare(lambda v: ravel_pytree(product(unravel(v)))[0], n, dtype)
    start = jnp.zeros_like(fy) if v is None else ravel_pytree(v)[0]
    flat_v, linear_residual, _ = solve(fy, start)

    def cross(v: Array) -> Array:
        return ravel_pytree(oracles.cross(problem, x, y, unravel(v), lower_batch))[0]

    gradient = fx - cross(flat_v)
    lower_residual = jnp.linalg.norm(R)
    rounding = jnp.finfo(dtype).eps * (n + fx.size)
    if constants is not None:
        error = _proved(constants, x, flat_y, flat_v, fx, lower_residual, linear_residual, rounding)
    elif estimate:
        if symmetric:
            forward_solve = solve
        else:
            forward = oracles.hvp_operator(problem, x, y, lower_batch)
            forward_solve = method.prepare(lambda v: ravel_pytree(forward(unravel(v)))[0], n, dtype)
        d, unsolved_d, _ = forward_solve(-R, jnp.zeros_like(R))
        by_x, by_y = oracles.adjoint_change(problem, x, y, unravel(flat_v), unravel(d), upper_batch, lower_batch)
        by_x, by_y = ravel_pytree(by_x)[0], ravel_pytree(by_y)[0]
        rhs = fy - ravel_pytree(product(unravel(flat_v)))[0] + by_y
        dv, unsolved_dv, _ = solve(rhs, jnp.zeros_like(fy))
        by_v, size = cross(dv), jnp.linalg.norm(rhs)
        amplified = jnp.linalg.norm(by_v) / jnp.where(size > 0, size, 1)  # of rounding in the adjoint's right-hand side
        scale = jnp.linalg.norm(fx) + jnp.linalg.norm(fx - gradient) + amplified * jnp.linalg.norm(fy)
        error = 2 * jnp.linalg.norm(by_x - by_v) + rounding * scale
        # An estimate by a solver that has not solved is none.
        solved_linear = (unsolved_d <= 0.1 * lower_residual) & (unsolved_dv <= 0.1 * size)
        error = jnp.where(solved_linear, error, jnp.inf)
    else:
        error = jnp.full((), jnp.nan, dtype)
    if constants is not None:
        good = jnp.where(jnp.isfinite(error), Status.CONVERGED, Status.UNCHECKED)
    elif estimate:
        good = jnp.where(jnp.isfinite(error), Status.ESTIMATED, Status.UNSOLVED_LINEAR)
    else:
        good = Status.UNCHECKED
    solved = jnp.where(status == Status.CONVERGED, good, status)
    finite = jnp.isfinite(gradient).all() & jnp.isfinite(value) & jnp.isfinite(lower_residual + linear_residual)
    return Hypergradient(
        value=value,
        gradient=unravel_x(jnp.where(finite, gradient, jnp.nan)),  # a failure is never a number
        y=y,
        lower_residual=lower_residual,
        linear_residual=linear_residual,
        error_bound=jnp.where(finite & ~(jnp.isnan(error) & (constants is not None)), error, jnp.inf),
        active_margin=jnp.full((), jnp.inf, dtype),
        status=jnp.where(finite, solved, Status.NONFINITE),
        v=unravel(flat_v),
    )


def _proved(
    c: Constants,
    x: PyTree,
    y: Array,
    v: Array,
    fx: Array,
    lower_residual: Array,
    linear_residual: Array,
    rounding: Array,
) -> Array:
    """The bound of the module's docstring, each computed residual raised by what rounding may have hidden in it."""
    size_x, size_y, size_v = _norm(x), jnp.linalg.norm(y), jnp.linalg.norm(v)
    R = lower_residual + rounding * (c.L_g * size_y + c.C_gxy * size_x + lower_residual)
    r_v = linear_residual + rounding * (c.L_g * size_v + c.L_fy * size_y)
    delta = R / c.mu
    eps_v = (r_v + c.L_fy * delta + c.L_gyy * size_v * delta) / c.mu
    bound = c.L_fx * delta + c.L_gxy * size_v * delta + c.C_gxy * eps_v
    return bound + rounding * (jnp.linalg.norm(fx) + c.L_fx * size_y + c.C_gxy * size_v)


def _unrolled(problem: BilevelProblem, x: PyTree, y: PyTree, method: Unrolled, status: Array) -> Hypergradient:
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    (value, last), gradient = oracles.unrolled_objective(
        problem, x, y, method.num_steps, method.step_size, upper_batch, lower_batch
    )
    nan = jnp.full((), jnp.nan, value.dtype)
    finite = jnp.isfinite(ravel_pytree(gradient)[0]).all() & jnp.isfinite(value)
    return Hypergradient(
        value=value,
        gradient=gradient,
        y=last,
        lower_residual=_norm(oracles.residual(problem, x, last, lower_batch)),
        linear_residual=nan,
        error_bound=jnp.where(finite, nan, jnp.inf),
        active_margin=jnp.full((), jnp.inf, value.dtype),
        status=jnp.where(finite, jnp.where(status == Status.CONVERGED, Status.UNCHECKED, status), Status.NONFINITE),
        v=jax.tree.map(jnp.zeros_like, last),
    )


def implicit_objective(
    problem: BilevelProblem, *, method: LinearSolver | None = None, lower: Newton | None = None
) -> Callable[..., Array]:
    """F: x -> f(x, y(x)), shape [], differentiable in forward and reverse mode, and again.

    Use it under `jax.grad`, `jax.hessian`, `jit`, `vmap`, in any optax loop. `F(x, y)` warm-starts the lower level
    from y,
    without a derivative with respect to y. F is NaN where the lower level cannot be solved at all; `hypergradient` says
    why, and how exact an answer is.

    Raises:
        NotImplementedError: for a lower level with sets or coupling.
    """
    lower_level.require_unconstrained(problem, "implicit_objective")
    return lambda x, y=None: _implicit_value(problem, x, y, method, lower)


@jax.jit
def _implicit_value(
    problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None, lower: Newton | None
) -> Array:
    symmetric = isinstance(problem.lower, Minimize)
    upper_batch, lower_batch = problem.upper_data.full(), problem.lower_data.full()
    y = lax.stop_gradient(start_y(problem, x, y))
    flat, unravel = ravel_pytree(y)
    linear = default_solver(flat.size, symmetric) if method is None else method

    def residual(flat: Array) -> Array:
        return ravel_pytree(oracles.residual(problem, x, unravel(flat), lower_batch))[0]

    def root(_: Callable, start: Array) -> Array:
        found = lower_level.solve(problem, lax.stop_gradient(x), unravel(start), lower_batch, lower)
        return jnp.where(found.status == Status.NONFINITE, jnp.nan, ravel_pytree(found.y)[0])

    def apply(matvec: Callable, b: Array) -> Array:
        return linear.iterate(matvec, b, jnp.zeros_like(b))[0]

    def tangent(matvec: Callable, b: Array) -> Array:
        return lax.custom_linear_solve(matvec, b, apply, transpose_solve=apply, symmetric=symmetric)

    solution = lax.custom_root(residual, flat, root, tangent)
    return oracles.upper_value(problem, x, unravel(solution), upper_batch)


def start_y(problem: BilevelProblem, x: PyTree, y: PyTree) -> PyTree:
    """y, or init's y0 where y is None; x and y are held against init's shapes."""
    x0, y0 = jax.eval_shape(lambda: problem.init(jax.random.key(0)))
    check_like("x", x, x0, "init's x0")
    if y is None:
        return problem.init(jax.random.key(0))[1]
    check_like("y", y, y0, "init's y0")
    return y


def check_like(name: str, value: PyTree, like: PyTree, source: str) -> None:
    """Raise `InvalidInput` where `value` differs from `like` in structure, shapes or dtypes."""
    got, want = (
        jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree) for tree in (value, like)
    )
    if got != want:
        invalid(name, got, f"{want}, as {source}", "Reshape or convert it.")
