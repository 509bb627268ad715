"""SSIGD: projected stochastic steps along smoothed implicit gradients of a linearly constrained lower level."""

from typing import Any, NamedTuple

import jax
from jax import Array

from bilevel.backend import draws
from bilevel.parts import tracking
from bilevel.parts.domain import project_upper
from bilevel.parts.tracking import Info, Iterate, implicit_cost, implicit_step
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import Scalar, Stepper, StepSize, step_sizes, stepper
from bilevel.struct import static, struct

PyTree = Any


def decreasing(count: Array) -> Array:
    """The default upper step, 0.1 (r + 1)^(-1/2) at step r."""
    return 0.1 * (count + 1) ** -0.5


class State(NamedTuple):
    """What a step of SSIGD needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    q: PyTree
    """The perturbation, drawn once, shaped like y."""
    active: Array
    """The active set at y, shape [rows] or [0], from which the next one starts."""
    step: Stepper
    """The step rule of x, with its state."""
    upper: PyTree
    """The state of the upper source."""


@struct(kw_only=True)
class SSIGD(Solver):
    """Stochastic smoothed implicit gradient descent: with one q, drawn at the start and kept, batches of f, and

        F_q(x) = f(x, y_q(x)),  y_q(x) = argmin g(x, y) + q'y  over the constraints,
        x <- Proj_X(x - b_r grad F_q(x; batch)).

    With probability one F_q is differentiable at a fixed x; its distance to F is at most L_f |q|/mu.

    Assumptions: g(x, .) strongly convex, linear constraints with LICQ that do not move with x (here they may). With
    b_r ~ r^(-1/2) it is analysed for weakly convex F_q, with b_r = 1/(mu_F (r + 1)) for mu_F-strongly convex F_q.
    Cost per step: with T = num_lower_steps, n = dim y: 1 upper gradient, T lower gradients, n HVPs (n (T + 1) where g
        is not quadratic; none with `Minimize.diagonal` on a box) and 1 JVP. With `PerSample` data all on one batch.

    Args:
        upper_step_size: b_r > 0. A number, an optax schedule or an optax transformation. Default: 0.1 (r + 1)^(-1/2).
        sigma: > 0, the size of q: standard deviation ("gaussian") or radius ("sphere", "ball"). Default: 1e-3.
        distribution: the law of q, "gaussian", "sphere" or "ball". Default: "gaussian".
        num_lower_steps: T >= 1, SQP steps at each point; one solves a quadratic g exactly. Default: 2.

    Reference: Khanduri, Tsaknakis, Zhang, Liu, Liu, Zhang, Hong. Linearly constrained bilevel optimization: a smoothed
        implicit gradient approach. ICML 2023.
    Differs from the paper: the constraints may depend on x; the lower level is solved by an active-set method.
    """

    upper_step_size: StepSize | None = None
    sigma: Scalar = 1e-3
    distribution: str = static(default="gaussian")
    num_lower_steps: int = static(default=2)
    assumptions = tracking.ASSUMPTIONS
    about = About(
        idea="gradients smoothed by one fixed perturbation",
        data="all of g, batches of f",
        reference="Khanduri et al. 2023",
        calls="1, T, n, 1",
        smoothing="one perturbation, kept",
        stops="shrinking steps",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "upper_step_size")
        draws.check_distribution("SSIGD.distribution", self.distribution)

    def init(self, problem: BilevelProblem, key: Array) -> State:
        key_start, key_source, key_q = jax.random.split(key, 3)
        x, y = problem.init(key_start)
        x = project_upper(problem, x, y)
        q = draws.perturbation(key_q, y, self.distribution, self.sigma)
        active, upper = tracking.no_rows_active(problem, x, y), problem.upper_data.init(key_source)
        return State(x, y, q, active, stepper(self.upper_step_size, decreasing, x), upper)

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        batch, upper = problem.upper_data.next(state.upper, key, state.x, state.y)
        at = Iterate(state.x, state.y, state.active, state.step)
        new, info = implicit_step(problem, at, state.q, batch, self.num_lower_steps)
        return State(new.x, new.y, state.q, new.active, new.step, upper), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return implicit_cost(problem, self.num_lower_steps)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return tracking.refuse_not_polyhedral(self, problem)
