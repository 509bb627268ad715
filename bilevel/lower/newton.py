"""Solve the lower level: y with R(x, y) = 0, and a certificate.

Newton's method, on the dense Hessian up to `DENSE_LIMIT` unknowns and matrix-free beyond; with sets or linear coupling
the active-set method of `polyhedral`, and on balls or for large y the projected Newton method of `projected`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.linear import CG, DENSE_LIMIT, GMRES, dense_matrix, gram, pack_scalars
from bilevel.linear.nystrom import Nystrom
from bilevel.lower import polyhedral, projected
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Status
from bilevel.struct import static, struct

PyTree = Any


class LowerSolution(NamedTuple):
    """y; residual = |R(x, y)|_2 at that y, recomputed; steps taken; status (CONVERGED, MAX_STEPS, STALLED, SADDLE,
    NONFINITE); factor of R_y at y or close to it, for `apply_inverse`, () where none was made; R(x, y) raveled, ()
    from `polyhedral`; sketch of R_y near y, from `projected`, a preconditioner for CG.
    """

    y: PyTree
    residual: Array
    steps: Array
    status: Array
    factor: PyTree
    R: Any = ()
    sketch: Nystrom | None = None


@struct
class Newton:
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


def solve(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Any = None) -> LowerSolution:
    """The lower-level solution from the warm start y; settings: `Newton`, or for a constrained level also `ActiveSet`
    or `ProjectedNewton`, whose own `solve` tells more.

    Raises:
        NotImplementedError: for a lower level with `SmoothCoupling`, or a `Ball` beside other constraints.
    """
    settings = Newton() if settings is None else settings
    large = projected.settings_for(problem, y, settings)
    if large is not None:
        found = projected.solve(problem, x, y, batch, large)
        residual = found.residual if problem.constrained_lower else jnp.linalg.norm(found.R)
        return LowerSolution(found.y, residual, found.steps, found.status, (), found.R, found.sketch)
    if problem.constrained_lower:
        found = polyhedral.solve(problem, x, y, batch, polyhedral.settings_for(problem, "lower.solve", settings))
        return LowerSolution(found.y, found.residual, found.steps, found.status, ())
    assert isinstance(settings, Newton)
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
        product = oracles.hvp_operator(problem, x, unravel(flat), batch)
        return lambda v: ravel_pytree(product(unravel(v)))[0]

    prepare, apply, nothing = _directions(operator, flat, minimize, dense)

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


def apply_inverse(factor: PyTree, minimize: bool, b: Array, transpose: bool = False) -> Array:
    """R_y^-1 b, or its transpose, by a factor of `solve`; NaN where that is not finite."""
    if minimize:
        return jax.scipy.linalg.cho_solve((factor[0].T, True), b)
    return jax.scipy.linalg.lu_solve(factor, b, trans=int(transpose))


def _directions(operator: Callable, like: Array, minimize: bool, dense: bool) -> tuple[Callable, Callable, PyTree]:
    """prepare: y -> factor; apply: (factor, y, R, eta) -> (d = -R_y^-1 R, definite, trusted); zeros like a factor.

    eta is the accuracy asked for where d is iterative; trusted says that it came within a tenth of |R|.
    """
    n, dtype = like.size, like.dtype
    rounding = 10 * n * float(jnp.finfo(dtype).eps)
    yes = jnp.array(True)

    def cholesky(flat: Array) -> tuple[Array, Array]:
        """(U, s) with U'U = H + s diag(rows), rows = absolute row sums of H, with the first s of 0, rounding,
        1/256, 1/64, ... that suffices; s > 1 does (Gershgorin). A zero row gets a one on the diagonal.
        """
        H = jax.vmap(operator(flat))(jnp.eye(n, dtype=dtype))  # symmetric: rows are columns
        rows = jnp.sum(jnp.abs(H), axis=1)

        zero = jnp.zeros((), dtype)

        def go_on(carry: tuple[Array, Array, Array]) -> Array:
            upcoming, U, _ = carry
            return (upcoming == 0) | (~jnp.isfinite(U[-1]) & (upcoming <= 4))

        def attempt(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            s = carry[0]
            upcoming = jnp.where(s == 0, rounding, jnp.maximum(4 * s, 1 / 256)).astype(dtype)
            shift = jnp.where(rows <= jnp.minimum(s, 0), 1, s * rows)
            shifted = H.ravel() + lax.pad(shift, zero, [(0, 0, n)])
            L = lax.linalg.cholesky_p.bind(shifted.reshape(n, n).T)
            return upcoming, L.T.ravel(), s

        _, U, s = lax.while_loop(go_on, attempt, (zero, H.ravel(), zero))
        return U.reshape(n, n), s

    def by_cholesky(factor: tuple[Array, Array], flat: Array, R: Array, eta: Array) -> tuple[Array, Array, Array]:
        U, s = factor
        finite = jnp.isfinite(U[-1, -1])  # else steepest descent
        return -jnp.where(finite, apply_inverse(factor, True, R), R), finite & (s <= rounding), yes

    if dense and minimize:
        return cholesky, by_cholesky, (jnp.zeros((n, n), dtype), jnp.zeros((), dtype))
    if dense:
        return (
            lambda flat: jax.scipy.linalg.lu_factor(dense_matrix(operator(flat), n, dtype)),
            lambda lu, flat, R, eta: (-apply_inverse(lu, False, R), yes, yes),
            (jnp.zeros((n, n), dtype), jnp.zeros(n, jnp.int32)),
        )

    def iterative(_: PyTree, flat: Array, R: Array, eta: Array) -> tuple[Array, Array, Array]:
        product = operator(flat)
        if minimize:
            v, _, positive = CG(tol=eta).run(product, R)
            v = jnp.where(jnp.any(v != 0), v, R)  # negative curvature at once: steepest descent
        else:
            (v, _), positive = GMRES(tol=eta).iterate(product, R), yes
        return -v, positive, jnp.linalg.norm(R - product(v)) <= 0.1 * jnp.linalg.norm(R)

    return lambda flat: (), iterative, ()
