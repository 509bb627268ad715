"""The family `alignment`: enumeration against the transfer matrix, gradients against both, where rounds end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from benchmarks.experiments.alignment import bradley_terry
from bilevel import InvalidInput, oracles
from problems import alignment, tiny_transformer
from problems.tiny_transformer import Size

SMALL = {"vocab": 4, "length": 3, "features": 3}


def world_of(seed=0, beta=0.7):
    return alignment.draw(seed, 4, 3, 3, beta)


def test_sequences_are_all_there_once():
    found = alignment.enumerate_all(3, 3)
    brute = [s for s in itertools.product(range(3), repeat=3) if all(a or not b for a, b in itertools.pairwise(s))]
    assert sorted(map(tuple, found)) == sorted(brute)
    world = world_of()
    assert np.exp(world.log_ref).sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_expectations_are_those_of_the_transfer_matrix(length):
    """Log Z and E_pi of the features without enumeration, at 4^5 sequences and fewer."""
    world = alignment.draw(1, 4, length, 3, 0.7)
    x = np.array([0.3, -1.0, 0.5])
    log_pi = alignment.tilted(world.log_ref, world.features @ x, 0.7)
    log_Z, mean = alignment.markov(world.chain, world.e, x, 0.7, length)
    np.testing.assert_allclose(world.log_ref + world.features @ x / 0.7 - log_pi, log_Z, atol=1e-12)
    np.testing.assert_allclose(np.exp(log_pi) @ world.features, mean, rtol=1e-12)


def test_the_gradient_is_the_difference_of_expectations():
    """-(1/beta)(E_D - E_pi) of the reward's gradient, and central differences of the enumerated likelihood."""
    beta = 0.7
    problem, world = problems.make("alignment", seed=2, beta=beta, demonstrations=20, **SMALL).problem, world_of(2)
    D, x = alignment.shown(world, beta, 20, 2), np.array([0.4, -0.2, 0.9])
    h = jax.jit(bilevel.hypergradient)(problem.validate(), jnp.asarray(x))
    expected = -(D @ world.features - alignment.markov(world.chain, world.e, x, beta, 3)[1]) / beta
    np.testing.assert_allclose(h.gradient, expected, rtol=1e-10)
    F = lambda x: -D @ alignment.tilted(world.log_ref, world.features @ x, beta)  # noqa: E731
    differences = [(F(x + 1e-6 * e) - F(x - 1e-6 * e)) / 2e-6 for e in np.eye(3)]
    np.testing.assert_allclose(h.gradient, differences, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(h.value, F(x), rtol=1e-12)


def test_the_experts_reward_is_the_optimum_of_its_distribution():
    instance = problems.make("alignment", seed=1, **SMALL)
    gradient = jax.jit(bilevel.hypergradient)(instance.problem, instance.truth.x).gradient
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    found = instance.metrics(instance.truth.x, instance.truth.y)
    assert found["true_reward"] == pytest.approx(1)
    assert found["ranking"] == 1
    assert abs(found["expert_kl"]) < 1e-12
    assert instance.baselines["reference"]()["true_reward"] == 0
    # the chain of greatest likelihood is a chain: it gains on ref, and is not the expert
    assert instance.baselines["supervised"]()["expert_kl"] > 0


def free(D, m):
    """The best of all rewards: Bradley-Terry's loss is least at log(D/m)."""
    return np.log(D) - np.log(m)


def test_free_rewards_are_log_ratios():
    """With a feature for each sequence the fitted reward tends to log(D/m) up to a constant; the penalty is small."""
    rng = np.random.default_rng(0)
    D, m = (0.1 + rng.dirichlet(np.ones(5)) / 2 for _ in range(2))
    r = bradley_terry(np.eye(5), D, m)
    np.testing.assert_allclose(r - r.mean(), free(D, m) - free(D, m).mean(), atol=2e-2)


@pytest.mark.parametrize("beta", [1.5, 3.0])
def test_where_rounds_with_free_rewards_end(beta):
    world = world_of(beta=beta)
    D = alignment.shown(world, beta, 0, 0)
    fixed = alignment.rounds(world.log_ref, D, free, beta, 100, moving=False, kept=False)[-1]
    mixture = (beta * world.log_ref + np.log(D)) / (1 + beta)
    np.testing.assert_allclose(fixed.log_pi, mixture - np.log(np.exp(mixture).sum()), atol=1e-10)
    assert alignment.judge(world, beta, fixed.log_pi, None)["expert_kl"] > 1e-3
    moving = alignment.rounds(world.log_ref, D, free, beta, 100, moving=True, kept=False)
    np.testing.assert_allclose(moving[-1].log_pi, np.log(D), atol=1e-10)
    np.testing.assert_allclose(moving[-1].reward - moving[-1].reward.mean(), 0, atol=1e-10)
    gaps = [np.ptp(one.log_pi - np.log(D)) for one in moving[:6]]  # geometric, by 1 - 1/beta
    np.testing.assert_allclose(np.array(gaps[1:]) / gaps[:-1], 1 - 1 / beta, rtol=1e-6)


def test_rounds_with_a_moving_anchor_end_at_the_likelihoods_maximum():
    """For linear rewards: E_pi of the features is the demonstrations', and pi is ref tilted by a linear reward."""
    world = world_of(beta=2.0)
    D = alignment.shown(world, 2.0, 40, 0)
    fit = lambda D, m: bradley_terry(world.features, D, m)  # noqa: E731
    end = alignment.rounds(world.log_ref, D, fit, 2.0, 60, moving=True, kept=False)[-1]
    np.testing.assert_allclose(np.exp(end.log_pi) @ world.features, D @ world.features, atol=1e-6)
    tilt = end.log_pi - world.log_ref
    centred = world.features - world.features.mean(axis=0)
    fitted = centred @ np.linalg.lstsq(centred, tilt - tilt.mean(), rcond=None)[0]
    np.testing.assert_allclose(fitted, tilt - tilt.mean(), atol=1e-8)


def test_with_beta_one_a_fixed_anchor_goes_to_and_fro():
    world = world_of(beta=1.0)
    D = alignment.shown(world, 1.0, 0, 0)
    done = alignment.rounds(world.log_ref, D, free, 1.0, 6, moving=False, kept=False)
    for k, one in enumerate(done):
        np.testing.assert_allclose(one.log_pi, world.log_ref if k % 2 else np.log(D), atol=1e-10)
    kept = alignment.rounds(world.log_ref, D, free, 1.0, 3, moving=True, kept=True)
    np.testing.assert_allclose(kept[-1].log_pi, np.log(D), atol=1e-10)


def test_a_transformer_is_causal_and_a_reward():
    """Later tokens do not change earlier outputs; the gradient through the policy is -(E_D - E_pi) grad r/beta."""
    size = Size(4, 4, 2, width=8, blocks=1)
    parameters, tokens = tiny_transformer.initial(size, jax.random.key(0)), jnp.array([[3, 0, 1, 2], [3, 2, 2, 0]])
    outputs = tiny_transformer.apply(size, parameters, tokens)
    changed = tiny_transformer.apply(size, parameters, tokens.at[:, 3].set(1))
    np.testing.assert_array_equal(outputs[:, :3], changed[:, :3])
    assert jnp.abs(outputs[:, 3] - changed[:, 3]).min() > 0

    instance = problems.make("alignment", vocab=3, length=2, beta=0.7, demonstrations=9, reward="transformer")
    problem = instance.problem.validate()
    x, y = problem.init(jax.random.key(1))
    batch, D = problem.lower_data.full(), problem.upper_data.full()["demonstrations"]
    _, gradient = oracles.unrolled_objective(problem, x, y, 1, 1.0, problem.upper_data.full(), batch)
    log_pi, r = problem.lower.T(x, y, batch), lambda x: tiny_transformer.apply(
        alignment.network(3, 2), x, batch["tokens"])[:, -1, 0]  # fmt: skip
    expected = jax.vjp(r, x)[1](-(D - jnp.exp(log_pi)) / 0.7)[0]
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    assert 0 <= instance.metrics(x, log_pi)["ranking"] <= 1


def test_rankings():
    log_ref, true = np.log(np.full(4, 0.25)), np.arange(4.0)
    assert alignment.ranking(2 * true + 1, true, log_ref) == 1
    assert alignment.ranking(-true, true, log_ref) == 0
    assert alignment.ranking(np.zeros(4), true, log_ref) == 0.5


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"vocab": 1}, r"vocab \(alignment\)"),
        ({"length": 0}, r"length \(alignment\)"),
        ({"length": 7}, "at most 300000 sequences"),
        ({"features": 0}, r"features \(alignment\)"),
        ({"reward": "table"}, r"reward \(alignment\)"),
        ({"beta": 0.0}, r"beta \(alignment\)"),
        ({"demonstrations": -1}, r"demonstrations \(alignment\)"),
    ],
)
def test_bad_parameters_are_named(params, words):
    with pytest.raises(InvalidInput, match=words):
        problems.make("alignment", **params)
