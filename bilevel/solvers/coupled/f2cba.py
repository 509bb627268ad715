"""F2CBA: first-order hypergradients under linear constraints, from multipliers and a penalty on the active rows."""

from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.diagnostics import for_many_minimisers
from bilevel.parts import lagrangian, tracking
from bilevel.parts.descent import barzilai_borwein
from bilevel.parts.domain import project_upper
from bilevel.problem import BilevelProblem, LinearCoupling, SmoothCoupling
from bilevel.record import OracleCount, Referee
from bilevel.solver import About, Solver, refuse_constrained_lower, refuse_fixed_point
from bilevel.step import Scalar, Stepper, StepSize, move, require_numbers, step_sizes, stepper
from bilevel.struct import static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of F2CBA needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The minimiser with f."""
    m: Array
    """The multipliers there, shape [rows]."""
    z: PyTree
    """The minimiser without f, shaped like y."""
    n: Array
    """The multipliers there, shape [rows]."""
    move: PyTree
    """The next step u of x, shaped like x; 0 without a radius."""
    size: Array
    """The primal step size of `lagrangian.max_min`, shape []."""
    dual_size: Array
    """The dual one, shape []."""
    step_x: Stepper
    """The step rule of x, with its state."""


class Info(NamedTuple):
    """What a step of F2CBA shows."""

    direction: Array
    """|G|, shape []: the norm of the hypergradient's estimate."""
    active: Array
    """How many rows are active, shape []."""
    violation: Array
    """Norm of the coupling's violation at y, shape []."""
    independent: Array
    """Whether the active rows are linearly independent, shape []."""
    margin: Array
    """The least over the inequalities of the larger of multiplier and slack at z, shape []."""


