"""PIGD: projected descent along exact implicit gradients, without smoothing."""

from typing import Any, NamedTuple

import optax
from jax import Array

from bilevel.parts import tracking
from bilevel.parts.domain import project_upper
from bilevel.parts.tracking import Info, Iterate, implicit_cost, implicit_step
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import Stepper, StepSize, step_sizes, stepper
from bilevel.struct import static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of PIGD needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    active: Array
    """The active set at y, shape [rows] or [0], from which the next one starts."""
    step: Stepper
    """The step rule of x, with its state."""


@struct(kw_only=True)
class PIGD(Solver):
    """Projected implicit gradient descent, on all of the data: y = y(x) by the active-set method, and

        x <- Proj_X(x - a grad F(x)),   grad F through the rows that are active at y(x).

    The plain method that the smoothed ones are held against: at a kink of F it sees one of the one-sided gradients, and
    a constant step makes it jump from one side to the other.

    Assumptions: g(x, .) strongly convex, linear constraints with LICQ, strict complementarity along the path.
    Cost per step: with T = num_lower_steps, n = dim y: 1 upper gradient, T lower gradients, n HVPs (n (T + 1) where g
        is not quadratic) and 1 JVP.

    Args:
        upper_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: 0.1.
        num_lower_steps: T >= 1, SQP steps at each point; one solves a quadratic g exactly. Default: 2.

    Reference: Khanduri, Tsaknakis, Zhang, Liu, Liu, Zhang, Hong. Linearly constrained bilevel optimization: a smoothed
        implicit gradient approach. ICML 2023. The method without its smoothing.
    Differs from the paper: no perturbation; the lower level is solved by an active-set method.
    """

    upper_step_size: StepSize | None = None
    num_lower_steps: int = static(default=2)
    full_batch = True
    assumptions = tracking.ASSUMPTIONS
    about = About(
        idea="projected descent, no smoothing",
        reference="Khanduri et al. 2023",
        calls="1, T, n, 1",
        smoothing="none",
        stops="grad F = 0; at a kink it jumps from side to side",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "upper_step_size")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        x = project_upper(problem, x, y)
        return State(x, y, tracking.no_rows_active(problem, x, y), stepper(self.upper_step_size, 0.1, x))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        nothing = optax.tree.zeros_like(state.y)
        new, info = implicit_step(problem, Iterate(*state), nothing, problem.upper_data.full(), self.num_lower_steps)
        return State(*new), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return implicit_cost(problem, self.num_lower_steps)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return tracking.refuse_not_polyhedral(self, problem)
