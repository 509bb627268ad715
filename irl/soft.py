"""Entropy-regularised ("soft") dynamic programming on an `MDP`, temperature one.

    V(s) = log sum_a exp Q(s, a),    pi(a | s) = exp(Q(s, a) - V(s)),    (T Q)(s, a) = r(s, a) + gamma E[V(s') | s, a].

T is a gamma-contraction in the maximum norm; its fixed point Q* is the largest value of r plus the policy's entropy,
discounted, over all policies, and pi attains it. Other temperatures tau: divide r and Q by tau.

With a horizon T, Q, V and pi carry the time in front, and T is a recursion backwards from V_T = 0,

    Q_t = r + gamma E V_{t+1}(s'),    V_t = log sum_a exp Q_t,    t = T - 1, …, 0.

Reference: Ziebart, Bagnell, Dey. Modeling interaction via the principle of maximum causal entropy. ICML 2010.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.linear import DENSE_LIMIT
from irl.mdp import MDP, Successors

LOOK_EVERY = 10


class SoftSolution(NamedTuple):
    """Q [S, A] or [T, S, A]; error: max |Q - Q*| is at most this, up to rounding []; sweeps taken []."""

    Q: Array
    error: Array
    sweeps: Array


def value(Q: Array) -> Array:
    """V = log sum_a exp Q, shape [S] or [T, S]."""
    return jax.nn.logsumexp(Q, axis=-1)


def log_policy(Q: Array) -> Array:
    """The logarithm Q - V of the policy, shaped like Q."""
    return jax.nn.log_softmax(Q, axis=-1)


def policy(Q: Array) -> Array:
    """The policy exp(Q - V), shaped like Q: each row a distribution over actions."""
    return jax.nn.softmax(Q, axis=-1)


def bellman(mdp: MDP, r: Array, Q: Array) -> Array:
    """T Q = r + gamma E V(s'), shaped like Q, for r [S, A] and Q [S, A], or [T, S, A] with a horizon."""
    if mdp.horizon is None:
        return r + mdp.discount * mdp.expect(value(Q))
    V = value(Q)
    following = jnp.concatenate([V[1:], jnp.zeros_like(V[:1])])
    return r[None] + mdp.discount * jax.vmap(mdp.expect)(following)


def evaluate(mdp: MDP, r: Array, Q: Array, log_pi: Array) -> Array:
    """One sweep of soft policy evaluation, r + gamma E sum_a' pi (Q - log pi)(s', a'), shape [S, A]; no horizon.

    At log_pi = `log_policy(Q)` it is `bellman`.
    """
    return r + mdp.discount * mdp.expect(jnp.sum(jnp.exp(log_pi) * (Q - log_pi), axis=-1))


@partial(jax.jit, static_argnames="max_sweeps")
def value_iteration(
    mdp: MDP, r: Array, Q: Array | None = None, tol: float | None = None, max_sweeps: int = 100_000
) -> SoftSolution:
    """Soft value iteration from Q (default 0) until a sweep changes no entry by more than tol (1 + max |Q|).

    It looks at the change every `LOOK_EVERY` sweeps, since looking costs as much as half a sweep.
    tol defaults to 10 eps of r's dtype. After a change c the distance to Q* is at most c gamma/(1 - gamma).
    With a horizon it is the exact recursion, whatever Q and tol.
    """
    if mdp.horizon is not None:
        return SoftSolution(_backwards(mdp, r), jnp.zeros((), r.dtype), jnp.array(mdp.horizon))
    tol = 10 * jnp.finfo(r.dtype).eps if tol is None else tol

    def sweep(_: Any, Q: Array) -> Array:
        return r + mdp.discount * mdp.expect(_value_apart(Q))

    def go_on(carry: tuple[Array, Array, Array]) -> Array:
        Q, change, k = carry
        return (change > tol * (1 + jnp.max(jnp.abs(Q)))) & (k < max_sweeps)

    def sweeps(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        Q, _, k = carry
        unseen = jnp.minimum(LOOK_EVERY, max_sweeps - k) - 1
        Q = lax.fori_loop(0, unseen, sweep, Q)
        new = sweep(0, Q)
        return new, jnp.max(jnp.abs(new - Q)), k + unseen + 1

    start = jnp.zeros_like(r) if Q is None else Q
    Q, change, count = lax.while_loop(go_on, sweeps, (start, jnp.full((), jnp.inf, r.dtype), jnp.array(0)))
    return SoftSolution(Q, change * mdp.discount / (1 - mdp.discount), count)


def _value_apart(Q: Array) -> Array:
    """`value`, with exp kept out of the sum's loop: sweeps on a CPU were measured a tenth to a fifth faster."""
    top = jnp.max(Q, axis=-1)
    top = jnp.where(jnp.isfinite(top), top, 0)
    return top + jnp.log(jnp.sum(lax.optimization_barrier(jnp.exp(Q - top[:, None])), axis=-1))


def _backwards(mdp: MDP, r: Array) -> Array:
    def back(V: Array, _: None) -> tuple[Array, Array]:
        Q = r + mdp.discount * mdp.expect(V)
        return value(Q), Q

    return lax.scan(back, jnp.zeros(mdp.num_states, r.dtype), length=mdp.horizon, reverse=True)[1]


def _forwards(mdp: MDP, policy: Array, sources: Array) -> Array:
    def push(arriving: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        source, pi = at
        d = (source + arriving)[:, None] * pi
        return mdp.discount * mdp.flow(d), d

    return lax.scan(push, jnp.zeros_like(sources[0]), (sources, policy))[1]


@jax.jit
def occupancy(mdp: MDP, policy: Array, start: Array | None = None) -> Array:
    """d(s, a) = E sum_t gamma^t 1{s_t = s, a_t = a}, shape [S, A], of a policy [S, A].

    The states' part m = sum_a d solves m = start + gamma (flow of m under the policy); `start` [S], default the MDP's,
    may be any measure, signed ones included. Dense transitions, or few states: one linear solve. Successor lists: the
    iteration m <- start + gamma flow(m), a contraction in the 1-norm, to rounding.
    With a horizon: d_t(s, a) = gamma^t P(s_t = s, a_t = a), shape [T, S, A], of a policy [T, S, A]; `start` may be [T,
    S], what enters at each time.
    """
    rho: Array = mdp.start if start is None else start
    if mdp.horizon is not None:
        sources = rho if rho.ndim == 2 else jnp.zeros((mdp.horizon, rho.size), rho.dtype).at[0].set(rho)
        return _forwards(mdp, policy, sources)
    if not mdp.is_sparse or mdp.num_states <= DENSE_LIMIT:
        moves = _moves(mdp, policy)
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


def _moves(mdp: MDP, policy: Array) -> Array:
    """P(s' | s) under the policy, shape [S, S], indexed [s', s]."""
    if not isinstance(mdp.transitions, Successors):
        return jnp.einsum("sa,sat->ts", policy, mdp.transitions)
    here = jnp.broadcast_to(jnp.arange(mdp.num_states)[:, None, None], mdp.transitions.next_states.shape)
    weights = policy[..., None] * mdp.transitions.probabilities
    return jnp.zeros((mdp.num_states,) * 2, weights.dtype).at[mdp.transitions.next_states, here].add(weights)
