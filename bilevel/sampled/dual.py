"""Least steps onto a few linearised rows, without a factorization: for many points at once, where near is enough."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

MAX_CG = 10  # conjugate-gradient steps; exact for up to so many unknowns


class Conjugate(NamedTuple):
    """Conjugate gradients for A z = b after some of their steps."""

    solution: Array
    """z so far."""

    residual: Array
    """b - A z."""

    direction: Array
    """The next one; 0 once they have ended."""


def safe(number: Array) -> Array:
    """`number` where it is positive and may divide, else 1."""
    return jnp.where(number > 0, number, 1)


def dual(K: Array, c: Array, equality: np.ndarray, sweeps: int = 4) -> Array:
    """The multipliers lam [R] of min |d|^2/2 s.t. c + J d <= 0, = 0 where `equality`, with K = J J': d = -J' lam.

    Gauss-Seidel on the dual (Hildreth) finds the rows with lam > 0, conjugate gradients solve their K lam = c. Exact
    for one row, for rows at right angles, and where the sweeps have found the rows. Rows without a gradient get 0.
    """
    some = jnp.diagonal(K) > 0
    lam = _hildreth(K, c, equality, sweeps if len(c) > 1 else 1)
    if len(c) == 1:
        return lam
    lam = _solve_rows(K, c, some & (equality | (lam > 0)), lam)
    return jnp.where(equality, lam, jnp.maximum(lam, 0))


def _hildreth(K: Array, c: Array, equality: np.ndarray, sweeps: int) -> Array:
    """`dual` by sweeps over the rows, each of which makes one row right for the multipliers of the others."""
    size, num, free = jnp.diagonal(K), len(c), jnp.asarray(equality)
    some = size > 0

    def update(t: Array, lam: Array) -> Array:
        k = t % num
        new = lam[k] + (c[k] - K[k] @ lam) / jnp.where(some[k], size[k], 1)
        new = jnp.where(free[k], new, jnp.maximum(new, 0))
        return lam.at[k].set(jnp.where(some[k], new, lam[k]))

    return lax.fori_loop(0, sweeps * num, update, jnp.zeros_like(c))


def _solve_rows(K: Array, c: Array, on: Array, lam: Array) -> Array:
    """K lam = c on the rows `on`, by conjugate gradients from lam, whose other entries stay."""

    def step(at: Conjugate, _: None) -> tuple[Conjugate, None]:
        p, r = at.direction, at.residual
        Kp = jnp.where(on, K @ p, 0)
        bend, rr = p @ Kp, r @ r
        goes = bend > 1e-14 * jnp.max(jnp.diagonal(K)) * (p @ p)
        length = jnp.where(goes, rr / jnp.where(goes, bend, 1), 0)
        lam, r = at.solution + length * p, r - length * Kp
        return Conjugate(lam, r, jnp.where(goes, r + r @ r / safe(rr) * p, 0)), None

    r = jnp.where(on, c - K @ lam, 0)
    return lax.scan(step, Conjugate(lam, r, r), length=min(len(c), MAX_CG))[0].solution
