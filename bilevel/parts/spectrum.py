"""Estimates of curvature, for default step sizes: extreme eigenvalues, Lipschitz constants of gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.problem import BilevelProblem, Minimize
from bilevel.sampled.covering import starts

PyTree = Any
PAIRS, ROUNDS = 32, 10  # of `smoothness`: pairs of points; power iterations from each


class Lanczos(NamedTuple):
    """A Krylov space after some of its m products."""

    Q: Array
    """An orthonormal basis in its rows, shape [m + 1, n]; rows of 0 where there is none yet, or no more."""

    T: Array
    """Column k holds the product with row k of Q in that basis, shape [m + 1, m]."""


class Steepest(NamedTuple):
    """Difference quotients of a gradient, seen along better and better directions."""

    best: Array
    """The largest one so far, shape []."""

    near: Array
    """The next points to look at, shape [pairs, n]."""


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

    def body(k: Array, at: Lanczos) -> Lanczos:
        Q, T = at
        w = product(Q[k])
        h = Q @ w
        w = w - h @ Q
        w = w - (Q @ w) @ Q
        norm = jnp.linalg.norm(w)
        alive = norm > 1e3 * jnp.finfo(flat.dtype).eps * jnp.linalg.norm(h)
        return Lanczos(Q.at[k + 1].set(jnp.where(alive, w / jnp.where(alive, norm, 1), 0)), T.at[:, k].set(h))

    first = jax.random.normal(jax.random.key(0), (n,), flat.dtype)
    Q = jnp.zeros((m + 1, n), flat.dtype).at[0].set(first / jnp.linalg.norm(first))
    Q, T = lax.fori_loop(0, m, body, Lanczos(Q, jnp.zeros((m + 1, m), flat.dtype)))
    used = jnp.linalg.norm(Q[:m], axis=1) > 0.5  # an exhausted Krylov space leaves zero rows: keep their zeros out
    first_value = T[0, 0]
    T = jnp.triu(T[:m]) + jnp.triu(T[:m], 1).T  # column k was filled before row k + 1 of Q existed
    T = jnp.where(used[:, None] & used[None, :], T, 0) + jnp.diag(jnp.where(used, 0, first_value))
    values = jnp.linalg.eigvalsh(T)
    return values[-1], values[0]


def smoothness(problem: BilevelProblem, key: Array, x: PyTree, y: PyTree) -> tuple[Array, Array]:
    """Estimates, from below, of the Lipschitz constants of grad f and grad g in (x, y), shapes [], on all of the data.

    The largest difference quotients over `PAIRS` pairs of points a thousandth of the way between two samples of X x
    Y. A random direction sees a mean curvature; each of `ROUNDS` more tries steps along the last difference of
    gradients, which is a power iteration. In high dimension the pairs are fewer: they take 2^24 numbers at most.
    """
    keys = jax.random.split(key, 4)
    flat, unravel = ravel_pytree((x, y))
    num = min(PAIRS, max(2, 2**24 // flat.size))

    def points(key_x: Array, key_y: Array) -> Array:
        xs, ys = starts(problem.x_set, key_x, num, x), starts(problem.y_set, key_y, num, y)
        return jax.vmap(lambda x, y: ravel_pytree((x, y))[0])(xs, ys)

    def f(z: Array) -> Array:
        x, y = unravel(z)
        return ravel_pytree(oracles.upper_gradients(problem, x, y, problem.upper_data.full()))[0]

    def g(z: Array) -> Array:
        x, y = unravel(z)
        return ravel_pytree(oracles.lower_gradients(problem, x, y, problem.lower_data.full()))[0]

    here, there = points(*keys[:2]), points(*keys[2:])
    near = here + 1e-3 * (there - here)
    distance = jnp.linalg.norm(near - here, axis=1)

    def largest(gradient: Callable) -> Array:
        base = jax.vmap(gradient)(here)

        def look(_: Any, at: Steepest) -> Steepest:
            change = jax.vmap(gradient)(at.near) - base
            size = jnp.linalg.norm(change, axis=1)
            quotient = size / jnp.where(distance > 0, distance, jnp.inf)
            usable = jnp.isfinite(quotient) & (size > 0)
            ahead = here + change * (distance / jnp.where(usable, size, 1))[:, None]
            best = jnp.maximum(at.best, jnp.max(jnp.where(usable, quotient, 0)))
            return Steepest(best, jnp.where(usable[:, None], ahead, at.near))

        return lax.fori_loop(0, 1 + ROUNDS, look, Steepest(jnp.zeros((), here.dtype), near)).best

    L_f, L_g = largest(f), largest(g)
    return L_f, jnp.where(L_g > 0, L_g, 1)
