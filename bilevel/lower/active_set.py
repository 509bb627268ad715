"""`ActiveSet`: the method for boxes, simplices, polyhedra and linear coupling."""

from typing import Any

from bilevel.linear import LinearSolver
from bilevel.lower import polyhedral, polyhedral_gradient
from bilevel.lower.method import Adjoint, LowerMethod, LowerSolution, Solved, refuse_solver
from bilevel.lower.polyhedral_level import Warm
from bilevel.problem import BilevelProblem
from bilevel.record import Hypergradient
from bilevel.struct import struct

PyTree = Any


@struct
class ActiveSet(polyhedral.Settings, LowerMethod):
    """An active-set method with exact quadratic programs (`lower.polyhedral`), for polyhedral lower levels.

    Args:
        tol: accuracy of y relative to |y| plus the longest step, >= 0; default 10 eps of y's dtype.
        max_steps: steps of the outer (SQP) loop, >= 1; a quadratic g takes two.
        max_changes: passes of the primal-dual search, after which the finite dual method takes over.
        start: deprecated, `warm=Warm(active=…)` of `solve` and `hypergradient`.
        factor: deprecated, `warm=Warm(factor=…)`.
        inverse: deprecated, `warm=Warm(inverse=…)`.
    """

    def solve(
        self, problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, warm: Warm | None = None
    ) -> LowerSolution:
        """The lower-level solution from the warm start y, and `warm`; `lower.polyhedral.solve` tells more."""
        found = polyhedral.solve(problem, x, y, batch, self, warm)
        return LowerSolution(found.iterate, found.residual, found.steps, found.status, ())

    def hypergradient(self, problem: BilevelProblem, x: PyTree, y: PyTree, adjoint: Adjoint) -> Hypergradient:
        """By the factors of the last quadratic program; the error is an estimate, whatever the constants."""
        refuse_solver("hypergradient", adjoint.method)
        return polyhedral_gradient.differentiate(problem, x, y, self, adjoint.estimate, adjoint.warm)

    def solved(self, problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None) -> Solved:
        """Derivatives by the same factors."""
        refuse_solver("implicit_objective", method)
        return polyhedral_gradient.implicit_solution(problem, x, y, self)
