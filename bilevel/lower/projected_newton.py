"""`ProjectedNewton`: the method for balls, and for boxes and simplices of many unknowns."""

from typing import Any

from bilevel.backend.tree import norm
from bilevel.linear import LinearSolver
from bilevel.lower import adjoint as unconstrained
from bilevel.lower import projected, projected_gradient
from bilevel.lower.method import Adjoint, LowerMethod, LowerSolution, Solved, refuse_solver
from bilevel.problem import BilevelProblem
from bilevel.record import Hypergradient
from bilevel.struct import struct

PyTree = Any


@struct
class ProjectedNewton(projected.Settings, LowerMethod):
    """Projected gradient steps that find the face, and Newton steps on it by products alone (`lower.projected`).

    For boxes, balls, simplices, products of them, and without constraints.

    Args:
        tol: accuracy of y relative to |y| plus the longest step; default 10 eps of y's dtype.
        max_rounds: rounds of accelerated steps and one Newton step each.
    """

    def solve(self, problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> LowerSolution:
        """The lower-level solution from the warm start y; `lower.projected.solve` tells more."""
        found = projected.solve(problem, x, y, batch, self)
        residual = found.residual if problem.constrained_lower else norm(found.R)
        return LowerSolution(found.y, residual, found.steps, found.status, (), found.R, found.sketch)

    def hypergradient(self, problem: BilevelProblem, x: PyTree, y: PyTree, adjoint: Adjoint) -> Hypergradient:
        """With constraints by CG on the face, and the error is an estimate; without, as after `Newton`."""
        if not problem.constrained_lower:
            return unconstrained.differentiate(
                problem, x, self.solve(problem, x, y, problem.lower_data.full()), adjoint
            )
        refuse_solver("hypergradient", adjoint.method)
        return projected_gradient.differentiate(problem, x, y, self, adjoint.estimate)

    def solved(self, problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None) -> Solved:
        """Derivatives likewise."""
        if not problem.constrained_lower:
            return unconstrained.implicit_solution(problem, x, y, self.solve, method)
        refuse_solver("implicit_objective", method)
        return projected_gradient.implicit_solution(problem, x, y, self)
