"""ML-IRL in the tabular case: both means fall like K^(-1/2), with explicit constants (our derivation).

One sweep a step, exact occupancies, a reward linear in x with |features| <= L, demonstrations that are the occupancy of
a policy. With delta_k = max |Q_k - Q*(x_k)|, the direction d_k is at most 2 L/(1 - gamma), and Q* is L/(1 - gamma)-
Lipschitz in x, so that with the constant step a

    delta_{k+1} <= gamma delta_k + a s,    s = 2 L^2/(1 - gamma)^2,
    max |log pi_{k+1} - log pi_{x_k}| <= 2 gamma delta_k,

hence mean_k max |log pi_{k+1} - log pi_{x_k}| <= 2 gamma (delta_0/K + a s)/(1 - gamma). The 1-norm of a softmax changes
by at most the maximum norm of its argument, and that of a discounted occupancy by (1 - gamma)^-2 times the policy's: so
d_k is within b delta_k of grad F(x_k), b = L gamma/(1 - gamma)^2, and grad F is L^2/(1 - gamma)^3-Lipschitz. For
a <= (1 - gamma)^3/L^2 the descent lemma with an inexact gradient gives

    mean_k |grad F(x_k)|^2 <= 2 F(x_0)/(a K) + b^2 (2 delta_0^2/((1 - gamma^2) K) + 2 a^2 s^2/(1 - gamma)^2),   F >= 0.

a = min(a_0 K^(-1/2), (1 - gamma)^3/L^2) makes both O(K^(-1/2)).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import irl
from bilevel import Full
from bilevel.guarantees import Guarantee
from irl.tabular import soft, spec
from problems import strategies
from problems.guarantees.instances import EPS
from problems.guarantees.soft import World, bellman_contracts, exact, world

HORIZON = (4, 16, 64)


class KnownLearning(NamedTuple):
    """gamma; L; delta_0; F(x_0); a_0; the size of Q."""

    discount: Array
    features: Array
    delta: Array
    value: Array
    step: Array
    size: Array


class Learning(NamedTuple):
    """A world, the table Q_0 = Q1 of it, and what is known."""

    world: World
    constants: KnownLearning


def learning(key: Array, step: Array, **numbers: Array) -> Learning:
    """A random world with the step a_0."""
    made = world(key, constant=jnp.array(False), near=jnp.zeros(()), **numbers)
    Q = exact(made.mdp, made.reward.table(made.x))
    value = -jnp.sum(made.expert * soft.log_policy(Q))
    size = 1 + jnp.max(jnp.abs(Q)) + jnp.max(jnp.abs(made.Q1))
    known = KnownLearning(
        made.constants.discount, made.constants.features, jnp.max(jnp.abs(made.Q1 - Q)), value, step, size
    )
    return Learning(made, known)


def contracts(instance: Learning) -> Array:
    """Assumption: the soft Bellman operator contracts by gamma."""
    return bellman_contracts(instance.world)


def step_size(known: KnownLearning, K: int) -> Array:
    """The step a of the module's docstring."""
    least = 1e-300  # where all features are zero any step does
    return jnp.minimum(known.step / K**0.5, (1 - known.discount) ** 3 / jnp.maximum(known.features**2, least))


def ml_irl(make: Callable[..., Any] = irl.MLIRL) -> Guarantee:
    """One run for each K of the horizon."""

    def measure(instance: Learning, horizon: tuple[int, ...]) -> Array:
        mdp, reward, c = instance.world.mdp, instance.world.reward, instance.world.expert
        problem = irl.TabularImitation(mdp=mdp, reward=reward, demonstrations=Full(c), init=spec.start(mdp, reward))
        key, rows = jax.random.key(0), []
        for K in horizon:
            solver = make(upper_step_size=step_size(instance.constants, K))

            def body(state: Any, _: Any, solver: Any = solver) -> Any:
                after = solver.step(problem, state, key)[0]
                best = exact(mdp, reward.table(state.x), state.y, 10)
                apart = jnp.max(jnp.abs(soft.log_policy(after.y) - soft.log_policy(best)))
                d = soft.occupancy(mdp, soft.policy(best))
                gradient = jnp.einsum("sa,saf->f", d - c, reward.features)
                return after, (apart, gradient @ gradient, jnp.linalg.norm(after.x - state.x))

            state = solver.init(problem, key)._replace(x=instance.world.x, y=instance.world.Q1)
            apart, squares, moved = jax.lax.scan(body, state, None, length=K)[1]
            rows.append(jnp.stack([jnp.mean(apart), jnp.mean(squares), jnp.max(moved)]))
        return jnp.stack(rows)

    def bound(known: KnownLearning, K: int) -> Array:
        gamma, L, far = known.discount, known.features, 1 - known.discount
        a, s, b = step_size(known, K), 2 * L**2 / far**2, L * gamma / far**2
        apart = 2 * gamma * (known.delta / K + a * s) / far
        inexact = 2 * known.delta**2 / ((1 - gamma**2) * K) + 2 * (a * s / far) ** 2
        return jnp.stack([apart, 2 * known.value / (a * K) + b**2 * inexact, 2 * a * L / far])

    def rounding(known: KnownLearning) -> Array:
        far = 1 - known.discount
        return 1e3 * EPS * known.size * (1 + known.features) ** 2 * (1 + known.step) / far**4

    drawn = strategies.recipes(
        learning, step=strategies.scales(), discount=strategies.fractions(0.0, 0.95), sharp=strategies.sizes(10.0),
        radius=strategies.sizes(10.0), features=strategies.sizes(),
    )  # fmt: skip
    return Guarantee(
        "ml-irl", "ours, after Zeng et al. 2022", (contracts,), drawn, measure, bound, HORIZON, rounding,
        "means over K steps of max |log pi_{k+1} - log pi_{x_k}| and |grad F(x_k)|^2, O(K^-1/2); largest step of x",
        "power",
    )  # fmt: skip


ML_IRL = ml_irl()
