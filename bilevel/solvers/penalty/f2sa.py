"""F2SA and Prox-F2SA: a fully first-order hypergradient from two lower iterates and a growing multiplier."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.parts.spectrum import smoothness
from bilevel.parts.tuning import default_steps
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver, refuse_without_value
from bilevel.step import Scheduled, Stepper, StepSize, schedules, step_sizes, stepper
from bilevel.struct import static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of F2SA needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate with f: near the minimiser of f/lam + g."""
    z: PyTree
    """The lower iterate without f: near the minimiser of g."""
    step_x: Stepper
    """The step rule of x, with its state."""
    step_y: Stepper
    """The step rule of y, with its state."""
    step_z: Stepper
    """The step rule of z, with its state."""
    penalty: Stepper
    """The step rule of lam, with its state."""
    upper: PyTree
    """The state of the upper source."""
    lower: PyTree
    """The state of the lower source."""


class Info(NamedTuple):
    """What a step of F2SA shows."""

    direction: Array
    """|f_x + lam (g_x(x, y) - g_x(x, z))|, shape []: the norm of the direction in x."""
    penalty: Array
    """The multiplier lam of this step, shape []."""


def _growth(k: Array) -> Array:
    """lam_k = 10 + k."""
    return 10.0 + k


def _slow_growth(k: Array) -> Array:
    """1/sigma_k = 10 (k + 1)^(1/3)."""
    return 10.0 * (k + 1.0) ** (1 / 3)


@struct(kw_only=True)
class F2SA(Solver):
    """F2SA: with fresh batches D of f and B of g wherever they are named, and lam = penalty of this step,

        z <- z - a g_y(x, z; B),   y <- y - a (f_y(x, y; D)/lam + g_y(x, y; B))         T = num_lower_steps times
        x <- Proj_X(x - c (f_x(x, y; D) + lam (g_x(x, y; B) - g_x(x, z; B)))).

    The direction in x is the gradient of min_y [f + lam g] - lam min_y g, which differs from grad F by O(1/lam), so
    that a constant penalty leaves that bias and a growing one none.

    Assumptions: g strongly convex in y, f and g smooth with Lipschitz second derivatives of g, lam g + f strongly
    convex (lam >= 2 L_f/mu_g), bounded variance, unconstrained lower level. The paper's rates to |grad F| <= eps are
    eps^-3 steps without noise and eps^-7 with noise in both levels, up to logarithms.
    Cost per step: T + 1 upper gradients, 2 T + 2 lower gradients.

    Args:
        lower_step_size: a > 0, 1/L or less. A number, an optax schedule or an optax transformation. Default: the lower
            step of `parts.tuning.default_steps` at the start.
        upper_step_size: c > 0, likewise. Default: the upper step of `parts.tuning.default_steps` at the start.
        penalty: lam > 0, a number or an optax schedule of the step. Default: 10 + k at step k.
        num_lower_steps: T >= 1; with T = 1 this is a single loop, and c has to be smaller. Default: 10.

    Reference: Kwon, Kwon, Wright, Nowak. A fully first-order method for stochastic bilevel optimization. ICML 2023,
        arXiv:2301.10945.
    Differs from the paper: its alpha_k is a/lam_k here and its xi alpha_k is c, so that steps need not shrink as lam
        grows. y and z see the same batches and start equal: the errors that they share then cancel in y - z, where
        lam would multiply them. x is projected on X.
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    penalty: Scheduled | None = None
    num_lower_steps: int = static(default=10)
    growth: ClassVar[Callable] = staticmethod(_growth)
    about = About(
        idea="two lower iterates and a growing multiplier",
        reference="Kwon et al. 2023",
        calls="T + 1, 2 T + 2, 0, 0",
        lower="strongly convex, unconstrained",
        stops="a bias like 1/lam stays; lam grows by default",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations; the penalty is a number or a schedule."""
        step_sizes(self, "lower_step_size", "upper_step_size")
        schedules(self, "penalty")

    def _default_steps(self, problem: BilevelProblem, key: Array, x: PyTree, y: PyTree, penalty: Any) -> tuple:
        return default_steps(problem, x, y, num_lower_steps=self.num_lower_steps)

    def init(self, problem: BilevelProblem, key: Array) -> State:
        key_start, key_upper, key_lower = jax.random.split(key, 3)
        x, y = problem.init(key_start)
        penalty = stepper(self.penalty, self.growth, ())
        lower = upper = None
        if None in (self.lower_step_size, self.upper_step_size):
            lower, upper = self._default_steps(problem, key, x, y, penalty.size()[0])
        return State(
            x, y, y,
            step_x=stepper(self.upper_step_size, upper, x),
            step_y=stepper(self.lower_step_size, lower, y),
            step_z=stepper(self.lower_step_size, lower, y),
            penalty=penalty,
            upper=problem.upper_data.init(key_upper),
            lower=problem.lower_data.init(key_lower),
        )  # fmt: skip

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        x = state.x
        penalty, next_penalty = state.penalty.size()

        def batches(upper: PyTree, lower: PyTree, y: PyTree, key: Array) -> tuple[PyTree, PyTree, PyTree, PyTree]:
            key_f, key_g = jax.random.split(key)
            return *problem.upper_data.next(upper, key_f, x, y), *problem.lower_data.next(lower, key_g, x, y)

        def lower_step(carry: PyTree, key: Array) -> tuple[PyTree, None]:
            y, z, step_y, step_z, upper, lower = carry
            batch_f, upper, batch_g, lower = batches(upper, lower, y, key)
            fy = oracles.upper_gradients(problem, x, y, batch_f)[1]
            gy = oracles.residual(problem, x, y, batch_g)
            gz = oracles.residual(problem, x, z, batch_g)
            y, step_y = step_y(y, jax.tree.map(lambda f, g: f / jnp.asarray(penalty, f.dtype) + g, fy, gy))
            z, step_z = step_z(z, gz)
            y, z = problem.y_set.project(y), problem.y_set.project(z)
            return (y, z, step_y, step_z, upper, lower), None

        key_lower, key_x = jax.random.split(key)
        carry = state.y, state.z, state.step_y, state.step_z, state.upper, state.lower
        (y, z, step_y, step_z, upper, lower), _ = lax.scan(
            lower_step, carry, jax.random.split(key_lower, self.num_lower_steps)
        )

        batch_f, upper, batch_g, lower = batches(upper, lower, y, key_x)
        fx = oracles.upper_gradients(problem, x, y, batch_f)[0]
        gap = oracles.value_gap_gradients(problem, x, y, z, batch_g)[0]
        direction = jax.tree.map(lambda f, q: f + jnp.asarray(penalty, f.dtype) * q, fx, gap)
        x, step_x = state.step_x(x, direction)
        state = State(problem.x_set.project(x), y, z, step_x, step_y, step_z, next_penalty, upper, lower)
        return state, Info(norm(direction), jnp.asarray(penalty, float))

    def output(self, problem: BilevelProblem, state: State) -> tuple[PyTree, PyTree]:
        """(x, z): z is the iterate that follows y(x); y is off by O(1/lam)."""
        return state.x, state.z

    def cost(self, problem: BilevelProblem) -> OracleCount:
        T = self.num_lower_steps
        return OracleCount(upper_gradients=T + 1, lower_gradients=2 * T + 2)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_without_value(self, problem)


