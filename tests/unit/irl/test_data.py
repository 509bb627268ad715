"""Demonstrations from elsewhere, networks as rewards, processes with an end: against NumPy."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from scipy.special import logsumexp

import bilevel
import irl
import problems
from bilevel import InvalidInput
from irl.rewards import TwoLayer
from irl.tabular.diagnostics import objective
from problems import objectworld

S, A, T = 5, 3, 4
hypergradient = jax.jit(lambda problem, x: bilevel.hypergradient(problem, x))


def process(horizon=None, discount=0.9):
    rng = np.random.default_rng(0)
    return irl.MDP.dense(rng.dirichlet(np.ones(S), (S, A)), rng.dirichlet(np.ones(S)), discount, horizon)


class TestHorizon:
    mdp = process(T, 1.0)
    P, rho = np.asarray(mdp.transitions), np.asarray(mdp.start)

    def backwards(self, r):
        Q, V = [], np.zeros(S)
        for _ in range(T):
            Q.insert(0, r + self.P @ V)
            V = logsumexp(Q[0], axis=1)
        return np.stack(Q)

    def test_recursions(self):
        """Q backwards, d forwards, undiscounted; T_x maps any Q to the fixed point in T sweeps."""
        r = np.random.default_rng(1).normal(size=(S, A))
        exact = self.backwards(r)
        found = irl.value_iteration(self.mdp, jnp.asarray(r))
        np.testing.assert_allclose(found.Q, exact, rtol=1e-13)
        assert (found.error, found.sweeps) == (0, T)
        Q = jax.random.normal(jax.random.key(0), self.mdp.shape)
        for _ in range(T):
            Q = irl.soft.bellman(self.mdp, jnp.asarray(r), Q)
        np.testing.assert_allclose(Q, exact, rtol=1e-13)

        pi, law = np.exp(exact - logsumexp(exact, axis=2, keepdims=True)), self.rho
        d = irl.occupancy(self.mdp, jnp.asarray(pi))
        for t in range(T):
            np.testing.assert_allclose(d[t], law[:, None] * pi[t], atol=1e-15)
            law = np.einsum("sa,sat->t", d[t], self.P)
        mu = irl.start_measure(self.mdp, d)
        np.testing.assert_allclose(mu[0], self.rho, atol=1e-15)
        np.testing.assert_allclose(mu[1:], 0, atol=1e-15)
        # entropy and reward to come, from the start, are V_0
        gain = np.sum(np.asarray(d) * (r - np.log(pi)))
        np.testing.assert_allclose(self.rho @ logsumexp(exact[0], axis=1), gain, rtol=1e-12)

    def test_samples(self, key):
        """Counts of a policy that depends on the time: each within five standard deviations of its occupancy."""
        pi = np.random.default_rng(2).dirichlet(np.ones(A), (T, S))
        d = irl.occupancy(self.mdp, jnp.asarray(pi))
        drawn = irl.sample(self.mdp, jnp.asarray(pi), key, num_trajectories=20_000, length=T).validate(self.mdp)
        assert (np.abs(drawn.occupancy(self.mdp) - d) <= 5 * np.sqrt(np.asarray(d) / 20_000) + 1e-4).all()
        with pytest.raises(InvalidInput, match=r"length .*got 5; expected at most the horizon 4"):
            irl.sample(self.mdp, jnp.asarray(pi), key, num_trajectories=2, length=5)

    def test_likelihood(self):
        """Trajectories shorter than the horizon, in a batch and as an occupancy, by loops."""
        rng = np.random.default_rng(3)
        states, actions = rng.integers(S, size=(6, T - 1)), rng.integers(A, size=(6, T - 1))
        drawn = irl.Demonstrations.of(states, actions, rng.integers(1, T, size=6))
        reward = irl.LinearReward.of(rng.normal(size=(S, A, 2)))
        x = np.array([0.5, -1.0])
        Q = self.backwards(np.asarray(reward.features) @ x)
        log_pi = Q - logsumexp(Q, axis=2, keepdims=True)
        exact = -np.mean(
            [sum(log_pi[t, states[i, t], actions[i, t]] for t in range(drawn.lengths[i])) for i in range(6)]
        )
        for problem in (irl.to_bilevel(self.mdp, drawn, reward), irl.to_bilevel(self.mdp, drawn, reward, batch_size=6)):
            value = problem.upper(jnp.asarray(x), jnp.asarray(Q), problem.validate().upper_data.full())
            np.testing.assert_allclose(value, exact, rtol=1e-13)

    @pytest.mark.parametrize(
        ("build", "words"),
        [
            (lambda: process(0), r"horizon .*got 0"),
            (lambda: process(True), r"horizon .*got True"),
            (lambda: process(None, 1.0), r"discount .*with a horizon"),
            (lambda: process(3, 1.1), r"discount .*got 1.1"),
            (lambda: irl.Demonstrations.of(*np.zeros((2, 1, 5), int)).validate(process(4)), r"states .*the horizon 4"),
            (
                lambda: irl.constants(process(4), jnp.ones((4, S, A)), irl.LinearReward.of(np.ones((S, A, 1)))),
                "horizon 4",
            ),
        ],
    )
    def test_bad_input_is_named(self, build, words):
        with pytest.raises(InvalidInput, match=words):
            build()


class Episode:
    def __init__(self, observations, actions):
        self.observations, self.actions = np.asarray(observations), np.asarray(actions)


class Dataset:
    """What `from_minari` asks of a minari.MinariDataset: episodes with one observation more than actions."""

    def __init__(self, *episodes):
        self.episodes = episodes

    def iterate_episodes(self):
        return iter(self.episodes)


class TestMinari:
    def test_episodes(self):
        """The last observation of an episode has no action; a function makes states of other observations."""
        found = irl.Demonstrations.from_minari(Dataset(Episode([3, 1, 0], [1, 2]), Episode([2, 2], [0])))
        assert (found.states.tolist(), found.actions.tolist()) == ([[3, 1], [2, 0]], [[1, 2], [0, 0]])
        assert found.lengths.tolist() == [2, 1]
        points = Dataset(Episode([[0.2, 1.7], [1.1, 0.3], [0.0, 0.0]], [1, 0]))
        found = irl.Demonstrations.from_minari(
            points, state=lambda seen: (3 * seen[:, 0] // 1 + seen[:, 1] // 1).astype(int)
        )
        assert found.states.tolist() == [[1, 3]]
        with pytest.raises(InvalidInput, match=r"states \(from_minari\).*shape \(2, 2\).*state="):
            irl.Demonstrations.from_minari(points)
        with pytest.raises(InvalidInput, match="0 episodes of nothing"):
            irl.Demonstrations.from_minari(Dataset())

    def test_a_name_needs_minari(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "minari", None)
        with pytest.raises(InvalidInput, match=r"'D4RL/x'.*pip install minari"):
            irl.Demonstrations.from_minari("D4RL/x")


def test_network_rewards(key):
    """Flax modules of both kinds against NumPy, their gradients through the likelihood, and bad input."""
    inputs = np.random.default_rng(0).normal(size=(S, 4))
    made = linen.Sequential((linen.Dense(5), linen.tanh, linen.Dense(1)))
    reward = irl.NetworkReward.of(made, inputs, num_actions=A)
    assert reward.init is irl.NetworkReward.of(made, inputs + 1, num_actions=A).init
    x = reward.init(key)
    first, last = (jax.device_get(x)["params"][f"layers_{k}"] for k in (0, 2))
    exact = np.tanh(inputs @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(reward.table(x), np.tile(exact, A), rtol=1e-12)

    linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    of_nnx = irl.NetworkReward.of(linear, inputs, num_actions=A)
    x = of_nnx.init(key)
    np.testing.assert_allclose(
        of_nnx.table(x), np.tile(inputs @ np.asarray(x["kernel"]) + np.asarray(x["bias"]), A), rtol=1e-12
    )
    c = irl.occupancy(process(), jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(A), S)))
    problem = irl.to_bilevel(process(), c, of_nnx)
    closed = irl.likelihood_gradient(process(), c, of_nnx, x)
    implicit = hypergradient(problem, x).gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), closed, implicit)
    for module, actions, words in ((np.tanh, A, r"module .*ufunc"), (made, None, r"inputs .*\(5, 4\)")):
        with pytest.raises(InvalidInput, match=words):
            irl.NetworkReward.of(module, inputs, actions)


def test_two_layers_near_the_start(key):
    """Against NumPy; 0 at D = 0 to the bit; 1-Lipschitz in D on unit inputs; a second draw compiles nothing."""
    network, z = TwoLayer.draw(key, 16, 4), np.random.default_rng(0).normal(size=(7, 4))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    D, E = np.random.default_rng(1).normal(size=(2, *network.origin.shape))
    W = np.concatenate([network.weights + D[0], network.weights + D[1]])
    b = np.repeat([1.0, -1.0], 8)
    np.testing.assert_allclose(network(jnp.asarray(D), jnp.asarray(z)), np.maximum(z @ W.T, 0) @ b / 4, rtol=1e-12)
    assert (network(network.origin, jnp.asarray(z)) == 0).all()
    apart = np.abs(network(jnp.asarray(D), jnp.asarray(z)) - network(jnp.asarray(E), jnp.asarray(z))).max()
    assert apart <= np.linalg.norm(D - E)
    reward = irl.TwoLayerReward.of(5 * z, 16, key, num_actions=A, scale=2.0)
    np.testing.assert_allclose(
        reward.table(jnp.asarray(D))[:, 0], 2 * network(jnp.asarray(D), jnp.asarray(z)), rtol=1e-12
    )
    assert reward.init is irl.TwoLayerReward.of(z, 16, jax.random.key(1), num_actions=A).init
    for width in (3, 0, 2.0):
        with pytest.raises(InvalidInput, match=rf"width: got {width}"):
            TwoLayer.draw(key, width, 4)


class TestObjectworld:
    def test_rewards_cell_by_cell(self):
        """Distances and rewards by loops over cells and objects; nothing else of the instance enters them."""
        rng = np.random.default_rng(3)
        distance = objectworld.distances(rng, 6, 7, 3)
        rng = np.random.default_rng(3)  # the same draws
        places, worn = rng.choice(36, 7, replace=False), rng.integers(3, size=(7, 2))
        worn[:3, 0] = range(3)
        r = objectworld.true_reward(distance, 2.0)
        for cell in range(36):
            apart = [np.hypot(cell // 6 - place // 6, cell % 6 - place % 6) for place in places]
            for side in range(2):
                for colour in range(3):
                    those = [d for d, colours in zip(apart, worn, strict=True) if colours[side] == colour]
                    assert distance[cell, side, colour] == min(those, default=np.inf)
            near = [any(d <= 3 - c and w[0] == c for d, w in zip(apart, worn, strict=True)) for c in range(2)]
            assert r[cell] == (0 if not near[0] else 2.0 if near[1] else -2.0)
        assert set(r) == {-2.0, 0.0, 2.0}

    def test_the_table_attains_the_expert(self):
        """At the true rewards f is the expert's entropy, the gradient is zero; no other model promises an optimum."""
        instance = problems.make("objectworld", size=3, objects=3, model="table")
        mdp = instance.problem.validate().mdp
        x = jnp.asarray(objectworld.true_reward(objectworld.distances(np.random.default_rng(0), 3, 3, 2), 2.0))
        x = jnp.repeat(x[:, None], 5, axis=1)
        np.testing.assert_allclose(objective(instance.problem, x), instance.truth.value, rtol=1e-12)
        gradient = irl.likelihood_gradient(mdp, instance.problem.occupancy(), irl.TableReward(9, 5), x)
        np.testing.assert_allclose(gradient, 0, atol=1e-10)
        assert instance.problem.x_set.violation(x) == 0
        assert problems.make("objectworld", size=3, objects=3).truth is None

    @pytest.mark.parametrize(
        "bad",
        [{"objects": 1}, {"colours": 1}, {"strength": 0.0}, {"model": "cubic"}, {"slip": 2}, {"trajectories": -1}],
    )
    def test_bad_input_is_named(self, bad):
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            problems.make("objectworld", **bad)
