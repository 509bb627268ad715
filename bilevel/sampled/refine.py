"""Local work on the lower level: points moved into Y(x), and minimisers of a f + b g over Y(x) found to full precision.

`restore` projects on the linearised constraints. `improve` is a projected truncated Newton method: a penalty
f + rho g has condition numbers of the order of rho, which gradient steps do not survive and Newton's do not notice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.oracles import samples as sample_oracles
from bilevel.problem import LinearCoupling
from bilevel.sampled.sampling import Blocks, pick

PyTree = Any
FEASIBLE = 1e-10
MAX_CG = 10  # conjugate-gradient steps of a Newton direction; exact for up to so many unknowns
LENGTHS, SIZES = (1.0, 0.2), (4.0, 1.0, 0.25)  # trials along a Newton direction, and of the gradient's last length


def dual(K: Array, c: Array, equality: np.ndarray, sweeps: int = 4) -> Array:
    """The multipliers lam [R] of min |d|^2/2 s.t. c + J d <= 0, = 0 where `equality`, with K = J J': d = -J' lam.

    Gauss-Seidel on the dual (Hildreth) finds the rows with lam > 0, conjugate gradients solve their K lam = c. Exact
    for one row, for rows at right angles, and where the sweeps have found the rows. Rows without a gradient get 0.
    """
    size, num = jnp.diagonal(K), len(c)
    some = size > 0

    free = jnp.asarray(equality)

    def update(t: Array, lam: Array) -> Array:
        k = t % num
        new = lam[k] + (c[k] - K[k] @ lam) / jnp.where(some[k], size[k], 1)
        new = jnp.where(free[k], new, jnp.maximum(new, 0))
        return lam.at[k].set(jnp.where(some[k], new, lam[k]))

    lam = lax.fori_loop(0, (sweeps if num > 1 else 1) * num, update, jnp.zeros_like(c))
    if num == 1:
        return lam
    on = some & (equality | (lam > 0))

    def conjugate(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        lam, r, p = carry
        Kp = jnp.where(on, K @ p, 0)
        bend, rr = p @ Kp, r @ r
        goes = bend > 1e-14 * jnp.max(size) * (p @ p)
        step = jnp.where(goes, rr / jnp.where(goes, bend, 1), 0)
        lam, r = lam + step * p, r - step * Kp
        return (lam, r, jnp.where(goes, r + r @ r / jnp.where(rr > 0, rr, 1) * p, 0)), None

    r = jnp.where(on, c - K @ lam, 0)
    lam = lax.scan(conjugate, (lam, r, r), length=min(num, MAX_CG))[0][0]
    return jnp.where(equality, lam, jnp.maximum(lam, 0))


def restore(view: Blocks, x: PyTree, y: Array, num_steps: int = 8) -> Array:
    """Move y [n, m] into Y(x): projections on the coupling linearised, and on Y. Onto Y where there is no coupling.

    At most `num_steps` times, and no more once the coupling holds up to rounding.
    """
    if view.problem.coupling is None:
        return view.project(y)
    rounding = 10 * float(jnp.finfo(y.dtype).eps)

    def outside(y: Array) -> Array:
        rows = oracles.coupling_residual(view.problem, x, view.unpack(y))
        return jnp.max(jnp.abs(rows), initial=0) > rounding * (1 + jnp.max(jnp.abs(y)))

    def step(carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        y, _, k = carry
        c, J, equality = sample_oracles.coupling_rows(view.problem, x, view.unpack(y))
        moved = ravel_pytree(view.unpack(y))[0] - J.T @ dual(J @ J.T, c, equality)
        y = view.project(moved[None])
        return y, outside(y), k + 1

    y = view.project(y)
    start = y, outside(y), jnp.zeros((), int)
    return lax.while_loop(lambda carry: carry[1] & (carry[2] < num_steps), step, start)[0]


def multipliers(view: Blocks, x: PyTree, y: Array, gradients: Array) -> Array:
    """lam [K, R] with |gradient + J' lam| least for each of `gradients` [K, m], lam >= 0 on inequalities.

    Of the rows of the coupling, those active at y have one, the others 0.
    """
    c, J, equality = sample_oracles.coupling_rows(view.problem, x, view.unpack(y))
    reach = 1e-6 * (1 + jnp.linalg.norm(y)) * jnp.linalg.norm(J, axis=1)
    J = jnp.where((equality | (c >= -reach))[:, None], J, 0)
    K = J @ J.T
    return jax.vmap(lambda G: dual(K, -J @ G, equality))(gradients)


def _tangent(view: Blocks, x: PyTree, y: Array, G: Array) -> tuple[Any, Any]:
    """(part, bend), functions of v [n, m] for a step from y, where the gradient is G [n, m].

    part: v's part along which y may move, not into faces of Y, nor across active rows, that -G points into. bend: what
    the active rows of a smooth coupling add to a Hessian's product with v, that is sum_i lam_i c_i'' v.
    """
    steep = jnp.linalg.norm(G, axis=1, keepdims=True)
    h = 1e-6 * (1 + jnp.linalg.norm(y, axis=1, keepdims=True)) / jnp.where(steep > 0, steep, 1)
    probe = y - h * G
    free = jnp.abs(view.project(probe) - probe) <= h * (0.1 * jnp.abs(G) + 1e-3 * steep)
    if view.problem.coupling is None:
        return lambda v: jnp.where(free, v, 0), lambda v: 0 * v
    c, J, equality = sample_oracles.coupling_rows(view.problem, x, view.unpack(probe))
    lam = dual(J @ J.T, c, equality)
    A = jnp.where(free & (equality | (lam > 0))[:, None], J, 0)
    K = A @ A.T
    ridge = 1e-12 * jnp.trace(K) + jnp.finfo(y.dtype).tiny
    pull = jnp.linalg.solve(K + ridge * jnp.eye(len(c), dtype=y.dtype), A)

    def part(v: Array) -> Array:
        v = jnp.where(free, v, 0)
        return v - (A.T @ (pull @ v[0]))[None]

    if isinstance(view.problem.coupling, LinearCoupling):
        return part, lambda v: 0 * v

    def slope(y: Array) -> Array:
        ys = jax.tree.map(lambda leaf: leaf[None], view.unpack(y))
        return view.pack(
            jax.tree.map(lambda g: g[0], sample_oracles.coupling_pull(view.problem, x, ys, lam[None] / h)[1])
        )

    return part, jax.linearize(slope, y)[1]


def improve(
    view: Blocks, x: PyTree, y: Array, a: Any, b: Any, num_steps: int, size: Any = 0.0, restores: int = 2
) -> tuple[Array, Array]:
    """(y [n, m], sizes [n]) after `num_steps` >= 1 descent steps from y on a f + b g over Y(x); on g if a is None.

    Each step tries, for each block, two lengths along a truncated Newton direction within the free variables and three
    of the projected gradient, and takes the best or stays. size: the gradient's first length, 0 for a guess.
    """
    rounding = 10 * float(jnp.finfo(y.dtype).eps)
    rows = lambda u, v: jnp.sum(u * v, axis=1, keepdims=True)  # noqa: E731
    safe = lambda number: jnp.where(number > 0, number, 1)  # noqa: E731
    data = view.upper, view.lower

    def value(y: Array) -> Array:
        return sample_oracles.weighted_terms(view.problem, x, view.unpack(y), a, b, *data)

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        y, size = carry
        phi, gradient, product = sample_oracles.weighted_model(view.problem, x, view.unpack(y), a, b, *data)
        G = view.pack(gradient)
        part, bend = _tangent(view, x, y, G)
        start = -part(G)
        first = rows(start, start)

        def conjugate(carry: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
            d, r, p = carry
            Hp = part(view.pack(product(view.unpack(p))) + bend(p))
            curvature, rr = rows(p, Hp), rows(r, r)
            goes = (curvature > 0) & (rr > 1e-24 * first)
            step = jnp.where(goes, rr / safe(curvature), 0)
            d, r = d + step * p, r - step * Hp
            p = jnp.where(goes, r + rows(r, r) / safe(rr) * p, 0)  # negative curvature ends it
            return (d, r, p), None

        d = lax.scan(conjugate, (jnp.zeros_like(y), start, start), length=min(view.m, MAX_CG))[0][0]
        steep = jnp.linalg.norm(G, axis=1)
        size = jnp.where(size > 0, size, 0.05 * (1 + jnp.linalg.norm(y, axis=1)) / safe(steep))
        lengths, sizes = (jnp.asarray(row, y.dtype)[:, None, None] for row in (LENGTHS, SIZES))
        moves = [lengths * d[None], -sizes * (size[:, None] * G)[None], jnp.zeros_like(y)[None]]
        trials = jax.vmap(lambda y: restore(view, x, y, restores))(y[None] + jnp.concatenate(moves))
        values = oracles.batched(value)(trials)
        values = values.at[0].add(-rounding * jnp.abs(phi))  # where rounding hides the fall, Newton shows the way
        if view.problem.coupling is not None:  # what `restore` did not bring back does not count as lower
            outside = jax.vmap(lambda y: view.violation(x, y))(trials)[:, None]
            values = values + jnp.where(outside > FEASIBLE, 1e4 * (1 + steep[0] + jnp.abs(phi[0])) * outside, 0)
        values = jnp.where(jnp.isfinite(values), values, jnp.inf)
        k = jnp.argmin(values, axis=0)
        factors = jnp.asarray((1.0,) * len(LENGTHS) + SIZES + (1 / 16,), y.dtype)
        return (pick(trials, k), size * factors[k]), None

    return lax.scan(step, (y, jnp.zeros(view.n, y.dtype) + size), length=num_steps)[0]


def polish(view: Blocks, x: PyTree, y: Array, num_steps: int = 20) -> Array:
    """A local minimiser of g(x, .) over Y(x) near y [n, m]; without coupling it may sit at a kink of g."""
    y = restore(view, x, improve(view, x, y, None, None, num_steps, restores=4)[0])
    return y if view.problem.coupling is not None else _by_coordinates(view, x, y)


def _by_coordinates(view: Blocks, x: PyTree, y: Array, rounds: int = 40) -> Array:
    """Move y by +-h in the coordinate that lowers g most, with h quartered where none does: for kinks of g."""
    rounding = 1e3 * float(jnp.finfo(y.dtype).eps)
    unit = jnp.eye(view.m, dtype=y.dtype)
    moves = jnp.concatenate([unit, -unit])[:, None]  # [2 m, 1, m]

    def value(y: Array) -> Array:
        return sample_oracles.weighted_terms(view.problem, x, view.unpack(y), None, None, view.upper, view.lower)

    def search(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        y, g, h = carry
        trials = jax.vmap(view.project)(y[None] + h[None, :, None] * moves)
        values = oracles.batched(value)(trials)
        k = jnp.argmin(values, axis=0)
        best = pick(values, k)
        falls = best < g - rounding * jnp.abs(g)
        y = jnp.where(falls[:, None], pick(trials, k), y)
        return (y, jnp.where(falls, best, g), jnp.where(falls, 2 * h, h / 4)), None

    return lax.scan(search, (y, value(y), 1e-2 * (1 + jnp.max(jnp.abs(y), axis=1))), length=rounds)[0][0]
