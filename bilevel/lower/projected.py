"""Lower levels on boxes, balls, simplices and products of them, by products with the Hessian alone: y may be large.

    y(x) = argmin over y in Y of g(x, y),   g(x, .) strongly convex,   y = Proj(y - s R(x, y)),   R = grad_y g.

Accelerated projected gradient steps find the face of Y that holds y(x); Newton steps on that face then take over.
With P the orthogonal projection on the face's tangent space and D = mu I on a ball whose boundary is active, where
R = -mu (y - centre), and D = 0 elsewhere,

    Newton step:        P (H + D) P d = -P R,    y <- Proj(y + d),
    implicit gradient:  P (H + D) P u = P f_y,   grad F = f_x - g_yx' u,

both by conjugate gradients in the tangent space: no matrix, and no solve where H is a multiple of the identity.

Reference: Beck, Teboulle. A fast iterative shrinkage-thresholding algorithm. SIAM Journal on Imaging Sciences 2, 2009;
    restarted as in O'Donoghue, Candes, 2015, arXiv:1204.3982. Bertsekas. Projected Newton methods. SIAM Journal on
    Control and Optimization 20, 1982.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.linear import CG, DENSE_LIMIT, nystrom
from bilevel.linear.nystrom import Nystrom
from bilevel.problem import BilevelProblem
from bilevel.qp.face import Face
from bilevel.record import Status
from bilevel.struct import static, struct

PyTree = Any
SKETCH_LIMIT = 1_000_000  # unknowns; a sketch takes memory for a hundred vectors like y while it is made
ROUND = 20  # accelerated steps between Newton steps


@struct
class Settings:
    """The fields of `ProjectedNewton`, which explains them."""

    tol: Any = None
    max_rounds: int = static(default=500)


class ProjectedSolution(NamedTuple):
    """y; residual = |y - Proj(y - s R)|/s, recomputed; steps: rounds; face; R at y, raveled.

    sketch: of H at the start, for `tangent_solve`; zeros where a Newton step has failed since; None up to
    `linear.DENSE_LIMIT` unknowns, beyond `SKETCH_LIMIT`, in half precision, with a ball, and where H is given.
    status: CONVERGED; WEAKLY_ACTIVE, where an active constraint's multiplier, or an inactive one's slack, is rounding
    error; MAX_STEPS, NONFINITE.
    """

    y: PyTree
    residual: Array
    steps: Array
    status: Array
    face: Face
    R: Array
    sketch: Nystrom | None = None


def tangent_solve(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, face: Face, sketch: Nystrom | None = None
) -> Callable:
    """(b, tol) -> v in the tangent space with P (H + D) P v = P b; `sketch`: of an H nearby, a preconditioner.

    With H given by its diagonal and E = H + D, v = E^-1 (b - N'm), N E^-1 N' m = N E^-1 b on the free entries: the
    normals N of a face are of different sets, so that N E^-1 N' is diagonal and nothing is solved.
    """
    diagonal = oracles.lower_diagonal(problem, x, y, batch)
    if diagonal is not None:
        E = ravel_pytree(diagonal)[0] + face.mu
        N = face.normals / E[None]
        size = jnp.sum(face.normals * N, axis=1)

        def closed(b: Array, tol: Any = None) -> Array:
            v = jnp.where(face.free, b, 0) / E
            return v - ((face.normals @ v) / jnp.where(size > 0, size, 1)) @ N

        return closed
    hessian = oracles.flat_operator(problem, x, y, batch)
    if not problem.constrained_lower:  # the face is all of R^n
        return lambda b, tol=None: CG(tol, preconditioner=sketch).iterate(hessian, b)[0]

    def operator(v: Array) -> Array:
        along = face.tangent(v)
        curved = hessian(along) + face.mu * along
        return face.tangent(curved) + (v - along) / face.s  # definite on all of R^n: rounding errors off the face fade

    inside = None if sketch is None else sketch.within(face.tangent)
    return lambda b, tol=None: CG(tol, preconditioner=inside).iterate(operator, face.tangent(b))[0]


class _Search(NamedTuple):
    """y and R there; step size s; natural residual |y - Proj(y - s R)|, and the largest so far; rounds; status; whether
    every Newton step so far was good: else the sketch is none of the Hessian here.
    """

    y: Array
    R: Array
    s: Array
    size: Array
    before: Array
    rounds: Array
    status: Array
    near: Array


def solve(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Settings | None = None
) -> ProjectedSolution:
    """The lower-level solution from the warm start y, which need not be feasible. Pure; for jit and vmap.

    CONVERGED: the natural residual is at most tol (|y| + s |R|), or that times sqrt(eps)/eps and no longer halves.
    """
    settings = Settings() if settings is None else settings
    flat, unravel = ravel_pytree(y)
    eps = jnp.finfo(flat.dtype).eps
    tol = 10 * eps if settings.tol is None else settings.tol

    def project(flat: Array) -> Array:
        return ravel_pytree(problem.y_set.project(unravel(flat)))[0]

    def evaluate(flat: Array) -> tuple[Array, Array]:
        g, R = oracles.lower_value_and_gradient(problem, x, unravel(flat), batch)
        return g, ravel_pytree(R)[0]

    def accelerate(_: Array, carry: tuple) -> tuple:
        """One accelerated step, or half the step size where the quadratic model is not above g."""
        y, w, theta, s, _ = carry
        g, R = evaluate(w)
        trial = project(w - s * R)
        moved = trial - w
        g_trial, R_trial = evaluate(trial)
        above = g_trial <= g + R @ moved + moved @ moved / (2 * s) + 100 * eps * (1 + jnp.abs(g))
        ok = above & jnp.isfinite(R_trial).all()
        restart = (w - trial) @ (trial - y) > 0
        theta_next = jnp.where(restart, 1, (1 + jnp.sqrt(1 + 4 * theta**2)) / 2)
        ahead = trial + jnp.where(restart, 0, (theta - 1) / theta_next) * (trial - y)
        return (
            jnp.where(ok, trial, y), jnp.where(ok, project(ahead), y), jnp.where(ok, theta_next, 1),
            jnp.where(ok, s, s / 2), jnp.where(ok, R_trial, carry[-1]),
        )  # fmt: skip

    def natural(y: Array, R: Array, s: Array) -> Array:
        return jnp.linalg.norm(y - project(y - s * R))

    def trusted(near: Array) -> Nystrom | None:
        """The sketch, or one of nothing, so that CG goes without."""
        return jax.tree.map(lambda rows: jnp.where(near, rows, 0), sketch)

    def body(c: _Search) -> _Search:
        # A Newton step on the face first: a warm start needs no other. It is solved to leave a third of what is asked.
        base, R = c.y, c.R
        if problem.constrained_lower:
            base = project(c.y - c.s * c.R)
            R = evaluate(base)[1]
        face = problem.y_set.face(unravel(base), unravel(c.R), c.s)
        goal = tol * (jnp.linalg.norm(c.y) + c.s * jnp.linalg.norm(c.R))
        enough = goal / 3 / jnp.maximum(c.size, jnp.finfo(flat.dtype).tiny)
        forcing = jnp.clip(jnp.maximum(c.size / c.before, enough), eps, 0.01)
        d = tangent_solve(problem, x, unravel(base), batch, face, trusted(c.near))(-R, forcing)
        newton = project(base + d)
        R = evaluate(newton)[1]
        size = natural(newton, R, c.s)
        good = jnp.isfinite(R).all() & (size <= 0.5 * c.size)

        def steps() -> tuple[Array, Array, Array]:
            start = c.y, c.y, jnp.ones((), flat.dtype), c.s, c.R
            y, _, _, s, R = lax.fori_loop(0, ROUND, accelerate, start)
            return y, R, s

        small = c.size <= jnp.sqrt(eps) * (jnp.linalg.norm(c.y) + c.s * jnp.linalg.norm(c.R))
        y, R, s = lax.cond(good, lambda: (newton, R, c.s), steps)
        size = jnp.where(good, size, natural(y, R, s))
        scale = jnp.linalg.norm(y) + s * jnp.linalg.norm(R)
        stuck = small & ~good & (size > 0.5 * c.size)
        better = size <= c.size
        y, R, size = (jnp.where(stuck & ~better, old, new) for new, old in ((y, c.y), (R, c.R), (size, c.size)))
        status = jnp.where((size <= tol * scale) | stuck, Status.CONVERGED, Status.MAX_STEPS)
        status = jnp.where(jnp.isfinite(size), status, Status.NONFINITE)
        return _Search(y, R, s, size, jnp.maximum(c.before, c.size), c.rounds + 1, status, c.near & (good | small))

    start = project(flat)
    g, R = evaluate(start)
    sketch = _sketch(problem, x, unravel(start), batch)
    s = _first_step(problem, x, unravel(start), batch, sketch)
    size = natural(start, R, s)
    status = jnp.where(jnp.isfinite(g) & jnp.isfinite(size), Status.MAX_STEPS, Status.NONFINITE)
    before = jnp.maximum(size, jnp.finfo(flat.dtype).tiny)
    begin = _Search(start, R, s, size, before, jnp.array(0), status, jnp.array(True))
    end = lax.while_loop(lambda c: (c.status == Status.MAX_STEPS) & (c.rounds < settings.max_rounds), body, begin)
    face = problem.y_set.face(unravel(end.y), unravel(end.R), end.s)
    noise = 1e3 * eps * (jnp.linalg.norm(end.y) + end.s * jnp.linalg.norm(end.R))
    weak = (end.status == Status.CONVERGED) & (face.margin <= jnp.maximum(noise, 10 * end.size))
    status = jnp.where(weak, Status.WEAKLY_ACTIVE, end.status)
    return ProjectedSolution(unravel(end.y), end.size / end.s, end.rounds, status, face, end.R, trusted(end.near))


def _sketch(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> Nystrom | None:
    """Of H at y, for a large y and where D = 0."""
    flat = ravel_pytree(y)[0]
    given = oracles.lower_diagonal(problem, x, y, batch) is not None
    sized = DENSE_LIMIT < flat.size <= SKETCH_LIMIT and jnp.finfo(flat.dtype).bits >= 32
    if given or not sized or not problem.y_set.polyhedral:
        return None
    return nystrom.sketch(oracles.flat_operator(problem, x, y, batch), flat.size, flat.dtype)


def _first_step(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, sketch: Nystrom | None) -> Array:
    """1/L, L the largest curvature that ten power iterations find, or three from where the sketch saw the largest: an
    estimate that the line search corrects.
    """
    flat, hessian = ravel_pytree(y)[0], oracles.flat_operator(problem, x, y, batch)

    def power(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        v, _ = carry
        w = hessian(v)
        size = jnp.linalg.norm(w)
        return w / jnp.where(size > 0, size, 1), size

    first, steps = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype), 10
    if sketch is not None:
        seen = jnp.any(sketch.rows[-1] != 0)
        first, steps = jnp.where(seen, sketch.rows[-1], first), jnp.where(seen, 3, 10)
    _, L = lax.fori_loop(0, steps, power, (first / jnp.linalg.norm(first), jnp.zeros((), flat.dtype)))
    return 1 / jnp.where(L > 0, 1.1 * L, 1)
