"""Entropy-regularised ("soft") dynamic programming on an `MDP`, temperature one.

    V(s) = log sum_a exp Q(s, a),    pi(a | s) = exp(Q(s, a) - V(s)),    (T Q)(s, a) = r(s, a) + gamma E[V(s') | s, a].

T is a gamma-contraction in the maximum norm; its fixed point Q* is the largest value of r plus the policy's entropy,
discounted, over all policies, and pi attains it. Other temperatures tau: divide r and Q by tau.

With a horizon T, Q, V and pi carry the time in front, and T is a recursion backwards from V_T = 0,

    Q_t = r + gamma E V_{t+1}(s'),    V_t = log sum_a exp Q_t,    t = T - 1, …, 0.

Reference: Ziebart, Bagnell, Dey. Modeling interaction via the principle of maximum causal entropy. ICML 2010.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.precision import full_precision
from bilevel.backend.tree import poisoned
from bilevel.linear import DENSE_LIMIT
from irl.mdp import MDP, Successors, at

LOOK_EVERY = 10  # sweeps between two looks at the change
INEXACT = 1e-2  # an error bound beyond it, relative to 1 + max |Q|, is that of no solution
UNROLLED = 64  # actions times successors up to which a sweep is written out term by term


class SoftSolution(NamedTuple):
    """What `value_iteration` returns. Whoever takes `Q` has looked at the error: without two digits it is NaN."""

    iterate: Array
    """Where the sweeps stopped, whatever the error, [S, A], or [T, S, A] with a horizon."""
    error: Array
    """A bound of max |iterate - Q*|, up to rounding, []."""
    sweeps: Array
    """How many sweeps it took, []."""

    @property
    def solved(self) -> Array:
        """Whether the error is at most `INEXACT` (1 + max |Q|), []."""
        size = jnp.max(jnp.abs(self.iterate), axis=tuple(range(self.error.ndim, self.iterate.ndim)))
        return self.error <= INEXACT * (1 + size)

    @property
    def Q(self) -> Array:
        """The iterate where it is solved for, else NaN."""
        return poisoned(self.iterate, self.solved)


def value(Q: Array) -> Array:
    """The soft value V = log sum_a exp Q, shape [S] or [T, S]."""
    return jax.nn.logsumexp(Q, axis=-1)


def log_policy(Q: Array) -> Array:
    """The logarithm Q - V of the policy, shaped like Q."""
    return jax.nn.log_softmax(Q, axis=-1)


def policy(Q: Array) -> Array:
    """The policy exp(Q - V), shaped like Q: each row a distribution over actions."""
    return jax.nn.softmax(Q, axis=-1)


def bellman(mdp: MDP, r: Array, Q: Array) -> Array:
    """The table T Q = r + gamma E V(s'), shaped like Q, for r [S, A] and Q [S, A], or [T, S, A] with a horizon."""
    if mdp.horizon is None:
        return r + mdp.discount * mdp.expect(value(Q))
    V = value(Q)
    following = jnp.concatenate([V[1:], jnp.zeros_like(V[:1])])
    return r[None] + mdp.discount * jax.vmap(mdp.expect)(following)


def evaluate(mdp: MDP, r: Array, Q: Array, log_pi: Array) -> Array:
    """One sweep of soft policy evaluation, r + gamma E sum_a' pi (Q - log pi)(s', a'), shape [S, A]; no horizon.

    It is `bellman` where log_pi = `log_policy(Q)`.
    """
    return r + mdp.discount * mdp.expect(jnp.sum(jnp.exp(log_pi) * (Q - log_pi), axis=-1))


@partial(jax.jit, static_argnames="max_sweeps")
@full_precision
def value_iteration(
    mdp: MDP, r: Array, Q: Array | None = None, tol: float | None = None, max_sweeps: int = 100_000
) -> SoftSolution:
    """Soft value iteration, until a sweep changes no V(s) by more than tol (1 + max |V|).

    The iteration is in V = log sum_a exp Q and looks at the change every `LOOK_EVERY` sweeps. With the last V,
    Q = r + gamma E V and c = max |log sum_a exp Q - V|, the distance of Q to Q* is at most c gamma/(1 - gamma): the
    error that is returned. At a discount near one it may be large at rounding level already: there Q is NaN, and
    `iterate` is where the sweeps stopped. With a horizon it is the exact recursion, whatever Q, tol and max_sweeps.

    Args:
        mdp: with S states and A actions.
        r: the reward, [S, A].
        Q: the start, [S, A]. Default: 0.
        tol: > 0. Default: 10 eps of r's dtype.
        max_sweeps: >= 0; the sweep that gives Q counts, and with 0 the start is returned with the error inf.
    """
    if mdp.horizon is not None:
        return SoftSolution(_backwards(mdp, r), jnp.zeros((), r.dtype), jnp.array(mdp.horizon))
    limit = 10 * jnp.finfo(r.dtype).eps if tol is None else tol
    if max_sweeps == 0:
        return SoftSolution(jnp.zeros_like(r) if Q is None else Q, jnp.full((), jnp.inf, r.dtype), jnp.array(0))
    sweep, most = _sweep(mdp, r), max_sweeps - 1  # the last one gives Q

    def go_on(carry: tuple[Array, Array, Array]) -> Array:
        V, change, k = carry
        return (change > limit * (1 + jnp.max(jnp.abs(V)))) & (k < most)

    def sweeps(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        V, _, k = carry
        count = jnp.minimum(LOOK_EVERY, most - k)
        V, before = lax.fori_loop(0, count, lambda _, pair: (sweep(pair[0]), pair[0]), (V, V))
        return V, jnp.max(jnp.abs(V - before)), k + count

    # The V of Q = 0 is written down, since XLA would take seconds of compiling to fold the sums of a million constants.
    V = jnp.full(len(r), jnp.log(jnp.asarray(mdp.num_actions, r.dtype))) if Q is None else value(Q)
    begin = V, jnp.full((), jnp.inf, r.dtype), jnp.array(0)
    V, _, count = lax.while_loop(go_on, sweeps, begin)
    last = r + mdp.discount * mdp.expect(V)
    return SoftSolution(last, jnp.max(jnp.abs(value(last) - V)) * mdp.discount / (1 - mdp.discount), count + 1)


def _sweep(mdp: MDP, r: Array) -> Callable[[Array], Array]:
    """The map v -> log sum_a exp(r + gamma E v) of values [S], to be called many times.

    Short successor lists are summed action by action and term by term, from arrays that are laid out so: XLA then makes
    one pass over the states of it.
    """
    lists = mdp.transitions
    if not isinstance(lists, Successors) or math.prod(lists.next_states.shape[1:]) > UNROLLED:
        return lambda V: value(r + mdp.discount * mdp.expect(V))
    by_action = r.T, lists.next_states.transpose(1, 2, 0), lists.probabilities.transpose(1, 2, 0)
    rewards, following, p = lax.optimization_barrier(by_action)  # copied once, not read with strides in each sweep

    def sweep(V: Array) -> Array:
        expect = lambda a: sum(weight * at(V, to) for weight, to in zip(p[a], following[a], strict=True))  # noqa: E731
        return _log_sum_exp([rewards[a] + mdp.discount * expect(a) for a in range(mdp.num_actions)])

    return sweep


def _log_sum_exp(rows: list[Array]) -> Array:
    """The logarithm of sum_a exp(rows[a]), shaped like a row; XLA would write a stack of them to memory first."""
    top = functools.reduce(jnp.maximum, rows)
    top = jnp.where(jnp.isfinite(top), top, 0)
    return top + jnp.log(functools.reduce(jnp.add, [jnp.exp(row - top) for row in rows]))


def _backwards(mdp: MDP, r: Array) -> Array:
    """The Q [T, S, A] of the recursion backwards from the horizon."""

    def back(V: Array, _: None) -> tuple[Array, Array]:
        Q = r + mdp.discount * mdp.expect(V)
        return value(Q), Q

    return lax.scan(back, jnp.zeros(mdp.num_states, r.dtype), length=mdp.horizon, reverse=True)[1]


def _forwards(mdp: MDP, policy: Array, sources: Array) -> Array:
    """The occupancies [T, S, A] of a policy [T, S, A] where the measure sources[t] [S] enters at time t."""

    def push(arriving: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        source, pi = at
        d = (source + arriving)[:, None] * pi
        return mdp.discount * mdp.flow(d), d

    return lax.scan(push, jnp.zeros_like(sources[0]), (sources, policy))[1]


@jax.jit
@full_precision
def occupancy(mdp: MDP, policy: Array, start: Array | None = None) -> Array:
    """The occupancy d(s, a) = E sum_t gamma^t 1{s_t = s, a_t = a}, shape [S, A], of a policy [S, A].

    With a horizon it is d_t(s, a) = gamma^t P(s_t = s, a_t = a), shape [T, S, A], of a policy [T, S, A].

    The states' part m = sum_a d solves m = start + gamma (flow of m under the policy). With dense transitions or few
    states that is one linear solve; with successor lists, the iteration m <- start + gamma flow(m), a contraction in
    the 1-norm, to rounding error. The occupancy is NaN where |start + gamma flow(m) - m|/(1 - gamma), the bound of m's
    error in that norm, is more than `INEXACT` |m|: there the discount is too near one for the dtype.

    Args:
        mdp: with S states and A actions.
        policy: probabilities, [S, A] or [T, S, A].
        start: any measure [S], signed ones included; with a horizon also [T, S], what enters at each time.
            Default: the MDP's.
    """
    rho: Array = mdp.start if start is None else start
    if mdp.horizon is not None:
        sources = rho if rho.ndim == 2 else jnp.zeros((mdp.horizon, rho.size), rho.dtype).at[0].set(rho)
        return _forwards(mdp, policy, sources)
    if not mdp.is_sparse or mdp.num_states <= DENSE_LIMIT:
        moves = _moves(mdp, policy)
        m = jnp.linalg.solve(jnp.eye(mdp.num_states, dtype=moves.dtype) - mdp.discount * moves, rho)
        return _exact(mdp, policy, rho, m)

    def go_on(carry: tuple[Array, Array, Array]) -> Array:
        m, change, k = carry
        return (change > 10 * jnp.finfo(m.dtype).eps * jnp.sum(jnp.abs(m))) & (k < 100_000)

    def push(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, _, k = carry
        new = rho + mdp.discount * mdp.flow(m[:, None] * policy)
        return new, jnp.sum(jnp.abs(new - m)), k + 1

    m, _, _ = lax.while_loop(go_on, push, (rho, jnp.full((), jnp.inf, rho.dtype), jnp.array(0)))
    return _exact(mdp, policy, rho, m)


def _exact(mdp: MDP, policy: Array, rho: Array, m: Array) -> Array:
    """The occupancy m pi, or NaN: see `occupancy`."""
    d = m[:, None] * policy
    error = jnp.sum(jnp.abs(rho + mdp.discount * mdp.flow(d) - m)) / (1 - mdp.discount)
    return poisoned(d, error <= INEXACT * jnp.sum(jnp.abs(m)))


def _moves(mdp: MDP, policy: Array) -> Array:
    """P(s' | s) under the policy, shape [S, S], indexed [s', s]."""
    if not isinstance(mdp.transitions, Successors):
        return jnp.einsum("sa,sat->ts", policy, mdp.transitions)
    here = jnp.broadcast_to(jnp.arange(mdp.num_states)[:, None, None], mdp.transitions.next_states.shape)
    weights = policy[..., None] * mdp.transitions.probabilities
    return jnp.zeros((mdp.num_states,) * 2, weights.dtype).at[mdp.transitions.next_states, here].add(weights)
