"""What can be seen of a problem without solving it: sizes, kinds, and the lower level's curvature at a few points."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.bounded import Flat, bounded_jit
from bilevel.backend.precision import full_precision
from bilevel.parts.spectrum import spectrum
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any
POINTS = 6  # at which R_y is looked at
LARGEST = 512  # unknowns of y beyond which R_y is not formed
SINGULAR = 1e-8  # part of the largest eigenvalue of g_yy up to which one counts as zero
BENT = 1e-4  # part of it below zero from which an estimated least one is negative


@dataclasses.dataclass(frozen=True)
class Seen:
    """What can be seen of a problem without solving it."""

    num_x: int
    """Unknowns of x."""
    num_y: int
    """Unknowns of y."""
    block: int
    """Unknowns of y that belong together: fewer than `num_y` where the problem is `separable`."""
    dtype: str
    """The floats of x and y."""
    fixed_point: bool
    """Whether the lower level is a `FixedPoint`."""
    curvature: str
    """Of the lower level, on all of the data at init's point and a few around it: "strongly convex", "flat" (g_yy is
    singular somewhere), "not convex", "contraction", "no contraction". Where y is large thirty products at init's point
    say "not convex" or "not seen to bend down"; of a large fixed point nothing: "not looked at"."""
    condition: float
    """The largest condition number of R_y seen there; NaN where none was."""
    x_set: str
    """The kind of X."""
    y_set: str
    """The kind of Y."""
    bounded: bool
    """Whether Y is bounded."""
    coupling: str
    """The kind of coupling; "" for none."""
    leader: bool
    """Whether there are upper constraints."""
    batches: bool
    """Whether a level has its data in batches."""
    per_sample: bool
    """Whether y has a part of its own for each sample."""

    @property
    def constrained(self) -> bool:
        """Whether the lower level is."""
        return self.coupling != "" or self.y_set != "Reals"

    @property
    def smooth(self) -> bool:
        """Whether nothing speaks against y(x) being unique."""
        return self.curvature not in ("flat", "not convex")

    def __str__(self) -> str:
        """One line."""
        level = "FixedPoint" if self.fixed_point else "g"
        known = "" if math.isnan(self.condition) else f" (condition {self.condition:.0e})"
        where = "" if self.curvature == "not looked at" else " where probed"
        parts = [f"{self.num_x} + {self.num_y} unknowns, {self.dtype}", f"{level} {self.curvature}{where}{known}"]
        parts += [f"x in {self.x_set}"] if self.x_set != "Reals" else []
        parts += [f"y in {self.y_set}"] if self.y_set != "Reals" else []
        parts += [f"y in blocks of {self.block}"] if self.block < self.num_y else []
        parts += [self.coupling] if self.coupling else []
        parts += ["upper constraints"] if self.leader else []
        parts += ["a y for each sample"] if self.per_sample else ["batches"] if self.batches else []
        return "; ".join(parts)


def look(problem: BilevelProblem, key: Array) -> Seen:
    """What can be seen of a problem that is valid."""
    x, y = problem.init(key)
    curvature, condition = _curvature(problem, x, y, key)
    num_y, coupling = ravel_pytree(y)[0].size, problem.coupling
    rows = len(jax.tree.leaves(y)[0]) if problem.separable else 1
    sources = problem.upper_data, problem.lower_data
    return Seen(
        num_x=ravel_pytree(x)[0].size,
        num_y=num_y,
        block=num_y // rows,
        dtype=str(ravel_pytree(y)[0].dtype),
        fixed_point=not isinstance(problem.lower, Minimize),
        curvature=curvature,
        condition=condition,
        x_set=type(problem.x_set).__name__,
        y_set=type(problem.y_set).__name__,
        bounded=problem.y_set.bounded,
        coupling="" if coupling is None else type(coupling).__name__,
        leader=problem.upper_constraints is not None,
        batches=any(source.fraction < 1 for source in sources),
        per_sample=any(hasattr(source, "rows") for source in sources),
    )


def _curvature(problem: BilevelProblem, x: PyTree, y: PyTree, key: Array) -> tuple[str, float]:
    """What is seen of R_y, and its largest condition number."""
    flat: Any = Flat(problem)
    if ravel_pytree(y)[0].size > LARGEST:
        return _of_many(problem, flat, x, y), math.nan
    matrices = np.asarray(_matrices(flat, x, y, key))
    if not np.isfinite(matrices).all():
        return "not looked at", math.nan
    if not isinstance(problem.lower, Minimize):
        radius = max(np.abs(np.linalg.eigvals(np.eye(len(R)) - R)).max() for R in matrices)
        return "contraction" if radius < 1 else "no contraction", float(max(np.linalg.cond(R) for R in matrices))
    values = np.linalg.eigvalsh((matrices + matrices.transpose(0, 2, 1)) / 2)
    least, most = values[:, 0], np.abs(values).max(axis=1)
    zero = max(SINGULAR, 100 * float(np.finfo(matrices.dtype).eps)) * most
    if (least < -zero).any():
        return "not convex", math.nan
    if (least <= zero).any():
        return "flat", math.inf
    return "strongly convex", float((most / least).max())


def _of_many(problem: BilevelProblem, flat: Any, x: PyTree, y: PyTree) -> str:
    """The same of more unknowns than R_y is formed for."""
    if not isinstance(problem.lower, Minimize):
        return "not looked at"
    most, least = (float(part) for part in _ends(flat, x, y))
    if not (math.isfinite(most) and math.isfinite(least)):
        return "not looked at"
    return "not convex" if least < -BENT * abs(most) else "not seen to bend down"


@bounded_jit
@full_precision
def _ends(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Array, Array]:
    """Estimates of the largest and least eigenvalue of g_yy at (x, y), by thirty products."""
    return spectrum(problem, x, y, problem.lower_data.full())


@bounded_jit
@full_precision
def _matrices(problem: BilevelProblem, x: PyTree, y: PyTree, key: Array) -> Array:
    """R_y [POINTS, n, n] on all of the data, at (x, y) and around it."""
    batch, (flat, unravel) = problem.lower_data.full(), ravel_pytree(y)

    def at(number: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, number))
        first = lambda a, b: jnp.where(number == 0, a, b)  # noqa: E731
        x_at = jax.tree.map(first, x, problem.x_set.around(keys[0], x))
        y_at = jax.tree.map(first, y, problem.y_set.around(keys[1], y))
        product = oracles.hvp_operator(problem, x_at, y_at, batch)
        column = lambda v: ravel_pytree(product(unravel(v)))[0]  # noqa: E731
        return jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))

    return jax.lax.map(at, jnp.arange(POINTS))
