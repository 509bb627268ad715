"""stocBiO: stochastic bilevel optimisation with a Neumann-series estimator."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel import oracles
from bilevel.diagnostics import norm
from bilevel.lower import descend
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import Solver
from bilevel.step import require_size, step_sizes
from bilevel.struct import static, struct
from bilevel.tuning import Iterates, start

PyTree = Any


class Info(NamedTuple):
    """|f_x - R_x' v|."""

    direction: Array


@struct
class StocBiO(Solver):
    """stocBiO: with a fresh batch B_j of g wherever one is named, D of f and g,

        y <- y - a R(x, y; B)                                   T = num_lower_steps times, from the last y
        v = eta sum_{q=0}^{Q} prod_{j=1}^{q} (I - eta R_y(x, y; B_j)') f_y(x, y; D),   Q = num_linear_steps
        x <- Proj_X(x - c (f_x(x, y; D) - R_x(x, y; D)' v)).

    Assumptions: g strongly convex in y (or T a contraction), smooth f and g, bounded variance, eta <= 1/L,
    unconstrained lower level. The series is cut at Q: a bias of order (1 - eta mu)^(Q+1) stays.
    Cost per step: 1 upper gradient, T lower gradients, Q HVPs, 1 JVP.

    Args:
        lower_step_size, upper_step_size: a, c > 0, optax schedules or optax transformations. linear_step_size:
            eta > 0 or an optax schedule. Default: `tuning`'s. num_lower_steps: T >= 1. num_linear_steps: Q >= 1.

    Reference: Ji, Yang, Liang. Bilevel optimization: convergence analysis and enhanced design. ICML 2021,
        arXiv:2010.07962, Algorithms 2 and 3.
    Differs from the paper: all batches have the sources' sizes, where the paper lets B_j shrink with j, and
        are independent only with replacement; x is projected.
    """

    lower_step_size: Any = None
    linear_step_size: Any = None
    upper_step_size: Any = None
    num_lower_steps: int = static(default=10)
    num_linear_steps: int = static(default=10)

    def __post_init__(self) -> None:
        """Accept numbers and schedules; transformations for x and y only."""
        step_sizes(self, "lower_step_size", "linear_step_size", "upper_step_size")
        require_size("StocBiO.linear_step_size", self.linear_step_size)

    def init(self, problem: BilevelProblem, key: Array) -> Iterates:
        rules = self.upper_step_size, self.lower_step_size, self.linear_step_size
        return start(problem, key, *rules, single_loop=False)

    def step(self, problem: BilevelProblem, state: Iterates, key: Array) -> tuple[Iterates, Info]:
        x = state.x
        key_y, key_f, key_v, key_x = jax.random.split(key, 4)
        y, step_y, lower = descend(problem, x, state.y, state.step_y, state.lower, key_y, self.num_lower_steps)

        batch_f, upper = problem.upper_data.next(state.upper, key_f, x, y)
        fx, fy = oracles.upper_gradients(problem, x, y, batch_f)
        eta, step_v = state.step_v.size()

        def term(carry: tuple[PyTree, PyTree, PyTree], key: Array) -> tuple[tuple[PyTree, PyTree, PyTree], None]:
            power, total, lower = carry
            batch, lower = problem.lower_data.next(lower, key, x, y)
            product = oracles.hvp(problem, x, y, power, batch)
            power = jax.tree.map(lambda r, h: r - jnp.asarray(eta, r.dtype) * h, power, product)
            return (power, jax.tree.map(jnp.add, total, power), lower), None

        (_, total, lower), _ = lax.scan(term, (fy, fy, lower), jax.random.split(key_v, self.num_linear_steps))
        v = jax.tree.map(lambda leaf: jnp.asarray(eta, leaf.dtype) * leaf, total)

        batch_g, lower = problem.lower_data.next(lower, key_x, x, y)
        direction = jax.tree.map(jnp.subtract, fx, oracles.cross(problem, x, y, v, batch_g))
        x, step_x = state.step_x(x, direction)
        it = Iterates(problem.x_set.project(x), y, v, step_x, step_y, step_v, upper, lower)
        return it, Info(norm(direction))

    def cost(self, problem: BilevelProblem) -> OracleCount:
        T, Q = self.num_lower_steps, self.num_linear_steps
        return OracleCount(upper_gradients=1, lower_gradients=T, hvps=Q, jvps=1)
