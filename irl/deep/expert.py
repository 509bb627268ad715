"""Experts: an agent trained by SAC on the true reward, and demonstrations of it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.struct import invalid
from irl.deep import rollouts
from irl.deep.environments import GYMNAX, Absorbing, Environment
from irl.deep.rollouts import Memory, Practice, Steps
from irl.deep.sac import SAC, Learner, Weights
from irl.demonstrations import Demonstrations


class Expert(NamedTuple):
    """What `train` returns."""

    weights: Weights
    """The best policy that was measured."""
    returns: list[float]
    """The mean return of five episodes after each chunk."""


def agent_of(environment: Environment, name: str) -> SAC:
    """Settings that train an expert: small networks for classic control, 2 x 256 for MuJoCo; see docs/irl.md."""
    hidden, batch_size = ((64, 64), 128) if name in GYMNAX else ((256, 256), 256)
    if environment.num_actions is not None:  # a tuned temperature keeps a discrete policy too random to excel
        return SAC(temperature=0.2, target_rate=0.02, hidden=hidden, batch_size=batch_size)
    return SAC(tuned=True, hidden=hidden, batch_size=batch_size)


def steps_of(name: str) -> int:
    """Environment steps that are enough as a rule."""
    return {"Pendulum-v1": 10_000, "CartPole-v1": 20_000}.get(name, 50_000 if name in GYMNAX else 300_000)


def on_true_reward(agent: SAC) -> Callable[[Learner, Memory, Array], tuple[Learner, Any]]:
    """An update of SAC as `rollouts.practise` takes it."""

    def update(learner: Learner, memory: Memory, key: Array) -> tuple[Learner, Any]:
        key_draw, key_update = jax.random.split(key)
        return agent.update(learner, memory.draw(key_draw, agent.batch_size), key_update)

    return update


@partial(jax.jit, static_argnames=("num_lanes", "capacity", "num_random"))
def _begin(environment: Environment, agent: SAC, key: Array, **sizes: int) -> Practice:
    return rollouts.begin(environment, agent, key, **sizes)


@partial(jax.jit, static_argnames=("num_steps", "num_updates", "block"), donate_argnums=2)
def _chunk(environment: Environment, agent: SAC, practice: Practice, key: Array, **sizes: int) -> Practice:
    return rollouts.practise(environment, agent, practice, key, on_true_reward(agent), **sizes)[0]


@partial(jax.jit, static_argnames=("num", "best"))
def play(environment: Environment, agent: SAC, weights: Weights, key: Array, *, num: int, best: bool = True) -> Steps:
    """`num` whole episodes [num, max_steps + 1] of the policy: its mode where `best`, else sampled from it."""
    act = (lambda observation, key: agent.mode(weights, observation)) if best else partial(agent.sample, weights)
    return rollouts.episodes(environment, act, key, num)


def train(
    environment: Environment,
    key: Array,
    *,
    agent: SAC = SAC(tuned=True),  # noqa: B008
    num_steps: int = 20_000,
    chunk: int = 1000,
    lanes: int = 1,
    block: int = 50,
    num_random: int = 1000,
    callback: Callable[[int, float], Any] | None = None,
) -> Expert:
    """The best policy that SAC meets in `num_steps` steps, an update for each, by five episodes after each chunk.

    `callback(steps, return)` hears of each.

    Raises:
        InvalidInput: where the sizes do not divide each other.
    """
    if chunk % (block * lanes) or num_steps % chunk:
        got, want = (num_steps, chunk, block, lanes), "num_steps a multiple of chunk, chunk one of block * lanes"
        invalid("num_steps, chunk, block, lanes (irl.expert.train)", got, want, "Round them.")
    key_begin, key_run, key_play = jax.random.split(key, 3)
    begin = {"num_lanes": lanes, "capacity": num_steps + num_random, "num_random": num_random}
    practice = _begin(environment, agent, key_begin, **begin)
    best, returns = practice.learner.weights, []
    for k in range(num_steps // chunk):
        sizes = {"num_steps": chunk, "num_updates": chunk, "block": block}
        practice = _chunk(environment, agent, practice, jax.random.fold_in(key_run, k), **sizes)
        weights = practice.learner.weights
        seen = play(environment, agent, weights, jax.random.fold_in(key_play, k), num=5)
        returns.append(float(jnp.mean(seen.returns)))
        if returns[-1] >= max(returns):
            best = jax.tree.map(np.asarray, weights)
        if callback is not None:
            callback((k + 1) * chunk, returns[-1])
    return Expert(best, returns)


def demonstrate(
    environment: Environment, agent: SAC, weights: Weights, key: Array, *, num: int, best: bool = True
) -> Demonstrations:
    """`num` whole episodes of a policy, by its mode or sampled, with returns."""
    if isinstance(environment, Absorbing):
        do = "Demonstrations know where they end: make them without it; to_control adds it."
        invalid("environment (irl.expert.demonstrate)", "Absorbing", "an environment without absorbing state", do)
    steps = jax.tree.map(np.asarray, play(environment, agent, weights, key, num=num, best=best))
    lengths = steps.inside.sum(axis=1)
    T, rows = lengths.max(), np.arange(num)
    actions = steps.action if environment.num_actions is None else steps.action.argmax(axis=-1)
    return Demonstrations.of(
        steps.observation[:, :T], actions[:, :T], lengths, None, steps.next_observation[rows, lengths - 1],
        steps.terminated[rows, lengths - 1], np.asarray(steps.returns),
    )  # fmt: skip
