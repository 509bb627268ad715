"""The gridworld family: dynamics cell by cell, the population optimum, and what samples recover."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems

hypergradient = jax.jit(lambda problem, x: bilevel.hypergradient(problem, x))


def dense_transitions(mdp):
    """P [S, A, S] in NumPy from successor lists."""
    P = np.zeros((mdp.num_states, mdp.num_actions, mdp.num_states))
    for index, probability in np.ndenumerate(np.asarray(mdp.transitions.probabilities)):
        P[index[0], index[1], mdp.transitions.next_states[index]] += probability
    return P


class TestGridworld:
    def test_dynamics(self):
        """A 3 x 3 grid with slip 0.5, cell by cell: 0.6 for the chosen move, 0.1 for each other; walls hold."""
        P = dense_transitions(problems.families()["gridworld"].grid(3, 0.5, 0.9))
        up, right, stay = 0, 1, 4
        np.testing.assert_allclose(P[4, right, [1, 5, 7, 3, 4]], [0.1, 0.6, 0.1, 0.1, 0.1])
        np.testing.assert_allclose(P[0, up, [0, 1, 3]], [0.8, 0.1, 0.1])  # up and left of the corner are walls
        np.testing.assert_allclose(P[8, stay, [8, 5, 7]], [0.8, 0.1, 0.1])
        np.testing.assert_allclose(P.sum(axis=-1), 1.0)

    def test_population_optimum(self):
        instance = problems.make("gridworld", trajectories=0, size=4)
        h = hypergradient(instance.problem.validate(), instance.truth.x)
        np.testing.assert_allclose(h.gradient, 0, atol=1e-10)
        np.testing.assert_allclose(h.value, instance.truth.value, rtol=1e-12)
        np.testing.assert_allclose(h.y, instance.truth.y, atol=1e-10)
        at_truth = instance.metrics(instance.truth.x, instance.truth.y)
        assert at_truth["policy_error"] < 1e-12
        assert abs(at_truth["expert_kl"]) < 1e-12
        assert at_truth["reward_rank"] == pytest.approx(1.0)
        reverse = instance.metrics(-instance.truth.x, -instance.truth.y)
        assert reverse["reward_rank"] == pytest.approx(-1.0)
        assert reverse["policy_error"] > 0.1
        assert reverse["expert_kl"] > instance.baselines["uniform policy"]()["expert_kl"] > 0.1
        assert instance.metrics(jnp.zeros(4), instance.truth.y)["reward_rank"] == 0.0

    def test_another_seed_compiles_nothing(self, key):
        @jax.jit
        def step(problem):
            solver = bilevel.SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.1)
            return bilevel.advance(problem, solver, solver.init(problem, key), key, 0, 3)[0].x

        for batch_size in (None, 5):
            sizes = {"size": 3, "trajectories": 20, "length": 10, "batch_size": batch_size}
            steps = [step(problems.make("gridworld", seed=seed, **sizes).problem) for seed in range(3)]
            assert not np.array_equal(steps[0], steps[1])
            discounts = [step(problems.make("gridworld", discount=d, **sizes).problem) for d in (0.5, 0.8)]
            assert not np.array_equal(*discounts)
        assert step._cache_size() == 2

    def test_samples_recover_the_reward(self, key):
        """300 trajectories: closer to the expert than the policy of the counts, which knows no dynamics."""
        instance = problems.make("gridworld", seed=1, size=4, trajectories=300)
        problem, solver = (
            instance.problem,
            bilevel.SOBA(lower_step_size=1.0, linear_step_size=1.0, upper_step_size=0.02),
        )
        state = bilevel.advance(problem, solver, solver.init(problem, key), key, 0, 5000)[0]
        numbers, cloned = instance.metrics(state.x, state.y), instance.baselines["behavioural cloning"]()
        assert numbers["reward_rank"] > 0.9
        assert numbers["expert_kl"] < 0.2 * cloned["expert_kl"]
