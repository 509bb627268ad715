r"""Maximum-likelihood inverse reinforcement learning as a bilevel problem.

    min over x of  F(x) = f(y(x)),    f(y) = -(1/n) sum over trajectories of sum_t gamma^t log pi_y(a_t | s_t),
    y(x) = T_x y(x),    T_x y = r(x) + gamma E V_y(s'),    V_y = log sum_a exp y,    pi_y = exp(y - V_y):

x are the reward's parameters, y = Q [S, A]. With c the demonstrations' discounted occupancy, f = -<c, log pi_y>. At
y = y(x), log pi = r + gamma E V(s') - V(s), and summing by parts

    F(x) = <mu, V> - <c, r(x)>,    mu(s') = sum_a c(s', a) - gamma sum c(s, a) P(s' | s, a),

    grad F(x) = sum over (s, a) of (d_{pi, mu}(s, a) - c(s, a)) grad r(s, a; x),

where d_{pi, mu} is the occupancy of pi = pi_{y(x)} from the start measure mu. This holds for any c >= 0. It is the
textbook's E_pi sum gamma^t grad r - E_expert sum gamma^t grad r, with pi started from rho, where mu = rho: where c
satisfies the flow equations from rho, as the occupancy of every policy does, and that of sampled trajectories does in
the limit of many long ones. With rewards linear in x, F is convex if mu >= 0; sampled demonstrations can break that.

Reference: Zeng, Li, Garcia, Hong. Maximum-likelihood inverse reinforcement learning with finite-time guarantees.
    NeurIPS 2022, arXiv:2210.01282.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Constants, FixedPoint, Full, Minibatch, Reals
from bilevel.sets import Set
from bilevel.struct import invalid
from irl import soft
from irl.demonstrations import Demonstrations
from irl.mdp import MDP
from irl.rewards import LinearReward, Reward

PyTree = Any


class Trajectories(NamedTuple):
    """A batch of trajectories: states, actions [b, T] and the weights n w_i/(sum of w) gamma^t [b, T]."""

    states: Any
    actions: Any
    weights: Any


class Environment(NamedTuple):
    """What the lower level sees."""

    mdp: MDP
    reward: Any


def upper_of_occupancy(x: PyTree, y: Array, c: Array) -> Array:
    """The upper objective f = -<c, log pi_y>, shape []; c [S, A]."""
    return -jnp.sum(c * soft.log_policy(y))


def upper_of_trajectories(x: PyTree, y: Array, batch: Trajectories) -> Array:
    """The mean over b trajectories of -sum_t weights log pi_y(a_t | s_t), shape []: unbiased for f."""
    log_pi = soft.log_policy(y)[batch.states, batch.actions]
    return -jnp.sum(batch.weights * log_pi) / batch.states.shape[0]


def lower_map(x: PyTree, y: Array, batch: Environment) -> Array:
    """The soft Bellman operator T_x y, shape [S, A]."""
    return soft.bellman(batch.mdp, batch.reward.table(x), y)


@functools.cache
def _init(reward_init: Callable, num_states: int, num_actions: int) -> Callable[[Array], tuple[PyTree, Array]]:
    """One function per reward and sizes, so that another instance compiles nothing."""
    return lambda key: (reward_init(key), jnp.zeros((num_states, num_actions), float))


def to_bilevel(
    mdp: MDP,
    demonstrations: Demonstrations | Any,
    reward: Reward,
    *,
    batch_size: int | None = None,
    x_set: Set = Reals(),  # noqa: B008
) -> BilevelProblem:
    """The bilevel problem of this module's docstring, for every solver that takes fixed points.

    Args:
        mdp: with S states and A actions.
        demonstrations: `Demonstrations`, or an expert's discounted occupancy [S, A] where it is known exactly.
        reward: `LinearReward`, `TableReward`, or anything with their two members.
        batch_size: trajectories a batch; default all of them, summed up in one array [S, A] once.
        x_set: where x may be. Demonstrations that never take some action can push its reward to minus infinity: a
            `Ball` or `Box` keeps x finite.

    Raises:
        InvalidInput: naming what does not fit together.
    """
    mdp.validate()
    shape = (mdp.num_states, mdp.num_actions)
    table = jax.eval_shape(lambda: reward.table(reward.init(jax.random.key(0)))).shape
    if table != shape:
        do = "Build the reward for the states and actions of this MDP."
        invalid("reward (to_bilevel)", f"a table of shape {table}", f"shape {shape}, [S, A] of the MDP", do)
    if batch_size is None:
        upper, data = upper_of_occupancy, Full(expert_occupancy(mdp, demonstrations))
    elif isinstance(demonstrations, Demonstrations):
        demonstrations.validate(mdp)
        weights = demonstrations.discounted_weights(mdp.discount)
        trajectories = Trajectories(demonstrations.states, demonstrations.actions, weights)
        upper, data = upper_of_trajectories, Minibatch(trajectories, batch_size)
    else:
        do = "Leave out batch_size, or give Demonstrations."
        invalid("batch_size (to_bilevel)", batch_size, "None for a known occupancy", do)
    return BilevelProblem(
        upper=upper,
        lower=FixedPoint(lower_map),
        x_set=x_set,
        upper_data=data,
        lower_data=Full(Environment(mdp, reward)),
        init=_init(reward.init, *shape),
    )


def expert_occupancy(mdp: MDP, demonstrations: Demonstrations | Any) -> Array:
    """The discounted occupancy c [S, A] of `Demonstrations`, or the array itself.

    Raises:
        InvalidInput: for states or actions that the MDP does not have, or an array that is no occupancy.
    """
    if isinstance(demonstrations, Demonstrations):
        return demonstrations.validate(mdp).occupancy(mdp)
    shape, c = (mdp.num_states, mdp.num_actions), np.asarray(demonstrations)
    expected = f"Demonstrations, or an occupancy of shape {shape} with finite numbers >= 0"
    do = "Use Demonstrations.of, Demonstrations.load, irl.sample, or irl.occupancy of a policy."
    if c.shape != shape or c.dtype.kind not in "fiu":
        got = f"{type(demonstrations).__name__} of shape {c.shape}, dtype {c.dtype}"
        invalid("demonstrations (to_bilevel)", got, expected, do)
    if not (c >= 0).all() or not np.isfinite(c).all():
        got = f"{c[~((c >= 0) & np.isfinite(c))][0]} as an entry"
        invalid("demonstrations (to_bilevel)", got, expected, do)
    return jnp.asarray(c, float)


def start_measure(mdp: MDP, c: Array) -> Array:
    """The measure mu(s') = sum_a c(s', a) - gamma sum c(s, a) P(s' | s, a), shape [S], for c [S, A].

    It is rho where c is the occupancy of a policy from rho; its sum is (1 - gamma) times that of c.
    """
    return jnp.sum(c, axis=1) - mdp.discount * mdp.flow(c)


@jax.jit
def likelihood_gradient(mdp: MDP, c: Array, reward: Reward, x: PyTree, start: Array | None = None) -> PyTree:
    """(d_{pi, start} - c) . grad r, shaped like x, by dynamic programming alone: soft Q, its policy, its occupancy.

    It is grad F of `to_bilevel` for start = `start_measure(mdp, c)`, the default; with start = rho it is the textbook's
    gradient, equal to grad F where c is the occupancy of a policy.
    """
    start = start_measure(mdp, c) if start is None else start
    r, pull = jax.vjp(reward.table, x)
    pi = soft.policy(soft.value_iteration(mdp, r).Q)
    return pull(soft.occupancy(mdp, pi, start) - c)[0]


def constants(mdp: MDP, c: Array, reward: LinearReward) -> Constants:
    """Constants of `to_bilevel` for a linear reward, valid for all x and y: they certify `bilevel.hypergradient`.

    With R = y - T_x y: |R_x| = |features|; f_yy has blocks c(s) (diag pi - pi pi') of norm <= c(s)/2, with c(s) the sum
    over a; R_y = I - gamma P Pi with rows pi in Pi, and pi is 1/2-Lipschitz in y; |P|^2 <= its largest column sum.
    """
    size = mdp.num_states * mdp.num_actions
    gamma, reach = float(mdp.discount), float(jnp.sqrt(jnp.max(mdp.flow(jnp.ones_like(c)))))
    features = np.asarray(reward.features).reshape(size, -1)
    return Constants(
        mu=(1 - gamma) / size**0.5, L_fx=0.0, L_fy=float(jnp.max(jnp.sum(c, axis=1))) / 2, L_gxy=0.0,
        L_gyy=gamma * reach / 2, C_gxy=float(np.linalg.norm(features, 2)), L_g=1 + gamma * reach,
    )  # fmt: skip
