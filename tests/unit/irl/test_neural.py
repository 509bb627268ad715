"""NeuralIRL: one step against NumPy, what it reaches, its samples; early stopping."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

import bilevel
import irl
from irl.solvers import neuralirl
from irl.tabular.diagnostics import objective, tracking_error
from problems import gridworld

POPULATION = gridworld.make(size=3, trajectories=0)
MDP, EXPERT = POPULATION.problem.mdp, POPULATION.problem.occupancy()
advance = jax.jit(bilevel.advance)
ONE_HOT = irl.rewards.one_hot_pairs(9, 5)
BAD = {"upper_decay": -1.0, "upper_delay": 0.0, "weight_decay": float("nan"), "averaging": float("inf"), "radius": 0.0}


def network_problem(width, radius=50.0, **settings):
    reward = irl.TwoLayerReward.of(np.eye(9), width, jax.random.key(7), MDP.num_actions)
    return irl.to_bilevel(MDP, EXPERT, reward, x_set=bilevel.Ball(radius), **settings)


def test_a_step_is_the_papers_in_numpy(key):
    """TD step with truncation and ball, policy, occupancy, reward step with decay, averages; written out."""
    problem = network_problem(6)
    solver = irl.NeuralIRL(
        lower_step_size=3.0, upper_step_size=0.4, upper_decay=0.5, upper_delay=2.0, radius=1.5, weight_decay=0.1,
        inputs=ONE_HOT, width=6,
    )  # fmt: skip
    start = jax.jit(solver.init)(problem, key)
    rng = np.random.default_rng(0)
    start = start._replace(
        x=jnp.asarray(rng.normal(size=(2, 3, 9))), D=jnp.asarray(rng.normal(size=(2, 3, 14)) / 6), count=jnp.array(3.0)
    )
    after, info = jax.jit(solver.step)(problem, start, key)

    P = np.zeros((9, 5, 9))
    for index, p in np.ndenumerate(np.asarray(MDP.transitions.probabilities)):
        P[index[0], index[1], MDP.transitions.next_states[index]] += p
    gamma, b = 0.9, np.repeat([1.0, -1.0], 3) / 6**0.5
    z = np.concatenate([np.repeat(np.eye(9)[:, None], 5, 1), np.repeat(np.eye(5)[None], 9, 0)], axis=2) / 2**0.5
    W = np.tile(np.asarray(start.network.weights), (2, 1))
    V = np.tile(np.asarray(problem.reward.network.weights), (2, 1))
    D, x = np.asarray(start.D).reshape(6, 14), np.asarray(start.x).reshape(6, 9)
    r = np.tile((np.maximum(V + x, 0).T @ b)[:, None], 5)  # inputs of the reward are unit vectors
    low, high = ((end + gamma * np.log(5)) * 10 for end in (r.min(), r.max()))

    def table(D):
        return 10 * (gamma * np.log(5) + np.maximum(z @ (W + D).T, 0) @ b)

    delta = table(D) - r - gamma * P @ logsumexp(np.clip(table(D), low, high), axis=1)
    slopes = 10 * b[:, None] * (z @ (W + D).T > 0)[..., None] * z[:, :, None, :]
    D = D - 3.0 * np.einsum("sa,sajd->jd", delta, slopes) / 45
    assert np.linalg.norm(D) > 1.5
    D = D * 1.5 / np.linalg.norm(D)
    np.testing.assert_allclose(after.D.reshape(6, 14), D, rtol=1e-10)
    np.testing.assert_allclose(info.td_error, np.sqrt(np.mean(delta**2)), rtol=1e-12)
    y = np.clip(table(D), low, high)
    np.testing.assert_allclose(after.y, y, rtol=1e-10)

    pi = np.exp(y - logsumexp(y, axis=1, keepdims=True))
    m = np.linalg.solve(np.eye(9) - gamma * np.einsum("sa,sat->ts", pi, P), np.full(9, 1 / 9))
    visits = np.sum(m[:, None] * pi - np.asarray(EXPERT), axis=1)
    slope = b[:, None] * (V + x > 0) * visits
    np.testing.assert_allclose(info.direction, np.linalg.norm(slope), rtol=1e-9)
    x = x - 0.4 / (1 + 3 / 2) ** 0.5 * (slope + 0.1 * x)
    np.testing.assert_allclose(after.x.reshape(6, 9), x, rtol=1e-9)
    np.testing.assert_allclose(
        after.mean.x.reshape(6, 9), x / 2, rtol=1e-9
    )  # from 0, with weight 3/(3 + 3) in the 4th step


def test_it_finds_the_expert_and_its_policy_follows(key):
    problem = network_problem(64)
    solver = irl.NeuralIRL(lower_step_size=0.2, upper_step_size=0.6, inputs=ONE_HOT, width=64)
    start = jax.jit(solver.init)(problem, key)
    assert (start.y == start.y[0, 0]).all()  # the soft Q of zero reward, to the bit
    np.testing.assert_allclose(start.y, 9 * np.log(5), rtol=1e-14)
    state, _ = advance(problem, solver, start, key, 0, 2000)
    at_start, best = objective(problem, start.x), POPULATION.truth.value
    assert objective(problem, state.x) - best < 0.01 * (at_start - best)
    assert objective(problem, solver.output(problem, state)[0]) - best < 0.01 * (at_start - best)
    assert tracking_error(problem, state.x, state.y) < 0.02


def test_chains_visit_what_the_occupancy_says(key):
    """(1 - gamma) d, by 400 chains over 100 steps after 60; chains are independent, so errors are over 400."""
    Q = jax.random.normal(key, MDP.shape)

    def step(visits, k):
        visits, pairs, following = neuralirl.transitions(MDP, Q, visits, jax.random.fold_in(key, k))
        return visits, (pairs, following)

    ((states, actions), following) = jax.jit(lambda v: jax.lax.scan(step, v, jnp.arange(160))[1])(jnp.zeros(400, int))
    each = np.zeros((400, *MDP.shape))
    chains = np.arange(400)[None, :].repeat(100, 0)
    np.add.at(each, (chains, np.asarray(states)[60:], np.asarray(actions)[60:]), 0.01)
    exact = 0.1 * np.asarray(irl.occupancy(MDP, irl.policy(Q)))
    assert (np.abs(each.mean(axis=0) - exact) <= 5 * each.std(axis=0) / 20 + 1e-3).all()
    reached = np.asarray(MDP.transitions.next_states)[states, actions]
    assert (reached == np.asarray(following)[..., None]).any(axis=-1).all()


def test_the_experts_pairs_are_drawn_as_often_as_its_occupancy_says(key):
    (states, actions), following = jax.jit(neuralirl.expert_transitions, static_argnums=2)(MDP, EXPERT, 20_000, key)
    seen = np.zeros(MDP.shape)
    np.add.at(seen, (np.asarray(states), np.asarray(actions)), 1 / 20_000)
    share = np.asarray(EXPERT) / np.sum(EXPERT)
    assert (np.abs(seen - share) <= 5 * np.sqrt(share / 20_000) + 1e-12).all()
    reached = np.asarray(MDP.transitions.next_states)[states, actions]
    assert (reached == np.asarray(following)[..., None]).any(axis=-1).all()


def test_the_row_sum_bounds_the_kernel_of_a_wide_network(key):
    """J J'/n of 30 pairs, some of them twice, by jacobian; at width 4096 its entries are within a few per cent."""
    network = irl.rewards.TwoLayer.draw(key, 4096, 14)
    z = ONE_HOT.reshape(-1, 14)[jax.random.randint(key, (30,), 0, 20)]
    J = jax.jacobian(lambda D: 10.0 * network(D, z))(network.origin).reshape(30, -1)
    largest = np.linalg.eigvalsh(J @ J.T / 30)[-1]
    assert 0.3 * neuralirl._largest_row(z, 10.0) <= largest <= 1.02 * neuralirl._largest_row(z, 10.0)


