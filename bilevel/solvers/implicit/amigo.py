"""AmIGO: amortised implicit gradient optimisation, with warm starts of y and v."""

from typing import Any, NamedTuple

import jax
import optax
from jax import Array, lax

from bilevel import oracles
from bilevel.parts.tuning import Iterates, implicit_step, start
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import Stepper, StepSize, step_sizes
from bilevel.struct import static, struct

PyTree = Any


class Info(NamedTuple):
    """What a step of AmIGO shows."""

    direction: Array
    """|f_x - R_x' v|, shape []: the norm of the hypergradient's estimate."""


@struct(kw_only=True)
class AmIGO(Solver):
    """AmIGO: with a fresh batch B of g wherever one is named, D of f,

        y <- y - a R(x, y; B)                                T = num_lower_steps times, from the last y
        v <- v - b (R_y(x, y; B)' v - f_y(x, y; D))          Q = num_linear_steps times, from the last v
        x <- Proj_X(x - c (f_x(x, y; D) - R_x(x, y; B)' v)).

    Assumptions: g strongly convex in y (or T a contraction), smooth f and g, bounded variance, unconstrained lower
    level.
    The warm starts make T and Q constants: without noise the rate is that of gradient descent on F up to constants.
    Cost per step: 1 upper gradient, T lower gradients, Q HVPs, 1 JVP.

    Args:
        lower_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: the lower step of
            `parts.tuning.default_steps` at the start.
        linear_step_size: b > 0, likewise. Default: the same as for a.
        upper_step_size: c > 0, likewise. Default: the upper step of `parts.tuning.default_steps` at the start.
        num_lower_steps: T >= 1, steps in y. Default: 10.
        num_linear_steps: Q >= 1, steps in v. Default: 10.

    Reference: Arbel, Mairal. Amortized implicit differentiation for stochastic bilevel optimization. ICLR 2022,
        arXiv:2111.14580, Algorithms 1 to 3.
    Differs from the paper: v has the opposite sign; x is projected on X; fixed points are allowed as lower level.
    """

    lower_step_size: StepSize | None = None
    linear_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    num_lower_steps: int = static(default=10)
    num_linear_steps: int = static(default=10)
    about = About(
        idea="lower steps, then warm-started steps on the adjoint",
        reference="Arbel and Mairal 2022",
        calls="1, T, Q, 1",
        memory="none",
        stops="a noise ball, or shrinking steps",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "lower_step_size", "linear_step_size", "upper_step_size")

    def init(self, problem: BilevelProblem, key: Array) -> Iterates:
        rules = self.upper_step_size, self.lower_step_size, self.linear_step_size
        return start(problem, key, *rules, num_lower_steps=self.num_lower_steps)

    def step(self, problem: BilevelProblem, state: Iterates, key: Array) -> tuple[Iterates, Info]:
        x = state.x

        def adjoint(y: PyTree, fy: PyTree, lower: PyTree, key: Array) -> tuple[PyTree, Stepper, PyTree]:
            def linear_step(carry: tuple[PyTree, Stepper, PyTree], key: Array) -> tuple[tuple, None]:
                v, step_v, lower = carry
                batch, lower = problem.lower_data.next(lower, key, x, y)
                v, step_v = step_v(v, optax.tree.sub(oracles.hvp(problem, x, y, v, batch), fy))
                return (v, step_v, lower), None

            keys = jax.random.split(key, self.num_linear_steps)
            return lax.scan(linear_step, (state.v, state.step_v, lower), keys)[0]

        state, size = implicit_step(problem, state, key, self.num_lower_steps, adjoint)
        return state, Info(size)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        T, Q = self.num_lower_steps, self.num_linear_steps
        return OracleCount(upper_gradients=1, lower_gradients=T, hvps=Q, jvps=1)
