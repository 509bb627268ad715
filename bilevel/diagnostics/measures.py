"""Convergence diagnostics: what the referee recomputes from (x, y) alone."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import oracles
from bilevel.backend.tree import distance, norm, poisoned
from bilevel.diagnostics.gap import LowerGap as LowerGap
from bilevel.diagnostics.gap import lower_gap as lower_gap
from bilevel.diagnostics.goldstein import goldstein as goldstein
from bilevel.hypergradient import hypergradient
from bilevel.lower import LowerMethod, Newton, given_for_none, polyhedral
from bilevel.parts.reduced import Multipliers, short_length, stationarity
from bilevel.problem import BilevelProblem
from bilevel.record import Measurement as Measurement
from bilevel.record import Status, solved
from bilevel.struct import invalid

PyTree = Any


def gradient_mapping(problem: BilevelProblem, x: PyTree, gradient: PyTree) -> PyTree:
    """(x - Proj_X(x - s gradient))/s, shaped like x: zero exactly at stationary points of F over X.

    Its norm grows as s falls, towards that of the projected gradient; s is `parts.reduced.short_length`. Where the
    projection leaves an entry alone, the entry is the gradient's own: x - s g loses it in rounding when |x| is large.
    """
    s = short_length(x, gradient)
    target = jax.tree.map(lambda a, g: a - s * g, x, gradient)
    moved = problem.x_set.project(target)
    mapped = lambda a, g, t, m: jnp.where(t == m, g, (a - m) / s)  # noqa: E731
    return jax.tree.map(mapped, x, gradient, target, moved)


def measure(
    problem: BilevelProblem,
    x: PyTree,
    y: PyTree,
    lower: LowerMethod | None = Newton(),  # noqa: B008
) -> Measurement:
    """Recompute everything from (x, y) on all of the data; y only warm-starts the lower solve.

    `lower=AsGiven()` measures at the given y instead: for lower levels with many minimisers, where y(x) has no meaning.
    None still means that, with a DeprecationWarning; in the next version it will mean the default. The status is that
    of the hypergradient; UNSOLVED_LOWER where the lower level came to the step limit of `lower`.
    """
    lower = given_for_none(lower, "measure")
    h = hypergradient(problem, x, y, lower=lower)
    if problem.coupling is not None:
        residual = polyhedral.natural_residual(problem, x, y, problem.lower_data.full())
    else:
        residual = oracles.residual(problem, x, y, problem.lower_data.full())
        if problem.constrained_lower:
            moved = problem.y_set.project(jax.tree.map(operator.sub, y, residual))
            residual = jax.tree.map(operator.sub, y, moved)
    violation = problem.x_set.violation(x) + problem.y_set.violation(y) + norm(oracles.coupling_residual(problem, x, y))
    if problem.upper_constraints is None:
        size, error, largest = norm(gradient_mapping(problem, x, h.gradient)), h.error_bound, jnp.nan
    else:
        reduced = stationarity(problem, x, h)
        size, error, violation = reduced.residual, reduced.error, violation + reduced.violation
        largest = jnp.max(jnp.abs(jnp.concatenate(reduced.multipliers)))
    return Measurement(
        value=h.value,
        hypergradient=size,
        error_bound=error,
        lower_residual=norm(residual),
        violation=violation,
        status=jnp.where(h.status == Status.MAX_STEPS, Status.UNSOLVED_LOWER, h.status),
        lower_distance=distance(y, h.y) / (1 + norm(h.y)),
        margin=h.active_margin / (1 + norm(h.y)),
        multiplier=largest,
    )


def multipliers(problem: BilevelProblem, x: PyTree, y: PyTree = None) -> Multipliers:
    """The multipliers of the upper constraints at x, with y(x) solved from y (default: init's y0), each NaN where the
    lower level is not solved: `parts.reduced` has their equations.

    Raises:
        InvalidInput: the problem has no upper constraints.
    """
    if problem.upper_constraints is None:
        invalid("problem (multipliers)", "no upper_constraints", "some", "Without them there are no multipliers.")
    found = hypergradient(problem, x, y).checked()
    return poisoned(stationarity(problem, x, found).multipliers, solved(found.status))


def fit_rate(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(p, half-width of its 95% interval) in values ~ C steps^p, by least squares on logarithms of positive entries.

    Raises:
        ValueError: with fewer than three positive pairs.
    """
    from scipy.stats import linregress, t

    keep = (np.asarray(steps) > 0) & (np.asarray(values) > 0)
    if keep.sum() < 3:
        raise ValueError(f"fit_rate: got {int(keep.sum())} positive pairs; expected at least 3. Record more steps.")
    fit: Any = linregress(np.log(np.asarray(steps)[keep]), np.log(np.asarray(values)[keep]))
    return float(fit.slope), float(fit.stderr * t.ppf(0.975, keep.sum() - 2)) if keep.sum() > 2 else float("inf")
