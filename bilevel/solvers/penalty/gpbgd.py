"""GPBGD: gradient descent on f plus a penalty on the lower level's residual."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.parts.tuning import default_steps
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import Scalar, Stepper, StepSize, require_numbers, step_sizes, stepper
from bilevel.struct import struct

PyTree = Any


class State(NamedTuple):
    """What a step of GPBGD needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    step: Stepper
    """The step rule of (x, y), with its state."""


class Info(NamedTuple):
    """What a step of GPBGD shows."""

    direction_x: Array
    """|f_x + c R_x' R|, shape []: the norm of the direction's part in x."""
    direction_y: Array
    """|f_y + c R_y' R|, shape []: that of its part in y."""
    residual: Array
    """|R| before the step, shape []."""


@struct(kw_only=True)
class GPBGD(Solver):
    """Gradient-norm penalty-based bilevel gradient descent, on all of the data, with c = penalty:

        (x, y) <- Proj_{X x R}((x, y) - a (f_x + c R_x' R, f_y + c R_y' R)),   R = g_y(x, y),

    which descends f + (c/2)|g_y|^2. Its stationary points are those of F up to order 1/c: y - y(x) is about
    -g_yy^-2 f_y/c. A single loop, at the price of second derivatives and of the squared condition number of g.

    Assumptions: f, g and g_y smooth, g_yy g_yy' bounded away from 0 (as with g strongly convex, or I - T_y
    invertible; stationary points of |g_y|^2 that are not of g are excluded), unconstrained lower level. With a
    constant step the squared projected gradient of the penalised objective falls like 1/K.
    Cost per step: 1 upper gradient, 1 lower gradient, 1 HVP, 1 JVP.

    Args:
        upper_step_size: a > 0, for (x, y) together. A number, an optax schedule or an optax transformation. Default:
            1/(1/a_F + 2 c/b^2), with the upper step a_F and the lower step b of `parts.tuning.default_steps`.
        penalty: c > 0, large against L_f/mu_g^2: f itself may be unbounded below. Default: 100.

    Reference: Shen, Chen. On penalty-based bilevel gradient descent method. ICML 2023, arXiv:2302.05185 (G-PBGD).
    Differs from the paper: the penalty carries a factor 1/2; fixed points are allowed as lower level, R = y - T.
    """

    upper_step_size: StepSize | None = None
    penalty: Scalar = 100.0
    full_batch = True
    about = About(
        idea="a penalty on the squared residual",
        reference="Shen and Chen 2023",
        calls="1, 1, 1, 1",
        lower="g_yy invertible, or a fixed point; unconstrained",
        stops="a bias like 1/lam stays",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "upper_step_size")
        require_numbers(self, "penalty")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        upper = None
        if self.upper_step_size is None:
            lower, upper = default_steps(problem.on_full_data(), x, y, num_lower_steps=None)
            upper = 1 / (1 / upper + 2 * jnp.asarray(self.penalty, lower.dtype) / lower**2)
        return State(x, y, stepper(self.upper_step_size, upper, (x, y)))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        x, y, batch_f, batch_g = state.x, state.y, problem.upper_data.full(), problem.lower_data.full()
        gradient = oracles.upper_gradients(problem, x, y, batch_f)
        R, square = oracles.residual_square_gradients(problem, x, y, batch_g)
        direction = jax.tree.map(lambda f, r: f + jnp.asarray(self.penalty, f.dtype) * r, gradient, square)
        (x, y), step = state.step((x, y), direction)
        info = Info(norm(direction[0]), norm(direction[1]), norm(R))
        return State(problem.x_set.project(x), y, step), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=1, hvps=1, jvps=1)
