"""VPBGD: gradient descent on f plus a penalty on the value gap of the lower level."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.parts.descent import projected_steps
from bilevel.parts.spectrum import smoothness
from bilevel.parts.tuning import default_steps
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver, refuse_without_value
from bilevel.step import Scalar, Stepper, StepSize, require_numbers, step_sizes, stepper
from bilevel.struct import static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of VPBGD needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    w: PyTree
    """The auxiliary minimiser of g(x, .), shaped like y."""
    step: Stepper
    """The step rule of (x, y), with its state."""
    step_w: Stepper
    """The step rule of w, with its state."""


class Info(NamedTuple):
    """What a step of VPBGD shows."""

    direction_x: Array
    """|f_x + c q_x|, q the gap, shape []: the norm of the direction's part in x."""
    direction_y: Array
    """|f_y + c q_y|, shape []: that of its part in y."""


@struct(kw_only=True)
class VPBGD(Solver):
    """Value-gap penalty-based bilevel gradient descent, on all of the data, with c = penalty:

        w <- Proj_Y(w - b g_y(x, w))                            T = num_lower_steps times, from the last w
        (x, y) <- Proj_{X x Y}((x, y) - a (f_x + c (g_x(x, y) - g_x(x, w)), f_y + c g_y(x, y))).

    It descends f + c (g - min_y g), whose stationary points are those of F up to order 1/c: y - y(x) is about
    -g_yy^-1 f_y/c. No product with a Hessian is needed, but a has to shrink like 1/c.

    Assumptions: f and g smooth, g(x, .) satisfies the Polyak-Lojasiewicz inequality (it need not be convex, nor its
    minimiser unique), lower level without coupling. With constant steps and T ~ log K the squared projected gradient of
    the penalised objective falls like 1/K.
    Cost per step: 1 upper gradient, T + 2 lower gradients.

    Args:
        lower_step_size: b > 0, at most 1/L. A number, an optax schedule or an optax transformation. Default: the lower
            step of `parts.tuning.default_steps` at the start, or 1/L_g from `spectrum.smoothness` with a y_set.
        upper_step_size: a > 0, likewise, for (x, y) together. Default: 1/(1/a_F + 4 c/b), with the upper step a_F and
            the lower step b of `parts.tuning.default_steps`; with a y_set 1/(L_f + 2 c L_g), from
            `spectrum.smoothness`.
        penalty: c > 0, large against L_f/mu_g: f itself may be unbounded below. Default: 10.
        num_lower_steps: T >= 1, steps in w. Default: 10.

    Reference: Shen, Chen. On penalty-based bilevel gradient descent method. ICML 2023, arXiv:2302.05185 (V-PBGD).
    Differs from the paper: w starts from its last value, not from y.
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    penalty: Scalar = 10.0
    num_lower_steps: int = static(default=10)
    full_batch = True
    about = About(
        idea="a penalty on g's value gap",
        reference="Shen and Chen 2023",
        calls="1, T + 2, 0, 0",
        lower="Polyak-Lojasiewicz, may have many minimisers; a set Y",
        stops="a bias like 1/lam stays",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "lower_step_size", "upper_step_size")
        require_numbers(self, "penalty")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        lower = upper = None
        if None in (self.lower_step_size, self.upper_step_size):
            if problem.y_set.whole:
                lower, upper = default_steps(problem.on_full_data(), x, y, num_lower_steps=None)
                upper = 1 / (1 / upper + 4 * jnp.asarray(self.penalty, lower.dtype) / lower)
            else:
                L_f, L_g = smoothness(problem.on_full_data(), key, x, y)
                lower, upper = 1 / L_g, 1 / (L_f + 2 * jnp.asarray(self.penalty, L_g.dtype) * L_g)
        return State(x, y, y, stepper(self.upper_step_size, upper, (x, y)), stepper(self.lower_step_size, lower, y))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        x, y, batch_f, batch_g = state.x, state.y, problem.upper_data.full(), problem.lower_data.full()
        w, step_w = projected_steps(problem, x, state.w, state.step_w, self.num_lower_steps)

        gradient = oracles.upper_gradients(problem, x, y, batch_f)
        gap = oracles.value_gap_gradients(problem, x, y, w, batch_g)
        direction = jax.tree.map(lambda f, q: f + jnp.asarray(self.penalty, f.dtype) * q, gradient, gap)
        (x, y), step = state.step((x, y), direction)
        return State(problem.x_set.project(x), problem.y_set.project(y), w, step, step_w), Info(*map(norm, direction))

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=self.num_lower_steps + 2)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_without_value(self, problem.without("y_set"))
