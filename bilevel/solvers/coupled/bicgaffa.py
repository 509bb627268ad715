"""BiC-GAFFA: one loop of gradients on f/c plus a regularised gap of a convex, constrained lower level."""

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
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, Referee
from bilevel.solver import About, Solver, refuse_fixed_point
from bilevel.step import Scalar, Scheduled, Stepper, StepSize, growth, require_numbers, schedules, step_sizes, stepper
from bilevel.struct import struct

PyTree = Any


class State(NamedTuple):
    """What a step of BiCGAFFA needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    w: PyTree
    """The gap function's maximiser over Y, followed by one step at a time, shaped like y."""
    z: Array
    """Multipliers, shape [rows]."""
    step_w: Stepper
    """The step rule of w, with its state."""
    step: Stepper
    """The step rule of (x, y), with its state."""
    step_z: Stepper
    """The step rule of z, with its state."""
    penalty: Stepper
    """The step rule of c, with its state."""


class Info(NamedTuple):
    """What a step of BiCGAFFA shows."""

    direction_x: Array
    """|d_x|, shape []."""
    direction_y: Array
    """|d_y|, shape []."""
    proximal_gap: Array
    """|y - w| at the old y and the new w, shape []."""
    violation: Array
    """Norm of the coupling's violation at the old (x, y), shape []."""


