"""What people look at in inverse reinforcement learning beside the record: policies, likelihoods, when to stop."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.record import Row
from bilevel.struct import invalid
from irl.tabular import soft
from irl.tabular.spec import TabularImitation

PyTree = Any


@jax.jit
def tracking_error(problem: TabularImitation, x: PyTree, y: Array) -> Array:
    """The largest |log pi_y - log pi_x|, shape []: the policy of y against the soft-optimal one of the reward at x."""
    exact = soft.value_iteration(problem.mdp, problem.reward.table(x)).Q
    return jnp.max(jnp.abs(soft.log_policy(y) - soft.log_policy(exact)))


@jax.jit
def objective(problem: TabularImitation, x: PyTree) -> Array:
    """F(x) by dynamic programming, shape []: minus the mean log-likelihood, or minus Lhat for the surrogate.

    NaN where the soft values at x are not found (`SoftSolution`).
    """
    Q = soft.value_iteration(problem.mdp, problem.reward.table(x)).Q
    return problem.upper(x, Q, problem.upper_data.full())


def epic_distance(first: Array, second: Array, discount: float | Array) -> Array:
    """The EPIC distance of two rewards, [], in [0, 1]: 0 for equal up to shaping and positive scale, 1 for opposite.

    With states S, S' and actions A uniform and independent, each reward is first made canonical,

        C(s, a, s') = R(s, a, s') + E[gamma R(s', A, S') - R(s, A, S') - gamma R(S, A, S')],

    which no shaping gamma phi(s') - phi(s) changes; the distance is sqrt((1 - rho)/2) with the correlation rho of the
    canonical rewards over uniform (s, a, s').

    Args:
        first: a reward [S, A], or [S, A, S] where it depends on the next state.
        second: another, in either form.
        discount: gamma.

    Reference: Gleave, Dennis, Legg, Russell, Leike. Quantifying differences in reward functions. ICLR 2021,
        arXiv:2006.13900, Definitions 4.1 and 4.6.
    Differs from the paper: uniform distributions only.
    """

    def canonical(R: Array) -> Array:
        S = R.shape[0]
        R = jnp.broadcast_to(R[:, :, None], (*R.shape, S)) if R.ndim == 2 else R
        mean = jnp.mean(R, axis=(1, 2))
        C = R + discount * mean[None, None, :] - mean[:, None, None]
        return (C - jnp.mean(C)).ravel()

    one, other = canonical(jnp.asarray(first)), canonical(jnp.asarray(second))
    rho = jnp.sum(one * other) / jnp.sqrt(jnp.sum(one**2) * jnp.sum(other**2))
    return jnp.sqrt(jnp.clip((1 - rho) / 2, 0, 1))


class EarlyStopping:
    """A callback for `bilevel.solve`: stop when F on held-out demonstrations has not fallen for some measurements.

        stopping = irl.EarlyStopping(irl.to_bilevel(mdp, held_out, reward), patience=5)
        solution = bilevel.solve(problem, solver, key=key, callback=stopping)
        stopping.x                  # the best x that was seen

    It looks at the solver's iterate, not at averages, every `every` steps of `solve`. Where soft values are not found,
    F is NaN, which is no better than anything.

    Attributes:
        x, value, step: the best x, its F on the held-out demonstrations, and its step; None before the first look.
    """

    def __init__(self, held_out: TabularImitation, patience: int = 5) -> None:
        """`held_out`: a problem of `to_bilevel` with the same reward. `patience`: looks without a better x, >= 1."""
        if not (isinstance(patience, int) and patience >= 1):
            invalid("patience (EarlyStopping)", patience, "a whole number >= 1", "It counts measurements.")
        self.held_out, self.patience = held_out, patience
        self.x, self.value, self.step, self.waited = None, float("inf"), None, 0

    def __call__(self, step: int, state: Any, row: Row) -> bool:
        """True when `patience` measurements in a row were no better than the best."""
        value = float(objective(self.held_out, state.x))
        if value < self.value:
            self.x, self.value, self.step, self.waited = state.x, value, step, 0
        else:
            self.waited += 1
        return self.waited >= self.patience
