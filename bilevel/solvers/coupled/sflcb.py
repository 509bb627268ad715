"""SFLCB: one loop of gradients on an augmented Lagrangian of both lower problems, linear constraints."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.diagnostics import for_many_minimisers
from bilevel.parts import lagrangian
from bilevel.parts.domain import project_upper
from bilevel.problem import BilevelProblem, SmoothCoupling
from bilevel.record import OracleCount, Referee
from bilevel.solver import About, Solver, refuse_constrained_lower, refuse_fixed_point
from bilevel.step import Scalar, Stepper, StepSize, require_numbers, step_sizes, stepper
from bilevel.struct import struct

PyTree = Any


class State(NamedTuple):
    """What a step of SFLCB needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The minimiser of delta f + g."""
    z: PyTree
    """The minimiser of g, shaped like y."""
    u: Array
    """The multipliers at y, shape [rows]."""
    v: Array
    """The multipliers at z, shape [rows]."""
    alpha: Array
    """The slacks at y, shape [rows]."""
    beta: Array
    """The slacks at z, shape [rows]."""
    step_x: Stepper
    """The step rule of x, with its state."""
    step_y: Stepper
    """The step rule of (y, alpha), with its state."""
    step_z: Stepper
    """The step rule of (z, beta), with its state."""
    step_u: Stepper
    """The step rule of (u, v), with its state."""


class Info(NamedTuple):
    """What a step of SFLCB shows."""

    direction: Array
    """|K_x|/delta, shape [], in the units of grad F."""
    gap_y: Array
    """|h(x, y) - alpha| before the step, shape []."""
    gap_z: Array
    """|h(x, z) - beta| likewise, shape []."""


@struct(kw_only=True)
class SFLCB(Solver):
    """Single-loop first-order algorithm for linearly constrained bilevel optimisation, on all of the data. With
    h(x, y) <= 0 below, slacks alpha, beta <= 0, and

        K = delta f(x, y) + g(x, y) + u'(h(x, y) - alpha) + rho/2 |h(x, y) - alpha|^2
                          - g(x, z) - v'(h(x, z) - beta)  - rho/2 |h(x, z) - beta|^2,

    the multipliers first, then all others at once,

        u <- u + d (h(x, y) - alpha),   v <- v + d (h(x, z) - beta)
        x <- Proj_X(x - c K_x)
        y <- y - a K_y,   alpha <- min(0, alpha - a K_alpha)
        z <- z + a K_z,   beta <- min(0, beta + a K_beta).

    y and z are the minimisers of delta f + g and of g under h <= 0, and K/delta approaches F as delta falls.

    Assumptions: f and g smooth, g(x, .) strongly convex, h affine with full row rank in y, delta L_f < mu_g.
    Cost per step: 1 upper gradient, 3 lower gradients.

    Args:
        lower_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: 1/(delta L_f + L_g +
            rho (J^2 + 1)), by `lagrangian.lipschitz`.
        dual_step_size: d > 0, likewise. Default: rho.
        upper_step_size: c > 0, likewise. Default: half of the default a.
        delta: > 0, the weight of f. Default: 0.1.
        rho: > 0, the weight of the squared residuals. Default: 1.

    Reference: Shen, Zhang, Huang, Shen. A single-loop first-order algorithm for linearly constrained bilevel
        optimization. NeurIPS 2025, arXiv:2510.24710, Algorithm 1.
    Differs from the paper: one rho and one step for both halves; equalities are allowed, their slacks are 0. That the
        multipliers move first is our reading.
    """

    lower_step_size: StepSize | None = None
    dual_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    delta: Scalar = 0.1
    rho: Scalar = 1.0
    full_batch = True
    about = About(
        idea="one loop, linear constraints: augmented Lagrangians of both lower problems",
        reference="Shen et al. 2025",
        calls="1, 3, 0, 0",
        lower="strongly convex, h affine, no set Y",
        stops="a bias like `delta` stays",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations; delta and rho are numbers."""
        step_sizes(self, "lower_step_size", "dual_step_size", "upper_step_size")
        require_numbers(self, "delta", "rho")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        x = project_upper(problem, x, y)
        m = lagrangian.zeros(problem, x, y)
        slack = lagrangian.clip_slacks(problem, jnp.concatenate(oracles.coupling_values(problem, x, y)))
        lower = upper = None
        if None in (self.lower_step_size, self.upper_step_size):
            L_f, L_g, J = lagrangian.lipschitz(problem.on_full_data(), key, x, y)
            delta, rho = (jnp.asarray(number, L_g.dtype) for number in (self.delta, self.rho))
            lower = 1 / (delta * L_f + L_g + rho * (J**2 + 1))
            upper = lower / 2
        return State(
            x, y, y, m, m, slack, slack,
            step_x=stepper(self.upper_step_size, upper, x),
            step_y=stepper(self.lower_step_size, lower, (y, m)), step_z=stepper(self.lower_step_size, lower, (y, m)),
            step_u=stepper(self.dual_step_size, self.rho, (m, m)),
        )  # fmt: skip

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        x, y, z, batch_f, batch_g = state.x, state.y, state.z, problem.upper_data.full(), problem.lower_data.full()
        delta, rho = (jnp.asarray(number, state.u.dtype) for number in (self.delta, self.rho))
        h_y, pull_y = oracles.coupling_pullback(problem, x, y)
        h_z, pull_z = oracles.coupling_pullback(problem, x, z)
        off_y, off_z = h_y - state.alpha, h_z - state.beta
        (u, v), step_u = state.step_u((state.u, state.v), (-off_y, -off_z))

        p, q = u + rho * off_y, v + rho * off_z
        fx, fy = oracles.upper_gradients(problem, x, y, batch_f)
        gap_x, gy = oracles.value_gap_gradients(problem, x, y, z, batch_g)
        gz = oracles.residual(problem, x, z, batch_g)
        (p_x, p_y), (q_x, q_z) = pull_y(p), pull_z(q)
        dx = jax.tree.map(lambda f, g, p, q: jnp.asarray(delta, f.dtype) * f + g + p - q, fx, gap_x, p_x, q_x)
        dy = jax.tree.map(lambda f, g, p: jnp.asarray(delta, f.dtype) * f + g + p, fy, gy, p_y)
        dz = optax.tree.add(gz, q_z)
        x, step_x = state.step_x(x, dx)
        (y, alpha), step_y = state.step_y((y, state.alpha), (dy, -p))
        (z, beta), step_z = state.step_z((z, state.beta), (dz, -q))
        alpha, beta = (lagrangian.clip_slacks(problem, part) for part in (alpha, beta))
        x = project_upper(problem, x, y)
        state = State(x, y, z, u, v, alpha, beta, step_x, step_y, step_z, step_u)
        return state, Info(norm(dx) / delta, norm(off_y), norm(off_z))

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=3)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return for_many_minimisers(problem)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if isinstance(problem.coupling, SmoothCoupling):
            return "SFLCB needs linear constraints; got SmoothCoupling. Write them as LinearCoupling."
        uncoupled = problem.without("coupling")
        return refuse_fixed_point(self, problem) or refuse_constrained_lower(self, uncoupled)
