"""AugmentedLagrangian: upper constraints for a solver that does not know of them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.parts.reduced import violation
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, Referee
from bilevel.solver import Solver
from bilevel.step import require_counts
from bilevel.struct import invalid, static, struct

PyTree = Any
GROWTH = 4.0  # of the weight, where an outer step has not cut the violation to `ENOUGH` of it
ENOUGH = 0.5
LIGHTEST, HEAVIEST = 1e-3, 10.0  # of the first weight


class State(NamedTuple):
    """What a step of AugmentedLagrangian needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """The lower iterate."""
    inner: Any
    """The solver's state on the augmented problem."""
    inequality: Array
    """lam, the multipliers of G, shape [rows]."""
    equality: Array
    """mu, those of H."""
    weight: Array
    """rho, shape []."""
    size: Array
    """The violation at the last outer step, shape []; the largest number before."""
    count: Array
    """Steps so far, shape []."""


class Info(NamedTuple):
    """What a step of AugmentedLagrangian shows."""

    constraint_violation: Array
    """|(max(G, -lam/rho), H)| at (x, y), shape []: also where a multiplier is left beside a slack."""
    weight: Array
    """rho, shape []."""
    largest_multiplier: Array
    """Of lam and |mu|, shape []."""


class _Start(NamedTuple):
    """`init` of a problem, at a point: a function of the key."""

    x: PyTree
    y: PyTree

    def __call__(self, key: Array) -> tuple[PyTree, PyTree]:
        return self.x, self.y


@struct
class AugmentedLagrangian(Solver):
    """The method of multipliers around any solver of problems without upper constraints:

        min over x in X of  f(x, y(x)) + |max(lam + rho G, 0)|^2/(2 rho) + mu'H + rho |H|^2/2,

    G and H at (x, y(x)), by `inner_steps` steps of the solver; then lam <- max(lam + rho G, 0), mu <- mu + rho H, and
    rho <- 4 rho where |(max(G, -lam/rho), H)| has not been halved. The solver begins anew from (x, y) after each such
    outer step, since the objective is another one; its default step sizes follow the curvature of the new one.

        bilevel.AugmentedLagrangian(bilevel.LBFGS())

    Assumptions: those of the solver, for the augmented objective; no assumption of it is checked on the way.
    Cost per step: a step of the solver.

    Args:
        solver: any that takes the problem without its upper constraints.
        inner_steps: >= 1, steps of the solver between updates of the multipliers. Default: 50.
        weight: rho > 0 at the start. Default: 2 |f|/|(max(G, 0), H)|^2 at the start, in [1e-3, 10], and 10 where the
            start is feasible.

    Reference: Rockafellar. The multiplier method of Hestenes and Powell applied to convex programming. Journal of
        Optimization Theory and Applications 12, 1973. Rule for rho: Birgin, Martinez. Practical augmented Lagrangian
        methods for constrained optimization. SIAM, 2014.
    Differs from the papers: a number of steps ends the inner problem, not a tolerance; there is no bound on lam and mu.
    """

    solver: Solver
    inner_steps: int = static(default=50)
    weight: Any = None
    upper_constraints = True

    def __post_init__(self) -> None:
        """Check the settings."""
        if isinstance(self.solver, type):
            got = f"the class {self.solver.__name__}"
            invalid("AugmentedLagrangian.solver", got, "a solver", f"Make one: {self.solver.__name__}().")
        require_counts(self, inner_steps=1)

    @property
    def full_batch(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The solver's."""
        return self.solver.full_batch

    @property
    def adaptive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The solver's."""
        return self.solver.adaptive

    @property
    def least_steps(self) -> int:
        """The solver's."""
        return self.solver.least_steps

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        G, H = _values(problem, x, y)
        size = violation((G, H))
        if self.weight is None:
            f = jnp.abs(oracles.upper_value(problem, x, y, problem.upper_data.full()))
            weight = jnp.clip(2 * f / jnp.where(size > 0, size, 1) ** 2, LIGHTEST, HEAVIEST)
            weight = jnp.where(size > 0, weight, HEAVIEST).astype(G.dtype)
        else:
            weight = jnp.asarray(self.weight, G.dtype)
        none = jnp.asarray(jnp.finfo(G.dtype).max, G.dtype)
        state = State(x, y, None, jnp.zeros_like(G), jnp.zeros_like(H), weight, none, jnp.array(0))
        inner = self._begun(problem, state, key)
        x, y = self.solver.output(problem, inner)
        return state._replace(x=x, y=y, inner=inner)

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        inner, _ = self.solver.step(_augmented(problem, state), state.inner, key)
        x, y = self.solver.output(problem, inner)
        G, H = _values(problem, x, y)
        left = norm((jnp.maximum(G, -state.inequality / state.weight), H))
        state = state._replace(x=x, y=y, inner=inner, count=state.count + 1)

        def outer(state: State) -> State:
            lam = jnp.maximum(state.inequality + state.weight * G, 0)
            mu = state.equality + state.weight * H
            heavier = jnp.where(left > ENOUGH * state.size, GROWTH * state.weight, state.weight)
            state = state._replace(inequality=lam, equality=mu, weight=heavier, size=left)
            return state._replace(inner=self._begun(problem, state, key))

        state = jax.lax.cond(state.count % self.inner_steps == 0, outer, lambda state: state, state)
        largest = jnp.max(jnp.abs(jnp.concatenate([state.inequality, state.equality])))
        return state, Info(left, state.weight, largest)

    def _begun(self, problem: BilevelProblem, state: State, key: Array) -> Any:
        """The solver's state at (x, y), for the multipliers at hand."""
        there = dataclasses.replace(_augmented(problem, state), init=_Start(state.x, state.y))
        return self.solver.init(there, key)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return self.solver.cost(problem.without("upper_constraints"))

    def referee(self, problem: BilevelProblem) -> Referee | None:
        return self.solver.referee(problem.without("upper_constraints"))

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if problem.upper_constraints is None:
            return f"AugmentedLagrangian is for upper_constraints; got None. Use {type(self.solver).__name__} itself."
        return self.solver.unsupported(problem.without("upper_constraints"))


def _values(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Array, Array]:
    assert problem.upper_constraints is not None
    return problem.upper_constraints.values(x, y)


def _augmented(problem: BilevelProblem, state: State) -> BilevelProblem:
    """The problem with the augmented Lagrangian in place of f."""
    f, lam, mu, rho = problem.upper, state.inequality, state.equality, state.weight

    def upper(x: PyTree, y: PyTree, batch: PyTree) -> Array:
        G, H = _values(problem, x, y)
        pushed = jnp.sum(jnp.maximum(lam + rho * G, 0) ** 2) / (2 * rho)
        return f(x, y, batch) + pushed + mu @ H + rho * jnp.sum(H**2) / 2

    return dataclasses.replace(problem.without("upper_constraints"), upper=upper)
