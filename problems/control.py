"""Deep control: a reward from few episodes of an expert, in an environment that can only be stepped; networks.

The expert is trained by soft actor-critic on the true reward, once in a run, and shows `trajectories` episodes of its
best actions. The problem is `irl.to_control`: x the reward's network, y policy and soft values, f the negative
log-likelihood of the demonstrated actions; for the solvers of `irl` that step environments. Nothing of such a lower
level can be certified: runs are measured by `irl.deep.control.measure`.

Metrics, by 50 episodes of the last policy's best actions: `return`, and `scaled_return`, 0 for uniformly random actions
and 1 for the expert.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import irl
from bilevel.backend.checks import is_count
from bilevel.struct import invalid
from irl.deep import expert, rollouts
from irl.deep.control import REFEREE
from irl.deep.environments import GYMNAX, Environment
from irl.deep.sac import SAC, Weights
from problems.instance import Instance

PyTree = Any
EPISODES = 50


def learner_of(name: str) -> SAC:
    """The agent that learns by imitation in an environment, with the settings that docs/irl.md measures."""
    if name in GYMNAX:
        return SAC(hidden=(64, 64), batch_size=128)
    return SAC(hidden=(128, 128), batch_size=128, learning_rate=5e-4)


@functools.cache
def environment_of(name: str) -> Environment:
    """The environment of a name, made once a process."""
    return irl.make(name)


@functools.cache
def _teacher(name: str, steps: int, precision: str) -> Weights:
    """The expert's policy; the precision is part of the key, since arrays of another would not fit."""
    environment = environment_of(name)
    return expert.train(
        environment, jax.random.key(0), agent=expert.agent_of(environment, name), num_steps=steps
    ).weights


@functools.partial(jax.jit, static_argnames="num")
def _random_returns(environment: Environment, key: jax.Array, num: int) -> jax.Array:
    return rollouts.episodes(environment, rollouts.uniform(environment), key, num).returns


class Teacher(NamedTuple):
    """An expert: what it is and what it has learnt."""

    agent: SAC
    weights: Weights


def recovery(
    world: Environment,
    teacher: Teacher,
    agent: SAC,
    *,
    seed: int,
    trajectories: int,
    state_only: bool = False,
    absorbing: bool = False,
) -> Instance:
    """Imitate `trajectories` episodes of a teacher's best actions in `world`; the rest is as in `make`.

    Args:
        world: in which the teacher acts.
        teacher: whom to imitate.
        agent: the one that learns.
        seed: >= 0, of the demonstrated episodes.
        trajectories: demonstrated episodes, >= 1.
        state_only: a reward r(s) instead of r(s, a).
        absorbing: learn the reward behind an end, too.
    """
    key_shown, key_played, key_random = jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 3)
    shown = expert.demonstrate(world, *teacher, key_shown, num=trajectories)
    learnt = irl.Absorbing(world) if absorbing else world

    def returns(world: Environment, agent: SAC, weights: Weights) -> float:
        return float(jnp.mean(expert.play(world, agent, weights, key_played, num=EPISODES).returns))

    goal = returns(world, *teacher)
    floor = float(jnp.mean(_random_returns(world, key_random, EPISODES)))

    def numbers(reached: float) -> dict[str, float]:
        return {"return": reached, "scaled_return": (reached - floor) / (goal - floor)}

    return Instance(
        irl.to_control(learnt, shown, irl.DeepReward(state_only=state_only), agent=agent),
        tags=frozenset({"irl", "fixed-point", "deep"}),
        metrics=lambda x, y: numbers(returns(learnt, agent, y)),
        baselines={"expert": lambda: numbers(goal), "random actions": lambda: numbers(floor)},
        referee=REFEREE,
    )


def make(
    seed: int = 0,
    environment: str = "CartPole-v1",
    trajectories: int = 1,
    state_only: bool = False,
    absorbing: bool = False,
    expert_steps: int | None = None,
    hidden: int | None = None,
) -> Instance:
    """Demonstrations of a trained expert.

    Args:
        seed: >= 0, of the demonstrated episodes.
        environment: of `irl.make`.
        trajectories: demonstrated episodes, >= 1.
        state_only: a reward r(s) instead of r(s, a).
        absorbing: learn the reward behind an end, too.
        expert_steps: environment steps of the expert's training, a multiple of 1000; default what is enough as a rule.
        hidden: units of each of the two hidden layers of policy and values; default those of `learner_of`.

    Raises:
        InvalidInput: an unknown environment, or a number out of its range.
    """
    for name, number in (("trajectories", trajectories), ("hidden", 1 if hidden is None else hidden)):
        if not is_count(number, 1):
            invalid(f"{name} (control)", number, "a whole number >= 1", "Give a count.")
    world, precision = environment_of(environment), str(jnp.zeros((), float).dtype)
    steps = expert.steps_of(environment) if expert_steps is None else expert_steps
    teacher = Teacher(expert.agent_of(world, environment), _teacher(environment, steps, precision))
    agent = learner_of(environment)
    agent = agent if hidden is None else dataclasses.replace(agent, hidden=(hidden, hidden))
    chosen = {"seed": seed, "trajectories": trajectories, "state_only": state_only, "absorbing": absorbing}
    return recovery(world, teacher, agent, **chosen)