def test_unit_vectors_need_no_matrix_of_them(key):
    network = irl.rewards.TwoLayer.draw(key, 6, 4)
    D = jax.random.normal(key, network.origin.shape)
    np.testing.assert_allclose(network.at_unit_vectors(D), network(D, jnp.eye(4)), rtol=1e-12)


@pytest.mark.parametrize("num_transitions", [None, 25])
def test_defaults_come_near_and_stay(key, num_transitions):
    """Exact expectations to 1e-4 of F - F* at the start, samples to 1e-2."""
    problem = network_problem(16, objective="surrogate")
    solver = irl.NeuralIRL(num_transitions=num_transitions)
    state, _ = advance(problem, solver, jax.jit(solver.init)(problem, key), key, 0, 3000)
    best, start = POPULATION.truth.value, objective(problem, jnp.zeros((2, 8, 9)))
    share = (objective(problem, solver.output(problem, state)[0]) - best) / (start - best)
    assert share <= (1e-4 if num_transitions is None else 1e-2)


def test_a_reward_that_runs_away_from_its_agent_is_told(key):
    """Q a thousand times too slow, the reward as fast as ever: F rises from 16 beyond 100, and no run ends silently."""
    problem = irl.to_bilevel(MDP, EXPERT, irl.TableReward(9, 5), objective="surrogate")
    inverted = irl.NeuralIRL(lower_step_size=1e-3, upper_step_size=1.0, upper_decay=0.0, num_transitions=25, width=16)
    solution = bilevel.solve(problem, inverted, key=key, max_steps=200, every=20)
    assert solution.record["value"][-1] > 5 * solution.record["value"][0]
    assert solution.status == bilevel.Status.DIVERGED


def test_reasons_and_bad_input():
    assert "surrogate" in irl.NeuralIRL(num_transitions=5).unsupported(network_problem(4))
    horizon = gridworld.make(size=3, horizon=4, trajectories=0).problem
    assert "horizon" in irl.NeuralIRL().unsupported(horizon)
    for name, value in BAD.items():
        with pytest.raises(bilevel.InvalidInput, match=f"NeuralIRL.{name}: got"):
            irl.NeuralIRL(**{name: value})


def test_early_stopping_keeps_the_best():
    """Along a line through the held-out optimum: it stops `patience` looks after it, with that x."""
    stopping = irl.EarlyStopping(POPULATION.problem, patience=2)
    line = [POPULATION.truth.x * share for share in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)]
    answers = [stopping(10 * k, types.SimpleNamespace(x=x), {}) for k, x in enumerate(line)]
    assert answers.index(True) == 4
    assert stopping.step == 20
    np.testing.assert_array_equal(stopping.x, POPULATION.truth.x)
    np.testing.assert_allclose(stopping.value, POPULATION.truth.value, rtol=1e-12)
    with pytest.raises(bilevel.InvalidInput, match="patience"):
        irl.EarlyStopping(POPULATION.problem, 0)