@struct(kw_only=True)
class F2CBA(Solver):
    """Experimental: its formulas are from memory; the text of the paper was not at hand.

    Fully first-order constrained bilevel algorithm, on all of the data. With h(x, y) = A y + B x - b, d = alpha^2,

        (z, n) = argmax over n, argmin over z of g(x, z) + n'h(x, z),         n >= 0 for inequalities

    by T = num_lower_steps dual steps of `lagrangian.max_min`. With inequalities, I the rows where n > 0 and equalities,

        y = argmin of d f(x, y) + g(x, y) + n'h(x, y) + |h_I(x, y)|^2/(2 d),         `num_penalty_steps` steps
        G = f_x(x, y) + (g_x(x, y) - g_x(x, z))/d + B_I'h_I(x, y)/d^2,

    and with equalities alone

        (y, m) = argmax over m, argmin over y of d f(x, y) + g(x, y) + m'h(x, y)
        G = f_x(x, y) + (g_x(x, y) + B'm - g_x(x, z) - B'n)/d.

    G is within O(alpha) of grad F, without second derivatives. Then x <- Proj_X(x - c G); with a `radius` D instead,
    for Goldstein-stationary points of an F with kinks,

        G at x + s u,  s ~ U[0, 1],    x <- Proj_X(x + u),    u <- (u - c G) cut to length D.

    Assumptions: f and g smooth, g(x, .) strongly convex, linearly independent active rows with multipliers away from 0.
    Cost per step: with K = num_penalty_steps, K + 2 upper gradients and T + K + 3 lower gradients; with equalities
        alone T + 1 and 2 T + 2.

    Args:
        lower_step_size: s > 0 of `lagrangian.max_min`, a number. Default: 1/(d L_f + L_g), by `lagrangian.lipschitz`.
        dual_step_size: > 0, a number. Default: 1/(s J^2), likewise.
        upper_step_size: c > 0. A number, an optax schedule or an optax transformation. With a radius it is a number, of
            order D/|G|. Default: 1/(L_f + L_g/d).
        alpha: > 0, small: errors of z are divided by d = alpha^2. Default: 0.1.
        radius: D > 0, the longest step of x. Default: None, for plain steps.
        num_lower_steps: T >= 1, dual steps. Default: 20.
        num_penalty_steps: K >= 1, steps in y where there are inequalities. Default: 30.

    Reference: Kornowski, Padmanabhan, Wang, Zhang, Sra. First-order methods for linearly constrained bilevel
        optimization. NeurIPS 2024, arXiv:2406.12771: the oracles of its sections on equalities and on inequalities with
        the optimal dual, and its nonsmooth method with an inexact gradient oracle.
    Differs from the paper: the solver's name is ours; the formulas are from memory, the text was not at hand. The
        multipliers, which the paper takes as given, come from the warm-started dual steps; y takes projected gradient
        steps of Barzilai and Borwein's length. The points x are reported, not averages of blocks.
    """

    lower_step_size: Scalar | None = None
    dual_step_size: Scalar | None = None
    upper_step_size: StepSize | None = None
    alpha: Scalar = 0.1
    radius: Scalar | None = None
    num_lower_steps: int = static(default=20)
    num_penalty_steps: int = static(default=30)
    full_batch = True
    assumptions = MappingProxyType({"independent": tracking.ASSUMPTIONS["independent"]})
    about = About(
        idea="linear constraints: multipliers and a penalty on the active rows",
        reference="Kornowski et al. 2024",
        calls="K + 2, T + K + 3, 0, 0; equalities alone T + 1, 2 T + 2",
        lower="strongly convex, h affine, no set Y",
        stops="a bias like `alpha` stays",
    )
    experimental = "its formulas are from memory; the text of the paper was not at hand"

    def __post_init__(self) -> None:
        """Accept numbers; for x schedules and transformations as well, unless there is a radius."""
        step_sizes(self, "upper_step_size")
        require_numbers(self, "lower_step_size", "dual_step_size", "alpha", "radius")
        if self.radius is not None:
            require_numbers(self, "upper_step_size")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        m = lagrangian.zeros(problem, x, y)
        full = problem.on_full_data()
        size, dual_size = lagrangian.sizes(
            full, key, x, y, self.lower_step_size, self.dual_step_size, jnp.asarray(self.alpha, m.dtype) ** 2
        )
        default = None
        if self.upper_step_size is None:
            L_f, L_g, _ = lagrangian.lipschitz(full, key, x, y)
            default = 1 / (L_f + L_g / jnp.asarray(self.alpha, m.dtype) ** 2)
        still = optax.tree.zeros_like(x)
        return State(x, y, m, y, m, still, size, dual_size, stepper(self.upper_step_size, default, x))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        x = state.x
        if self.radius is not None:
            share = jax.random.uniform(key, (), state.m.dtype)
            x = move(x, state.move, -share)
        batch_f, batch_g = problem.upper_data.full(), problem.lower_data.full()
        delta = jnp.asarray(self.alpha, state.m.dtype) ** 2
        sizes = state.size, state.dual_size, self.num_lower_steps

        z, n = lagrangian.max_min(
            problem, x, state.z, state.n, lambda z: oracles.residual(problem, x, z, batch_g), *sizes
        )
        held = lagrangian.active(problem, n)

        def weighted(y: PyTree) -> tuple[Array, PyTree]:
            return oracles.weighted_value_and_gradient(problem, x, y, delta, 1.0, batch_f, batch_g)

        def penalised(y: PyTree) -> tuple[Array, PyTree]:
            value, gradient = weighted(y)
            h, pull = oracles.coupling_pullback(problem, x, y)
            off = jnp.where(held, h, 0)
            return value + n @ h + off @ off / (2 * delta), optax.tree.add(gradient, pull(n + off / delta)[1])

        if _equalities_alone(problem):
            y, m = lagrangian.max_min(problem, x, state.y, state.m, lambda y: weighted(y)[1], *sizes)
        else:
            y, m = barzilai_borwein(problem.y_set, penalised, state.y, self.num_penalty_steps)[0], n
            m = n + jnp.where(held, oracles.coupling_pullback(problem, x, y)[0], 0) / delta

        fx, _ = oracles.upper_gradients(problem, x, y, batch_f)
        gap, _ = oracles.value_gap_gradients(problem, x, y, z, batch_g)
        by_rows, _ = oracles.coupling_pullback(problem, x, y)[1]((m - n) / delta)
        total = lambda f, q, r: f + q / jnp.asarray(delta, f.dtype) + r  # noqa: E731
        direction = jax.tree.map(total, fx, gap, by_rows)
        slack = -oracles.coupling_values(problem, x, z)[0]
        info = Info(
            norm(direction), jnp.sum(held), norm(oracles.coupling_residual(problem, x, y)),
            lagrangian.independent(problem, held, x, y), jnp.min(jnp.maximum(n[: len(slack)], slack), initial=jnp.inf),
        )  # fmt: skip

        if self.radius is None:
            x, step_x = state.step_x(x, direction)
            ahead = state.move
        else:
            size, step_x = state.step_x.size()
            x, ahead = move(state.x, state.move, -1.0), move(state.move, direction, size)
            length, radius = norm(ahead), jnp.asarray(self.radius, share.dtype)
            ahead = jax.tree.map(lambda d: d * jnp.minimum(1, radius / jnp.where(length > 0, length, 1)), ahead)
        return State(project_upper(problem, x, y), y, m, z, n, ahead, state.size, state.dual_size, step_x), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        T, K = self.num_lower_steps, self.num_penalty_steps
        if _equalities_alone(problem):
            return OracleCount(upper_gradients=T + 1, lower_gradients=2 * T + 2)
        return OracleCount(upper_gradients=K + 2, lower_gradients=T + K + 3)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return for_many_minimisers(problem)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if isinstance(problem.coupling, SmoothCoupling):
            return "F2CBA needs linear constraints; got SmoothCoupling. Write them as LinearCoupling."
        uncoupled = problem.without("coupling")
        return refuse_fixed_point(self, problem) or refuse_constrained_lower(self, uncoupled)


def _equalities_alone(problem: BilevelProblem) -> bool:
    coupling = problem.coupling
    return isinstance(coupling, LinearCoupling) and coupling.num_inequalities == 0
