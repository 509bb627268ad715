"""LV-HBA: one loop of gradients on f/c + g minus its proximal Lagrangian value, with joint projections."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import constraints, oracles
from bilevel.backend.tree import norm
from bilevel.diagnostics import for_many_minimisers
from bilevel.lower import polyhedral
from bilevel.parts import lagrangian
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, Referee
from bilevel.solver import About, Solver
from bilevel.step import Scalar, Scheduled, Stepper, StepSize, growth, require_numbers, schedules, step_sizes, stepper
from bilevel.struct import struct

PyTree = Any


class State(NamedTuple):
    """What a step of LVHBA needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    w: PyTree
    """The saddle value's minimiser over Y, followed by one step at a time, shaped like y."""
    lam: Array
    """Its multipliers, shape [rows]."""
    z: Array
    """The multipliers that lam is pulled to, shape [rows]."""
    step_w: Stepper
    """The step rule of (w, lam), with its state."""
    step: Stepper
    """The step rule of (x, y), with its state."""
    step_z: Stepper
    """The step rule of z, with its state."""
    penalty: Stepper
    """The step rule of c, with its state."""


class Info(NamedTuple):
    """What a step of LVHBA shows."""

    direction_x: Array
    """|d_x|, shape []."""
    direction_y: Array
    """|d_y|, shape []."""
    proximal_gap: Array
    """|y - w| at the old y and the new w, shape []."""
    multiplier_gap: Array
    """|lam - z| at the new lam and the old z, shape []."""


