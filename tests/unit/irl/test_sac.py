"""The agent of deep inverse RL: its density, its fixed point and its update against exact answers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import bilevel
import irl
from irl.deep import control, networks, sac
from irl.tabular import soft


class TestPolicy:
    def test_density_is_scipys_and_integrates_to_one(self, key):
        pi = networks.Gaussian(jnp.array([[0.3, -0.8]]), jnp.array([[-0.4, 0.1]]))
        action, log_pi = pi.sample(key)
        u = np.arctanh(np.asarray(action))
        exact = scipy.stats.norm.logpdf(u, pi.mean, np.exp(pi.log_std)) - np.log(1 - np.asarray(action) ** 2)
        np.testing.assert_allclose(log_pi, exact.sum(axis=1), rtol=1e-12)
        np.testing.assert_allclose(pi.log_prob(action), log_pi, rtol=1e-12)
        first = networks.Gaussian(pi.mean[:, :1], pi.log_std[:, :1])
        density = jax.jit(lambda a: jnp.exp(first.log_prob(a.reshape(1, 1)))[0])
        inner = 1 - networks.EDGE
        mass, _ = scipy.integrate.quad(lambda a: float(density(a)), -inner, inner)
        cut = scipy.stats.norm.cdf([-np.arctanh(inner), np.arctanh(inner)], 0.3, math.exp(-0.4))
        np.testing.assert_allclose(mass, cut[1] - cut[0], rtol=1e-7)

    def test_log_std_is_bounded_and_far_actions_have_finite_density(self):
        pi = networks.Gaussian.of(jnp.array([[0.0, 1e3], [50.0, -1e3]]))
        np.testing.assert_allclose(pi.log_std[:, 0], [2, -5])
        assert np.isfinite(pi.log_prob(jnp.array([[1.0], [-1.0]]))).all()


class TestAgent:
    def test_soft_q_learning_ends_at_soft_value_iteration(self, key):
        """Deterministic moves and a table as the network: the fixed point is the exact one for r/alpha, times alpha."""
        rng, alpha = np.random.default_rng(0), 0.5
        moves, r = rng.integers(0, 4, (4, 3)), rng.normal(size=(4, 3))
        mdp = irl.MDP.dense(np.eye(4)[moves], start=np.full(4, 0.25), discount=0.8)
        exact = alpha * soft.value_iteration(mdp, jnp.asarray(r / alpha)).Q
        agent = irl.SAC(discount=0.8, temperature=alpha, target_rate=1.0, hidden=(), batch_size=12)
        world = irl.Tabular(mdp, jnp.asarray(r), max_steps=10)
        s, a = (grid.ravel() for grid in np.mgrid[:4, :3])
        batch = sac.Batch(
            jnp.eye(4)[s], jnp.eye(3)[a], jnp.eye(4)[moves[s, a]], jnp.asarray(r[s, a]), jnp.zeros(12, bool)
        )

        @jax.jit
        def train(agent, learner):
            body = lambda learner, _: (agent.update(learner, batch, key)[0], None)  # noqa: E731
            return jax.lax.scan(body, learner, length=1500)[0]

        learner = agent.init(world, key)
        for rate in (0.1, 0.01, 1e-3):
            learner = train(irl.SAC(0.8, alpha, rate, 1.0, hidden=(), batch_size=12), learner)
        for net in learner.weights.critics:
            np.testing.assert_allclose(networks.mlp(net, jnp.eye(4)), exact, atol=2e-3)
        np.testing.assert_allclose(
            jnp.exp(agent.log_policy(learner.weights, jnp.eye(4))), soft.policy(exact / alpha), atol=2e-3
        )

    def test_actor_critic_update_is_the_formulas(self, key):
        """Target, losses and the tuned temperature's direction, recomputed by hand from the networks."""
        agent = irl.SAC(hidden=(8,), tuned=True, target_entropy=-1.0, learning_rate=0.01, target_rate=0.25)
        learner = agent.init(control.Sizes(3, 2, None), key)
        k = jax.random.split(key, 6)
        batch = sac.Batch(
            jax.random.normal(k[0], (5, 3)), jnp.tanh(jax.random.normal(k[1], (5, 2))), jax.random.normal(k[2], (5, 3)),
            jax.random.normal(k[3], (5,)), jnp.array([False, True, False, False, True]),
        )  # fmt: skip
        after, losses = jax.jit(agent.update)(learner, batch, k[4])
        w, (key_target, key_actor) = learner.weights, jax.random.split(k[4])
        Q = lambda net, s, a: networks.mlp(net, networks.pairs(s, a))[:, 0]  # noqa: E731
        action, log_pi = networks.Gaussian.of(networks.mlp(w.actor, batch.next_observation)).sample(key_target)
        V = np.minimum(*(Q(net, batch.next_observation, action) for net in w.targets)) - 0.2 * np.asarray(log_pi)
        y = np.asarray(batch.reward) + 0.99 * np.where(batch.terminated, 0, V)
        errors = [np.asarray(Q(net, batch.observation, batch.action)) - y for net in w.critics]
        np.testing.assert_allclose(losses.critic, 0.5 * sum(np.mean(e**2) for e in errors), rtol=1e-10)
        slope = np.mean(errors[0])  # of the critic's last bias; Adam's first step is the sign times the rate
        moved = after.weights.critics[0][-1].bias - w.critics[0][-1].bias
        np.testing.assert_allclose(moved, -0.01 * np.sign(slope), rtol=1e-5)
        follow = w.targets[0][0].weights + 0.25 * (after.weights.critics[0][0].weights - w.targets[0][0].weights)
        np.testing.assert_allclose(after.weights.targets[0][0].weights, follow, rtol=1e-12)
        _, log_pi = networks.Gaussian.of(networks.mlp(w.actor, batch.observation)).sample(key_actor)
        np.testing.assert_allclose(losses.entropy, -np.mean(log_pi), rtol=1e-10)
        direction = np.sign(after.weights.log_temperature - w.log_temperature)
        assert direction == np.sign(-1.0 - float(losses.entropy))  # alpha falls where the entropy is above its target

    @pytest.mark.parametrize("wrong", [{"discount": 1.0}, {"temperature": 0.0}, {"learning_rate": -1.0}])
    def test_bad_settings_are_named(self, wrong):
        with pytest.raises(bilevel.InvalidInput, match=f"{next(iter(wrong))} .SAC.: got"):
            irl.SAC(**wrong)
