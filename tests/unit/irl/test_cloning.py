"""Behavioural cloning: what it fits, and what counts as a demonstrated action."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
from bilevel.struct import static, struct
from irl.deep import environments


@struct
class Line(environments.Environment):
    """A number around 300 that the action moves; 1 away from there the episode terminates."""

    max_steps: int = static(default=6)
    observation_size = 1
    num_actions = None
    action_size = 1

    def reset(self, key):
        return jnp.zeros(()), jnp.full(1, 300.0)

    def step(self, state, action, key):
        after = state + action[0]
        t = environments.Timestep(300 + after[None], jnp.ones(()), jnp.abs(after) > 1, jnp.array(False))
        return after, t


def test_cloning_finds_the_counted_policy(key):
    """Discrete actions, a table as the network: the softmax goes to the demonstrations' frequencies."""
    mdp = irl.MDP.dense(np.full((2, 2, 2), 0.5), start=np.full(2, 0.5), discount=0.9)
    world = irl.Tabular(mdp, jnp.zeros((2, 2)), max_steps=5)
    states, actions = np.array([[0, 0, 0, 0, 1]]), [[0, 1, 1, 1, 0]]
    given = irl.Demonstrations.of(np.eye(2)[states], actions, last=np.eye(2)[[1]], terminated=[False])
    p = irl.to_control(world, given, agent=irl.SAC(hidden=(), learning_rate=0.004, batch_size=300))
    solver = irl.BC(num_lower_steps=600, num_env_steps=100, block=50)
    state, _ = jax.jit(solver.lower)(p, jax.jit(solver.init)(p, key), key)
    pi = np.exp(p.agent.log_policy(state.y, jnp.eye(2)))
    np.testing.assert_allclose(pi[0], [0.25, 0.75], atol=0.03)
    assert pi[1, 0] > 0.95


def test_doing_nothing_is_an_action():
    """Every demonstrated step is in the likelihood, also where the action is 0; the absorbed one is not."""
    world, observations = irl.Absorbing(Line()), np.random.default_rng(0).normal(size=(1, 6, 1))
    still = irl.Demonstrations.of(observations, np.zeros((1, 6, 1)), last=[[302.0]], terminated=[True])
    p = irl.to_control(world, still, agent=irl.SAC(hidden=(8,)))
    x, y = p.init(jax.random.key(0))
    seen = jnp.asarray(np.pad(observations[0], [(0, 0), (0, 1)]))
    mean = p.agent.log_prob(y, seen, jnp.zeros((6, 1))).mean()
    np.testing.assert_allclose(p.upper(x, y, p.upper_data.full()), -mean, rtol=1e-12)


def test_actions_at_the_bounds_and_observations_of_any_unit(key):
    """Half of the actions at the bound, observations around 300: the best action is the demonstrated one."""
    observations = 300 + np.random.default_rng(0).normal(size=(4, 50, 1))
    actions = np.where(observations > 300, 1.0, -0.5)
    given = irl.Demonstrations.of(observations, actions, last=np.full((4, 1), 300.0), terminated=[False] * 4)
    world = Line(max_steps=50)
    p = irl.to_control(world, given, agent=irl.SAC(hidden=(32,), learning_rate=0.01, batch_size=100))
    solver = irl.BC(num_lower_steps=600, num_env_steps=100)
    state, losses = jax.jit(lambda p, key: solver.lower(p, solver.init(p, key), key))(p, key)
    assert np.isfinite(losses.entropy)
    seen = np.array([[298.5], [299.5], [300.5], [301.5]])
    np.testing.assert_allclose(p.agent.mode(state.y, jnp.asarray(seen))[:, 0], [-0.5, -0.5, 1, 1], atol=0.06)


def test_the_name_of_the_loss():
    with pytest.raises(bilevel.InvalidInput, match=r"loss .BC.: got 'huber'"):
        irl.BC(loss="huber")
