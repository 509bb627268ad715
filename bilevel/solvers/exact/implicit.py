"""Implicit: any optax rule along the exact gradient of F."""

import functools
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from bilevel.backend.tree import norm
from bilevel.parts.domain import project_upper
from bilevel.parts.evaluation import LEAST, evaluate, refuse_unsolvable
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import Stepper, StepSize, step_sizes, stepper
from bilevel.struct import struct

PyTree = Any
ADAM = 0.05  # the default rule's rate, in units of x


class State(NamedTuple):
    """What a step of Implicit needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """y at the last x at which it was found: a warm start."""
    v: PyTree
    """The adjoint there, likewise."""
    step: Stepper
    """The step rule of x, with its state."""


class Info(NamedTuple):
    """What a step of Implicit shows."""

    direction: Array
    """|grad F(x)|, shape []; 0 where y(x) was not found."""
    objective: Array
    """F(x), shape []; NaN where y(x) was not found."""
    lower_solved: Array
    """Whether y(x) was found, shape []. Where it was not x stays where it is."""


@functools.cache
def _default() -> optax.GradientTransformation:
    """The same object each time, so that nothing compiles twice."""
    return optax.adam(ADAM)


@struct(kw_only=True)
class Implicit(Solver):
    """Descent by any rule along the exact gradient of F(x) = f(x, y(x)), on all of the data:

        x <- Proj_X(x - rule(grad F(x))),    y(x) and grad F from `bilevel.lower`, from the last y and adjoint.

    Assumptions: g(x, .) strongly convex, or as the lower level's method needs it; F smooth.
    Cost per step: one evaluation of F and its gradient, with as many steps of the lower level's method as its tolerance
        takes. The number of oracle calls is not known before.

    Args:
        upper_step_size: the rule: an optax transformation, or a number or an optax schedule for plain steps of that
            size. Default: optax.adam(0.05), whose steps are of that length in each entry of x.

    Reference: Larsen, Hansen, Svarer, Ohlsson. Design and regularization of neural networks: the optimal use of a
        validation set. IEEE Workshop on Neural Networks for Signal Processing VI, 1996. Bengio. Gradient-based
        optimization of hyperparameters. Neural Computation 12, 2000.
    Differs from the papers: the rule is any; the lower level may be constrained; x is projected.
    """

    upper_step_size: StepSize | None = None
    full_batch = adaptive = True
    assumptions = MappingProxyType({"lower_solved": "the lower level has a solution at x, and its method finds it"})
    about = About(
        idea="any optax rule along the exact gradient",
        reference="Larsen et al. 1996; Bengio 2000",
        calls="as many as the lower level needs",
        lower="as `LBFGS`",
        stops="grad F = 0, where the rule's steps shrink",
    )

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "upper_step_size")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        x = project_upper(problem, x, y)
        return State(x, y, optax.tree.zeros_like(y), stepper(self.upper_step_size, _default(), x))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        found = evaluate(problem, state.x, state.y, state.v, "Implicit")
        x, step = state.step(state.x, found.gradient)
        x = project_upper(problem, x, found.y)
        x, step = optax.tree.where(found.good, (x, step), (state.x, state.step))
        objective = jnp.where(found.good, found.value, jnp.nan)
        return State(x, found.y, found.v, step), Info(norm(found.gradient), objective, found.good)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return LEAST

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_unsolvable(self, problem)
