"""SABA: SOBA's directions with SAGA's variance reduction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel import oracles, theory
from bilevel.backend.draws import numbers_below
from bilevel.backend.tree import norm
from bilevel.parts.estimators import SagaTable, saga, saga_init
from bilevel.parts.tuning import Iterates, start
from bilevel.problem import BilevelProblem, Constants
from bilevel.record import OracleCount
from bilevel.solver import About, Solver, refuse_constrained_lower
from bilevel.step import StepSize, step_sizes
from bilevel.struct import struct

PyTree = Any


class State(NamedTuple):
    """What a step of SABA needs."""

    iterates: Iterates
    """The variables, step rules and sources that most solvers share."""
    upper_table: SagaTable
    """(f_x, f_y) of every upper block, where it was last looked at."""
    lower_table: SagaTable
    """(R, R_y' v, R_x' v) of every lower block, likewise."""

    @property
    def x(self) -> PyTree:
        """The upper iterate."""
        return self.iterates.x

    @property
    def y(self) -> PyTree:
        """The lower iterate."""
        return self.iterates.y


class Info(NamedTuple):
    """What a step of SABA shows."""

    direction: Array
    """|f_x - R_x' v| of the variance-reduced direction, shape []."""


@struct(kw_only=True)
class SABA(Solver):
    """SABA, single loop: draw block j of f and block i of g uniformly; S is the SAGA estimate of each mean,

        y <- y - a S[R],   v <- v - b (S[R_y' v] - S[f_y]),   x <- Proj_X(x - c (S[f_x] - S[R_x' v])),

    all at the old (x, y, v), then store block values. The data are cut once into num_samples/batch_size blocks.

    Assumptions: g strongly convex in y (or T a contraction), smooth components, unconstrained lower level. Constant
    steps suffice: the rate is 1/K for the squared gradient norm, linear under the Polyak-Lojasiewicz inequality.
    Cost per step: 1 upper gradient, 1 lower gradient, 1 HVP, 1 JVP of one block; init touches every block once.
    Memory: num_blocks (2 dim y + dim x) for g and num_blocks (dim y + dim x) for f.

    Args:
        lower_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: a third of the lower
            step of `parts.tuning.default_steps` at the start, as in SAGA's theory.
        linear_step_size: b > 0, likewise. Default: the same as for a.
        upper_step_size: c > 0, likewise. Default: a third of the upper step of `parts.tuning.default_steps` at the
            start.

    Reference: Dagréou, Ablin, Vaiter, Moreau. A framework for bilevel optimization that enables stochastic and global
        variance reduction algorithms. NeurIPS 2022, arXiv:2201.13409, Section 3 (SABA).
    Differs from the paper: v has the opposite sign; tables are over blocks of batch_size samples instead of single
        samples; x is projected on X; fixed points are allowed as lower level.
    """

    lower_step_size: StepSize | None = None
    linear_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    guarantees = ("saba", "saba-rate")
    about = About(
        idea="SOBA with SAGA's variance reduction",
        reference="Dagréou et al. 2022",
        calls="1, 1, 1, 1",
        memory="n_g (2 dim y + dim x) + n_f (dim y + dim x)",
        stops="grad F = 0, with constant steps",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "lower_step_size", "linear_step_size", "upper_step_size")

    @classmethod
    def from_theory(cls, constants: Constants, mu_F: Any, L_F: Any, noise: theory.Noise) -> "SABA":
        """Steps for which `theory.expected_step` bounds the mean squared errors on quadratics; small, but proved.

        Args:
            constants: of f and g.
            mu_F: strong convexity of F.
            L_F: Lipschitz constant of grad F.
            noise: how far the blocks of f and g differ.
        """
        a, b, c = theory.saba_steps(constants, mu_F, L_F, noise)[0]
        return cls(lower_step_size=a, linear_step_size=b, upper_step_size=c)

    def init(self, problem: BilevelProblem, key: Array) -> State:
        rules = self.upper_step_size, self.lower_step_size, self.linear_step_size
        it = start(problem, key, *rules, num_lower_steps=0, caution=1 / 3)
        it = it._replace(upper=(), lower=())  # blocks are drawn here, not by the sources

        def upper(j: Array) -> PyTree:
            return oracles.upper_gradients(problem, it.x, it.y, problem.upper_data.block(j))

        def lower(i: Array) -> PyTree:
            return oracles.directions(problem, it.x, it.y, it.v, problem.lower_data.block(i))

        over_upper, over_lower = jnp.arange(problem.upper_data.num_blocks), jnp.arange(problem.lower_data.num_blocks)
        return State(it, saga_init(jax.lax.map(upper, over_upper)), saga_init(jax.lax.map(lower, over_lower)))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        it = state.iterates
        j, i = numbers_below(key, problem.upper_data.num_blocks, problem.lower_data.num_blocks)

        new_upper = oracles.upper_gradients(problem, it.x, it.y, problem.upper_data.block(j))
        new_lower = oracles.directions(problem, it.x, it.y, it.v, problem.lower_data.block(i))
        (fx, fy), upper_table = saga(state.upper_table, j, new_upper)
        (R, Hv, Jv), lower_table = saga(state.lower_table, i, new_lower)
        direction_x = optax.tree.sub(fx, Jv)

        y, step_y = it.step_y(it.y, R)
        v, step_v = it.step_v(it.v, optax.tree.sub(Hv, fy))
        x, step_x = it.step_x(it.x, direction_x)
        it = Iterates(problem.x_set.project(x), y, v, step_x, step_y, step_v, it.upper, it.lower)
        return State(it, upper_table, lower_table), Info(norm(direction_x))

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=1, hvps=1, jvps=1)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        for name in ("upper_data", "lower_data"):
            source = getattr(problem, name)
            if abs(source.num_blocks * source.fraction - 1) > 1e-9:
                return f"SABA cuts the data into equal blocks; {name}: batch_size must divide the number of samples."
        return refuse_constrained_lower(self, problem)
