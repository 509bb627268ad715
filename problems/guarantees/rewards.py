"""Rewards: demonstrations that stand for their policy, shaping that changes nothing, networks in their ball.

**Finite samples.** With 0 <= r <= C a whole trajectory pays between 0 and C/(1 - gamma), and one that is cut after T
steps loses at most C gamma^T/(1 - gamma). So Hoeffding's inequality says of n trajectories of one policy and an x that
does not depend on them, with probability at least 1 - LEVEL,

    |L(x) - Lhat(x)| <= C/(1 - gamma) ((log(2/LEVEL)/(2 n))^(1/2) + gamma^T).

LEVEL is that of one test; a search of 200 draws makes some ten thousand.

**Feature-additive shaping.** Features phi(s, a) + gamma E psi(s') - psi(s), psi [S, F], give r + gamma E p(s') - p(s)
with p = psi x, whose solution is Q - p: T commutes with the shift. The policy is the same, and so is the gradient of F
where c is an occupancy from rho: sum c (gamma E p(s') - p(s)) = -<rho, p> for every such c.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import irl
from bilevel import Ball
from bilevel.guarantees import Guarantee
from irl import demonstrations
from irl.rewards import TwoLayer
from irl.tabular import soft, spec
from problems import strategies
from problems.guarantees.instances import EPS, normal
from problems.guarantees.soft import World, bellman_contracts, rounding, world, worlds

LEVEL, LENGTH, WIDTH = 1e-7, 60, 6


class KnownSample(NamedTuple):
    """gamma; C; the size of Q."""

    discount: Array
    largest: Array
    size: Array


class Sampled(NamedTuple):
    """A world and a reward table [S, A] with entries in [0, C], the parameters of a `TableReward`; a key."""

    world: World
    table: Array
    key: Array
    constants: KnownSample


def sampled(
    key: Array, discount: Array, sharp: Array, largest: Array, coin: Array, first: Array
) -> Sampled:  # fmt: skip
    """Rewards are 0 or C where `coin`; where `first`, of the first state alone, which is never left."""
    key, key_r, key_draws = jax.random.split(key, 3)
    zero, one = jnp.zeros(()), jnp.ones(())
    made = world(
        key, discount=discount, sharp=sharp, radius=one, near=zero, constant=jnp.array(False), features=one
    )  # fmt: skip
    S, A = made.expert.shape
    u = jax.random.uniform(key_r, (S, A), float)
    table = largest * jnp.where(coin, jnp.where(u < 0.5, 0.0, 1.0), u)
    table = jnp.where(first, table[:, :1], table)
    stay = jnp.broadcast_to(jnp.eye(S)[:, None], (S, A, S))
    mdp = irl.MDP(jnp.where(first, stay, made.mdp.transitions), made.mdp.start, discount)
    expert = jnp.sum(made.expert, axis=1, keepdims=True)
    expert = soft.occupancy(mdp, made.expert / expert)
    known = KnownSample(discount, largest, 1 + (largest + 1) / (1 - discount))
    return Sampled(made._replace(mdp=mdp, expert=expert), table, key_draws, known)


def contracts(instance: Sampled) -> Array:
    """Assumption: the soft Bellman operator contracts by gamma."""
    return bellman_contracts(instance.world)


def bounded_reward(instance: Sampled) -> Array:
    """Assumption: 0 <= r <= C."""
    largest = instance.constants.largest
    return jnp.minimum(jnp.min(instance.table), largest - jnp.max(instance.table)) + 1e-9 * largest


def finite_sample(occupancy: Callable = demonstrations.Demonstrations.occupancy) -> Guarantee:
    """Lhat of n drawn trajectories against L of their policy, at a fixed x."""

    def measure(instance: Sampled, horizon: tuple[int, ...]) -> Array:
        mdp, c = instance.world.mdp, instance.world.expert
        reward = irl.TableReward(*c.shape)
        Q = soft.value_iteration(mdp, instance.table).Q
        policy = c / jnp.sum(c, axis=1, keepdims=True)

        def L(c: Array) -> Array:
            return -spec.upper_surrogate(instance.table, Q, spec.Scored(spec.Model(mdp, reward), c))

        apart = []
        for n in horizon:
            drawn = demonstrations.sample(mdp, policy, instance.key, num_trajectories=n, length=LENGTH)
            apart.append(jnp.abs(L(occupancy(drawn, mdp)) - L(c)))
        return jnp.stack(apart)

    def bound(known: KnownSample, n: int) -> Array:
        chance = np.sqrt(np.log(2 / LEVEL) / (2 * n))
        return known.largest / (1 - known.discount) * (chance + known.discount**LENGTH)

    drawn = strategies.recipes(
        sampled, discount=strategies.fractions(0.0, 0.9), sharp=strategies.sizes(10.0), largest=strategies.sizes(10.0),
        coin=strategies.booleans, first=strategies.booleans,
    )  # fmt: skip
    return Guarantee(
        "finite-sample", "Hoeffding 1963; Zeng et al.", (contracts, bounded_reward), drawn, measure, bound,
        (2, 8, 32, 128), lambda known: 1e3 * EPS * known.size / (1 - known.discount),
        "|L - Lhat| <= C/(1 - gamma) ((log(2/d)/(2 n))^(1/2) + gamma^T), d = 1e-7, n trajectories of T steps", "power",
        16,
    )  # fmt: skip


def shaped(mdp: irl.MDP, reward: irl.LinearReward, psi: Array) -> irl.LinearReward:
    """Features plus gamma E psi(s') - psi(s)."""
    following = jax.vmap(mdp.expect, in_axes=1, out_axes=2)(psi)
    return irl.LinearReward(reward.features + mdp.discount * following - psi[:, None, :])


def shaping(shape: Callable = shaped) -> Guarantee:
    """Policy, Q and gradient with shaped features."""

    def measure(instance: World, horizon: tuple[int, ...]) -> Array:
        mdp, reward, x = instance.mdp, instance.reward, instance.x
        psi = jax.random.normal(jax.random.key(6), (instance.Q1.shape[0], x.size), float) * (1 + instance.Q1[:, :1])
        other = shape(mdp, reward, psi)
        Q, Q2 = (soft.value_iteration(mdp, made.table(x)).Q for made in (reward, other))
        apart = jnp.max(jnp.abs(Q2 - Q + (psi @ x)[:, None]))
        policies = jnp.max(jnp.abs(soft.policy(Q2) - soft.policy(Q)))
        gradients = [irl.likelihood_gradient(mdp, instance.expert, made, x, mdp.start) for made in (reward, other)]
        size = (1 + jnp.max(jnp.abs(psi))) * (1 + instance.constants.features) / (1 - mdp.discount)
        return jnp.stack([apart, policies, jnp.linalg.norm(gradients[0] - gradients[1])])[None, :] / size

    return Guarantee(
        "shaping", "Ng et al. 1999; ours", (bellman_contracts,), worlds, measure, lambda known, k: jnp.zeros(3), (1,),
        lambda known: 1e2 * rounding(known) * (1 + known.radius),
        "features + gamma E psi(s') - psi(s): Q - psi x, the same policy, the same gradient of F",
    )  # fmt: skip


class KnownBall(NamedTuple):
    """B; the scale; |x - x2|; gamma; log A; the size of the numbers."""

    radius: Array
    scale: Array
    moved: Array
    discount: Array
    log_actions: Array
    size: Array


class Network(NamedTuple):
    """An MDP, a network's reward, and x, x2 of the ball."""

    mdp: irl.MDP
    reward: irl.TwoLayerReward
    x: Array
    x2: Array
    constants: KnownBall


def network(
    key: Array, discount: Array, sharp: Array, radius: Array, scale: Array, far: Array, near: Array, aligned: Array
) -> Network:  # fmt: skip
    """A network with x, x2 projected on the ball from about `far` radii away; x is along the units where `aligned`."""
    keys = iter(jax.random.split(key, 8))
    S, A, d = 4, 3, 4
    P = jax.nn.softmax(sharp * normal(next(keys), S, A, S), axis=-1)
    inputs = normal(next(keys), S, A, d)
    inputs = inputs / jnp.linalg.norm(inputs, axis=-1, keepdims=True)
    weights = normal(next(keys), WIDTH // 2, d)
    half = jnp.broadcast_to(inputs[0, 0], (WIDTH // 2, d))
    D = jnp.where(aligned, jnp.stack([half, -half]), normal(next(keys), 2, WIDTH // 2, d))
    ball = Ball(radius)
    x = ball.project(far * radius * D)
    x2 = ball.project(x + near * radius * normal(next(keys), *D.shape))
    reward = irl.TwoLayerReward(TwoLayer(weights), inputs, scale)
    mdp = irl.MDP(P, jnp.full(S, 1 / S), discount)
    top = 1 + scale * radius * (1 + far)
    known = KnownBall(radius, scale, jnp.linalg.norm((x - x2).ravel()), discount, jnp.log(jnp.asarray(float(A))), top)
    return Network(mdp, reward, x, x2, known)


def network_ball(solve: Callable = soft.value_iteration) -> Guarantee:
    """What the ball says about a two-layer network near its initialisation, and about the solution of its reward."""

    def measure(instance: Network, horizon: tuple[int, ...]) -> Array:
        r, r2 = (instance.reward.table(x) for x in (instance.x, instance.x2))
        Q, Q2 = (solve(instance.mdp, table).Q for table in (r, r2))
        largest = lambda part: jnp.max(jnp.abs(part))  # noqa: E731
        return jnp.stack([largest(r), largest(r - r2), jnp.max(Q), -jnp.min(Q), largest(Q - Q2)])[None, :]

    def bound(known: KnownBall, k: int) -> Array:
        top, far, moved = known.scale * known.radius, 1 - known.discount, known.scale * known.moved
        return jnp.stack([top, moved, (top + known.discount * known.log_actions) / far, top / far, moved / far])

    drawn = strategies.recipes(
        network, discount=strategies.fractions(0.0, 0.99), sharp=strategies.sizes(), radius=strategies.sizes(10.0),
        scale=strategies.sizes(), far=strategies.sizes(10.0), near=strategies.sizes(), aligned=strategies.booleans,
    )  # fmt: skip
    return Guarantee(
        "reward-ball-network", "ours, irl.rewards", (), drawn, measure, bound, (1,),
        lambda known: 1e3 * EPS * known.size / (1 - known.discount) ** 2,
        "|r| <= scale B, |r - r'| <= scale |x - x'|; Q* between -scale B/(1 - gamma) and (scale B + gamma log A)/(1 - "
        "gamma), and Lipschitz",
    )  # fmt: skip


FINITE_SAMPLE = finite_sample()
SHAPING = shaping()
NETWORK_BALL = network_ball()
