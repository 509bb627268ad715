"""DSIGD: smoothed implicit gradients of a linearly constrained lower level, with a projected Armijo search."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend import draws
from bilevel.backend.tree import norm
from bilevel.parts import tracking
from bilevel.parts.domain import project_upper
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import Scalar, require_numbers
from bilevel.struct import static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of DSIGD needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    q: PyTree
    """The perturbation, drawn once, shaped like y."""
    active: Array
    """The active set at y, shape [rows] or [0], from which the next one starts."""


class Info(NamedTuple):
    """What a step of DSIGD shows, and what can be seen there of the assumptions."""

    direction: Array
    """|d|, shape []."""
    accepted: Array
    """The accepted a, shape [], 0 where no trial was."""
    margin: Array
    """The least slack or multiplier at y, shape []."""
    feasible: Array
    """Whether the lower level has a point, shape []."""
    independent: Array
    """Whether its active rows are linearly independent (LICQ), shape []."""
    definite: Array
    """Whether g_yy is positive definite, shape []."""
    strict: Array
    """Whether the margin is more than rounding error, shape []."""


@struct(kw_only=True)
class DSIGD(Solver):
    """Deterministic smoothed implicit gradient descent, on all of the data: with one q, drawn at the start and kept,
    F_q(x) = f(x, y_q(x)), y_q(x) = argmin g(x, y) + q'y over the constraints,

        d = Proj_X(x - s grad F_q(x)) - x,
        x <- x + a d,  a = shrink^m with the least m < num_trials so that
            F_q(x + a d) <= F_q(x) + decrease a grad F_q(x)'d + slack,

    and x stays where there is none.

    Assumptions: g(x, .) strongly convex, linear constraints with LICQ that do not move with x (here they may).
    Cost per step: with T = num_lower_steps, M = num_trials and n = dim y: 1 upper gradient, M + 1 upper values,
        (M + 1) T lower gradients, (M + 1) n HVPs ((M + 1) n (T + 1) where g is not quadratic), 1 JVP.

    Args:
        upper_step_size: s > 0, a number. Default: 1.
        shrink: the ratio of two trial steps, in (0, 1). Default: 0.5.
        decrease: the part of the expected fall that is asked for, in (0, 1). Default: 0.1.
        slack: >= 0, for the lower level's inexactness. Default: 0.
        sigma: > 0, the size of q: standard deviation ("gaussian") or radius ("sphere", "ball"). Default: 1e-3.
        distribution: the law of q, "gaussian", "sphere" or "ball". Default: "gaussian".
        num_trials: M >= 1, trial steps. Default: 12.
        num_lower_steps: T >= 1, SQP steps at each point; one solves a quadratic g exactly. Default: 2.

    Reference: Khanduri, Tsaknakis, Zhang, Liu, Liu, Zhang, Hong. Linearly constrained bilevel optimization: a smoothed
        implicit gradient approach. ICML 2023.
    Differs from the paper: the M trials are evaluated at once, by vmap, and the search ends with them; the lower level
        is solved by an active-set method.
    """

    upper_step_size: Scalar | None = None
    shrink: Scalar = 0.5
    decrease: Scalar = 0.1
    slack: Scalar = 0.0
    sigma: Scalar = 1e-3
    distribution: str = static(default="gaussian")
    num_trials: int = static(default=12)
    num_lower_steps: int = static(default=2)
    full_batch = True
    assumptions = tracking.ASSUMPTIONS
    about = About(
        idea="SSIGD's gradients with a projected Armijo search",
        reference="Khanduri et al. 2023",
        calls="1, (M + 1) T, (M + 1) n, 1",
        smoothing="one perturbation, kept",
        stops="no trial step lowers F any more",
    )

    def __post_init__(self) -> None:
        """Accept a number as step."""
        require_numbers(self, "upper_step_size")
        draws.check_distribution("DSIGD.distribution", self.distribution)

    def init(self, problem: BilevelProblem, key: Array) -> State:
        key_start, key_q = jax.random.split(key)
        x, y = problem.init(key_start)
        x = project_upper(problem, x, y)
        q = draws.perturbation(key_q, y, self.distribution, self.sigma)
        return State(x, y, q, tracking.no_rows_active(problem, x, y))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        upper, lower = problem.upper_data.full(), problem.lower_data.full()
        x, q = state.x, state.q
        found = tracking.track(problem, x, state.y, state.active, q, lower, self.num_lower_steps)
        y, active = found.solution.y, found.solution.active
        gradient = tracking.gradient(problem, x, found, upper, lower)
        here = oracles.upper_value(problem, x, y, upper)
        dtype, step = here.dtype, 1.0 if self.upper_step_size is None else self.upper_step_size
        step, shrink, decrease, slack = (
            jnp.asarray(part, dtype) for part in (step, self.shrink, self.decrease, self.slack)
        )
        target = project_upper(problem, jax.tree.map(lambda a, g: a - step * g, x, gradient), y)
        d = optax.tree.sub(target, x)
        slope = ravel_pytree(gradient)[0] @ ravel_pytree(d)[0]
        move = lambda a: jax.tree.map(lambda b, d: b + a * d, x, d)  # noqa: E731

        def value(a: Array) -> Array:
            there = tracking.track(problem, move(a), y, active, q, lower, self.num_lower_steps).solution
            return oracles.upper_value(problem, move(a), there.y, upper)

        sizes = shrink ** jnp.arange(self.num_trials, dtype=dtype)
        enough = oracles.batched(value)(sizes) <= here + decrease * sizes * slope + slack
        a = jnp.where(jnp.any(enough), sizes[jnp.argmax(enough)], 0)
        return State(problem.x_set.project(move(a)), y, q, active), Info(norm(d), a, **found.solution.assumptions())

    def cost(self, problem: BilevelProblem) -> OracleCount:
        lower, points = tracking.track_cost(problem, self.num_lower_steps), self.num_trials + 1
        return OracleCount(
            upper_values=points,
            upper_gradients=1,
            lower_gradients=points * lower.lower_gradients,
            hvps=points * lower.hvps,
            jvps=1,
        )

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return tracking.refuse_not_polyhedral(self, problem)
