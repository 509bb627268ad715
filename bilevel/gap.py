"""The true lower-level gap g(x, y) - min over Y(x) of g(x, .), by a search that shares no samples with any solver.

Points of a fixed additive recurrence and of Y's boundary, the best of each of `num_starts` interleaved blocks polished
on Y(x) by projected gradients (and multipliers, with a coupling). The minimum found is an upper bound of v(x), so that
the gap is a lower bound of the true one: it is reliable where the points are dense enough for one to fall into the
basin of a global minimiser, that is for lower dimensions up to about 10.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles, sampling
from bilevel.diagnostics import Measurement
from bilevel.hypergradient import check_like
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import Status
from bilevel.struct import invalid

PyTree = Any


class LowerGap(NamedTuple):
    """gap: g(x, y) - v(x), NaN where Y(x) is empty; below zero only for an infeasible y. value: v(x), the least g seen.

    y: where it was seen. violation: distance of the given y to Y plus the norm of its coupling residual.
    least_violation: the least seen over Y, 0 up to the tolerance unless Y(x) is empty. status: CONVERGED;
    INFEASIBLE_LOWER, Y(x) is empty as far as the search sees; NONFINITE.
    """

    gap: Array
    value: Array
    y: PyTree
    violation: Array
    least_violation: Array
    status: Array


@partial(jax.jit, static_argnames=("num_points", "num_starts", "num_steps"))
def lower_gap(
    problem: BilevelProblem,
    x: PyTree,
    y: PyTree,
    *,
    num_points: int = 2048,
    num_starts: int = 16,
    num_steps: int = 60,
    tol: Any = 1e-6,
) -> LowerGap:
    """The true lower-level gap at (x, y), on all of the data. Pure; use it under jit and vmap.

    Args:
        problem: with a lower level Minimize(g); y_set should be bounded, since unbounded directions are only sampled.
        x: shaped like init's x0.
        y: shaped like init's y0.
        num_points: how many points of Y are looked at.
        num_starts: how many of them are polished, beside y itself.
        num_steps: gradient steps of a polish; with a coupling, of each of its rounds.
        tol: violation up to which a point counts as feasible.

    Raises:
        InvalidInput: for a fixed point, or where x or y is not shaped like init's.
    """
    if not isinstance(problem.lower, Minimize):
        invalid("problem.lower", type(problem.lower).__name__, "Minimize(g)", "A fixed point has no value to compare.")
    x0, y0 = jax.eval_shape(lambda: problem.init(jax.random.key(0)))
    check_like("x", x, x0, "init's x0")
    check_like("y", y, y0, "init's y0")
    batch = problem.lower_data.full()
    flat = ravel_pytree(y)[0]
    uniform = sampling.kronecker(num_points, flat.size, flat.dtype)
    points = sampling.fill(problem.y_set, uniform, jax.random.key(20), y)
    points = sampling.join(points, sampling.edge(problem.y_set, sampling.take(points, slice(0, num_points // 8))))

    def look(y: PyTree) -> tuple[Array, Array]:
        return oracles.lower_value(problem, x, y, batch), sampling.violation(problem, x, y)

    # A point of a coupled set is judged where `restore` takes it.
    if problem.coupling is not None:
        points = jax.vmap(lambda y: sampling.restore(problem, x, y))(points)
    g, outside = jax.vmap(look)(points)
    size = len(g) // num_starts * num_starts
    score = jnp.where(outside <= tol, g, jnp.inf)
    by_block = (leaf[:size].reshape(-1, num_starts) for leaf in (score, outside))
    score, far = by_block
    best = jnp.where(jnp.min(score, axis=0) < jnp.inf, jnp.argmin(score, axis=0), jnp.argmin(far, axis=0))
    starts = sampling.take(points, best * num_starts + jnp.arange(num_starts))
    starts = sampling.join(starts, jax.tree.map(lambda leaf: leaf[None], y))
    polished = jax.vmap(lambda y: sampling.polish(problem, x, y, num_steps))(starts)

    candidates = sampling.join(starts, polished)
    g, outside = jax.vmap(look)(candidates)
    score = jnp.where((outside <= tol) & jnp.isfinite(g), g, jnp.inf)
    best = jnp.argmin(score)
    value = score[best]
    given, distance = look(y)
    empty = jnp.minimum(jnp.min(far), jnp.min(outside))
    status = jnp.where(empty > tol, Status.INFEASIBLE_LOWER, Status.CONVERGED)
    bad = ~jnp.isfinite(given) | ((value == jnp.inf) & (empty <= tol))
    return LowerGap(
        gap=jnp.where(value < jnp.inf, given - value, jnp.nan),
        value=jnp.where(value < jnp.inf, value, jnp.nan),
        y=sampling.take(candidates, best),
        violation=distance,
        least_violation=empty,
        status=jnp.where(bad, Status.NONFINITE, status),
    )


def measure_global(problem: BilevelProblem, x: PyTree, y: PyTree) -> Measurement:
    """What `solve` records where g(x, .) may have many minimisers: nothing is solved for y, the given one is judged.

    value: f(x, y). lower_residual: the true lower gap, |g(x, y) - v(x)|. violation: of X, Y and the coupling together.
    hypergradient and error_bound: NaN, since F may jump and no gradient of it is known: `solve` then never says
    CONVERGED. status: ESTIMATED, or INFEASIBLE_LOWER or NONFINITE; where Y(x) is empty the value is NaN.
    """
    found = lower_gap(problem, x, y)
    value = oracles.upper_value(problem, x, y, problem.upper_data.full())
    solved = jnp.where(found.status == Status.CONVERGED, Status.ESTIMATED, found.status)
    nan = jnp.full_like(value, jnp.nan)
    return Measurement(
        value=jnp.where(jnp.isnan(found.value), jnp.nan, value),
        hypergradient=nan,
        error_bound=nan,
        lower_residual=jnp.abs(found.gap),
        violation=problem.x_set.violation(x) + found.violation,
        status=solved,
    )