@struct(kw_only=True)
class BiCGAFFA(Solver):
    """Bilevel constrained gap function based first-order algorithm, on all of the data, with h(x, y) <= 0 below and
    c = c_k = penalty of this step:

        w <- Proj_Y(w - a (g_y(x, w) + h_y(x, w)'z + (w - y)/gamma_1))
        lam = [z + gamma_2 h(x, y)]_+
        d_x = f_x/c + g_x(x, y) + h_x(x, y)'lam - g_x(x, w) - h_x(x, w)'z
        d_y = f_y/c + g_y(x, y) + h_y(x, y)'lam - (y - w)/gamma_1
        d_z = -(z - lam)/gamma_2 - h(x, w)
        (x, y) <- Proj_{X x Y}((x, y) - b (d_x, d_y)),   z <- Proj_[0, r](z - e d_z),

    one step of descent on f/c + G with the doubly regularised gap function

        G(x, y, z) = max over w in Y, lam >= 0 of  g(x, y) + lam'h(x, y) - |lam - z|^2/(2 gamma_2)
                                                 - g(x, w) - z'h(x, w) - |w - y|^2/(2 gamma_1)  >= 0,

    which is 0 where (y, z) solves the lower level's Karush-Kuhn-Tucker system. No projection on {h <= 0}: y
    violates h by O(1/c).

    Assumptions: f, g, h smooth, g and h convex in y, their multipliers bounded by r. With c_k ~ k^p, p < 1/2, the KKT
    residual of the penalised problem falls like k^(p - 1/2).
    Cost per step: 1 upper gradient, 3 lower gradients. As many gradients of h are not counted.

    Args:
        lower_step_size: a > 0, for w. A number, an optax schedule or an optax transformation. Default: 1/(L_g +
            1/gamma_1), with L_f, L_g, J here and below from `lagrangian.lipschitz`.
        upper_step_size: b > 0, likewise, for (x, y) together. Default: 1/(L_f/c_0 + 2 L_g + 1/gamma_1 + 2 gamma_2 J^2).
        dual_step_size: e > 0, likewise, for z. Default: 1/(1/gamma_2 + gamma_1 J^2).
        penalty: c_k > 0, a number or an optax schedule of the step. Default: (k + 1)^0.3.
        gamma_1: > 0, of the proximal term in w. Default: 1.
        gamma_2: > 0, of the proximal term in lam. Default: 1.
        bound: r > 0, of the multipliers z. Default: 1000.

    Reference: Yao, Yin, Zeng, Zhang. Overcoming lower-level constraints in bilevel optimization: a novel approach with
        regularized gap functions. ICLR 2025, arXiv:2406.01992, Algorithm 1.
    Differs from the paper: the directions were derived anew from f/c + G; all use the new w and the old x, y, z, which
        is our reading. Equalities are allowed: their lam and z have both signs.
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    dual_step_size: StepSize | None = None
    penalty: Scheduled | None = None
    gamma_1: Scalar = 1.0
    gamma_2: Scalar = 1.0
    bound: Scalar = 1e3
    full_batch = True
    about = About(
        idea="one loop: a regularised gap of the lower level's KKT system",
        reference="Yao et al. 2025",
        calls="1, 3, 0, 0",
        lower="convex, may have many minimisers",
        stops="a bias and a violation of h like 1/c stay, c ~ k^0.3",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations; penalty is a number or a schedule."""
        step_sizes(self, "lower_step_size", "upper_step_size", "dual_step_size")
        schedules(self, "penalty")
        require_numbers(self, "gamma_1", "gamma_2", "bound")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        x = project_upper(problem, x, y)
        z = lagrangian.zeros(problem, x, y)
        penalty = stepper(self.penalty, growth(0.3), ())
        lower = upper = dual = None
        if None in (self.lower_step_size, self.upper_step_size, self.dual_step_size):
            L_f, L_g, J = lagrangian.lipschitz(problem.on_full_data(), key, x, y)
            c, g1, g2 = (jnp.asarray(value, L_g.dtype) for value in (penalty.size()[0], self.gamma_1, self.gamma_2))
            lower, dual = 1 / (L_g + 1 / g1), 1 / (1 / g2 + g1 * J**2)
            upper = 1 / (L_f / c + 2 * L_g + 1 / g1 + 2 * g2 * J**2)
        return State(
            x, y, y, z,
            step_w=stepper(self.lower_step_size, lower, y), step=stepper(self.upper_step_size, upper, (x, y)),
            step_z=stepper(self.dual_step_size, dual, z), penalty=penalty,
        )  # fmt: skip

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        x, y, z, batch_f, batch_g = state.x, state.y, state.z, problem.upper_data.full(), problem.lower_data.full()
        c, penalty = state.penalty.size()
        c, g1, g2 = (jnp.asarray(value, z.dtype) for value in (c, self.gamma_1, self.gamma_2))

        _, pull_w = oracles.coupling_pullback(problem, x, state.w)
        pulled = lambda g, h, w, y: g + h + (w - y) / jnp.asarray(g1, w.dtype)  # noqa: E731
        dw = jax.tree.map(pulled, oracles.residual(problem, x, state.w, batch_g), pull_w(z)[1], state.w, y)
        w, step_w = state.step_w(state.w, dw)
        w = problem.y_set.project(w)

        h_y, pull_y = oracles.coupling_pullback(problem, x, y)
        h_w, pull_w = oracles.coupling_pullback(problem, x, w)
        lam = lagrangian.clip(problem, z + g2 * h_y)
        fx, fy = oracles.upper_gradients(problem, x, y, batch_f)
        gap_x, gy = oracles.value_gap_gradients(problem, x, y, w, batch_g)
        lam_x, lam_y = pull_y(lam)
        along_x = lambda f, g, hy, hw: f / jnp.asarray(c, f.dtype) + g + hy - hw  # noqa: E731
        along_y = lambda f, g, h, y, w: f / jnp.asarray(c, f.dtype) + g + h - (y - w) / jnp.asarray(g1, f.dtype)  # noqa: E731
        dx = jax.tree.map(along_x, fx, gap_x, lam_x, pull_w(z)[0])
        dy = jax.tree.map(along_y, fy, gy, lam_y, y, w)
        (x, y), step = state.step((x, y), (dx, dy))
        z, step_z = state.step_z(z, (lam - z) / g2 - h_w)
        z = lagrangian.clip(problem, z, self.bound)

        info = Info(
            norm(dx), norm(dy), norm(optax.tree.sub(state.y, w)),
            norm(oracles.coupling_residual(problem, state.x, state.y)),
        )  # fmt: skip
        return State(project_upper(problem, x, y), problem.y_set.project(y), w, z, step_w, step, step_z, penalty), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=3)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return for_many_minimisers(problem)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_fixed_point(self, problem)
