"""Multipliers of a coupled lower level: what first-order solvers for c(x, y) <= 0, e(x, y) = 0 share.

With h = (c, e) in one vector [rows] and multipliers m [rows], those of c at least 0, the Lagrangian g + m'h.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.parts.spectrum import smoothness
from bilevel.problem import BilevelProblem, LinearCoupling
from bilevel.qp.active_set import masked_inverse
from bilevel.sampled.covering import starts
from bilevel.step import Scalar, move

PyTree = Any
SAMPLES = 8


def zeros(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
    """Multipliers of zero, [rows]."""
    rows = jax.eval_shape(lambda: jnp.concatenate(oracles.coupling_values(problem, x, y))).shape[0]
    return jnp.zeros(rows, ravel_pytree(y)[0].dtype)


def _unequal(problem: BilevelProblem, rows: int) -> Array:
    """Which of the rows are inequalities, [rows]."""
    coupling = problem.coupling
    linear = isinstance(coupling, LinearCoupling)
    equalities = coupling.num_equalities if linear else 0
    return jnp.arange(rows) < rows - equalities


def clip(problem: BilevelProblem, m: Array, most: Scalar = jnp.inf) -> Array:
    """The multipliers nearest to m [rows] in [0, most] for inequalities, and in [-most, most] for equalities."""
    most = jnp.asarray(most, m.dtype)
    return jnp.clip(m, jnp.where(_unequal(problem, m.size), 0, -most), most)


def clip_slacks(problem: BilevelProblem, s: Array) -> Array:
    """The values of h nearest to s [rows] that are feasible: at most 0 for inequalities, 0 for equalities."""
    return jnp.where(_unequal(problem, s.size), jnp.minimum(s, 0), 0)


def lipschitz(problem: BilevelProblem, key: Array, x: PyTree, y: PyTree) -> tuple[Array, Array, Array]:
    """(L_f, L_g, J), shapes []: `spectrum.smoothness`, and a bound on the norm of h's derivative in (x, y).

    J^2 = |h'|_1 |h'|_inf, exact for one row; at several points of X x Y where h is not affine.
    """
    L_f, L_g = smoothness(problem, key, x, y)
    if problem.coupling is None:
        return L_f, L_g, jnp.zeros_like(L_g)
    num = 1 if isinstance(problem.coupling, LinearCoupling) else SAMPLES
    points = starts(problem.x_set, key, num, x), starts(problem.y_set, key, num, y)

    def bound(x: PyTree, y: PyTree) -> Array:
        size = jnp.abs(oracles.coupling_derivative(problem, x, y))
        return jnp.sqrt(jnp.max(jnp.sum(size, axis=0)) * jnp.max(jnp.sum(size, axis=1), initial=0))

    return L_f, L_g, jnp.max(jax.vmap(bound)(*points))


def active(problem: BilevelProblem, m: Array) -> Array:
    """Which rows hold with equality by their multipliers: inequalities where m > 0, and all equalities; [rows]."""
    return (m > 0) | ~_unequal(problem, m.size)


def independent(problem: BilevelProblem, held: Array, x: PyTree, y: PyTree) -> Array:
    """Whether the rows in `held` [rows] of a `LinearCoupling`, or of none, are linearly independent in y (LICQ), [];
    x and y give shapes only.
    """
    if problem.coupling is None:
        return jnp.array(True)
    assert isinstance(problem.coupling, LinearCoupling)
    rows = problem.coupling.raveled(x, y)
    dtype = ravel_pytree(y)[0].dtype
    A = jnp.concatenate([jnp.asarray(part, dtype) for part in (rows.A, rows.A_eq)])
    length = jnp.linalg.norm(A, axis=1, keepdims=True)
    A = A / jnp.where(length > 0, length, 1)
    return masked_inverse(A @ A.T, held.astype(A.dtype))[1]


def sizes(
    problem: BilevelProblem, key: Array, x: PyTree, y: PyTree, primal: Scalar | None, dual: Scalar | None,
    weight: Array | float,
) -> tuple[Array, Array]:  # fmt: skip
    """(s, r) of `max_min` for g and weight f + g: these numbers, or s = 1/(weight L_f + L_g), r = 1/(s J^2)."""
    dtype = ravel_pytree(y)[0].dtype
    size, dual_size = (None if size is None else jnp.asarray(size, dtype) for size in (primal, dual))
    if size is None or dual_size is None:
        L_f, L_g, J = lipschitz(problem, key, x, y)
        size = 1 / (weight * L_f + L_g) if size is None else size
        dual_size = 1 / (size * jnp.where(J > 0, J, 1) ** 2) if dual_size is None else dual_size
    return size, dual_size


class Ascent(NamedTuple):
    """Dual ascent under way."""

    y: PyTree
    m: Array
    """The multipliers, shape [rows]."""

    last: Array
    """The ones before."""


def max_min(
    problem: BilevelProblem, x: PyTree, y: PyTree, m: Array, gradient: Callable, size: Any, dual_size: Any,
    num_steps: int, num_primal_steps: int = 1,
) -> tuple[PyTree, Array]:  # fmt: skip
    """(y, m) after `num_steps` of dual ascent on max over m of min over y in Y of phi(y) + m'h(x, y):

        n = m + (t - 1)/(t + 2) (m - last m)                   or m itself, where there is one primal step
        y <- Proj_Y(y - s (phi_y(y) + h_y(x, y)' n))           `num_primal_steps` times
        m <- clip(n + r h(x, y)),                              t = 0, 1, …

    `gradient`: y -> phi_y. With one primal step a quadratic phi and an affine h give a linear iteration, whose
    eigenvalues solve z^2 - z (2 - s p - s r q) + 1 - s p = 0 for some p between the extreme eigenvalues of phi_yy and
    q <= J^2: it contracts for s <= 1/L and s r J^2 < 2.
    """
    accelerated = num_primal_steps > 1

    def primal(y: PyTree, n: Array) -> PyTree:
        pull = oracles.coupling_pullback(problem, x, y)[1](n)[1]
        return problem.y_set.project(move(y, optax.tree.add(gradient(y), pull), size))

    def step(at: Ascent, t: Array) -> tuple[Ascent, None]:
        y, m, last = at
        n = m + jnp.maximum(t - 1, 0) / (t + 2) * (m - last) if accelerated else m
        y = lax.scan(lambda y, _: (primal(y, n), None), y, length=num_primal_steps)[0] if accelerated else primal(y, n)
        h = jnp.concatenate(oracles.coupling_values(problem, x, y))
        return Ascent(y, clip(problem, n + jnp.asarray(dual_size, m.dtype) * h), m), None

    end = lax.scan(step, Ascent(y, m, m), jnp.arange(num_steps, dtype=m.dtype))[0]
    return end.y, end.m
