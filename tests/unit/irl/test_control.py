"""Deep control: episodes and their weights, the solvers' directions, repeatability."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
from bilevel.struct import static, struct
from irl.deep import control, environments, networks, rollouts, sac
from irl.deep.imitation import gradient_penalty

TINY = irl.SAC(hidden=(8,), batch_size=16, discount=0.9)
SHORT = {"num_env_steps": 20, "num_lower_steps": 20, "num_rollouts": 3, "block": 10, "capacity": 100, "num_random": 10}


@struct
class Corridor(environments.Environment):
    """Positions 0 to 3 in a row; right of the last one the episode terminates."""

    max_steps: int = static(default=6)
    observation_size = 1
    num_actions = 2
    action_size = 2

    def reset(self, key):
        return (jnp.zeros((), int), jnp.zeros((), int)), jnp.zeros(1)

    def step(self, state, action, key):
        position, time = jnp.maximum(state[0] + 2 * action - 1, 0), state[1] + 1
        ended = position > 3
        t = environments.Timestep(position.astype(float)[None], jnp.ones(()), ended, (time >= self.max_steps) & ~ended)
        return (position, time), t


def right(observation, key):
    return jnp.broadcast_to(jnp.array([0.0, 1.0]), (len(observation), 2))


def demonstrations(environment=Corridor()):  # noqa: B008
    """One episode right to the end, one that dithers to the time limit."""
    return irl.Demonstrations.of(
        np.array([[0, 1, 2, 3, 0, 0], [0, 0, 1, 0, 0, 1]])[..., None], [[1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0]], [4, 6],
        last=[[4.0], [0.0]], terminated=[True, False], returns=[4, 6],
    )  # fmt: skip


class TestEpisodes:
    def test_no_step_behind_an_end(self, key):
        steps = jax.jit(lambda key: rollouts.episodes(Corridor(), right, key, 2))(key)
        np.testing.assert_array_equal(steps.inside, [[1, 1, 1, 1, 0, 0, 0]] * 2)
        np.testing.assert_array_equal(steps.observation[0, :4, 0], [0, 1, 2, 3])
        np.testing.assert_array_equal(steps.next_observation[0, :4, 0], [1, 2, 3, 4])
        np.testing.assert_array_equal(steps.terminated[0], [0, 0, 0, 1, 0, 0, 0])
        np.testing.assert_array_equal(steps.returns, [4, 4])

    def test_collecting_resets_behind_an_end_and_keeps_the_last_observation(self, key):
        lanes = rollouts.start(Corridor(), key, 1)
        _, steps = jax.jit(lambda key: rollouts.collect(Corridor(), right, lanes, key, 6))(key)
        np.testing.assert_array_equal(steps.observation[:, 0, 0], [0, 1, 2, 3, 0, 1])
        np.testing.assert_array_equal(steps.next_observation[:, 0, 0], [1, 2, 3, 4, 1, 2])
        np.testing.assert_array_equal(steps.time[:, 0], [0, 1, 2, 3, 0, 1])

    @pytest.mark.parametrize("discount", [1.0, 0.7])
    def test_with_the_absorbing_state_every_episode_weighs_the_same(self, discount, key):
        """However early it ends; without it an early end weighs less. Demonstrations and episodes agree."""
        world, whole = irl.Absorbing(Corridor()), sum(discount**t for t in range(6))
        given = rollouts.demonstrated(world, demonstrations())
        np.testing.assert_allclose(rollouts.weights(world, given, discount).sum(axis=1), [whole, whole])
        played = rollouts.episodes(world, right, key, 1)
        for name in ("observation", "next_observation", "terminated", "truncated", "inside"):
            one, other = (np.asarray(getattr(steps, name))[0] for steps in (given, played))
            inside = np.asarray(given.inside)[0] | (name == "inside")
            np.testing.assert_array_equal(one[inside], other[inside], err_msg=name)
        np.testing.assert_array_equal(given.observation[0, :6, 1], [0, 0, 0, 0, 1, 0])
        assert not given.terminated.any()
        plain = rollouts.demonstrated(Corridor(), demonstrations())
        first = sum(discount**t for t in range(4))
        np.testing.assert_allclose(rollouts.weights(Corridor(), plain, discount).sum(axis=1), [first, whole])
        np.testing.assert_array_equal(plain.terminated.sum(axis=1), [1, 0])
        np.testing.assert_array_equal(plain.next_observation[0, :4, 0], [1, 2, 3, 4])

    def test_actions_beyond_the_bounds_are_what_the_environment_makes_of_them(self):
        """An expert recorded before the environment's clip: else no agent could ever act as it does."""

        class Line(Corridor):
            num_actions, action_size = None, 1

        given = demonstrations()
        wild = dataclasses.replace(given, actions=jnp.asarray(given.actions, float)[..., None] * 5 - 2.5)
        steps = rollouts.demonstrated(Line(), wild)
        np.testing.assert_array_equal(steps.action, np.clip(wild.actions, -1, 1))

        class Wide(Line):
            bounds = (-2.0, 2.0)

        with pytest.raises(bilevel.InvalidInput, match=r"100% of the numbers beyond.*bounds are -2.0 and 2.0"):
            rollouts.demonstrated(irl.Absorbing(Wide()), wild)

    def test_memory_is_a_ring(self, key):
        _, steps = rollouts.collect(Corridor(), right, rollouts.start(Corridor(), key, 1), key, 6)
        memory = rollouts.Memory.empty(Corridor(), 8).add(steps).add(steps)
        assert memory.count == 12
        np.testing.assert_array_equal(memory.rows[:, 0], [2, 3, 0, 1, 0, 1, 0, 1])  # the last eight, the oldest at 4
        batch = memory.draw(key, 200)
        assert set(zip(batch.observation[:, 0].tolist(), batch.next_observation[:, 0].tolist(), strict=True)) == {
            (0, 1), (1, 2), (2, 3), (3, 4),
        }  # fmt: skip
        np.testing.assert_array_equal(batch.terminated, batch.next_observation[:, 0] == 4)

    def test_demonstrations_survive_a_file(self, tmp_path):
        given = demonstrations()
        given.save(tmp_path / "a.npz")
        back = irl.Demonstrations.load(tmp_path / "a.npz")
        jax.tree.map(np.testing.assert_array_equal, given, back)
        rows = {"observation": given.states, "action": np.asarray(given.actions)[..., None], "reward": np.ones((2, 6))}
        after = np.concatenate([np.asarray(given.states)[:, 1:], np.zeros((2, 1, 1))], axis=1)
        after[0, 3] = 4
        ends = np.zeros((2, 6), bool)
        ends[0, 3] = True
        np.savez(tmp_path / "b.npz", next_observation=after, terminal=ends, **rows)
        other = irl.Demonstrations.load(tmp_path / "b.npz")
        for name in ("states", "lengths", "last", "terminated", "returns"):
            np.testing.assert_array_equal(getattr(other, name), getattr(given, name), err_msg=name)

    def test_what_does_not_fit_is_named(self):
        flat = irl.Demonstrations.of([[0, 1]], [[0, 1]])
        with pytest.raises(bilevel.InvalidInput, match=r"expected shape \[n, T, 1\]"):
            irl.to_control(Corridor(), flat)
        with pytest.raises(bilevel.InvalidInput, match="no last, terminated"):
            irl.to_control(Corridor(), irl.Demonstrations.of([[[0.0]]], [[1]]))
        with pytest.raises(bilevel.InvalidInput, match=r"actions .to_control.: got 2 at index \(0, 1\)"):
            irl.to_control(
                Corridor(), dataclasses.replace(demonstrations(), actions=jnp.full((2, 6), 1).at[0, 1].set(2))
            )
        with pytest.raises(bilevel.InvalidInput, match="6 steps; expected at most the time limit, 5"):
            irl.to_control(Corridor(max_steps=5), demonstrations())
        with pytest.raises(bilevel.InvalidInput, match=r"environment .to_control."):
            irl.to_control("CartPole-v1", demonstrations())
        mdp = irl.MDP.dense(np.full((2, 2, 2), 0.5), start=np.full(2, 0.5), discount=0.9)
        with pytest.raises(bilevel.InvalidInput, match=r"there is irl\.to_control"):
            irl.to_bilevel(mdp, demonstrations(), irl.TableReward(2, 2))


