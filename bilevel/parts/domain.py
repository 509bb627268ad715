"""The leader's step back into its domain {x in X : Y(x) is not empty}."""

from typing import Any

from bilevel.problem import BilevelProblem, LinearCoupling
from bilevel.sampled.blocks import Blocks
from bilevel.sampled.domain import into_domain
from bilevel.sampled.feasible import affine_rows, is_affine

PyTree = Any
MOST = 200  # rows of Y(x) beyond which nothing is moved into the domain
ROUNDS = 3  # projections, so that x is the nearest one to rounding


def project_upper(problem: BilevelProblem, x: PyTree, y: PyTree) -> PyTree:
    """The point of X nearest to x, and where Y is empty there the nearest point of the leader's domain:
    `sampled.domain.into_domain`, where Y(x) is described by at most `MOST` affine rows. y: anything shaped like the
    problem's y, close to Y(x) at best.
    """
    if not isinstance(problem.coupling, LinearCoupling):
        return problem.x_set.project(x)
    view = Blocks.of(problem, y)
    start = view.pack(y)
    many = is_affine(view) and len(affine_rows(view, x, start).lo) > MOST
    return problem.x_set.project(x) if many else into_domain(view, x, start, ROUNDS)
