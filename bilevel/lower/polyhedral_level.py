"""A lower level on a polyhedron at one x: what its two methods, `quadratic` and `sqp`, start from and share."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.tree import row_norms
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import MAX_CHANGES, Factor, Model, Rows, factorize
from bilevel.record import Status
from bilevel.struct import static, struct

PyTree = Any


@struct
class Settings:
    """The fields of `ActiveSet`, which explains them."""

    tol: Any = None
    start: Any = None
    factor: Any = None
    inverse: Any = None
    max_steps: int = static(default=100)
    max_changes: int = static(default=MAX_CHANGES)

    def __post_init__(self) -> None:
        if self.start is not None or self.factor is not None or self.inverse is not None:
            text = "ActiveSet(start, factor, inverse) goes in the next version; use the argument warm=Warm(…)."
            warnings.warn(text, DeprecationWarning, stacklevel=3)


class Warm(NamedTuple):
    """Where the active-set method starts, beside y: of an earlier solution, `PolyhedralSolution.warm`.

    A field that is None is found anew.
    """

    active: Array | None = None
    """The active set to start from, shape [rows], as `PolyhedralSolution.active`. Default: the rows that y holds with
    equality, or else those that the unconstrained step violates.
    """
    factor: Factor | None = None
    """Factors to be used again, for a quadratic g. Where g_yy or the rows' normals are not those that they were made
    of, refinement makes up for the difference, in y and in the adjoint, or the status is STALLED: residual, violation
    and the multipliers' signs are measured anew.
    """
    inverse: Array | None = None
    """The inverse that belongs to `factor` and `active`, shape [rows, rows]."""


def start_of(settings: Settings, warm: Warm | None) -> Warm:
    """The argument `warm`, or what the deprecated fields of the settings say."""
    return Warm(settings.start, settings.factor, settings.inverse) if warm is None else warm


class Level(NamedTuple):
    """The lower level at one x, in the raveled y [n]. Not a pytree of arrays: it does not cross into compiled code."""

    problem: BilevelProblem
    x: PyTree
    batch: PyTree
    unravel: Callable[[Array], PyTree]
    limits: Rows

    def value_and_gradient(self, y: Array) -> tuple[Array, Array]:
        """(g, grad_y g [n])."""
        g, R = oracles.lower_value_and_gradient(self.problem, self.x, self.unravel(y), self.batch)
        return g, ravel_pytree(R)[0]

    def gradient(self, y: Array) -> Array:
        """The gradient alone."""
        return ravel_pytree(oracles.residual(self.problem, self.x, self.unravel(y), self.batch))[0]

    def factor_at(self, y: Array) -> Factor:
        """Factors of g_yy."""
        return factorize(oracles.lower_hessian(self.problem, self.x, self.unravel(y), self.batch), self.limits.C)


class Found(NamedTuple):
    """What `_certify` looks at."""

    y: Array
    factor: Factor
    model: Model
    """The last one, with the multipliers at y."""
    at: Array
    """[m], C y."""
    R: Array
    """[n], grad_y g + C' lam at y."""
    steps: Array
    status: Array


def guess(limits: Rows, factor: Factor, y: Array, z: Array) -> Array:
    """The active set [m] to start from where none is given, z = L^-1 grad_y g: the rows that y holds with equality and
    the unconstrained step would violate; where there are none of these, the rows that it violates.
    """
    eps = jnp.finfo(y.dtype).eps
    at = limits.C @ y
    near = 100 * eps * (jnp.abs(limits.C) @ jnp.abs(y) + row_norms(limits.C))
    moved = at - (factor.W @ z) / factor.d
    held_hi = (jnp.abs(at - limits.hi) <= near) & (moved >= limits.hi)
    held_lo = (jnp.abs(at - limits.lo) <= near) & (moved <= limits.lo)
    some = jnp.any(held_hi | held_lo)
    high, low = jnp.where(some, held_hi, moved > limits.hi), jnp.where(some, held_lo, moved < limits.lo)
    return jnp.where(high | (limits.lo == limits.hi), 1, jnp.where(low, -1, 0)).astype(y.dtype)


def ends(level: Level, status: Array, factor: Factor, model: Model) -> Array:
    """The status after a model was solved, where it did not go well."""
    limits = level.limits
    bad = jnp.isnan(limits.lo).any() | jnp.isnan(limits.hi).any() | ~jnp.isfinite(limits.C).all()
    status = jnp.where(model.unsolved, Status.STALLED, status)
    empty = model.empty | jnp.any(limits.lo > limits.hi)  # one row can be empty by itself
    status = jnp.where(empty, Status.INFEASIBLE_LOWER, status)
    status = jnp.where(jnp.isnan(factor.L[-1, -1]), Status.SADDLE, status)
    return jnp.where(bad, Status.NONFINITE, status)
