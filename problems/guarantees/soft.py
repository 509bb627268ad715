"""Soft dynamic programming and maximum-likelihood IRL on random MDPs, against exact solutions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import irl
from bilevel.guarantees import Guarantee
from bilevel.theory import assumptions
from irl.tabular import soft
from problems import strategies
from problems.guarantees.instances import EPS, normal

S, A, F = 4, 3, 3


class KnownMDP(NamedTuple):
    """gamma; max |r|; max |features| in the 2-norm; |x|; the number of actions; max |Q1|, |Q1 - Q2|; |x1 - x2|."""

    discount: Array
    reward: Array
    features: Array
    radius: Array
    num_actions: Array
    table: Array
    apart: Array
    moved: Array


class World(NamedTuple):
    """An MDP, a linear reward with parameters x and x2, two tables Q1, Q2 [S, A], and an expert's occupancy."""

    mdp: irl.MDP
    reward: irl.LinearReward
    x: Array
    x2: Array
    Q1: Array
    Q2: Array
    expert: Array
    constants: KnownMDP


def world(
    key: Array, discount: Array, sharp: Array, radius: Array, near: Array, constant: Array, features: Array
) -> World:
    """Random transitions exp(sharp normal), ergodic since all are positive; |x| = radius, |x2 - x| = near radius.

    Where `constant`, Q2 - Q1 is the same in each entry, which attains the contraction.
    """
    keys = iter(jax.random.split(key, 10))
    P = jax.nn.softmax(sharp * normal(next(keys), S, A, S), axis=-1)
    start = jax.nn.softmax(sharp * normal(next(keys), S))
    table = features * normal(next(keys), S, A, F)
    x, move, Q1, gap = (normal(next(keys), *shape) for shape in ((F,), (F,), (S, A), (S, A)))
    x = radius * x / jnp.linalg.norm(x)
    x2 = x + near * radius * move / jnp.linalg.norm(move)
    Q1 = radius * Q1
    Q2 = Q1 + radius * jnp.where(constant, jnp.ones((S, A)), gap)
    mdp, reward = irl.MDP(P, start, discount), irl.LinearReward(table)
    expert = soft.occupancy(mdp, jax.nn.softmax(sharp * normal(next(keys), S, A), axis=-1))
    r = reward.table(x)
    known = KnownMDP(
        discount, jnp.max(jnp.abs(r)), jnp.max(jnp.linalg.norm(table, axis=-1)), radius, jnp.asarray(float(A)),
        jnp.max(jnp.abs(Q1)), jnp.max(jnp.abs(Q1 - Q2)), jnp.linalg.norm(x2 - x),
    )  # fmt: skip
    return World(mdp, reward, x, x2, Q1, Q2, expert, known)


worlds = strategies.recipes(
    world, discount=strategies.fractions(0.0, 0.99), sharp=strategies.sizes(10.0), radius=strategies.sizes(10.0),
    near=strategies.sizes(), constant=strategies.booleans, features=strategies.sizes(),
)  # fmt: skip


def exact(mdp: irl.MDP, r: Array, start: Array | None = None, rounds: int = 60) -> Array:
    """Q* by Newton's method (soft policy iteration) on Q = r + gamma P logsumexp Q, dense; quadratic convergence."""

    def body(_: int, Q: Array) -> Array:
        pi = jax.nn.softmax(Q, axis=-1)
        entropy = -jnp.sum(pi * jax.nn.log_softmax(Q, axis=-1), axis=-1)
        moves = jnp.einsum("sa,sat->st", pi, mdp.transitions)
        V = jnp.linalg.solve(jnp.eye(S) - mdp.discount * moves, jnp.sum(pi * r, axis=-1) + entropy)
        return r + mdp.discount * jnp.einsum("sat,t->sa", mdp.transitions, V)

    return jax.lax.fori_loop(0, rounds, body, jnp.zeros_like(r) if start is None else start)


def bellman_contracts(instance: World) -> Array:
    """Assumption: the Jacobian of T at Q1 has maximum-norm at most gamma < 1."""
    r = instance.reward.table(instance.x)
    return assumptions.contraction(lambda Q: soft.bellman(instance.mdp, r, Q), instance.Q1, instance.constants.discount)


def rounding(known: KnownMDP) -> Array:
    """Of values of the size (max |r| + log A)/(1 - gamma)."""
    return 1e2 * EPS * (1 + known.reward + known.radius + known.apart) / (1 - known.discount) ** 2


