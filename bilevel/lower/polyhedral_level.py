"""A lower level on a polyhedron at one x: what its two methods, `quadratic` and `sqp`, start from and share."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.loops import once_if
from bilevel.backend.tree import norm, row_norms
from bilevel.lower import sides
from bilevel.problem import BilevelProblem
from bilevel.qp.active_set import MAX_CHANGES, Factor, Model, Rows, inverse_of_rows
from bilevel.qp.convex import factorize_convex, pinned, shifted
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
    max_steps: int = static(default=200)
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

    def factor_at(self, y: Array, grad: Array) -> Factor:
        """Factors of g_yy, or of g_yy and a small shift: of a linear g, small beside grad [n] over the size of y."""
        H = oracles.lower_hessian(self.problem, self.x, self.unravel(y), self.batch)
        return factorize_convex(H, self.limits.C, unit_of(self.limits, y, grad))


def unit_of(limits: Rows, y: Array, grad: Array) -> Array:
    """A curvature, []: the gradient's size over that of y and of where the rows end; 1 where one of these is 0."""
    lengths = row_norms(limits.C)
    far = jnp.max(sides.ends(limits) / jnp.where(lengths > 0, lengths, jnp.inf), initial=0)
    length, steep = jnp.maximum(jnp.max(jnp.abs(y)), far), jnp.max(jnp.abs(grad))
    unit = steep / jnp.where(length > 0, length, 1)
    return jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)


def noise_of(limits: Rows, factor: Factor, y: Array, lam: Array) -> Array:
    """The rounding error [m] of rows and of multipliers at a solution, in rows of unit length."""
    eps, (m, n) = float(jnp.finfo(y.dtype).eps), limits.C.shape
    pull = (lam / factor.d) @ factor.W
    return 10 * eps * (factor.length * norm(y) + factor.d * sides.ends(limits) + (n + m) ** 0.5 * norm(pull))


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


class OnFace(NamedTuple):
    """Factors for the face at the end of a search, and the model that belongs to them."""

    factor: Factor
    model: Model
    flat: Array
    """[], g_yy is singular on the face."""

    def word(self, status: Array) -> Array:
        """The status, which knows nothing of that yet."""
        lost = (status == Status.SADDLE) | (status == Status.NONFINITE) | (status == Status.INFEASIBLE_LOWER)
        return jnp.where(self.flat & ~lost, Status.UNDETERMINED, status)


def on_face(limits: Rows, factor: Factor, model: Model) -> OnFace:
    """Factors of a shifted g_yy made those of g_yy itself, on the rows that have a multiplier (`qp.convex`)."""
    if factor.shift is None or factor.X is not None:  # kept factors are of a face, or of a g_yy that is definite
        return OnFace(factor, model, jnp.array(False))
    moved = shifted(factor) & jnp.isfinite(factor.L[-1, -1])

    def remade(found: tuple[Factor, Model]) -> tuple[Factor, Model]:
        factor, model = found
        strong = (limits.lo == limits.hi) | ((model.active != 0) & (model.room > 10 * model.noise))
        factor = pinned(factor, limits.C, strong)
        return factor, model._replace(inverse=inverse_of_rows(factor.W, model.active)[0])

    factor, model = once_if(moved, remade, (factor, model))
    return OnFace(factor, model, moved & ~jnp.isfinite(factor.L[-1, -1]))