def problem(clamp=10.0, world=Corridor(), **settings):  # noqa: B008
    return irl.to_control(world, demonstrations(), irl.DeepReward(clamp, hidden=(4,), **settings), agent=TINY)


@pytest.mark.parametrize("world", [Corridor(), irl.Absorbing(Corridor())])
def test_an_expert_that_hardly_moves_does_not_set_the_scale(world):
    """Observations are standardised by the half-and-half mixture with random actions, absorbing states left out."""
    still = irl.Demonstrations.of(np.zeros((1, 6, 1)), [[0] * 6], last=[[0.0]], terminated=[False])
    p = irl.to_control(world, still, agent=TINY)
    wandered = rollouts.wander(world, jax.random.key(0), num_lanes=8, num_steps=128).flat.observation
    at = np.asarray(wandered)[..., 0]
    if wandered.shape[1] == 2:
        at = at[wandered[:, 1] == 0]
        assert (p.center[-1], p.scale[-1]) == (0, 1)
    mixture = np.concatenate([np.zeros(len(at)), at])
    np.testing.assert_allclose([p.center[0], p.scale[0]], [mixture.mean(), mixture.std()])
    assert np.abs(p.standard(jnp.asarray(wandered))).max() < 5


@jax.jit
def pair_of(solver, p, key):
    seen = rollouts.episodes(
        p.environment, lambda s, key: jax.nn.one_hot(jax.random.bernoulli(key, 0.6, (3,)).astype(int), 2), key, 3
    )
    return seen, solver.pair(p.environment, seen, p.demonstrations)


