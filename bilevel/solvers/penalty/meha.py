"""MEHA: one loop of gradients on f/c plus g's distance to its Moreau envelope; g may be non-convex and non-smooth."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.diagnostics import BY_VALUE
from bilevel.parts.spectrum import smoothness
from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import OracleCount, Referee
from bilevel.solver import About, Solver, refuse_without_value
from bilevel.step import Scalar, Scheduled, Stepper, StepSize, growth, move, require_numbers, schedules, stepper
from bilevel.struct import static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of MEHA needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    w: PyTree
    """Near the proximal point of g(x, .) at y, shaped like y."""
    gamma: Array
    """The envelope's gamma, shape [], chosen at the start."""
    step_w: Stepper
    """The step rule of w, with its state."""
    step: Stepper
    """The step rule of x and of y, with its state."""
    penalty: Stepper
    """The step rule of c, with its state."""


class Info(NamedTuple):
    """What a step of MEHA shows."""

    direction_x: Array
    """Norm of the direction in x, shape []."""
    direction_y: Array
    """Norm of the direction in y, shape []."""
    proximal_gap: Array
    """|y - w| before y moves, shape [], which is 0 where y is stationary for g(x, .)."""


@struct(kw_only=True)
class MEHA(Solver):
    """Moreau envelope based Hessian-free algorithm, on all of the data, with c = c_k = penalty of this step:

        w <- prox_a(x, w - a (g_y(x, w) + (w - y)/gamma))
        x <- Proj_X(x - b (f_x(x, y)/c + g_x(x, y) - g_x(x, w)))
        y <- prox_b(x, y - b (f_y(x, y)/c + g_y(x, y) - (y - w)/gamma))          at the new x,

    one step each of descent on f/c + g - v, with the Moreau envelope v(x, y) = min_w g(x, w) + |w - y|^2/(2 gamma):
    v_x = g_x(x, w*), v_y = (y - w*)/gamma. g >= v, with equality where y is proximally stationary.

    g may have a non-smooth part r(x, .): g_y is then the gradient of g - r, and prox_t(x, z) the minimiser over Y of
    r(x, .) + |. - z|^2/(2 t). Without one prox_t is the projection on Y.

    Assumptions: f and g - r smooth, f bounded below: else f/c + g - v may fall without end while c is small, and x
    runs away for thousands of steps (indefinite quadratics do so). g(x, .) weakly convex with a constant below
    1/(2 gamma), convex with any gamma; no coupling. With c_k ~ k^p, p < 1/2, the KKT residual of the penalised problem
    falls like k^(p - 1/2).
    Cost per step: 2 upper gradients, 4 lower gradients.

    Args:
        lower_step_size: a > 0, a number or an optax schedule. Default: 1/(L_g + 1/gamma), L_g from
            `spectrum.smoothness`.
        upper_step_size: b > 0, likewise, for x and y. Default: 1/(L_f/c_0 + 2 L_g + 1/gamma).
        penalty: c_k > 0, a number or an optax schedule of the step. Default: (k + 1)^0.49.
        gamma: > 0, of the Moreau envelope. Default: 3/2 of the first lower step size, 1/(2 L_g) with both defaults.
        nonsmooth: r(x, y) -> []. Default: None, no such part.
        prox: (x, z, t) -> a point shaped like y. Default: None, the projection on Y.

    Reference: Liu, Liu, Yao, Zeng, Zhang. Moreau envelope for nonconvex bi-level optimization: a single-loop and
        Hessian-free solution strategy. ICML 2024, arXiv:2405.09927, Algorithm 1.
    Differs from the paper: one step size serves x and y. The directions were derived anew from f/c + g - v; that y
        moves at the new x is our reading. (x, w) is reported, not (x, y).
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    penalty: Scheduled | None = None
    gamma: Scalar | None = None
    nonsmooth: Callable | None = static(default=None)
    prox: Callable | None = static(default=None)
    full_batch = True
    about = About(
        idea="one loop: a penalty on g's distance to its Moreau envelope; g may be non-convex",
        reference="Liu et al. 2024",
        calls="2, 4, 0, 0",
        lower="weakly convex on a set, non-smooth with a prox",
        stops="a bias like 1/c stays, c ~ k^0.49; smaller with large `gamma`, where g is convex",
    )

    def __post_init__(self) -> None:
        """Accept numbers and schedules; gamma is a number."""
        schedules(self, "lower_step_size", "upper_step_size", "penalty")
        require_numbers(self, "gamma")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        penalty = stepper(self.penalty, growth(0.49), ())
        lower = upper = None
        if None in (self.lower_step_size, self.upper_step_size):
            L_f, L_g = smoothness(self._smooth(problem.on_full_data()), key, x, y)
            pull = 2 * L_g if self.gamma is None else 1 / jnp.asarray(self.gamma, L_g.dtype)
            c = jnp.asarray(penalty.size()[0], L_g.dtype)
            lower, upper = 1 / (L_g + pull), 1 / (L_f / c + 2 * L_g + pull)
        step_w = stepper(self.lower_step_size, lower, y)
        gamma = 1.5 * step_w.size()[0] if self.gamma is None else self.gamma
        gamma = jnp.asarray(gamma, jax.tree.leaves(y)[0].dtype)
        return State(x, y, y, gamma, step_w, stepper(self.upper_step_size, upper, y), penalty)

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        smooth, batch_f, batch_g = self._smooth(problem), problem.upper_data.full(), problem.lower_data.full()
        x, y, w = state.x, state.y, state.w
        prox = (lambda x, z, t: problem.y_set.project(z)) if self.prox is None else self.prox
        a, step_w = state.step_w.size()
        b, step = state.step.size()
        c, penalty = state.penalty.size()

        pull = jax.tree.map(lambda w, y: (w - y) / state.gamma, w, y)
        w = prox(x, move(w, optax.tree.add(oracles.residual(smooth, x, w, batch_g), pull), a), a)

        fx, _ = oracles.upper_gradients(problem, x, y, batch_f)
        gap_x, _ = oracles.value_gap_gradients(problem, x, y, w, batch_g)
        dx = jax.tree.map(lambda f, g: f / jnp.asarray(c, f.dtype) + g, fx, gap_x)
        x = problem.x_set.project(move(x, dx, b))

        _, fy = oracles.upper_gradients(problem, x, y, batch_f)
        gy = oracles.residual(smooth, x, y, batch_g)
        toward = lambda f, g, y, w: f / jnp.asarray(c, f.dtype) + g - (y - w) / state.gamma  # noqa: E731
        dy = jax.tree.map(toward, fy, gy, y, w)
        gap = norm(optax.tree.sub(y, w))
        y = prox(x, move(y, dy, b), b)
        return State(x, y, w, state.gamma, step_w, step, penalty), Info(norm(dx), norm(dy), gap)

    def _smooth(self, problem: BilevelProblem) -> BilevelProblem:
        """The problem with g - r as lower level."""
        if self.nonsmooth is None:
            return problem
        assert isinstance(problem.lower, Minimize)
        g, r = problem.lower.g, self.nonsmooth
        return dataclasses.replace(problem.plain(), lower=Minimize(lambda x, y, batch: g(x, y, batch) - r(x, y)))

    def output(self, problem: BilevelProblem, state: State) -> tuple[PyTree, PyTree]:
        """(x, w): g(x, w) is lower than g(x, y), which is off by O(1/c)."""
        return state.x, state.w

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=2, lower_gradients=4)

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return BY_VALUE if problem.constrained_lower else None

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_without_value(self, problem.without("y_set"))
