"""ITD: iterative differentiation, through the lower level's steps."""

from typing import NamedTuple

from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.parts.tuning import Iterates, start
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import StepSize, schedules, step_sizes
from bilevel.struct import static, struct


class Info(NamedTuple):
    """What a step of ITD shows."""

    direction: Array
    """|d/dx f(x, y_T(x))|, shape [], the norm of the derivative through the T steps."""
    value: Array
    """f(x, y_T) before x moves, shape []."""


@struct(kw_only=True)
class ITD(Solver):
    """Iterative differentiation, on all of the data, from the last y held constant as y_0:

        y_{t+1} = y_t - a R(x, y_t),  t < T = num_lower_steps
        x <- Proj_X(x - c d/dx f(x, y_T(x))),

    the derivative by reverse mode through the T steps, each under `jax.checkpoint`. It converges to the hypergradient
    like T (1 - a mu)^(T-1), for quadratic g like (1 - a mu)^T; the bias of a finite T stays, so that ITD stops near,
    not at, a stationary point of F.

    Assumptions: g strongly convex in y (or T a contraction), smooth f and g, unconstrained lower level.
    Cost per step: 1 upper gradient, T lower gradients, T HVPs, T JVPs. Memory: T copies of y.

    Args:
        lower_step_size: a > 0, a number or an optax schedule of the outer step. Default: the lower step of
            `parts.tuning.default_steps` at the start.
        upper_step_size: c > 0. A number, an optax schedule or an optax transformation. Default: the upper step of
            `parts.tuning.default_steps` at the start.
        num_lower_steps: T >= 1, steps in y that the derivative goes through. Default: 20.

    Reference: Franceschi, Donini, Frasconi, Pontil. Forward and reverse gradient-based hyperparameter optimization.
        ICML 2017, arXiv:1703.01785. Grazzi et al., ICML 2020, arXiv:2006.16218, Algorithm 1. Warm start of y: Ji,
        Yang, Liang, ICML 2021, arXiv:2010.07962, Algorithm 1 (ITD-BiO).
    Differs from the papers: x is projected on X.
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    num_lower_steps: int = static(default=20)
    full_batch = True
    about = About(
        idea="reverse mode through the lower steps",
        reference="Franceschi et al. 2017",
        calls="1, T, T, T",
        memory="T copies of y",
        stops="a bias like (1 - a mu)^T stays",
    )

    def __post_init__(self) -> None:
        """Accept numbers and schedules; transformations for x only."""
        step_sizes(self, "upper_step_size")
        schedules(self, "lower_step_size")

    def init(self, problem: BilevelProblem, key: Array) -> Iterates:
        rules = self.upper_step_size, self.lower_step_size, self.lower_step_size
        return start(problem.on_full_data(), key, *rules, num_lower_steps=self.num_lower_steps)

    def step(self, problem: BilevelProblem, state: Iterates, key: Array) -> tuple[Iterates, Info]:
        size, step_y = state.step_y.size()
        batches = problem.upper_data.full(), problem.lower_data.full()
        (value, y), direction = oracles.unrolled_objective(
            problem, state.x, state.y, self.num_lower_steps, size, *batches
        )
        x, step_x = state.step_x(state.x, direction)
        return state._replace(x=problem.x_set.project(x), y=y, step_x=step_x, step_y=step_y), Info(
            norm(direction), value
        )

    def cost(self, problem: BilevelProblem) -> OracleCount:
        T = self.num_lower_steps
        return OracleCount(upper_gradients=1, lower_gradients=T, hvps=T, jvps=T)
