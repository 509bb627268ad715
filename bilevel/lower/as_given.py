"""`AsGiven`: no solve at all."""

from typing import Any

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.linear import LinearSolver
from bilevel.lower import adjoint as unconstrained
from bilevel.lower.method import Adjoint, LowerMethod, LowerSolution, Solved
from bilevel.problem import BilevelProblem
from bilevel.record import Hypergradient, Status
from bilevel.struct import struct

PyTree = Any


@struct
class AsGiven(LowerMethod):
    """Take y as it is given. The hypergradient's error says what that costs; without constraints only.

    For y that something else has solved, and for lower levels with many minimisers, where y(x) has no meaning.
    """

    def solve(self, problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> LowerSolution:
        """The point y itself with its residual; CONVERGED says only that nothing more was asked for."""
        R = ravel_pytree(oracles.residual(problem, x, y, batch))[0]
        return LowerSolution(y, norm(R), jnp.array(0), jnp.array(Status.CONVERGED), (), R)

    def hypergradient(self, problem: BilevelProblem, x: PyTree, y: PyTree, adjoint: Adjoint) -> Hypergradient:
        """The implicit formula at (x, y)."""
        return unconstrained.differentiate(problem, x, self.solve(problem, x, y, problem.lower_data.full()), adjoint)

    def solved(self, problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None) -> Solved:
        """The given y, differentiated as if it were y(x)."""
        return unconstrained.implicit_solution(problem, x, y, self.solve, method)
