"""BVFSM: a sequence of barriers on g's value gap, for lower levels that need not be convex."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.diagnostics import BY_VALUE
from bilevel.parts.descent import barzilai_borwein
from bilevel.parts.spectrum import smoothness
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, Referee
from bilevel.solver import About, Solver, refuse_without_value
from bilevel.step import Scalar, Scheduled, Stepper, StepSize, require_numbers, schedules, step_sizes, stepper
from bilevel.struct import static, struct

PyTree = Any
CUT = 0.01  # part of the largest slack below which the logarithm is continued by a parabola


class State(NamedTuple):
    """What a step of BVFSM needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    z: PyTree
    """The minimiser of the regularised g(x, .), shaped like y."""
    step_x: Stepper
    """The step rule of x, with its state."""
    step_z: Stepper
    """The step rule of z, with its state."""
    decay: Stepper
    """The step rule of the weights' decay d_k, with its state."""


class Info(NamedTuple):
    """What a step of BVFSM shows."""

    direction: Array
    """Norm of the direction in x, shape []."""
    slack: Array
    """The slack v - g(x, y) that is left to the barrier, shape []."""
    multiplier: Array
    """The barrier's multiplier of g: s/slack, until its parabola takes over; shape []."""
    decay: Array
    """The factor d_k of this step, shape []."""


def _decay(k: Array) -> Array:
    """1.01^-k, at least 1e-5."""
    return jnp.maximum(1.01**-k, 1e-5)


def barrier(slack: Array, cut: Array) -> tuple[Array, Array]:
    """(-log(slack), its derivative), shapes []; below `cut` the parabola with the same value and two derivatives."""
    inside, below = jnp.maximum(slack, cut), jnp.minimum(slack / cut - 1, 0)
    return -jnp.log(inside) - below + below**2 / 2, (below - 1) / inside