def bellman(operator: Callable = soft.bellman) -> Guarantee:
    """Soft Bellman sweeps: two tables approach each other, and Q*, like gamma^k."""

    def measure(instance: World, horizon: tuple[int, ...]) -> Array:
        mdp, r = instance.mdp, instance.reward.table(instance.x)
        Q_star = exact(mdp, r)

        def segment(carry: Any, count: Array) -> Any:
            sweep = lambda _, pair: tuple(operator(mdp, r, Q) for Q in pair)  # noqa: E731
            carry = jax.lax.fori_loop(0, count, sweep, carry)
            return carry, jnp.stack([jnp.max(jnp.abs(carry[0] - carry[1])), jnp.max(jnp.abs(carry[0] - Q_star))])

        return jax.lax.scan(segment, (instance.Q1, instance.Q2), jnp.diff(jnp.array((0, *horizon))))[1]

    def bound(known: KnownMDP, k: int) -> Array:
        away = known.table + (known.reward + jnp.log(known.num_actions)) / (1 - known.discount)  # >= |Q1 - Q*|
        return known.discount**k * jnp.stack([known.apart, away])

    return Guarantee(
        "soft-bellman", "Haarnoja et al. 2017", (bellman_contracts,), worlds,
        measure, bound, (1, 2, 5, 10, 20, 50), rounding,
        "max |T^k Q1 - T^k Q2| <= gamma^k max |Q1 - Q2|, and max |T^k Q1 - Q*| likewise", "geometric",
    )  # fmt: skip


def value_iteration(solve: Callable = soft.value_iteration) -> Guarantee:
    """The certificate of value iteration, at several tolerances 10^-k."""

    def measure(instance: World, horizon: tuple[int, ...]) -> Array:
        mdp, r = instance.mdp, instance.reward.table(instance.x)
        Q_star, known = exact(mdp, r), instance.constants
        found = [solve(mdp, r, instance.Q1, tol=10.0**-k) for k in horizon]
        return jnp.stack([jnp.max(jnp.abs(s.iterate - Q_star)) / (s.error + rounding(known)) for s in found])

    return Guarantee(
        "soft-value-iteration",
        "Puterman 1994, 6.3.1",
        (bellman_contracts,),
        worlds,
        measure,
        lambda known, k: jnp.ones(()),
        (1, 4, 8),
        lambda known: 0.0,
        "max |Q - Q*| <= the error that it reports, stopped at tolerances 10^-k",
    )


def reward_ball(solve: Callable = soft.value_iteration) -> Guarantee:
    """What |x| <= B says about a linear reward's solution: T is monotone and T(Q + c) = T Q + gamma c."""

    def measure(instance: World, horizon: tuple[int, ...]) -> Array:
        mdp, reward = instance.mdp, instance.reward
        Q, Q2 = (solve(mdp, reward.table(x)).Q for x in (instance.x, instance.x2))
        change = jnp.max(jnp.abs(soft.log_policy(Q) - soft.log_policy(Q2)))
        return jnp.stack([jnp.max(Q), -jnp.min(Q), jnp.max(jnp.abs(Q - Q2)), change])[None, :]

    def bound(known: KnownMDP, k: int) -> Array:
        top, far = known.radius * known.features, 1 - known.discount
        change = known.moved * known.features / far
        return jnp.stack([(top + known.discount * jnp.log(known.num_actions)) / far, top / far, change, 2 * change])

    return Guarantee(
        "reward-ball",
        "ours",
        (bellman_contracts,),
        worlds,
        measure,
        bound,
        (1,),
        rounding,
        "-B L/(1 - gamma) <= Q* <= (B L + gamma log A)/(1 - gamma); Q* is L/(1 - gamma)-Lipschitz, log pi twice that",
    )


def likelihood(gradient: Callable = irl.likelihood_gradient) -> Guarantee:
    """ML-IRL with a linear reward: F is convex, its gradient bounded."""

    def measure(instance: World, horizon: tuple[int, ...]) -> Array:
        mdp, reward, c = instance.mdp, instance.reward, instance.expert

        def F(x: Array) -> Array:
            return -jnp.sum(c * soft.log_policy(soft.value_iteration(mdp, reward.table(x)).Q))

        at, at2 = (gradient(mdp, c, reward, x) for x in (instance.x, instance.x2))
        tangent = F(instance.x) + at @ (instance.x2 - instance.x) - F(instance.x2)  # <= 0: convex
        return jnp.stack([tangent, -(at2 - at) @ (instance.x2 - instance.x), jnp.linalg.norm(at)])[None, :]

    def bound(known: KnownMDP, k: int) -> Array:
        return jnp.stack([jnp.zeros(()), jnp.zeros(()), 2 * known.features / (1 - known.discount)])

    return Guarantee(
        "ml-irl-linear", "Zeng et al. 2022; irl.spec", (bellman_contracts,), worlds, measure, bound, (1,),
        lambda known: 1e2 * rounding(known) * (1 + known.features) / (1 - known.discount),
        "F = -Lhat is convex: above its tangents, gradient monotone; |grad F| <= 2 max |features|/(1 - gamma)",
    )  # fmt: skip


BELLMAN = bellman()
VALUE_ITERATION = value_iteration()
REWARD_BALL = reward_ball()
LIKELIHOOD = likelihood()