@struct(kw_only=True)
class LVHBA(Solver):
    """Proximal Lagrangian value function based Hessian-free bilevel algorithm, on all of the data, with h(x, y) <= 0
    below and c = c_k = penalty of this step:

        w   <- Proj_Y(w - a (g_y(x, w) + h_y(x, w)'lam + (w - y)/gamma_1))
        lam <- [lam - a ((lam - z)/gamma_2 - h(x, w))]_+                        both from the old (w, lam)
        d_x = f_x/c + g_x(x, y) - g_x(x, w) - h_x(x, w)'lam
        d_y = f_y/c + g_y(x, y) - (y - w)/gamma_1
        (x, y) <- Proj_C((x, y) - b (d_x, d_y)),   C = {x in X, y in Y, h(x, y) <= 0}
        z   <- Proj_[0, r](z + e (lam - z)/gamma_2),

    one step of descent on f/c + g - v over C, with the saddle value

        v(x, y, z) = min over w in Y, max over lam >= 0 of
                     g(x, w) + lam'h(x, w) + |w - y|^2/(2 gamma_1) - |lam - z|^2/(2 gamma_2)  <= g(x, y) on C.

    Assumptions: f and g smooth, g(x, .) convex, C a polyhedron, on which one quadratic program projects. With
    c_k ~ k^p, p < 1/2, the KKT residual of the penalised problem falls like k^(p - 1/2).
    Cost per step: 1 upper gradient, 3 lower gradients. Gradients of h and projections are not counted.

    Args:
        lower_step_size: a > 0, for (w, lam). A number, an optax schedule or an optax transformation. Default: m/(L_g +
            1/gamma_1 + 1/gamma_2 + J)^2, with m = min(1/gamma_1, 1/gamma_2) and L_f, L_g, J here and below from
            `lagrangian.lipschitz`: the steps on (w, lam) contract.
        upper_step_size: b > 0, likewise, for (x, y). Default: min(a, 1/(L_f/c_0 + 2 L_g + 1/gamma_1)), with the default
            a.
        dual_step_size: e > 0, likewise, for z. Default: that of a.
        penalty: c_k > 0, a number or an optax schedule of the step. Default: (k + 1)^0.3.
        gamma_1: > 0, of the proximal term in w. Default: 1.
        gamma_2: > 0, of the proximal term in lam. Default: 1.
        bound: r > 0, of the multipliers z. Default: 1000.

    Reference: Yao, Yu, Zeng, Zhang. Constrained bi-level optimization: proximal Lagrangian value function approach and
        Hessian-free algorithm. ICLR 2024, arXiv:2401.16164, Algorithm 1.
    Differs from the paper: h is affine, h's equalities have lam and z of both signs; the directions were derived anew
        from f/c + g - v.
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
        idea="one loop, linear constraints: g against its proximal Lagrangian value",
        reference="Yao et al. 2024",
        calls="1, 3, 0, 0, and a joint projection",
        lower="convex, h affine, X and Y polyhedral",
        stops="a bias like 1/c stays, c ~ k^0.3; feasible",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations; penalty is a number or a schedule."""
        step_sizes(self, "lower_step_size", "upper_step_size", "dual_step_size")
        schedules(self, "penalty")
        require_numbers(self, "gamma_1", "gamma_2", "bound")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        z = lagrangian.zeros(problem, x, y)
        penalty = stepper(self.penalty, growth(0.3), ())
        lower = upper = None
        if None in (self.lower_step_size, self.upper_step_size, self.dual_step_size):
            L_f, L_g, J = lagrangian.lipschitz(problem.on_full_data(), key, x, y)
            sizes = penalty.size()[0], self.gamma_1, self.gamma_2
            c, g1, g2 = (jnp.asarray(value, L_g.dtype) for value in sizes)
            lower = jnp.minimum(1 / g1, 1 / g2) / (L_g + 1 / g1 + 1 / g2 + J) ** 2
            upper = jnp.minimum(lower, 1 / (L_f / c + 2 * L_g + 1 / g1))
        return State(
            x, y, y, z, z,
            step_w=stepper(self.lower_step_size, lower, (y, z)), step=stepper(self.upper_step_size, upper, (x, y)),
            step_z=stepper(self.dual_step_size, lower, z), penalty=penalty,
        )  # fmt: skip

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        x, y, z, batch_f, batch_g = state.x, state.y, state.z, problem.upper_data.full(), problem.lower_data.full()
        c, penalty = state.penalty.size()
        c, g1, g2 = (jnp.asarray(value, z.dtype) for value in (c, self.gamma_1, self.gamma_2))

        h, pull = oracles.coupling_pullback(problem, x, state.w)
        pulled = lambda g, h, w, y: g + h + (w - y) / jnp.asarray(g1, w.dtype)  # noqa: E731
        dw = jax.tree.map(pulled, oracles.residual(problem, x, state.w, batch_g), pull(state.lam)[1], state.w, y)
        (w, lam), step_w = state.step_w((state.w, state.lam), (dw, (state.lam - z) / g2 - h))
        w, lam = problem.y_set.project(w), lagrangian.clip(problem, lam)

        fx, fy = oracles.upper_gradients(problem, x, y, batch_f)
        gap_x, gy = oracles.value_gap_gradients(problem, x, y, w, batch_g)
        lam_x, _ = oracles.coupling_pullback(problem, x, w)[1](lam)
        dx = jax.tree.map(lambda f, g, h: f / jnp.asarray(c, f.dtype) + g - h, fx, gap_x, lam_x)
        along_y = lambda f, g, y, w: f / jnp.asarray(c, f.dtype) + g - (y - w) / jnp.asarray(g1, f.dtype)  # noqa: E731
        dy = jax.tree.map(along_y, fy, gy, y, w)
        gap = norm(optax.tree.sub(y, w))
        moved, step = state.step((x, y), (dx, dy))
        if problem.coupling is None:  # the set is a product, and no dense matrix is needed
            x, y = problem.x_set.project(moved[0]), problem.y_set.project(moved[1])
        else:
            flat, unravel = ravel_pytree(moved)
            rows = constraints.joint_rows(problem, x, y)
            x, y = unravel(flat + polyhedral.projected_step(rows, flat, jnp.zeros_like(flat)))

        info = Info(norm(dx), norm(dy), gap, norm(lam - z))
        z, step_z = state.step_z(z, (z - lam) / g2)
        z = lagrangian.clip(problem, z, self.bound)
        return State(x, y, w, lam, z, step_w, step, step_z, penalty), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=3)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return for_many_minimisers(problem)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        reason = constraints.refuse_joint(problem)
        return None if reason is None else f"LVHBA projects on a polyhedron of (x, y): {reason}."
