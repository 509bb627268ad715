"""Many starts: the distinct ends of runs from points spread over X, each with its verdict."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.checks import is_count
from bilevel.problem import BilevelProblem, check_problem
from bilevel.record import Status
from bilevel.run.driver import solve_many
from bilevel.run.lanes import Anywhere
from bilevel.solution import Solution
from bilevel.solver import Solver
from bilevel.struct import invalid

PyTree = Any
APART = 1e-3  # of two ends that are not the same, in units of 1 + |x|


class Optimum(NamedTuple):
    """An end that one or more runs came to."""

    x: PyTree
    """Where."""
    y: PyTree
    """The solver's y there."""
    value: float
    """F there, by the referee."""
    status: Status
    """The verdict of the run: CONVERGED for a stationary point of F, which descent hardly ever finds to be a saddle."""
    count: int
    """How many runs ended there with this verdict."""
    solution: Solution
    """The run of them with the least F."""


def local_optima(
    problem: BilevelProblem, solver: Solver | None = None, *, key: Array, num_starts: int = 16, apart: float = APART,
    **arguments: Any,
) -> list[Optimum]:  # fmt: skip
    """The distinct ends of `num_starts` runs from points spread over X, for an F that is not convex: those that are
    CONVERGED first, and by F.

    A start is drawn from X where that is bounded; elsewhere it is init's x0 plus a normal step as long as 1 + |x0_i| in
    entry i, moved into X. Two ends are the same where they have the same verdict and |x - x'| <= apart (1 + |x|); an
    end that is not CONVERGED may be on its way to another one. All runs are one vmapped run, `solve_many`.

    Args:
        problem: what to solve.
        solver: how. Default: the one that `bilevel.recommend(problem)` names first.
        key: a typed key, `jax.random.key(seed)`.
        num_starts: >= 1.
        apart: >= 0.
        arguments: further arguments of `solve_many`: max_steps, every, tol, time_limit, y0, ...

    Raises:
        InvalidInput, Unsupported: as of `solve_many`.
    """
    check_problem(problem)
    if not is_count(num_starts, 1):
        invalid("num_starts", num_starts, "a whole number >= 1", "Leave it out for 16.")
    if not apart >= 0:
        invalid("apart", apart, "a number >= 0", "Leave it out for 1e-3.")
    keys = jax.random.split(key, num_starts)
    solutions = solve_many(problem, solver, keys=keys, x0=Anywhere(), **arguments)
    best = sorted(solutions, key=lambda one: (one.status != Status.CONVERGED, _value(one)))
    found: list[Optimum] = []
    for one in best:
        twin = next((k for k, other in enumerate(found) if _same(one, other.solution, apart)), None)
        if twin is None:
            found.append(Optimum(one.x, one.y, float(one.record.rows[-1]["value"]), one.status, 1, one))
        else:
            found[twin] = found[twin]._replace(count=found[twin].count + 1)
    return found


def _value(solution: Solution) -> float:
    value = float(solution.record.rows[-1]["value"])
    return value if np.isfinite(value) else np.inf


def _same(one: Solution, other: Solution, apart: float) -> bool:
    """Whether two runs ended in the same way at the same place."""
    if one.status != other.status:
        return False
    a, b = (np.asarray(ravel_pytree(end.x)[0]) for end in (one, other))
    return bool(np.linalg.norm(a - b) <= apart * (1 + np.linalg.norm(b)))
