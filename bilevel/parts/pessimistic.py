"""Followers who decide ties against the leader, restated as followers who decide them in any way.

    min over x of  max { f(x, y) : y in argmin g(x, .) over Y(x) }
        =  min over x and z in Y(x) of  f(x, y),    y in argmin { -f(x, y) : y in Y(x), g(x, y) <= g(x, z) }.

The leader's z is best where g(x, z) is least, since that leaves the follower the fewest y: then he has the minimisers
of g alone, and takes the worst of them. Where he has several of these, f is the same.

Reference: Zeng. A practical scheme to compute the pessimistic bilevel optimization problem. INFORMS Journal on
Computing 32, 2020. Written down from the definition; the paper was not at hand.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from bilevel.backend.errors import invalid
from bilevel.problem import BilevelProblem, Minimize, SmoothCoupling
from bilevel.sets import Product
from bilevel.sets.coupling import UpperConstraints

PyTree = Any


@dataclasses.dataclass(frozen=True)
class _Upper:
    """f at ((x, z), y), times a sign."""

    f: Callable[..., Array]
    sign: float

    def __call__(self, both: PyTree, y: PyTree, batch: PyTree) -> Array:
        return self.sign * self.f(both[0], y, batch)


@dataclasses.dataclass(frozen=True)
class _Start:
    """The start ((x0, y0), y0)."""

    init: Callable[..., tuple[PyTree, PyTree]]

    def __call__(self, key: Array) -> tuple[PyTree, PyTree]:
        x, y = self.init(key)
        return (x, y), y


@dataclasses.dataclass(frozen=True)
class _NoWorse:
    """The follower's inequalities, and g(x, y) <= g(x, z)."""

    g: Callable[..., Array]

    def __call__(self, both: PyTree, y: PyTree, data: PyTree) -> Array:
        x, z = both
        rows = None if data["coupling"] is None else data["coupling"].values(x, y)[0]
        more = self.g(x, y, data["lower"]) - self.g(x, z, data["lower"])
        return jnp.concatenate([*([] if rows is None else [rows]), more[None]])


def _equal(both: PyTree, y: PyTree, data: PyTree) -> Array:
    return data["coupling"].values(both[0], y)[1]


def _leader(both: PyTree, y: PyTree, data: PyTree) -> Array:
    """The follower's inequalities at z."""
    return data["coupling"].values(*both)[0]


def _leader_equal(both: PyTree, y: PyTree, data: PyTree) -> Array:
    return data["coupling"].values(*both)[1]


def pessimistic(problem: BilevelProblem) -> BilevelProblem:
    """The problem in which the follower, of several minimisers of g, takes the worst for the leader:

        min over x in X of  max { f(x, y) : y in argmin g(x, .) over Y(x) }.

    It is stated as a problem in ((x, z), y), z another point of Y(x), that any solver may take, whatever it does with
    ties: the follower maximises f over the y in Y(x) with g(x, y) <= g(x, z). `certify(problem, optimistic=False)` and
    `BranchAndBound(optimistic=False)` do so, for f and g linear in y, g's costs without x.

    Where a g is strictly convex nothing changes but the size. For other g than linear ones the follower of the new
    problem has no y with g(x, y) < g(x, z) at its best points, so that KKT conditions, and solvers that rest on them,
    may fail there.

    Args:
        problem: with `Minimize(g)` and without upper constraints.

    Raises:
        InvalidInput: for another one.
    """
    if not isinstance(problem.lower, Minimize):
        got = f"a lower level {type(problem.lower).__name__}"
        invalid("problem (pessimistic)", got, "Minimize(g)", "A fixed point leaves no choice.")
    if problem.upper_constraints is not None:
        do = "Write constraints of x as rows of the x_set; those of y may fail for the worst y."
        invalid("problem (pessimistic)", "upper_constraints", "none", do)
    data = {"coupling": problem.coupling, "lower": problem.lower_data.full()}
    unequal, equal = (False, False) if problem.coupling is None else problem.coupling.sides
    return BilevelProblem(
        _Upper(problem.upper, 1.0),
        Minimize(_Upper(problem.upper, -1.0)),
        x_set=Product((problem.x_set, problem.y_set)),
        y_set=problem.y_set,
        coupling=SmoothCoupling(_NoWorse(problem.lower.g), _equal if equal else None, data=data),
        upper_data=problem.upper_data,
        lower_data=problem.upper_data,
        init=_Start(problem.init),
        upper_constraints=UpperConstraints(_leader if unequal else None, _leader_equal if equal else None, data=data)
        if unequal or equal
        else None,
    )