@struct(kw_only=True)
class BVFSM(Solver):
    """Experimental: the shift mu of the value is from memory.

    Bilevel value-function-based sequential minimisation, on all of the data, with mu, theta, s times a decay d_k:

        z <- Proj_Y(z - a (g_y(x, z) + mu z))                       T = num_lower_steps times, from the last z
        v = g(x, z) + mu |z|^2/2 + mu
        y <- a minimiser over Y, near the last y, of  f(x, y) + theta |y|^2/2 - s log(v - g(x, y))
        x <- Proj_X(x - c (f_x(x, y) + s (g_x(x, y) - g_x(x, z))/(v - g(x, y)))).

    y takes `num_penalty_steps` projected gradient steps of Barzilai and Borwein's length that never let its
    objective rise (`descent.barzilai_borwein`). The barrier keeps g(x, y) below v, which comes down to min g as mu
    falls: while it is high y may leave a basin of g for one that f prefers.

    Assumptions: f and g continuously differentiable and, with the regularisation, coercive in y; no coupling. Where z
    and y are global minimisers of their problems, limits of x are minimisers of the optimistic F.
    Cost per step: with K = num_penalty_steps, K + 2 upper gradients, T + K + 3 lower gradients and 2 lower values.

    Args:
        lower_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: 1/(L_g + mu), L_g from
            `spectrum.smoothness`.
        upper_step_size: c > 0, likewise. Default: 1/(L_f + L_g), likewise.
        regularisation: mu > 0 at the first step. Default: 1.
        penalty_regularisation: theta > 0 at the first step. Default: 0.01.
        barrier: s > 0 at the first step. Default: 1.
        decay: d_k > 0, a number or an optax schedule of the step. Default: 1.01^-k, at least 1e-5.
        num_lower_steps: T >= 1, steps in z. Default: 20.
        num_penalty_steps: K >= 1, steps in y. Default: 20.

    Reference: Liu, Liu, Zeng, Zhang, Zhang. Value-function-based sequential minimization for bi-level optimization.
        arXiv:2110.04974, 2021; Liu, Liu, Yuan, Zeng, Zhang. A value-function-based interior-point method for non-convex
        bi-level optimization. ICML 2021, arXiv:2106.07991.
    Differs from the paper: the logarithm goes on as a parabola below a hundredth of the largest slack, so that y finds
        its way back when a step of x has left it outside; step lengths in y. The shift mu in v is the second paper's,
        from memory. In the authors' public code for the sine example v - g has the constant n + 1e-8 in place of it and
        of g(x, y)'s own part, |z|^2 and |y|^2 come without halves and x moves by Adam; the three objectives and their
        order are the same. The default decay and step sizes are ours.
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    regularisation: Scalar = 1.0
    penalty_regularisation: Scalar = 0.01
    barrier: Scalar = 1.0
    decay: Scheduled | None = None
    num_lower_steps: int = static(default=20)
    num_penalty_steps: int = static(default=20)
    full_batch = True
    about = About(
        idea="a barrier on g's value gap that starts high and sharpens; g may be non-convex",
        reference="Liu et al. 2021",
        calls="K + 2, T + K + 3 and 2 values, 0, 0; K steps of y",
        lower="any smooth g on a set, local minima of it",
        stops="a gap like the decaying weights stays",
    )
    experimental = "the shift mu of the value is from memory"

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations; the weights are numbers, decay a number or a schedule."""
        step_sizes(self, "lower_step_size", "upper_step_size")
        schedules(self, "decay")
        require_numbers(self, "regularisation", "penalty_regularisation", "barrier")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        lower = upper = None
        if None in (self.lower_step_size, self.upper_step_size):
            L_f, L_g = smoothness(problem.on_full_data(), key, x, y)
            lower, upper = 1 / (L_g + jnp.asarray(self.regularisation, L_g.dtype)), 1 / (L_f + L_g)
        steps = stepper(self.upper_step_size, upper, x), stepper(self.lower_step_size, lower, y)
        return State(x, y, problem.y_set.project(y), *steps, stepper(self.decay, _decay, ()))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        x, batch_f, batch_g = state.x, problem.upper_data.full(), problem.lower_data.full()
        d, decay = state.decay.size()
        weights = self.regularisation, self.penalty_regularisation, self.barrier
        mu, theta, s = (jnp.asarray(weight * d, jax.tree.leaves(x)[0].dtype) for weight in weights)

        def lower_step(carry: tuple[PyTree, Stepper], _: None) -> tuple[tuple[PyTree, Stepper], None]:
            z, step_z = carry
            pull = jax.tree.map(
                lambda g, z: g + jnp.asarray(mu, z.dtype) * z, oracles.residual(problem, x, z, batch_g), z
            )
            z, step_z = step_z(z, pull)
            return (problem.y_set.project(z), step_z), None

        (z, step_z), _ = jax.lax.scan(lower_step, (state.z, state.step_z), length=self.num_lower_steps)
        g_z = oracles.lower_value(problem, x, z, batch_g)
        v = g_z + mu * (norm(z) ** 2 / 2 + 1)
        cut = CUT * (v - g_z)

        def penalised(y: PyTree) -> tuple[Array, PyTree]:
            f, (_, fy) = oracles.upper_value_and_gradients(problem, x, y, batch_f)
            g, gy = oracles.lower_value_and_gradient(problem, x, y, batch_g)
            value, slope = barrier(v - g, cut)
            total = lambda f, g, y: f + jnp.asarray(theta, f.dtype) * y - jnp.asarray(s * slope, f.dtype) * g  # noqa: E731
            return f + theta * norm(y) ** 2 / 2 + s * value, jax.tree.map(total, fy, gy, y)

        y, _ = barzilai_borwein(problem.y_set, penalised, problem.y_set.project(state.y), self.num_penalty_steps)

        fx, _ = oracles.upper_gradients(problem, x, y, batch_f)
        g_y = oracles.lower_value(problem, x, y, batch_g)
        gap, _ = oracles.value_gap_gradients(problem, x, y, z, batch_g)
        multiplier = -s * barrier(v - g_y, cut)[1]
        direction = jax.tree.map(lambda f, q: f + jnp.asarray(multiplier, f.dtype) * q, fx, gap)
        x, step_x = state.step_x(x, direction)
        info = Info(norm(direction), v - g_y, multiplier, jnp.asarray(d, float))
        return State(problem.x_set.project(x), y, z, step_x, step_z, decay), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        T, K = self.num_lower_steps, self.num_penalty_steps
        return OracleCount(upper_gradients=K + 2, lower_values=2, lower_gradients=T + K + 3)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return BY_VALUE if problem.constrained_lower else None

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_without_value(self, problem.without("y_set"))
