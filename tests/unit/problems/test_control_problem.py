"""The family `control`: demonstrations of a trained expert as a problem; frozen rewards in another world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import irl
import problems
from benchmarks.experiments.transfer_control import Frozen, in_world
from bilevel import InvalidInput
from irl.deep import expert
from irl.deep.sac import Batch
from problems import control


def test_an_instance_scores_policies_between_random_actions_and_the_expert():
    """A process of two states: state 1 pays, and its own action leads there."""
    mdp = irl.MDP.dense(np.eye(2)[[[0, 1], [0, 1]]], start=[1.0, 0.0], discount=0.9)
    world = irl.Tabular(mdp, jnp.array([[0.0, 0.0], [1.0, 1.0]]), max_steps=10)
    agent = irl.SAC(hidden=(8,), batch_size=16, learning_rate=0.01, discount=0.9)
    teacher = control.Teacher(agent, expert.train(world, jax.random.key(0), agent=agent, num_steps=1000).weights)
    learner = irl.SAC(hidden=(8, 8), batch_size=128, learning_rate=5e-4)
    instance = control.recovery(world, teacher, learner, seed=0, trajectories=1)
    problem = instance.problem.validate()
    assert instance.baselines["random actions"]()["scaled_return"] == 0
    best = instance.baselines["expert"]()
    assert (best["return"], best["scaled_return"]) == (9, 1)  # in state 1 from the second step on
    x, y = problem.init(jax.random.key(0))
    score = instance.metrics(x, y)
    assert 0 <= score["return"] <= 9
    steps = problem.demonstrations
    np.testing.assert_array_equal(steps.action[0, :, 1], np.ones(10))
    # Frozen: the reward of a method where another process is stepped, without AIRL's shaping, or the true one.
    flat = steps.flat
    batch = Batch(flat.observation, flat.action, flat.next_observation, jnp.arange(10.0), flat.terminated)
    moved = in_world(problem, irl.Tabular(mdp, jnp.ones((2, 2)), max_steps=5))
    source = irl.AIRL(num_random=10, capacity=20).init(problem, jax.random.key(1))
    frozen = Frozen(solver=irl.AIRL(num_random=10, capacity=20), source=source)
    np.testing.assert_array_equal(frozen.reward(moved, source, batch), problem.rewards(source.x, batch))
    np.testing.assert_array_equal(Frozen().reward(moved, source, batch), batch.reward)
    assert moved.environment.max_steps == 5


def test_what_is_out_of_range_is_named():
    with pytest.raises(InvalidInput, match=r"trajectories .control.: got 0"):
        problems.make("control", trajectories=0)
