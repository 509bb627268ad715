"""Solve the lower level: y(x), with a certificate, and what follows from it for the derivative.

`LowerMethod` is the protocol, `choose` the only place that picks a method.
"""

from bilevel.lower.active_set import ActiveSet
from bilevel.lower.as_given import AsGiven
from bilevel.lower.blocks import Blocks
from bilevel.lower.choice import check_lower, choose, choose_for_derivatives, given_for_none, solve, unsolvable
from bilevel.lower.directions import apply_inverse
from bilevel.lower.method import Adjoint, LowerMethod, LowerSolution, Unrolled
from bilevel.lower.newton import Newton
from bilevel.lower.polyhedral_level import Warm
from bilevel.lower.projected_newton import ProjectedNewton

__all__ = [
    "ActiveSet",
    "Adjoint",
    "AsGiven",
    "Blocks",
    "LowerMethod",
    "LowerSolution",
    "Newton",
    "ProjectedNewton",
    "Unrolled",
    "Warm",
    "apply_inverse",
    "check_lower",
    "choose",
    "choose_for_derivatives",
    "given_for_none",
    "solve",
    "unsolvable",
]
