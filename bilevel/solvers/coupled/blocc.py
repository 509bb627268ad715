"""BLOCC: a penalty on g's value gap under coupled constraints, both lower problems solved by primal-dual steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.diagnostics import for_many_minimisers
from bilevel.parts import lagrangian
from bilevel.parts.domain import project_upper
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, Referee
from bilevel.solver import About, Solver, refuse_fixed_point
from bilevel.step import Scalar, Stepper, StepSize, require_numbers, step_sizes, stepper
from bilevel.struct import static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of BLOCC needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The minimiser of f/c + g over Y under h <= 0."""
    m: Array
    """The multipliers there, shape [rows]."""
    z: PyTree
    """The minimiser of g over Y under h <= 0, shaped like y."""
    n: Array
    """The multipliers there, shape [rows]."""
    size: Array
    """The primal step size s of both, shape []."""
    dual_size: Array
    """The dual step size r of both, shape []."""
    step_x: Stepper
    """The step rule of x, with its state."""


class Info(NamedTuple):
    """What a step of BLOCC shows."""

    direction: Array
    """Norm of the direction in x, shape []."""
    violation: Array
    """Norm of the coupling's violation at the old x and the new y, shape []."""


@struct(kw_only=True)
class BLOCC(Solver):
    """Experimental: the inner algorithm is from memory; the text of the paper was not at hand.

    Bilevel optimisation with coupled constraints, on all of the data, with h(x, y) <= 0 below and c = penalty:

        (z, n) = argmax over n >= 0, argmin over z in Y of g(x, z) + n'h(x, z)
        (y, m) = argmax over m >= 0, argmin over y in Y of f(x, y)/c + g(x, y) + m'h(x, y)
        x <- Proj_X(x - e (f_x(x, y) + c (g_x(x, y) + h_x(x, y)'m - g_x(x, z) - h_x(x, z)'n))),

    both by T = num_lower_steps dual steps of `lagrangian.max_min` from the last point. It is gradient descent on
    min_y {f + c (g - v)} under h <= 0, v(x) the least value of g there, without projections on {h <= 0}.

    Assumptions: f and g smooth, g(x, .) and f/c + g strongly convex, h convex in y with linearly independent active
    gradients. The penalised value is within O(1/c) of F.
    Cost per step: with K = T num_primal_steps, K + 1 upper gradients and 2 K + 2 lower gradients. Gradients of h, one
        for each of g, are not counted.

    Args:
        lower_step_size: s > 0 of both max-min problems, a number. Default: 1/(L_f/c + L_g), by `lagrangian.lipschitz`.
        dual_step_size: r > 0, a number. Default: 1/(s J^2), J the norm of h's derivative.
        upper_step_size: e > 0. A number, an optax schedule or an optax transformation. Default: 1/(L_f + c L_g).
        penalty: c > 0. Default: 10.
        num_lower_steps: T >= 1, dual steps. Default: 20.
        num_primal_steps: >= 1, steps of y for each dual step; with more than one the dual steps are accelerated.
            Default: 1, enough where h is affine in y.

    Reference: Jiang, Xiao, Tenorio, Real-Rojas, Marques, Chen. A primal-dual-assisted penalty approach to bilevel
        optimization with coupled constraints. NeurIPS 2024, arXiv:2406.10148, Algorithms 1 and 2.
    Differs from the paper: the second problem is divided by c, m with it, so that both share their steps. Equalities
        are allowed; their multipliers are free. Algorithm 2 is from memory, the paper's text was not at hand: momentum
        (t - 1)/(t + 2) and the dual step from the extrapolated multipliers agree with a public implementation, whose
        inner loops run to a tolerance and which starts (y, m) from (z, n); here both take T steps from their last
        points. The default step sizes are derived here.
    """

    lower_step_size: Scalar | None = None
    dual_step_size: Scalar | None = None
    upper_step_size: StepSize | None = None
    penalty: Scalar = 10.0
    num_lower_steps: int = static(default=20)
    num_primal_steps: int = static(default=1)
    full_batch = True
    about = About(
        idea="a penalty on g's value gap, both lower problems by primal-dual steps",
        reference="Jiang et al. 2024",
        calls="T + 1, 2 T + 2, 0, 0",
        lower="strongly convex, h with independent active gradients",
        stops="a bias like 1/lam stays",
    )
    experimental = "the inner algorithm is from memory; the text of the paper was not at hand"

    def __post_init__(self) -> None:
        """Accept numbers; for x schedules and transformations as well."""
        step_sizes(self, "upper_step_size")
        require_numbers(self, "lower_step_size", "dual_step_size", "penalty")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        x = project_upper(problem, x, y)
        m = lagrangian.zeros(problem, x, y)
        c, full = jnp.asarray(self.penalty, m.dtype), problem.on_full_data()
        size, dual_size = lagrangian.sizes(full, key, x, y, self.lower_step_size, self.dual_step_size, 1 / c)
        upper_size = None
        if self.upper_step_size is None:
            L_f, L_g, _ = lagrangian.lipschitz(full, key, x, y)
            upper_size = 1 / (L_f + c * L_g)
        return State(x, y, m, y, m, size, dual_size, stepper(self.upper_step_size, upper_size, x))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        x, batch_f, batch_g = state.x, problem.upper_data.full(), problem.lower_data.full()
        c = jnp.asarray(self.penalty, state.m.dtype)
        sizes = state.size, state.dual_size, self.num_lower_steps, self.num_primal_steps

        def lower(z: PyTree) -> PyTree:
            return oracles.residual(problem, x, z, batch_g)

        def both(y: PyTree) -> PyTree:
            return oracles.weighted_value_and_gradient(problem, x, y, 1 / c, 1.0, batch_f, batch_g)[1]

        z, n = lagrangian.max_min(problem, x, state.z, state.n, lower, *sizes)
        y, m = lagrangian.max_min(problem, x, state.y, state.m, both, *sizes)

        fx, _ = oracles.upper_gradients(problem, x, y, batch_f)
        gap, _ = oracles.value_gap_gradients(problem, x, y, z, batch_g)
        _, pull_y = oracles.coupling_pullback(problem, x, y)
        _, pull_z = oracles.coupling_pullback(problem, x, z)
        total = lambda f, q, hm, hn: f + jnp.asarray(c, f.dtype) * (q + hm - hn)  # noqa: E731
        direction = jax.tree.map(total, fx, gap, pull_y(m)[0], pull_z(n)[0])
        x, step_x = state.step_x(x, direction)
        info = Info(norm(direction), norm(oracles.coupling_residual(problem, state.x, y)))
        return State(project_upper(problem, x, y), y, m, z, n, state.size, state.dual_size, step_x), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        T = self.num_lower_steps * self.num_primal_steps
        return OracleCount(upper_gradients=T + 1, lower_gradients=2 * T + 2)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return for_many_minimisers(problem)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_fixed_point(self, problem)
