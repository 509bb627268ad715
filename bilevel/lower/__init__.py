"""Solve the lower level: y(x), with a certificate, and what follows from it for the derivative."""

from bilevel.lower.newton import LowerSolution, Newton, apply_inverse, solve
from bilevel.lower.polyhedral import ActiveSet
from bilevel.lower.projected import ProjectedNewton

__all__ = ["ActiveSet", "LowerSolution", "Newton", "ProjectedNewton", "apply_inverse", "solve"]
