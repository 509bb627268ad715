"""Entropy-regularised ("soft") dynamic programming on an `MDP`, temperature one.

    V(s) = log sum_a exp Q(s, a),    pi(a | s) = exp(Q(s, a) - V(s)),    (T Q)(s, a) = r(s, a) + gamma E[V(s') | s, a].

T is a gamma-contraction in the maximum norm; its fixed point Q* is the largest value of r plus the policy's entropy,
discounted, over all policies, and pi attains it. Other temperatures tau: divide r and Q by tau.

Reference: Ziebart, Bagnell, Dey. Modeling interaction via the principle of maximum causal entropy. ICML 2010.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from irl.mdp import MDP

LOOK_EVERY = 10


class SoftSolution(NamedTuple):
    """Q [S, A]; error: max |Q - Q*| is at most this, up to rounding []; sweeps taken []."""

    Q: Array
    error: Array
    sweeps: Array


def value(Q: Array) -> Array:
    """V = log sum_a exp Q, shape [S]."""
    return jax.nn.logsumexp(Q, axis=-1)


def log_policy(Q: Array) -> Array:
    """The logarithm Q - V of the policy, shape [S, A]."""
    return jax.nn.log_softmax(Q, axis=-1)


def policy(Q: Array) -> Array:
    """The policy exp(Q - V), shape [S, A]: each row a distribution over actions."""
    return jax.nn.softmax(Q, axis=-1)


def bellman(mdp: MDP, r: Array, Q: Array) -> Array:
    """T Q = r + gamma E V(s'), shape [S, A], for r and Q [S, A]."""
    return r + mdp.discount * mdp.expect(value(Q))


@partial(jax.jit, static_argnames="max_sweeps")
def value_iteration(
    mdp: MDP, r: Array, Q: Array | None = None, tol: float | None = None, max_sweeps: int = 100_000
) -> SoftSolution:
    """Soft value iteration from Q (default 0) until a sweep changes no entry by more than tol (1 + max |Q|).

    It looks at the change every `LOOK_EVERY` sweeps, since looking costs as much as half a sweep.
    tol defaults to 10 eps of r's dtype. After a change c the distance to Q* is at most c gamma/(1 - gamma).
    """
    tol = 10 * jnp.finfo(r.dtype).eps if tol is None else tol

    def go_on(carry: tuple[Array, Array, Array]) -> Array:
        Q, change, k = carry
        return (change > tol * (1 + jnp.max(jnp.abs(Q)))) & (k < max_sweeps)

    def sweeps(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        Q, _, k = carry
        unseen = jnp.minimum(LOOK_EVERY, max_sweeps - k) - 1
        Q = lax.fori_loop(0, unseen, lambda _, Q: bellman(mdp, r, Q), Q)
        new = bellman(mdp, r, Q)
        return new, jnp.max(jnp.abs(new - Q)), k + unseen + 1

    start = jnp.zeros_like(r) if Q is None else Q
    Q, change, count = lax.while_loop(go_on, sweeps, (start, jnp.full((), jnp.inf, r.dtype), jnp.array(0)))
    return SoftSolution(Q, change * mdp.discount / (1 - mdp.discount), count)


@jax.jit
def occupancy(mdp: MDP, policy: Array, start: Array | None = None) -> Array:
    """d(s, a) = E sum_t gamma^t 1{s_t = s, a_t = a}, shape [S, A], of a policy [S, A].

    The states' part m = sum_a d solves m = start + gamma (flow of m under the policy); `start` [S], default the MDP's,
    may be any measure, signed ones included. Dense transitions: one linear solve. Successor lists: the iteration
    m <- start + gamma flow(m), a contraction in the 1-norm, to rounding.
    """
    rho: Array = mdp.start if start is None else start
    if not mdp.is_sparse:
        moves = jnp.einsum("sa,sat->ts", policy, mdp.transitions)
        m = jnp.linalg.solve(jnp.eye(mdp.num_states, dtype=moves.dtype) - mdp.discount * moves, rho)
        return m[:, None] * policy

    def go_on(carry: tuple[Array, Array, Array]) -> Array:
        m, change, k = carry
        return (change > 10 * jnp.finfo(m.dtype).eps * jnp.sum(jnp.abs(m))) & (k < 100_000)

    def push(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, _, k = carry
        new = rho + mdp.discount * mdp.flow(m[:, None] * policy)
        return new, jnp.sum(jnp.abs(new - m)), k + 1

    m, _, _ = lax.while_loop(go_on, push, (rho, jnp.full((), jnp.inf, rho.dtype), jnp.array(0)))
    return m[:, None] * policy