@struct(kw_only=True)
class ProxF2SA(F2SA):
    """Experimental: the order of the updates is from memory.

    Prox-F2SA: F2SA on a set Y, with sigma = 1/penalty of this step,

        z <- Proj_Y(z - a g_y(x, z; B)),   y <- Proj_Y(y - a (sigma f_y(x, y; D) + g_y(x, y; B)))      T times
        x <- Proj_X(x - c (f_x(x, y; D) + (g_x(x, y; B) - g_x(x, z; B))/sigma)).

    Assumptions: f and g smooth, sigma f + g with a proximal error bound on Y for each small sigma: the length of a
    projected step bounds the distance to its minimisers. g need not be convex, nor its minimiser unique. No coupling.
    The direction is the gradient of (min_Y {sigma f + g} - min_Y g)/sigma, within O(sigma) of that of F.
    Cost per step: T + 1 upper gradients, 2 T + 2 lower gradients.

    Args:
        lower_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: 1/(sigma_0 L_f + L_g),
            from `spectrum.smoothness`.
        upper_step_size: c > 0, likewise. Default: 1/(L_f + L_g/sigma_0), likewise.
        penalty: 1/sigma > 0, a number or an optax schedule of the step. Default: 10 (k + 1)^(1/3).
        num_lower_steps: T >= 1. Default: 10.

    Reference: Kwon, Kwon, Wright, Nowak. On penalty methods for nonconvex bilevel optimization and first-order
        stochastic approximation. ICLR 2024, arXiv:2309.01753.
    Differs from the paper: its inner proximal problems are plain projected steps, and there is no momentum; y and z see
        the same batches. From the paper's summary: sigma f + g, the direction's limit and the error bound; the order of
        the updates is from memory, schedule and step sizes are ours.
    """

    growth: ClassVar[Callable] = staticmethod(_slow_growth)
    about = About(
        idea="F2SA on a set Y, g need not be convex",
        reference="Kwon et al. 2024",
        calls="T + 1, 2 T + 2, 0, 0",
        lower="a proximal error bound on a set, may have many minimisers",
        stops="a bias like 1/lam stays; lam grows by default",
    )
    experimental = "the order of the updates is from memory"

    def _default_steps(self, problem: BilevelProblem, key: Array, x: PyTree, y: PyTree, penalty: Any) -> tuple:
        L_f, L_g = smoothness(problem.on_full_data(), key, x, y)
        c = jnp.asarray(penalty, L_g.dtype)
        return 1 / (L_f / c + L_g), 1 / (L_f + c * L_g)

    def output(self, problem: BilevelProblem, state: State) -> tuple[PyTree, PyTree]:
        """(x, y): of many minimisers of g, y is near the one that f prefers, z is any."""
        return state.x, state.y

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_without_value(self, problem.without("y_set"))
