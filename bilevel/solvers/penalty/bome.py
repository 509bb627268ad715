"""BOME: descent on f, corrected so that the value gap of the lower level always falls."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

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
    """What a step of BOME needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    step: Stepper
    """The step rule of (x, y), with its state."""
    step_y: Stepper
    """The step rule of the lower steps, those of w, with its state."""


class Info(NamedTuple):
    """What a step of BOME shows."""

    direction: Array
    """|df + lam dq|, shape []."""
    multiplier: Array
    """The multiplier lam, shape []."""
    gap_gradient: Array
    """|dq|, shape [], which is 0 where y minimises g(x, .)."""


@struct(kw_only=True)
class BOME(Solver):
    """BOME ("BO made easy"), on all of the data:

        w = y, then w <- Proj_Y(w - b g_y(x, w))                T = num_lower_steps times
        dq = (g_x(x, y) - g_x(x, w), g_y(x, y)),   df = (f_x, f_y)        (w held constant)
        lam = max(0, eta |dq|^2 - df'dq) / |dq|^2               0 where dq = 0
        (x, y) <- Proj_{X x Y}((x, y) - a (df + lam dq)).

    The direction is the nearest to df along which the gap q = g(x, y) - min g(x, .) falls at least at the rate
    eta |dq|^2: a multiplier chosen anew at each step, in place of a penalty. Where x is empty, min f over the
    minimisers of g ("simple bilevel"), dq = g_y and no w is needed: the method is dynamic barrier gradient descent.
    With `equality`, and without x, it is BLUR, a method for unlearning: lam may be negative there, so that the gap
    falls no faster than asked even where descent on f alone would lower it more.

    Assumptions: f and g smooth, f bounded, g(x, .) satisfies the Polyak-Lojasiewicz inequality (its minimiser need not
    be unique), lower level without coupling. A constant step leaves a neighbourhood of the solution of order a, because
    the direction of dq is steep there; with a ~ K^(-1/2) the KKT residual vanishes.
    Cost per step: 1 upper gradient, T + 2 lower gradients.

    Args:
        lower_step_size: b > 0, at most 1/L. A number, an optax schedule or an optax transformation. Default: the lower
            step of `parts.tuning.default_steps` at the start, or 1/L_g from `spectrum.smoothness` with a y_set.
        upper_step_size: a > 0, likewise, for (x, y) together. Default: min(a_F, b)/10 with the upper step a_F and the
            lower step b of `parts.tuning.default_steps`; with a y_set min(1/L_f, b)/10 and b = 1/L_g, from
            `spectrum.smoothness`.
        decrease: eta > 0, how fast the gap has to fall. Default: 0.5.
        num_lower_steps: T >= 1, steps in w. Default: 30.
        equality: whether the gap has to fall at exactly that rate, lam = (eta |dq|^2 - df'dq) / |dq|^2. Default: False.

    Reference: Ye, Liu, Wright, Stone, Liu. BOME! Bilevel optimization made easy: a simple first-order approach.
        NeurIPS 2022, arXiv:2209.08709, with phi = eta |dq|^2. Without x: Gong, Liu, Liu. Bi-objective trade-off with
        dynamic barrier gradient descent. NeurIPS 2021. BLUR: Reisizadeh et al. EACL 2026, arXiv:2506.08164, with
        eta = gamma.
    Differs from the paper: x is projected on X, and y and w on Y.
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    decrease: Scalar = 0.5
    num_lower_steps: int = static(default=30)
    equality: bool = static(default=False)
    full_batch = True
    about = About(
        idea="descent on f that always lowers g's value gap",
        reference="Ye et al. 2022",
        calls="1, T + 2, 0, 0",
        lower="Polyak-Lojasiewicz, may have many minimisers; a set Y",
        stops="a cycle as large as the step, and a bias like (1 - b mu)^T",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "lower_step_size", "upper_step_size")
        require_numbers(self, "decrease")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        lower = upper = None
        if None in (self.lower_step_size, self.upper_step_size):
            if problem.y_set.whole:
                lower, upper = default_steps(problem.on_full_data(), x, y, num_lower_steps=None)
            else:
                upper, lower = (1 / L for L in smoothness(problem.on_full_data(), key, x, y))
            upper = jnp.minimum(lower, upper) / 10
        return State(x, y, stepper(self.upper_step_size, upper, (x, y)), stepper(self.lower_step_size, lower, y))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        x, y, batch_f, batch_g = state.x, state.y, problem.upper_data.full(), problem.lower_data.full()
        w, step_y = projected_steps(problem, x, y, state.step_y, self.num_lower_steps)

        df, unravel = ravel_pytree(oracles.upper_gradients(problem, x, y, batch_f))
        dq, _ = ravel_pytree(oracles.value_gap_gradients(problem, x, y, w, batch_g))
        square = dq @ dq
        wanted = jnp.asarray(self.decrease, dq.dtype) * square - df @ dq
        wanted = wanted if self.equality else jnp.maximum(0, wanted)
        multiplier = jnp.where(square > 0, wanted / jnp.where(square > 0, square, 1), 0)
        direction = df + multiplier * dq
        (x, y), step = state.step((x, y), unravel(direction))
        return State(problem.x_set.project(x), problem.y_set.project(y), step, step_y), Info(
            norm(direction), multiplier, norm(dq)
        )

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=self.num_lower_steps + 2)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_without_value(self, problem.without("y_set"))
