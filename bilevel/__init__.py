"""bilevax: bilevel optimisation in JAX, with certified hypergradients.

Start with `BilevelProblem`, `solve`, `hypergradient` and `implicit_objective`; solvers are in `bilevel.solvers`.
"""

# ruff: noqa: F401, F403
import difflib
from typing import Any

from bilevel import (
    data,
    diagnostics,
    linear,
    lower,
    oracles,
    report,
    run,
    sets,
    solver,
    solvers,
    step,
    struct,
)
from bilevel.backend import moved
from bilevel.data import Full, Minibatch, PerSample, Source
from bilevel.hypergradient import Hypergradient, Unrolled, hypergradient
from bilevel.implicit import implicit_objective
from bilevel.linear import CG, GMRES, MINRES, Dense, Neumann
from bilevel.lower import ActiveSet, AsGiven, Newton, ProjectedNewton
from bilevel.problem import BilevelProblem, Constants, FixedPoint, LinearCoupling, Minimize, Separable, SmoothCoupling
from bilevel.record import OracleCount, Record, Solution, SolveError, Status
from bilevel.run import advance, checkpoint, solve, solve_many
from bilevel.run.checkpoint import CheckpointError
from bilevel.sets import Ball, Box, Polyhedron, Product, Reals, Simplex
from bilevel.solver import Solver, Unsupported
from bilevel.solvers import *  # every solver found in bilevel/solvers, by discovery
from bilevel.struct import InvalidInput


def __getattr__(name: str) -> Any:
    """Only reached for names that do not exist; it also tells type checkers that discovery adds names."""
    if (module := moved.attribute(__name__, name)) is not None:
        return module
    near = difflib.get_close_matches(name, globals(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module 'bilevel' has no attribute {name!r}.{hint}")
