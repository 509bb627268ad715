"""`Newton`: the method for lower levels without constraints. It finds y with R(x, y) = 0, and a certificate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.linear import DENSE_LIMIT, LinearSolver, gram, pack_scalars
from bilevel.lower import adjoint as unconstrained
from bilevel.lower.directions import directions
from bilevel.lower.method import Adjoint, LowerMethod, LowerSolution
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Hypergradient, Status
from bilevel.struct import static, struct

PyTree = Any


@struct
class Newton(LowerMethod):
    """Newton's method for the lower level, with backtracking (Minimize) or Picard steps (FixedPoint) as safeguard.

    Minimize: d = -H^-1 R; where Cholesky fails, a multiple of the absolute row sums is added to H's diagonal (dense),
    and CG stops at negative curvature (matrix-free, forcing term min(0.01, |R|/|R_0|)). The step is halved until g
    decreases (Armijo, 1e-4), or |R| halves while g does not rise beyond rounding.
    FixedPoint: d = -(I - T_y)^-1 R by LU or GMRES, taken where it halves |R|, else y <- T(x, y), which is
    the safe step of a contraction.
    A dense factor serves again while it cuts |R| tenfold (chord steps): a quadratic is factored once.

    The next direction's length estimates the error of y, whatever the scales of g and of y. With s^2 = |y|^2 +
    |longest step so far|^2, CONVERGED means that it is at most tol s; or that it was at most sqrt(eps) s, and neither
    it nor |R| halves any more: rounding allows no more. Where |R| and g stop falling before, the status is STALLED.
    Minimize: CONVERGED needs a Hessian that is positive semidefinite up to rounding (dense; matrix-free only along
    CG's directions), else SADDLE. s is one number: entries of y much smaller than the largest are less exact by that
    ratio.

    Args:
        tol: accuracy of y relative to s; default 10 eps of y's dtype.
        max_steps: steps, those rejected by the safeguard included.
        dense: form the Hessian; default where y has at most `linear.DENSE_LIMIT` entries.
    """

    tol: Any = None
    max_steps: int = static(default=200)
    dense: bool | None = static(default=None)

    def solve(self, problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> LowerSolution:
        """The lower-level solution from the warm start y, by `lower.newton.solve`."""
        return solve(problem, x, y, batch, self)

    def hypergradient(self, problem: BilevelProblem, x: PyTree, y: PyTree, adjoint: Adjoint) -> Hypergradient:
        """By the solution's last factor, or by products; see `lower.adjoint`."""
        return unconstrained.differentiate(problem, x, self.solve(problem, x, y, problem.lower_data.full()), adjoint)

    def objective(self, problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None) -> Array:
        """F(x), its derivatives likewise."""
        return unconstrained.implicit_value(problem, x, y, self.solve, method)


def solve(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Newton) -> LowerSolution:
    """The lower-level solution from the warm start y, without constraints. Pure; for jit and vmap."""
    flat, unravel = ravel_pytree(y)
    dense = flat.size <= DENSE_LIMIT if settings.dense is None else settings.dense
    minimize = isinstance(problem.lower, Minimize)
    eps = jnp.finfo(flat.dtype).eps
    tol = 10 * eps if settings.tol is None else settings.tol

    def evaluate(flat: Array) -> tuple[Array, Array]:
        """(g, R); g is 0 for a fixed point."""
        if minimize:
            g, R = oracles.lower_value_and_gradient(problem, x, unravel(flat), batch)
            return g, ravel_pytree(R)[0]
        return jnp.zeros((), flat.dtype), ravel_pytree(oracles.residual(problem, x, unravel(flat), batch))[0]

    def operator(flat: Array) -> Callable[[Array], Array]:
        return oracles.flat_operator(problem, x, unravel(flat), batch)

    prepare, apply, nothing = directions(operator, flat, minimize, dense)

    def go_on(carry: tuple) -> Array:
        return (carry[-1][-1] == Status.MAX_STEPS) & (carry[-1][-2] < settings.max_steps)

    def body(carry: tuple[Array, PyTree, Array]) -> tuple[Array, PyTree, Array]:
        # One trial point a pass, so that each oracle is compiled once. The first pass (t = 0) only evaluates the start.
        rows, old_factor, scalars = carry
        c = _Search.unpack(scalars, rows.dtype)
        first = c.steps == 0
        trial = rows[0] + c.t * rows[2]
        g, R = evaluate(trial)
        moved = jnp.stack([trial, R])
        R_square = gram(moved)[1, 1]
        finite = jnp.isfinite(R_square) & jnp.isfinite(g)
        halved, steady = R_square <= 0.25 * c.R_square, R_square > 0.25 * c.R_square
        if minimize:
            slack = 1e3 * eps * (1 + jnp.abs(c.g))
            enough = ((c.slope < 0) & (g <= c.g + 1e-4 * c.t * c.slope)) | (halved & (g <= c.g + slack))
        else:
            enough = c.safe | halved
        ok = finite & (first | enough)
        refactor = jnp.where(ok, first | (R_square > 0.01 * c.R_square), ~c.fresh) if dense else ok
        level = ~ok | (g >= c.g - 1e3 * eps * jnp.abs(c.g))
        point = jnp.where(first | ok, moved, rows[:2])
        g, R_square = jnp.where(ok, g, c.g), jnp.where(ok, R_square, c.R_square)
        R_square = jnp.where(first & ~finite, jnp.nan, R_square)  # no residual is known
        first_square = jnp.where(first, R_square, c.first_square)

        flat, R = point
        renew = ok | refactor
        factor = lax.cond(refactor, prepare, lambda _: old_factor, flat)
        otherwise = rows[2] if minimize else -R
        if dense:
            d, definite, trusted = apply(factor, flat, R, None)
            d = jnp.where(renew, d, otherwise)
        else:
            eta = jnp.clip(jnp.sqrt(R_square / first_square), eps, 0.01)
            kept = otherwise, c.definite, jnp.array(False)
            d, definite, trusted = lax.cond(renew, lambda: apply(factor, flat, R, eta), lambda: kept)
        t = jnp.where(renew, 1, c.t / 2) if minimize else jnp.ones_like(c.t)

        rows = jnp.concatenate([point, d[None]])
        products = gram(rows)
        length, reach = products[2, 2], jnp.maximum(c.reach, jnp.where(ok, c.t**2 * c.length, 0))
        scale, steady = products[0, 0] + reach, ~ok | steady
        small = (c.length <= eps * scale) & ~first
        at_rounding = small & jnp.where(ok, steady & (length >= c.length / 4), ~refactor)
        done = (ok & trusted & (length <= tol**2 * scale)) | (at_rounding & (length <= eps * scale))
        stuck = t < eps
        if minimize:  # a Newton step that lowers neither |R| nor g: the conditioning allows no more
            stuck = stuck | (ok & ~first & c.fresh & c.definite & steady & level)
        status = jnp.where(stuck, Status.STALLED, Status.MAX_STEPS)
        status = jnp.where(definite & ((done & jnp.isfinite(scale)) | (R_square == 0)), Status.CONVERGED, status)
        status = jnp.where(~definite & ok & (R_square <= (10 * eps) ** 2 * first_square), Status.SADDLE, status)
        status = jnp.where((first | c.safe) & ~finite, Status.NONFINITE, status)
        search = _Search(
            g, t, length, R_square, first_square, slope=products[1, 2], reach=reach, definite=definite,
            fresh=jnp.where(renew, refactor, c.fresh), safe=~renew & (not minimize), steps=c.steps + 1, status=status,
        )  # fmt: skip
        return rows, factor, search.pack()

    zeros = jnp.zeros(len(_Search._fields), _packed_dtype(flat.dtype))
    start = jnp.stack([flat, jnp.zeros_like(flat), jnp.zeros_like(flat)]), nothing, zeros.at[-1].set(Status.MAX_STEPS)
    (y, R, _), factor, scalars = lax.while_loop(go_on, body, start)
    end = _Search.unpack(scalars, flat.dtype)
    return LowerSolution(unravel(y), jnp.sqrt(end.R_square), end.steps.astype(int), end.status.astype(int), factor, R)


class _Search(NamedTuple):
    """g at y; step length t along the direction d; squares of |d|, |R|, |R at the start|; R'd; the square of the
    longest step taken so far.

    definite: the Hessian behind d is positive semidefinite, up to rounding. fresh: the factor is R_y at y, not at an
    earlier point. safe: d is a Picard step, taken without a test. The loop carries them packed in one vector, and
    squares instead of norms, since each array that leaves a loop's body and each root is a kernel to compile.
    """

    g: Array
    t: Array
    length: Array
    R_square: Array
    first_square: Array
    slope: Array
    reach: Array
    definite: Array
    fresh: Array
    safe: Array
    steps: Array
    status: Array

    def pack(self) -> Array:
        return pack_scalars(self, _packed_dtype(self.g.dtype), self.steps)

    @classmethod
    def unpack(cls, packed: Array, dtype: Any) -> "_Search":
        flags = {name: packed[cls._fields.index(name)] > 0 for name in ("definite", "fresh", "safe")}
        return cls(*packed.astype(dtype))._replace(**flags, steps=packed[-2], status=packed[-1])


def _packed_dtype(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32  # half precision cannot count to max_steps
