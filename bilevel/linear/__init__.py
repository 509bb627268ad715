"""Linear systems with a known matrix-vector product: CG, MINRES, GMRES, Neumann, dense; and a preconditioner."""

from bilevel.linear.default import DENSE_LIMIT, default_solver
from bilevel.linear.gmres import GMRES
from bilevel.linear.nystrom import Nystrom, sketch
from bilevel.linear.solvers import (
    CG,
    MINRES,
    UNSOLVED,
    Dense,
    LinearSolution,
    LinearSolver,
    Matvec,
    Neumann,
    dense_matrix,
    refine,
    verified,
)

__all__ = [
    "CG",
    "DENSE_LIMIT",
    "GMRES",
    "MINRES",
    "UNSOLVED",
    "Dense",
    "LinearSolution",
    "LinearSolver",
    "Matvec",
    "Neumann",
    "Nystrom",
    "default_solver",
    "dense_matrix",
    "refine",
    "sketch",
    "verified",
]
