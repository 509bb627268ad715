"""AiPOD: projected lower steps and implicit gradients for lower levels under linear equalities."""

from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.parts.descent import descend, neumann
from bilevel.parts.tuning import start
from bilevel.problem import BilevelProblem, LinearCoupling, Minimize, SmoothCoupling
from bilevel.record import OracleCount
from bilevel.solver import About, Solver, refuse_constrained_lower
from bilevel.step import Stepper, StepSize, schedules, step_sizes
from bilevel.struct import static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of AiPOD needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    inverse: Array
    """The pseudo-inverse of A, shape [dim y, rows]."""
    step_x: Stepper
    """The step rule of x, with its state."""
    step_y: Stepper
    """The step rule of y, with its state."""
    step_v: Stepper
    """The step rule of the series, eta, with its state."""
    upper: PyTree
    """The state of the upper source."""
    lower: PyTree
    """The state of the lower source."""


class Info(NamedTuple):
    """What a step of AiPOD shows."""

    direction: Array
    """Norm of the direction in x, shape []."""
    violation: Array
    """|A y + B x - b| at the old x and the new y, shape []."""
    convex: Array
    """Whether v'g_yy v > 0, or v = 0; shape []."""


def _matrix(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
    """A [rows, dim y] of the equalities, without rows where there are none; x and y give shapes only."""
    flat = ravel_pytree(y)[0]
    if isinstance(problem.coupling, LinearCoupling):
        return jnp.asarray(problem.coupling.raveled(x, y).A_eq, flat.dtype)
    return jnp.zeros((0, flat.size), flat.dtype)


@struct(kw_only=True)
class AiPOD(Solver):
    """Alternating implicit projected SGD, for A y + B x = b below. With A+ the pseudo-inverse, P = I - A+ A, a fresh
    batch E of g wherever one is named and D of f,

        y <- Proj(y - a g_y(x, y; E)),   Proj(y) = y - A+ (A y + B x - b)           T = num_lower_steps times
        v = eta sum_{q=0}^{Q} prod_{j=1}^{q} (I - eta P g_yy(x, y; E_j)) P f_y(x, y; D),   Q = num_linear_steps
        x <- Proj_X(x - c (f_x(x, y; D) - g_xy(x, y; E) v - B' (A+)' (f_y(x, y; D) - g_yy(x, y; E) v))).

    v approximates V (V'g_yy V)^-1 V'f_y, with V an orthonormal basis of A's kernel and P = V V', in the derivative

        y'(x) = V (V'g_yy V)^-1 V'(g_yy A+ B - g_yx) - A+ B

    of the lower solution. One projection is one product with A+ [dim y, rows].

    Assumptions: g strongly convex in y on the kernel of A, f and g smooth, bounded variance, no inequality, no set Y;
    rows of A may depend on each other where they do not contradict.
    Cost per step: 1 upper gradient, T lower gradients, Q + 1 HVPs, 1 JVP.

    Args:
        lower_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: the lower step of
            `parts.tuning.default_steps` at the start.
        linear_step_size: eta > 0, a number or an optax schedule. Default: the same as for a.
        upper_step_size: c > 0. A number, an optax schedule or an optax transformation. Default: the upper step of
            `parts.tuning.default_steps` at the start.
        num_lower_steps: T >= 1, steps in y. Default: 10.
        num_linear_steps: Q >= 1, terms of the series after the first. Default: 10.

    Reference: Xiao, Shen, Yin, Chen. Alternating implicit projected SGD and its efficient variants for
        equality-constrained bilevel optimization. AISTATS 2023, arXiv:2211.07096, Algorithm 1.
    Differs from the paper: the whole Neumann sum instead of a random term of it; X is any set; h(x) = B x.
        Its variants that skip projections at random are not here.
    """

    lower_step_size: StepSize | None = None
    linear_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    num_lower_steps: int = static(default=10)
    num_linear_steps: int = static(default=10)
    assumptions = MappingProxyType({"convex": "g_yy is positive along the adjoint v (strong convexity)"})
    about = About(
        idea="linear equalities: projected lower steps, then a Neumann series on their tangent space",
        reference="Xiao et al. 2023",
        calls="1, T, Q + 1, 1",
        smoothing="none",
        stops="a noise ball, and a bias like (1 - eta mu)^(Q + 1)",
    )

    def __post_init__(self) -> None:
        """Accept numbers and schedules; transformations for x and y only."""
        step_sizes(self, "lower_step_size", "upper_step_size")
        schedules(self, "linear_step_size")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        rules = self.upper_step_size, self.lower_step_size, self.linear_step_size
        it = start(problem, key, *rules, num_lower_steps=self.num_lower_steps)
        inverse = jnp.linalg.pinv(_matrix(problem, it.x, it.y))
        return State(it.x, it.y, inverse, it.step_x, it.step_y, it.step_v, it.upper, it.lower)

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        x, inverse = state.x, state.inverse
        key_y, key_f, key_v, key_x = jax.random.split(key, 4)
        unravel = ravel_pytree(state.y)[1]

        def onto(y: PyTree) -> PyTree:
            return unravel(ravel_pytree(y)[0] - inverse @ oracles.coupling_values(problem, x, y)[1])

        def tangent(v: PyTree) -> PyTree:
            flat = ravel_pytree(v)[0]
            return unravel(flat - inverse @ (_matrix(problem, x, v) @ flat))

        y, step_y, lower = descend(
            problem, x, state.y, state.step_y, state.lower, key_y, self.num_lower_steps, project=onto
        )
        batch_f, upper = problem.upper_data.next(state.upper, key_f, x, y)
        fx, fy = oracles.upper_gradients(problem, x, y, batch_f)
        eta, step_v = state.step_v.size()
        v, lower = neumann(problem, x, y, tangent(fy), eta, lower, key_v, self.num_linear_steps, project=tangent)

        batch_g, lower = problem.lower_data.next(lower, key_x, x, y)
        Hv = oracles.hvp(problem, x, y, v, batch_g)
        rest = optax.tree.sub(fy, Hv)
        by_x, _ = oracles.coupling_pullback(problem, x, y)[1](inverse.T @ ravel_pytree(rest)[0])
        cross = oracles.cross(problem, x, y, v, batch_g)
        direction = jax.tree.map(lambda f, c, b: f - c - b, fx, cross, by_x)
        x, step_x = state.step_x(x, direction)
        flat = ravel_pytree(v)[0]
        convex = (flat @ ravel_pytree(Hv)[0] > 0) | ~jnp.any(flat != 0)
        info = Info(norm(direction), norm(oracles.coupling_residual(problem, state.x, y)), convex)
        return State(problem.x_set.project(x), y, inverse, step_x, step_y, step_v, upper, lower), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        T, Q = self.num_lower_steps, self.num_linear_steps
        return OracleCount(upper_gradients=1, lower_gradients=T, hvps=Q + 1, jvps=1)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if not isinstance(problem.lower, Minimize):
            return f"AiPOD needs a lower level Minimize(g); got {type(problem.lower).__name__}."
        coupling = problem.coupling
        inequalities = isinstance(coupling, LinearCoupling) and coupling.num_inequalities > 0
        if inequalities or isinstance(coupling, SmoothCoupling):
            got = type(coupling).__name__ + " with inequalities" * inequalities
            return f"AiPOD needs linear equalities and no inequality; got {got}."
        return refuse_constrained_lower(self, problem.without("coupling"))
