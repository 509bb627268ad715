"""Linear systems with a known matrix-vector product: CG, MINRES, GMRES, Neumann, dense; and a preconditioner."""

from bilevel.linear.nystrom import Nystrom, sketch
from bilevel.linear.solvers import (
    CG,
    DENSE_LIMIT,
    GMRES,
    MINRES,
    Dense,
    LinearSolution,
    LinearSolver,
    Matvec,
    Neumann,
    default_solver,
    dense_matrix,
    gram,
    pack_scalars,
    refine,
)

__all__ = [
    "CG",
    "DENSE_LIMIT",
    "GMRES",
    "MINRES",
    "Dense",
    "LinearSolution",
    "LinearSolver",
    "Matvec",
    "Neumann",
    "Nystrom",
    "default_solver",
    "dense_matrix",
    "gram",
    "pack_scalars",
    "refine",
    "sketch",
]
