"""Which linear solver serves where none is asked for."""

from typing import Any

from bilevel.linear.gmres import GMRES
from bilevel.linear.solvers import CG, Dense, LinearSolver

DENSE_LIMIT = 256  # unknowns; below it a dense factor is faster than CG at any condition number (docs/design.md)


def default_solver(n: int, symmetric: bool, preconditioner: Any = None) -> LinearSolver:
    """Dense up to DENSE_LIMIT unknowns; beyond, CG for a lower level that is minimised and GMRES for a fixed point."""
    if n <= DENSE_LIMIT:
        return Dense()
    return CG(preconditioner=preconditioner) if symmetric else GMRES()
