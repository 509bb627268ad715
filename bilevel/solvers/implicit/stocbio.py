"""stocBiO: stochastic bilevel optimisation with a Neumann-series estimator."""

from typing import Any, NamedTuple

from jax import Array

from bilevel.parts.descent import neumann
from bilevel.parts.tuning import Iterates, implicit_step, start
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import Stepper, StepSize, schedules, step_sizes
from bilevel.struct import static, struct

PyTree = Any


class Info(NamedTuple):
    """What a step of stocBiO shows."""

    direction: Array
    """|f_x - R_x' v|, shape []: the norm of the hypergradient's estimate."""


@struct(kw_only=True)
class StocBiO(Solver):
    """stocBiO: with a fresh batch B_j of g wherever one is named, D of f and g,

        y <- y - a R(x, y; B)                                   T = num_lower_steps times, from the last y
        v = eta sum_{q=0}^{Q} prod_{j=1}^{q} (I - eta R_y(x, y; B_j)') f_y(x, y; D),   Q = num_linear_steps
        x <- Proj_X(x - c (f_x(x, y; D) - R_x(x, y; D)' v)).

    Assumptions: g strongly convex in y (or T a contraction), smooth f and g, bounded variance, eta <= 1/L,
    unconstrained lower level. The series is cut at Q: a bias of order (1 - eta mu)^(Q+1) stays.
    Cost per step: 1 upper gradient, T lower gradients, Q HVPs, 1 JVP.

    Args:
        lower_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: the lower step of
            `parts.tuning.default_steps` at the start.
        linear_step_size: eta > 0, a number or an optax schedule. Default: the same as for a.
        upper_step_size: c > 0. A number, an optax schedule or an optax transformation. Default: the upper step of
            `parts.tuning.default_steps` at the start.
        num_lower_steps: T >= 1, steps in y. Default: 10.
        num_linear_steps: Q >= 1, terms of the series after the first. Default: 10.

    Reference: Ji, Yang, Liang. Bilevel optimization: convergence analysis and enhanced design. ICML 2021,
        arXiv:2010.07962, Algorithms 2 and 3.
    Differs from the paper: all batches have the sources' sizes, where the paper lets B_j shrink with j, and
        are independent only with `Minibatch(..., order="independent")`; x is projected.
    """

    lower_step_size: StepSize | None = None
    linear_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    num_lower_steps: int = static(default=10)
    num_linear_steps: int = static(default=10)
    about = About(
        idea="lower steps, then a Neumann series",
        reference="Ji et al. 2021",
        calls="1, T, Q, 1",
        memory="a copy of y",
        stops="a noise ball, and a bias like (1 - eta mu)^(Q + 1)",
    )

    def __post_init__(self) -> None:
        """Accept numbers and schedules; transformations for x and y only."""
        step_sizes(self, "lower_step_size", "upper_step_size")
        schedules(self, "linear_step_size")

    def init(self, problem: BilevelProblem, key: Array) -> Iterates:
        rules = self.upper_step_size, self.lower_step_size, self.linear_step_size
        return start(problem, key, *rules, num_lower_steps=self.num_lower_steps)

    def step(self, problem: BilevelProblem, state: Iterates, key: Array) -> tuple[Iterates, Info]:
        x = state.x

        def adjoint(y: PyTree, fy: PyTree, lower: PyTree, key: Array) -> tuple[PyTree, Stepper, PyTree]:
            eta, step_v = state.step_v.size()
            v, lower = neumann(problem, x, y, fy, eta, lower, key, self.num_linear_steps)
            return v, step_v, lower

        state, size = implicit_step(problem, state, key, self.num_lower_steps, adjoint)
        return state, Info(size)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        T, Q = self.num_lower_steps, self.num_linear_steps
        return OracleCount(upper_gradients=1, lower_gradients=T, hvps=Q, jvps=1)