@jax.jit
def begin(solver, p, key):
    return solver.init(p, key)


@jax.jit
def move(solver, p, state, seen, key):
    return solver.move(p, state, solver.pair(p.environment, seen, p.demonstrations), key)


class TestDirections:
    def test_maximum_likelihood_counts_visits_whatever_the_length(self, key):
        """With r = x . (s, a): the direction is the difference of the episodes' mean sums over the time limit, 6."""
        linear = irl.DeepReward(1e6, hidden=())
        p = irl.to_control(Corridor(), demonstrations(), linear, agent=TINY)
        solver = irl.DeepMLIRL(upper_step_size=1.0, **SHORT)
        seen, _ = pair_of(solver, p, key)
        state = begin(solver, p, key)
        after, _ = move(solver, p, state, seen, key)

        def sums(steps):
            inputs = np.concatenate(
                [(np.asarray(steps.observation) - np.asarray(p.center)) / np.asarray(p.scale), steps.action],
                axis=-1,
            )
            return (inputs * np.asarray(steps.inside)[..., None]).sum(axis=(0, 1)) / len(steps.inside) / 6

        exact = sums(seen) - sums(p.demonstrations)
        np.testing.assert_allclose(state.x[0].weights[:, 0] - after.x[0].weights[:, 0], exact, rtol=1e-9)

    def test_discriminators_descend_the_logistic_loss(self, key):
        """GAIL's direction against finite differences of the loss in NumPy."""
        p = problem()
        solver = irl.GAIL(upper_step_size=1.0, **SHORT)
        seen, pair = pair_of(solver, p, key)
        state = begin(solver, p, key)

        def loss(bias):
            x = (state.x[0], state.x[1]._replace(bias=state.x[1].bias + bias))
            agent, given = (np.asarray(p.rewards(x, steps)) for steps in (pair.agent, pair.expert))
            D = lambda f: 1 / (1 + np.exp(f))  # noqa: E731
            sides = np.log(D(agent)), np.log(1 - D(given))
            weights = pair.agent_weights, pair.expert_weights
            return -sum(np.sum(w * side) / np.sum(w) for w, side in zip(weights, sides, strict=True))

        after, _ = move(solver, p, state, seen, key)
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose(state.x[1].bias - after.x[1].bias, slope, rtol=1e-6)

    def test_gradient_penalty_of_a_linear_logit_is_its_slope_less_one_squared(self, key):
        """Closed form at every point: |(w, v)| - 1 with w by standardised observations. A flat logit has penalty 1."""
        p = irl.to_control(Corridor(), demonstrations(), irl.DeepReward(10.0, hidden=()), agent=TINY)
        solver = irl.GAIL(upper_step_size=1.0, **SHORT)
        _, pair = pair_of(solver, p, key)
        x = begin(solver, p, key).x
        slope = np.linalg.norm(np.asarray(x[0].weights))
        penalty = gradient_penalty(lambda steps: p.rewards(x, steps), pair, p.scale, key)
        np.testing.assert_allclose(penalty, (slope - 1) ** 2, rtol=1e-9)
        there = lambda steps: 3 * steps.next_observation[:, 0] / p.scale[0]  # noqa: E731
        assert jnp.abs(gradient_penalty(there, pair, p.scale, key) - 4) < 1e-9
        flat = lambda steps: 0 * steps.action[:, 0]  # noqa: E731
        assert jnp.abs(gradient_penalty(flat, pair, p.scale, key) - 1) < 1e-5
        steep = jax.grad(lambda c: gradient_penalty(lambda steps: c * flat(steps), pair, p.scale, key))(1.0)
        assert jnp.isfinite(steep)

        assert not pair.agent.inside.all()
        hidden = jnp.where(pair.agent.inside[:, None], pair.agent.observation, jnp.nan)
        padded = pair._replace(agent=pair.agent._replace(observation=hidden))
        assert jnp.isfinite(gradient_penalty(lambda steps: steps.observation[:, 0] ** 2, padded, p.scale, key))

    @pytest.mark.parametrize("kind", [irl.GAIL, irl.AIRL])
    def test_discriminators_descend_the_gradient_penalty(self, kind, key):
        """What it adds for a linear reward, in closed form: for AIRL of r/alpha, whatever log pi is."""
        p = irl.to_control(Corridor(), demonstrations(), irl.DeepReward(10.0, hidden=()), agent=TINY)
        solver = kind(upper_step_size=1.0, **SHORT)
        seen, _ = pair_of(solver, p, key)
        state = begin(solver, p, key)
        if kind is irl.AIRL:
            state = state._replace(extra=state.extra._replace(h=jax.tree.map(jnp.zeros_like, state.extra.h)))
        plain, _ = move(solver, p, state, seen, key)
        held, _ = move(dataclasses.replace(solver, gradient_penalty=3.0), p, state, seen, key)
        alpha = 1.0 if kind is irl.GAIL else 0.2
        w = np.asarray(state.x[0].weights) / alpha
        slope = np.linalg.norm(w)
        added = 3 * 2 * (slope - 1) * w / slope / alpha
        np.testing.assert_allclose(plain.x[0].weights - held.x[0].weights, added, rtol=1e-9)
        with pytest.raises(bilevel.InvalidInput, match="gradient_penalty"):
            kind(gradient_penalty=-1.0)

    def test_divergences_move_the_reward_by_the_covariance(self, key):
        """f-IRL with every divergence against the covariance over episodes, written out; an early end counts 0."""
        p = irl.to_control(Corridor(), demonstrations(), irl.DeepReward(10.0, hidden=()), agent=TINY)
        for divergence, h in {
            "fkl": lambda u: -u, "rkl": lambda u: -np.log(u) - 10, "js": lambda u: -np.log(1 + u)
        }.items():  # fmt: skip
            solver = irl.FIRL(upper_step_size=1.0, divergence=divergence, num_discriminator_steps=3, **SHORT)
            seen, pair = pair_of(solver, p, key)
            state = begin(solver, p, key)
            after, _ = move(solver, p, state, seen, key)
            inside = np.asarray(seen.inside)
            u = np.exp(np.asarray(p.rewards(after.extra.weights, pair.agent))).reshape(inside.shape)
            inputs = np.concatenate(
                [(np.asarray(seen.observation) - np.asarray(p.center)) / np.asarray(p.scale), seen.action],
                axis=-1,
            )
            first, second = (h(u) * inside / 6).sum(axis=1), (inputs * inside[..., None] / 6).sum(axis=1)
            exact = (first - first.mean()) @ second / (len(first) - 1) / 0.2
            np.testing.assert_allclose(
                state.x[0].weights[:, 0] - after.x[0].weights[:, 0], exact, rtol=1e-8, atol=1e-12
            )
            assert abs(after.x[0].bias - state.x[0].bias) >= 0

    def test_adversarial_reward_is_shaped_and_ends_without_a_future(self, key):
        p = problem()
        solver = irl.AIRL(upper_step_size=1.0, **SHORT)
        state, steps = begin(solver, p, key), p.expert
        h = lambda s: networks.mlp(state.extra.h, p.standard(s))[:, 0]  # noqa: E731
        exact = (
            p.rewards(state.x, steps)
            + 0.9 * np.where(steps.terminated, 0, h(steps.next_observation))
            - h(steps.observation)
        )
        np.testing.assert_allclose(solver.reward(p, state, steps), exact, rtol=1e-10)

    @pytest.mark.parametrize("use_memory", [False, True])
    def test_inverse_soft_q_learning_is_the_formula(self, use_memory, key):
        p = problem()
        solver = irl.IQLearn(upper_step_size=1.0, use_memory=use_memory, **SHORT)
        state = begin(solver, p, key)
        state = state._replace(y=state.y._replace(targets=jax.tree.map(lambda leaf: 0.5 * leaf, state.y.critics)))
        learner = sac.Learner(state.y, *state.moments)
        _, losses = jax.jit(solver.update)(p, state, learner, key)
        keys, given = jax.random.split(key, 5), 8 if use_memory else 16
        chances = np.asarray(p.expert.inside) / np.sum(np.asarray(p.expert.inside))
        drawn = jax.random.choice(keys[1], len(chances), (given,), p=jnp.asarray(chances))
        names = "observation", "action", "next_observation", "terminated"
        s, a, after, ended = expert = [np.asarray(getattr(p.expert, name))[drawn] for name in names]
        if use_memory:
            key_draw, key_policy = jax.random.split(keys[0])
            own = state.memory.draw(key_draw, 8)
            own = own._replace(action=p.agent.sample(state.y, own.observation, key_policy))
            parts = zip(expert, (getattr(own, name) for name in names), strict=True)
            s, a, after, ended = (np.concatenate(part) for part in parts)

        total = 0
        behind = state.y.targets if use_memory else state.y.critics
        for net, other in zip(state.y.critics, behind, strict=True):
            Q, Q_after = (np.asarray(networks.mlp(of, jnp.asarray(at))) for of, at in ((net, s), (other, after)))
            V, V_after = (0.2 * np.log(np.exp(q / 0.2).sum(axis=1)) for q in (Q, Q_after))
            future = 0.9 * np.where(ended, 0, V_after)
            r = (Q * a).sum(axis=1) - future
            start = 0.1 * V[:given] if use_memory else V - future
            total += start.mean() - r[:given].mean() + np.mean(r**2) / 2
        np.testing.assert_allclose(losses.critic, total, rtol=1e-8)


