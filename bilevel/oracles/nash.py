"""Several followers in Nash equilibrium, as one fixed point.

Follower i chooses y_i in Y_i for the least g_i(x, y), the others' y given. With F_i = grad of g_i in y_i, and each g_i
convex in y_i, y is an equilibrium exactly where F(x, y)'(z - y) >= 0 for all z in Y, a variational inequality, that is
where

    y_i = T_i(x, y) = Proj_i(y_i - s F_i(x, y))    for each i,

with any s > 0. F need not be the gradient of a function of y. Where it is strongly monotone in y there is exactly one
equilibrium.

Reference: Facchinei, Pang. Finite-Dimensional Variational Inequalities and Complementarity Problems, 2003, section 1.4
and Proposition 1.5.8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend.errors import invalid
from bilevel.problem import BilevelProblem, FixedPoint
from bilevel.sets import Reals, Set

PyTree = Any
Cost = Callable[[PyTree, PyTree, PyTree], Array]


@dataclass(frozen=True)
class _Kept:
    """A set by its numbers: equal for equal sets, so that nothing compiles again."""

    structure: Any
    leaves: tuple[tuple[str, tuple[int, ...], bytes], ...]

    @classmethod
    def of(cls, kept: Set) -> "_Kept":
        """Take the numbers out."""
        leaves, structure = jax.tree.flatten(kept)
        arrays = [np.asarray(leaf) for leaf in leaves]
        return cls(structure, tuple((part.dtype.str, part.shape, part.tobytes()) for part in arrays))

    def back(self) -> Set:
        """The set."""
        leaves = [np.frombuffer(data, np.dtype(kind)).reshape(shape) for kind, shape, data in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


@dataclass(frozen=True)
class Equilibrium:
    """T of the module's docstring, which `nash` makes."""

    costs: tuple[tuple[str, Cost], ...]
    """(name, g_i) of each follower; the names are y's."""
    sets: tuple[_Kept, ...]
    step_size: float

    def __call__(self, x: PyTree, y: Mapping[str, PyTree], batch: PyTree) -> dict[str, PyTree]:
        """T(x, y), shaped like y."""
        if not isinstance(y, Mapping) or {*y} != {name for name, _ in self.costs}:
            got = sorted(y) if isinstance(y, Mapping) else type(y).__name__
            do = "One branch for each follower, of any shape."
            invalid("y (nash)", got, f"a dict with the keys {sorted(name for name, _ in self.costs)}", do)
        found = {}
        for (name, cost), kept in zip(self.costs, self.sets, strict=True):
            F = jax.grad(lambda own, cost=cost, name=name: cost(x, {**y, name: own}, batch))(y[name])
            ahead = jax.tree.map(lambda a, d: a - jnp.asarray(self.step_size, a.dtype) * d, y[name], F)
            found[name] = kept.back().project(ahead)
        return found


def nash(costs: Mapping[str, Cost], sets: Mapping[str, Set] | None = None, step_size: float = 1.0) -> FixedPoint:
    """A lower level of several followers in Nash equilibrium, each with an objective and a set of his own.

        lower=bilevel.nash({"east": east_cost, "west": west_cost}, sets={"east": bilevel.Box(0.0, jnp.inf)})

    y is a dict with a branch for each follower. Each g_i should be convex in its own branch: then y(x) is an
    equilibrium, which `bilevel.diagnostics.regrets` confirms follower by follower. Followers that do not see each other
    need none of this: their objectives add up to one `Minimize`.

    Args:
        costs: name -> g_i(x, y, batch) -> [], with all of y.
        sets: name -> the set of that branch; default the whole space. Their numbers are kept as constants.
        step_size: s > 0. Any s has the same equilibria; methods that iterate T converge if it is small against the
            curvature of the g_i.

    Raises:
        InvalidInput: no follower, a set for nobody, or a step size that is not positive.
    """
    sets = {} if sets is None else sets
    if not costs or not all(callable(cost) for cost in costs.values()):
        invalid("costs (nash)", f"{len(costs)} followers", "functions g_i(x, y, batch) by name", "Name one at least.")
    for name, one in sets.items():
        if name not in costs or not isinstance(one, Set):
            invalid(
                f"sets[{name!r}] (nash)", type(one).__name__, f"a set of one of {sorted(costs)}", "Correct the name."
            )
    if not (isinstance(step_size, int | float) and 0 < step_size < np.inf):
        invalid("step_size (nash)", step_size, "a number > 0", "Leave it out for 1.")
    names = sorted(costs)
    kept = tuple(_Kept.of(sets.get(name, Reals())) for name in names)
    return FixedPoint(Equilibrium(tuple((name, costs[name]) for name in names), kept, float(step_size)))


def followers(problem: BilevelProblem) -> dict[str, tuple[Cost, Set]]:
    """(g_i, Y_i) by name of a problem whose lower level is `nash`.

    Raises:
        InvalidInput: it is another one.
    """
    T = problem.lower.T if isinstance(problem.lower, FixedPoint) else None
    if not isinstance(T, Equilibrium):
        invalid("lower", type(problem.lower).__name__, "bilevel.nash({name: g_i, …})", "State the followers so.")
    return {name: (cost, kept.back()) for (name, cost), kept in zip(T.costs, T.sets, strict=True)}
