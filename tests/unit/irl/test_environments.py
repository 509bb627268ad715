"""Real environments behind the protocol: gymnax inside jit, Gymnasium's MuJoCo through a pure callback."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
from irl.deep import environments, rollouts

needs_gymnax = pytest.mark.skipif(sys.version_info >= (3, 12), reason="gymnax 1.0.1 needs jax < 0.12, and so 3.11")


def alive(observation, key):
    return jnp.broadcast_to(jnp.array([0.0, 1.0]), (len(observation), 2))


@needs_gymnax
class TestGymnax:
    def test_cartpole_is_gymnasiums(self, key):
        """The same start and actions in both packages: the same path, ended at the same step as terminated."""
        gymnasium = pytest.importorskip("gymnasium")
        world, other = irl.make("CartPole-v1"), gymnasium.make("CartPole-v1").unwrapped
        steps = jax.jit(lambda key: rollouts.episodes(world, alive, key, 1))(key)
        other.reset()
        other.state = np.asarray(steps.observation[0, 0])
        length = int(steps.inside.sum())
        for t in range(length):
            observation, _, terminated, truncated, _ = other.step(1)
            np.testing.assert_allclose(steps.next_observation[0, t], observation, rtol=1e-5, atol=1e-6)
            assert (terminated, truncated) == (steps.terminated[0, t], steps.truncated[0, t])
        assert 5 < length < 20
        assert terminated
        assert steps.returns[0] == length

    def test_pendulum_is_truncated_and_a_heavier_one_compiles_nothing(self, key):
        seen = jax.jit(
            lambda world, key: rollouts.episodes(world, lambda s, key: jnp.ones((len(s), 1)), key, 1)
        )  # fmt: skip
        light, heavy = (seen(irl.make("Pendulum-v1", max_steps=30, m=mass), key) for mass in (1.0, 2.0))
        assert seen._cache_size() == 1
        assert light.truncated.sum() == 1
        assert light.truncated[0, 29]
        assert not light.terminated.any()
        theta, speed = np.arctan2(*np.asarray(light.observation[0, 0, 1::-1])), float(light.observation[0, 0, 2])
        for mass, steps in ((1.0, light), (2.0, heavy)):  # torque 2 for action 1; g = 10, length 1, dt = 0.05
            exact = speed + (15 * np.sin(theta) + 3 / mass * 2.0) * 0.05
            np.testing.assert_allclose(steps.next_observation[0, 0, 2], exact, rtol=1e-5)

    @pytest.mark.parametrize("name", environments.GYMNAX)
    def test_every_name_makes_an_environment(self, name):
        world = irl.make(name, absorbing=True)
        state, observation = jax.eval_shape(world.reset, jax.random.key(0))
        action = jnp.zeros((), int) if world.num_actions else jnp.zeros(world.action_size)
        after, timestep = jax.eval_shape(world.step, state, action, jax.random.key(0))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
        assert observation.shape == timestep.observation.shape == (world.observation_size,)

    def test_unknown_changes_are_named(self):
        with pytest.raises(bilevel.InvalidInput, match="a parameter of Pendulum-v1"):
            irl.make("Pendulum-v1", weight=2.0)


class TestGymnasium:
    def test_a_path_inside_jit_is_gymnasiums_own_to_the_bit(self, key):
        """Two lanes in turns through one simulator, against plain loops of Gymnasium: the same seeds and actions."""
        gymnasium = pytest.importorskip("gymnasium")
        pytest.importorskip("mujoco")
        world = irl.make("HalfCheetah-v5", max_steps=12)
        actions = jax.random.uniform(key, (12, 2, 6), minval=-1.0)
        act = lambda observation, key: actions[jnp.zeros((), int)]  # noqa: E731
        lanes = rollouts.start(world, key, 2)

        @jax.jit
        def run(lanes, actions):
            return jax.lax.scan(lambda lanes, a: rollouts.forward(world, lanes, a, key), lanes, actions)

        end, steps = run(lanes, actions)
        for lane, seed in enumerate(jax.random.split(key, 2)):
            env = gymnasium.make("HalfCheetah-v5")
            observation, _ = env.reset(seed=int(jax.random.bits(seed, (), jnp.uint32)))
            np.testing.assert_array_equal(steps.observation[0, lane], observation)
            for t in range(12):
                observation, reward, terminated, _, _ = env.step(np.asarray(actions[t, lane]))
                np.testing.assert_array_equal(steps.next_observation[t, lane], observation)
                assert steps.reward[t, lane] == reward
                assert steps.terminated[t, lane] == terminated
        np.testing.assert_array_equal(steps.truncated[:, 0], [False] * 11 + [True])
        middle, _ = run(lanes, actions[:5])
        resumed, rest = run(jax.tree.map(jnp.asarray, jax.device_get(middle)), actions[5:])
        np.testing.assert_array_equal(rest.next_observation, steps.next_observation[5:])
        np.testing.assert_array_equal(resumed.state, end.state)
        past, after = jax.jit(lambda lanes: rollouts.forward(world, lanes, act(None, None), key))(end)
        np.testing.assert_array_equal(past.state, end.state)  # an ended episode stays where it is
        assert not after.reward.any()

    def test_what_is_not_mujocos_is_refused_with_a_reason(self):
        pytest.importorskip("gymnasium")
        pytest.importorskip("mujoco")
        with pytest.raises(bilevel.InvalidInput, match="an environment of Gymnasium's MuJoCo"):
            irl.make("CliffWalking-v1")
        with pytest.raises(bilevel.InvalidInput, match="Nowhere-v0"):
            irl.make("Nowhere-v0")


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(bilevel.InvalidInput, match=r"pip install 'bilevax\[rl\]'"):
        irl.make("Walker2d-v5", frame_skip=7)  # a simulator that no other test has made


def test_tabular_episodes_follow_the_process(key):
    rng = np.random.default_rng(0)
    P, r = rng.dirichlet(np.ones(3), (3, 2)), rng.normal(size=(3, 2))
    world = irl.Tabular(irl.MDP.dense(P, start=[0.2, 0.3, 0.5], discount=0.9), jnp.asarray(r), max_steps=4)
    pick = lambda s, key: jax.nn.one_hot(jax.random.randint(key, (len(s),), 0, 2), 2)  # noqa: E731
    steps = rollouts.episodes(world, pick, key, 3000)
    s, a = (np.asarray(part[:, :4].argmax(axis=-1)) for part in (steps.observation, steps.action))
    np.testing.assert_array_equal(steps.reward[:, :4], r[s, a])
    after = np.asarray(steps.next_observation[:, :4].argmax(axis=-1))
    for state, action in np.ndindex(3, 2):
        here = (s == state) & (a == action)
        np.testing.assert_allclose(np.bincount(after[here], minlength=3) / here.sum(), P[state, action], atol=0.06)
    assert steps.truncated[:, 3].all()
    assert steps.inside.sum() == 12000