class TestRuns:
    def test_repeats_and_resumes_to_the_bit_and_shows_itself(self, key, tmp_path):
        p, solver = problem(world=irl.Absorbing(Corridor())), irl.DeepMLIRL(**SHORT)
        whole = bilevel.solve(p, solver, key=key, max_steps=4, every=2)
        path = tmp_path / "run"
        bilevel.solve(p, solver, key=key, max_steps=2, every=1, checkpoint=path)
        again = bilevel.solve(p, solver, key=key, max_steps=4, every=1, checkpoint=path)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(whole.state), jax.tree.leaves(again.state))
        assert whole.status == bilevel.Status.MAX_STEPS
        for column in ("Lhat", "direction", "policy_change", "returns", "reward_expert", "reward_std", "entropy"):
            assert np.isfinite(whole.record[column][1:]).all(), column
        assert whole.record["env_steps"][-1] >= 4 * 20
        assert np.isnan(whole.record["hypergradient"]).all()  # nothing here is certified
        other = bilevel.solve(p, solver, key=jax.random.key(1), max_steps=4, every=2)
        assert not np.array_equal(other.x[0].weights, whole.x[0].weights)

    def test_a_saturated_reward_ends_with_a_warning(self, key):
        p, solver = problem(clamp=1e-6), irl.BC(**SHORT)
        assert bilevel.solve(p, solver, key=key, max_steps=1).status == bilevel.Status.SATURATED

    def test_a_discriminator_that_is_always_right_ends_with_a_warning(self, key):
        """Demonstrations far from where the agent can go: the logit's sign tells the sides apart."""
        far = irl.Demonstrations.of(np.full((1, 6, 1), 50.0), [[1] * 6], last=[[50.0]], terminated=[False])
        p = irl.to_control(Corridor(), far, irl.DeepReward(hidden=(4,)), agent=TINY)
        fast = irl.GAIL(upper_step_size=0.5, num_upper_steps=20, **SHORT)
        solution = bilevel.solve(p, fast, key=key, max_steps=2, every=1)
        assert solution.record["told_apart"][-1] == 1
        assert solution.status == bilevel.Status.SATURATED
        assert "assumption failed at 2 of 2 steps: the discriminator is right" in str(solution)

    def test_every_method_takes_control_problems_and_no_others(self):
        mdp = irl.MDP.dense(np.full((2, 2, 2), 0.5), start=np.full(2, 0.5), discount=0.9)
        tabular = irl.to_bilevel(mdp, irl.Demonstrations.of([[0, 1]], [[0, 1]]), irl.TableReward(2, 2))
        deep = problem().validate()
        for kind in (irl.DeepMLIRL, irl.BC, irl.GAIL, irl.AIRL, irl.IQLearn, irl.FIRL):
            assert "made by irl.to_control" in kind().unsupported(tabular)
            assert kind().unsupported(deep) is None
        for kind in (irl.MLIRL, irl.MCEIRL, irl.NeuralIRL):
            assert "made by irl.to_bilevel" in kind().unsupported(deep)
        with pytest.raises(bilevel.Unsupported, match="AID does not step environments"):
            bilevel.solve(deep, bilevel.AID(), key=jax.random.key(0))

    @pytest.mark.parametrize(
        ("settings", "name"),
        [({"num_env_steps": 30}, "num_env_steps"), ({"num_lower_steps": 7}, "num_lower_steps")],
    )
    def test_loop_lengths_must_fit(self, settings, name):
        with pytest.raises(bilevel.InvalidInput, match=f"{name} .DeepMLIRL.: got"):
            irl.DeepMLIRL(**{**SHORT, "lanes": 2, "num_env_steps": 40, **settings})

    def test_the_lower_residual_is_the_critics_gradient(self):
        """At zero networks, r = 0 and Q = 0, so that the error of every transition is -gamma alpha log 2."""
        p = problem()
        x, y = jax.tree.map(jnp.zeros_like, p.init(jax.random.key(0)))
        residual = control.lower_map(x, y, p.lower_data.full()).critics[0][-1].bias - y.critics[0][-1].bias
        V = math.log(2)  # log_temperature is 0: alpha = 1
        ended = np.asarray(p.expert.terminated)
        errors = -0.9 * V * np.where(ended, 0, 1) * np.asarray(p.expert.inside)
        a = np.asarray(p.expert.action)
        np.testing.assert_allclose(residual, -(errors @ a) / len(errors), rtol=1e-10)
