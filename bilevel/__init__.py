"""bilevax: bilevel optimisation in JAX, with certified hypergradients.

Start with `BilevelProblem`, `solve`, `hypergradient` and `implicit_objective`; solvers are in `bilevel.solvers`.

The solvers are spelt out for readers and type checkers; a file that is new in `bilevel/solvers` is found without that,
and tests/test_face.py asks for its name here.
"""

import typing as _typing

from bilevel import data, diagnostics, linear, lower, oracles, report, run, sets, solver, solvers, step, struct, theory
from bilevel.backend import moved as _moved
from bilevel.data import Full, Minibatch, PerSample, Source
from bilevel.diagnostics.sensitivity import sensitivity
from bilevel.hypergradient import Hypergradient, Unrolled, hypergradient
from bilevel.implicit import implicit_objective, solution_map
from bilevel.linear import CG, GMRES, MINRES, Dense, Neumann
from bilevel.lower import ActiveSet, AsGiven, Blocks, Newton, ProjectedNewton
from bilevel.lower.directional import Directional, directional_derivative
from bilevel.oracles.nash import nash
from bilevel.parts.from_cvxpy import from_cvxpy
from bilevel.parts.mibs import MibS, read_mibs, write_mibs
from bilevel.parts.pessimistic import pessimistic
from bilevel.problem import BilevelProblem, Constants, FixedPoint, LinearCoupling, Minimize, Separable, SmoothCoupling
from bilevel.recommend import Recommendation, recommend
from bilevel.record import OracleCount, Record, Row, Stats, Status
from bilevel.run import Optimum, advance, checkpoint, local_optima, solve, solve_many
from bilevel.run.checkpoint import CheckpointError
from bilevel.sets import Ball, Box, Intersection, Polyhedron, Product, Reals, Simplex, SmoothSet
from bilevel.sets.coupling import UpperConstraints
from bilevel.solution import Solution, SolveError
from bilevel.solver import Solver, Unsupported
from bilevel.solvers.coupled.bicgaffa import BiCGAFFA
from bilevel.solvers.coupled.blocc import BLOCC
from bilevel.solvers.coupled.f2cba import F2CBA
from bilevel.solvers.coupled.lvhba import LVHBA
from bilevel.solvers.coupled.sflcb import SFLCB
from bilevel.solvers.exact.augmented_lagrangian import AugmentedLagrangian
from bilevel.solvers.exact.branch_and_bound import BranchAndBound
from bilevel.solvers.exact.implicit import Implicit
from bilevel.solvers.exact.lbfgs import LBFGS
from bilevel.solvers.exact.mpec import MPEC
from bilevel.solvers.exact.sqp import SQP
from bilevel.solvers.exact.trust_region import TrustRegion
from bilevel.solvers.implicit.aid import AID
from bilevel.solvers.implicit.amigo import AmIGO
from bilevel.solvers.implicit.itd import ITD
from bilevel.solvers.implicit.saba import SABA
from bilevel.solvers.implicit.soba import SOBA
from bilevel.solvers.implicit.stocbio import StocBiO
from bilevel.solvers.penalty.bome import BOME
from bilevel.solvers.penalty.bvfsm import BVFSM
from bilevel.solvers.penalty.f2sa import F2SA, ProxF2SA
from bilevel.solvers.penalty.gpbgd import GPBGD
from bilevel.solvers.penalty.meha import MEHA
from bilevel.solvers.penalty.vpbgd import VPBGD
from bilevel.solvers.polyhedral.aipod import AiPOD
from bilevel.solvers.polyhedral.ds_blo import DSBLO
from bilevel.solvers.polyhedral.dsigd import DSIGD
from bilevel.solvers.polyhedral.pigd import PIGD
from bilevel.solvers.polyhedral.ssigd import SSIGD
from bilevel.solvers.sampled.at import AT
from bilevel.solvers.sampled.per_sample_penalty import PerSamplePenalty
from bilevel.solvers.sampled.sampled_penalty import SampledPenalty
from bilevel.step import StepSize, decay
from bilevel.struct import InvalidInput

__all__ = [
    "AID",
    "AT",
    "BLOCC",
    "BOME",
    "BVFSM",
    "CG",
    "DSBLO",
    "DSIGD",
    "F2CBA",
    "F2SA",
    "GMRES",
    "GPBGD",
    "ITD",
    "LBFGS",
    "LVHBA",
    "MEHA",
    "MINRES",
    "MPEC",
    "PIGD",
    "SABA",
    "SFLCB",
    "SOBA",
    "SQP",
    "SSIGD",
    "VPBGD",
    "ActiveSet",
    "AiPOD",
    "AmIGO",
    "AsGiven",
    "AugmentedLagrangian",
    "Ball",
    "BiCGAFFA",
    "BilevelProblem",
    "Blocks",
    "Box",
    "BranchAndBound",
    "CheckpointError",
    "Constants",
    "Dense",
    "Directional",
    "FixedPoint",
    "Full",
    "Hypergradient",
    "Implicit",
    "Intersection",
    "InvalidInput",
    "LinearCoupling",
    "MibS",
    "Minibatch",
    "Minimize",
    "Neumann",
    "Newton",
    "Optimum",
    "OracleCount",
    "PerSample",
    "PerSamplePenalty",
    "Polyhedron",
    "Product",
    "ProjectedNewton",
    "ProxF2SA",
    "Reals",
    "Recommendation",
    "Record",
    "Row",
    "SampledPenalty",
    "Separable",
    "Simplex",
    "SmoothCoupling",
    "SmoothSet",
    "Solution",
    "SolveError",
    "Solver",
    "Source",
    "Stats",
    "Status",
    "StepSize",
    "StocBiO",
    "TrustRegion",
    "Unrolled",
    "Unsupported",
    "UpperConstraints",
    "advance",
    "checkpoint",
    "data",
    "decay",
    "diagnostics",
    "directional_derivative",
    "from_cvxpy",
    "hypergradient",
    "implicit_objective",
    "linear",
    "local_optima",
    "lower",
    "nash",
    "oracles",
    "pessimistic",
    "read_mibs",
    "recommend",
    "report",
    "run",
    "sensitivity",
    "sets",
    "solution_map",
    "solve",
    "solve_many",
    "solver",
    "solvers",
    "step",
    "struct",
    "theory",
    "write_mibs",
]

__version__ = _moved.version()

if not _typing.TYPE_CHECKING:  # to a type checker, other names are errors

    def __getattr__(name):
        """A solver that is only a file, a module by its old name, or an error with the nearest name."""
        return _moved.lookup(__name__, name, solvers.ALL, __all__)

    def __dir__():
        return [*__all__, "__version__"]
