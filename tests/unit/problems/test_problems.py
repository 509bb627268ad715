"""Families are found, every instance is valid, and a second seed compiles nothing."""

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import problems
from bilevel import InvalidInput, oracles
from problems.datasets import digits, split
from problems.hyper_cleaning import corrupt

SMALL = {
    "quadratic": [{}, {"dim_x": 3, "dim_y": 1, "num_samples": 6, "batch_size": 2}],
    "ridge": [{}],
    "constrained": [{"kind": "random"}, {"kind": "toy"}],
    "logistic": [{}, {"penalties": "feature", "batch_size": 50}, {"penalties": "one"}],
    "hyper_cleaning": [{}, {"batch_size": 64}, {"model": "mlp"}],
}
CASES = [pytest.param(name, params, id=f"{name}-{k}") for name, all in SMALL.items() for k, params in enumerate(all)]


def test_families_are_found():
    assert set(SMALL) <= set(problems.families())
    for name, module in problems.families().items():
        assert callable(module.make), name
        assert len(module.__doc__.splitlines()[0]) > 20, name


@pytest.mark.process
def test_importing_is_light(program):
    subprocess.run(program("light_families"), check=True)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_instances_are_valid(name, params):
    instance = problems.make(name, **params)
    problem = instance.problem.validate()
    assert problem.init(jax.random.key(0))[0].dtype == jnp.float64
    again = problems.make(name, **params).problem
    for a, b in zip(jax.tree.leaves(problem), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    other = problems.make(name, seed=1, **params).problem
    pairs = zip(jax.tree.leaves(problem), jax.tree.leaves(other), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_another_seed_compiles_nothing(name, params):
    @jax.jit
    def gradient(problem):
        x, y = problem.init(jax.random.key(0))
        return oracles.upper_gradients(problem, x, y, problem.upper_data.full()), oracles.residual(
            problem, x, y, problem.lower_data.full()
        )

    results = [gradient(problems.make(name, seed=seed, **params).problem) for seed in range(3)]
    assert gradient._cache_size() == 1
    first, second = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(r)]) for r in results[:2])
    assert np.isfinite(first).all()
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("quadratics", {}, "quadratic"),
        ("hypercleaning", {}, "hyper_cleaning"),
        ("ridge", {"vall": 3}, "'val'"),
        ("quadratic", {"dim_x": 0}, "dim_x"),
        ("quadratic", {"condition_y": 0.5}, "condition_y"),
        ("quadratic", {"noise": 1.0}, "noise"),
        ("quadratic", {"coupling": 0.0}, "coupling"),
        ("quadratic", {"num_samples": 2.5}, "num_samples"),
        ("ridge", {"train": 5}, "train"),
        ("constrained", {"kind": "box"}, "kind"),
        ("constrained", {"kind": "random", "dim": 3, "active": 4}, "active"),
        ("logistic", {"penalties": "pixel"}, "penalties"),
        ("logistic", {"train": 1000, "val": 797}, "1797"),
        ("hyper_cleaning", {"model": "cnn"}, "model"),
        ("hyper_cleaning", {"corruption": 1.0}, "corruption"),
        ("hyper_cleaning", {"ridge": 0.0}, "ridge"),
    ],
)
def test_bad_input_is_named(name, params, words):
    with pytest.raises(InvalidInput, match=words):
        problems.make(name, **params)


def test_splits_are_disjoint_and_complete():
    parts = split(3, 50, 20, 12)
    assert [len(part) for part in parts] == [20, 12, 18]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(50))
    assert not np.array_equal(parts[0], split(4, 50, 20, 12)[0])


def test_problem_data_are_disjoint_rows():
    """No validation image of hyper-cleaning is a training image (digits has no duplicates)."""
    problem = problems.make("hyper_cleaning").problem
    train, val = np.asarray(problem.lower_data.arrays[1]), np.asarray(problem.upper_data.arrays[0])
    assert len(np.unique(digits()[0], axis=0)) == 1797
    assert len(np.unique(np.vstack([train, val]), axis=0)) == len(train) + len(val)


@pytest.mark.parametrize("corruption", [0.0, 0.25, 0.5, 0.9])
def test_corruption_is_exact(corruption):
    labels = np.arange(1000) % 10
    given, wrong = corrupt(np.random.default_rng(0), labels, corruption)
    assert wrong.sum() == round(1000 * corruption)
    np.testing.assert_array_equal(given != labels, wrong)
    if corruption == 0.9:  # uniform over the nine others: chi-squared with 8 degrees of freedom, 99.99% quantile 31.8
        counts = np.bincount((given - labels)[wrong] % 10, minlength=10)[1:]
        assert ((counts - 100) ** 2 / 100).sum() < 31.8


def test_hyper_cleaning_corrupts_the_training_set_only():
    Z, labels = digits()
    truth = {row.tobytes(): label for row, label in zip(Z, labels, strict=True)}
    problem = problems.make("hyper_cleaning", corruption=0.3, train=500).problem
    _, Z_train, targets, _ = (np.asarray(leaf) for leaf in problem.lower_data.arrays)
    Z_val, clean = (np.asarray(leaf) for leaf in problem.upper_data.arrays)
    assert sum(truth[z.tobytes()] != t.argmax() for z, t in zip(Z_train, targets, strict=True)) == 150
    assert all(truth[z.tobytes()] == t.argmax() for z, t in zip(Z_val, clean, strict=True))


def test_minibatches_carry_their_logits(key):
    """The batch's gradient in x is non-zero exactly at the samples in the batch."""
    problem = problems.make("hyper_cleaning", batch_size=32).problem
    x, w = problem.init(key)
    source = problem.lower_data
    batch, _ = source.next(source.init(key), key, x, w)
    slope = np.asarray(oracles.lower_gradient_x(problem, x, w, batch))
    assert set(np.flatnonzero(slope)) == set(np.asarray(batch[0]).tolist())
