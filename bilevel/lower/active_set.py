"""`ActiveSet`: the method for boxes, simplices, polyhedra and linear coupling."""

from typing import Any

from jax import Array

from bilevel.linear import LinearSolver
from bilevel.lower import polyhedral, polyhedral_gradient
from bilevel.lower.method import Adjoint, LowerMethod, LowerSolution, refuse_solver
from bilevel.problem import BilevelProblem
from bilevel.record import Hypergradient
from bilevel.struct import struct

PyTree = Any


@struct
class ActiveSet(polyhedral.Settings, LowerMethod):
    """An active-set method with exact quadratic programs (`lower.polyhedral`), for polyhedral lower levels.

    Args:
        tol: accuracy of y relative to |y| plus the longest step; default 10 eps of y's dtype.
        max_steps: steps of the outer (SQP) loop; a quadratic g takes two.
        max_changes: passes of the primal-dual search, after which the finite dual method takes over.
        start: the active set to start from, shape [rows], as `PolyhedralSolution.active`; default: the rows that y
            holds with equality, and those that the unconstrained step violates.
        factor: a solution's `factor`, to be used again for a quadratic g. Where g_yy or the rows' normals are not those
            that it was made of, refinement makes up for the difference, in y and in the adjoint, or the end is STALLED:
            residual, violation and the multipliers' signs are measured anew.
        inverse: beside `factor`, the same solution's `inverse`, where `start` is its `active`.
    """

    def solve(self, problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> LowerSolution:
        """The lower-level solution from the warm start y; `lower.polyhedral.solve` tells more."""
        found = polyhedral.solve(problem, x, y, batch, self)
        return LowerSolution(found.y, found.residual, found.steps, found.status, ())

    def hypergradient(self, problem: BilevelProblem, x: PyTree, y: PyTree, adjoint: Adjoint) -> Hypergradient:
        """By the factors of the last quadratic program; the error is an estimate, whatever the constants."""
        refuse_solver("hypergradient", adjoint.method)
        return polyhedral_gradient.differentiate(problem, x, y, self, adjoint.estimate)

    def objective(self, problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None) -> Array:
        """F(x), its derivatives by the same factors."""
        refuse_solver("implicit_objective", method)
        return polyhedral_gradient.implicit_value(problem, x, y, self)
