"""Theorems behind inverse reinforcement learning, on drawn instances."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bilevel
import irl
from irl.solvers.neuralirl import bounds
from irl.tabular import soft

S, A = 5, 3
seeds = st.integers(0, 2**31 - 1)
discounts = st.floats(0.0, 0.95)


def process(seed, discount=0.9):
    rng = np.random.default_rng(seed)
    return irl.MDP.dense(rng.dirichlet(np.full(S, 0.3), (S, A)), rng.dirichlet(np.ones(S)), discount)


@jax.jit
def optimum(mdp, r):
    return soft.value_iteration(mdp, r).Q, bounds(mdp, r)


@example(0, 0.95, 0.0)  # constant rewards: both bounds are attained
@settings(max_examples=20)
@given(seeds, discounts, st.floats(0.0, 30.0))
def test_truncation_holds_the_optimum_and_shaping_changes_no_policy(seed, discount, size):
    """With lo <= Q* <= hi, T keeps the interval; r + gamma E phi(s') - phi(s) has Q* - phi and the same policy."""
    mdp, rng = process(seed, discount), np.random.default_rng(seed)
    r, phi = jnp.asarray(size * rng.normal(size=(S, A))), jnp.asarray(size * rng.normal(size=S))
    Q, (lo, hi) = optimum(mdp, r)
    slack = 1e-10 * (1 + np.abs(Q).max())
    assert np.min(Q) >= lo - slack
    assert np.max(Q) <= hi + slack
    for inside in (jnp.full((S, A), lo), jnp.full((S, A), hi), lo + (hi - lo) * jnp.asarray(rng.uniform(size=(S, A)))):
        image = soft.bellman(mdp, r, inside)
        assert (image >= lo - slack).all()
        assert (image <= hi + slack).all()
    shaped, _ = optimum(mdp, r + discount * mdp.expect(phi) - phi[:, None])
    np.testing.assert_allclose(shaped, Q - phi[:, None], atol=100 * slack)
    np.testing.assert_allclose(soft.policy(shaped), soft.policy(Q), atol=100 * slack)


hypergradient = jax.jit(lambda problem, x: bilevel.hypergradient(problem, x).gradient)


@settings(max_examples=15)
@given(seeds, discounts, st.floats(0.1, 3.0))
def test_gradient_identity(seed, discount, size):
    """The implicit hypergradient is h(agent) - h(expert), for the occupancy of any policy, from rho."""
    mdp, rng = process(seed, discount), np.random.default_rng(seed)
    reward = irl.LinearReward.of(rng.normal(size=(S, A, 4)))
    c = irl.occupancy(mdp, jnp.asarray(rng.dirichlet(np.ones(A), S)))
    x = jnp.asarray(size * rng.normal(size=4))
    closed = irl.likelihood_gradient(mdp, c, reward, x, mdp.start)
    np.testing.assert_allclose(hypergradient(irl.to_bilevel(mdp, c, reward), x), closed, atol=1e-10)


def test_lhat_is_near_l():
    """|L - Lhat| <= C_r/(1 - gamma) sqrt(log(2/delta)/(2 n)) fails for at most delta of the draws, C_r = 1.

    A coin for a reward makes it as tight as it gets: all of a trajectory pays 1 or 0 by its first state.
    """
    stay = np.repeat(np.eye(2)[:, None], A, axis=1)  # two states that are never left
    mdp = irl.MDP.dense(stay, [0.5, 0.5], 0.9)
    r, n, length, delta, draws = jnp.array([[1.0], [0.0]]).repeat(A, 1), 25, 60, 0.1, 400

    @jax.jit
    def distances(keys):
        def one(key):
            drawn = irl.sample(mdp, jnp.full((2, A), 1 / A), key, num_trajectories=n, length=length)
            return jnp.sum((drawn.occupancy(mdp) - irl.occupancy(mdp, jnp.full((2, A), 1 / A))) * r)

        return jnp.abs(jax.vmap(one)(keys))

    bound = 1 / (1 - 0.9) * (np.sqrt(np.log(2 / delta) / (2 * n)) + 0.9**length)  # the last: cut trajectories
    failures = np.mean(np.asarray(distances(jax.random.split(jax.random.key(0), draws))) > bound)
    assert 0 < failures <= delta


@jax.jit
def path(problem, solver, key):
    """Norms of D, of x and of their averages after each of 20 steps."""

    def step(state, k):
        state = solver.step(problem, state, jax.random.fold_in(key, k))[0]
        lengths = [jnp.linalg.norm(part) for part in (state.D, state.mean.D, state.x, state.mean.x)]
        lo, hi = bounds(problem.mdp, problem.reward.table(state.x))
        return state, (jnp.stack(lengths), jnp.all(jnp.isfinite(state.y)), lo <= hi)

    return jax.lax.scan(step, solver.init(problem, key), jnp.arange(20))[1]


@settings(max_examples=10)
@given(seeds, st.floats(1e-2, 1e4), st.floats(1e-2, 1e4), st.floats(1e-3, 10.0), st.floats(1e-3, 10.0))
def test_every_iterate_is_in_its_ball(seed, eta, alpha, B, B_r):
    """Whatever the steps, and so are the averages; rewards then are at most B_r."""
    mdp, key = process(seed), jax.random.key(seed)
    reward = irl.TwoLayerReward.of(np.random.default_rng(seed).normal(size=(S, 4)), 6, key, A)
    c = irl.occupancy(mdp, jnp.full((S, A), 1 / A).at[:, 0].add(0.2).at[:, 1].add(-0.2))
    problem = irl.to_bilevel(mdp, c, reward, x_set=bilevel.Ball(jnp.asarray(B_r)))
    lengths, finite, ordered = path(
        problem, irl.NeuralIRL(lower_step_size=eta, upper_step_size=alpha, radius=B, width=6), key
    )
    assert finite.all()
    assert ordered.all()
    assert (lengths[:, :2] <= B * (1 + 1e-12)).all()
    assert (lengths[:, 2:] <= B_r * (1 + 1e-12)).all()
    x = problem.x_set.sample(key, reward.init(key))
    assert np.abs(reward.table(x)).max() <= B_r * (1 + 1e-12)
    assert irl.NeuralIRL().unsupported(problem) is None
