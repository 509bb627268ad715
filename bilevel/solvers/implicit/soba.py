"""SOBA: all three directions of the bilevel problem, stepped at once."""

from typing import Any, NamedTuple

import jax
import optax
from jax import Array

from bilevel import oracles, theory
from bilevel.backend.tree import norm
from bilevel.parts.tuning import Iterates, start
from bilevel.problem import BilevelProblem, Constants
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import StepSize, step_sizes
from bilevel.struct import struct


class Info(NamedTuple):
    """What a step of SOBA shows."""

    direction: Array
    """|f_x - R_x' v|, shape []: an estimate of |grad F| once y and v have settled."""


@struct(kw_only=True)
class SOBA(Solver):
    """SOBA, single loop: with one batch of f and one of g per step,

        y <- y - a R(x, y),   v <- v - b (R_y' v - f_y),   x <- Proj_X(x - c (f_x - R_x' v)),

    all three directions taken at the old (x, y, v). At the solution R_y' v = f_y, so that grad F = f_x - R_x' v.

    Assumptions: g strongly convex in y (or T a contraction), smooth f and g, unconstrained lower level. On all of the
    data with constant small steps it converges linearly where F is strongly convex; with batches, to a neighbourhood
    whose size the steps set, or with constant steps ~ K^(-1/2), tuned to the number K of steps, at the rate K^(-1/2)
    for the mean squared gradient norm.
    Cost per step: 1 upper gradient, 1 lower gradient, 1 HVP, 1 JVP, in one sweep over each batch.

    Args:
        lower_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: the lower step of
            `parts.tuning.default_steps` at the start.
        linear_step_size: b > 0, likewise. Default: the same as for a.
        upper_step_size: c > 0, likewise. Default: the upper step of `parts.tuning.default_steps` at the start.

    Reference: Dagréou, Ablin, Vaiter, Moreau. A framework for bilevel optimization that enables stochastic and global
        variance reduction algorithms. NeurIPS 2022, arXiv:2201.13409, Algorithm 1.
    Differs from the paper: v has the opposite sign; x is projected on X; fixed points are allowed as lower level.
    """

    lower_step_size: StepSize | None = None
    linear_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    guarantees = ("soba", "soba-projected", "soba-batches", "soba-batches-rate")
    about = About(
        idea="one loop: y, adjoint and x move at once",
        reference="Dagréou et al. 2022",
        calls="1, 1, 1, 1",
        memory="none",
        stops="a noise ball, or shrinking steps",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "lower_step_size", "linear_step_size", "upper_step_size")

    @classmethod
    def from_theory(
        cls, constants: Constants, mu_F: Any, L_F: Any, v_bound: Any = 0.0,
        batches: tuple[theory.Noise, theory.Errors, int] | None = None,
    ) -> "SOBA":  # fmt: skip
        """Steps for which a bound of all errors is known.

        On all of the data `theory.single_loop_matrix` bounds them after every number of steps. With batches the bound
        of E|x - x*|^2 on quadratics after a given number of steps is the least that `theory.soba_steps` finds; it is
        for batches that are drawn independently of each other, `Minibatch(..., order="independent")`.

        Args:
            constants: of f and g.
            mu_F: strong convexity of F.
            L_F: Lipschitz constant of grad F.
            v_bound: >= sup |v(x)|; needed only where g is not quadratic.
            batches: (how far the blocks of f and g differ, bounds of the errors at the start, the number of steps).
        """
        if batches is None:
            a, b, c = theory.single_loop_steps(constants, mu_F, L_F, v_bound)
        else:
            a, b, c = theory.soba_steps(constants, mu_F, L_F, *batches)
        return cls(lower_step_size=a, linear_step_size=b, upper_step_size=c)

    def init(self, problem: BilevelProblem, key: Array) -> Iterates:
        rules = self.upper_step_size, self.lower_step_size, self.linear_step_size
        return start(problem, key, *rules, num_lower_steps=0)

    def step(self, problem: BilevelProblem, state: Iterates, key: Array) -> tuple[Iterates, Info]:
        x, y, v = state.x, state.y, state.v
        key_upper, key_lower = jax.random.split(key)
        batch_f, upper = problem.upper_data.next(state.upper, key_upper, x, y)
        batch_g, lower = problem.lower_data.next(state.lower, key_lower, x, y)

        fx, fy = oracles.upper_gradients(problem, x, y, batch_f)
        R, Hv, Jv = oracles.directions(problem, x, y, v, batch_g)
        direction_v = optax.tree.sub(Hv, fy)
        direction_x = optax.tree.sub(fx, Jv)

        y, step_y = state.step_y(y, R)
        v, step_v = state.step_v(v, direction_v)
        x, step_x = state.step_x(x, direction_x)
        return Iterates(problem.x_set.project(x), y, v, step_x, step_y, step_v, upper, lower), Info(norm(direction_x))

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=1, hvps=1, jvps=1)
