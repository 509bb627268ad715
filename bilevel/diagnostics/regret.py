"""By how much each follower of a Nash equilibrium could do better alone."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import reference
from bilevel.oracles.nash import Cost, followers
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any


@dataclass(frozen=True)
class _Alone:
    """g_i as a function of y_i, the others' y given as x."""

    cost: Cost
    name: str

    def __call__(self, both: PyTree, own: PyTree, batch: PyTree) -> Array:
        x, y = both
        return self.cost(x, {**y, self.name: own}, batch)


def _nothing(x: PyTree, y: PyTree, batch: PyTree) -> Array:
    return jnp.zeros(())


def regrets(problem: BilevelProblem, x: PyTree, y: PyTree) -> dict[str, float]:
    """g_i(x, y) minus the least g_i over y_i in Y_i, the others' y held, by the followers' names: 0 for all of them in
    an equilibrium. The least is that of SciPy's SLSQP from y_i and 20 random points, so that a regret may be larger
    where g_i is not convex in y_i.

    Args:
        problem: with the lower level `bilevel.nash`, sets being boxes, balls or the whole space.
        x: the leader's choice.
        y: the followers', a dict.

    Raises:
        InvalidInput: another lower level.
        RuntimeError: for sets of other kinds.
    """
    found, batch = {}, problem.lower_data.full()
    for name, (cost, own) in followers(problem).items():
        alone = BilevelProblem(_nothing, Minimize(_Alone(cost, name)), y_set=own, lower_data=problem.lower_data,
                               init=lambda key: ((x, y), y[name]))  # noqa: B023  # fmt: skip
        least = reference.least_lower_value(alone, (x, y), y[name])
        found[name] = max(float(jax.jit(cost)(x, y, batch)) - least, 0.0)
    return found
