"""Families whose optima are known by other means than a bilevel solver, against certificates."""

import numpy as np
import pytest

import problems
from bilevel import InvalidInput, Status
from bilevel.diagnostics import certify
from problems import tolls


@pytest.mark.parametrize(("width", "height", "pairs"), [(2, 2, 1), (3, 3, 2)])
def test_tolls_are_the_best_of_all_ways(width, height, pairs):
    for seed in range(2):
        instance = problems.make("tolls", width=width, height=height, pairs=pairs, seed=seed)
        found = certify(instance.problem)
        assert found.status == Status.CONVERGED
        assert instance.truth.value < 0
        np.testing.assert_allclose([found.value, found.lower_bound], instance.truth.value, rtol=1e-8)


def test_ways_of_a_grid():
    """Three rows and columns have six monotone ways from corner to corner, of four streets each."""
    network = tolls.draw(3, 3, 1, np.random.default_rng(0))
    found = tolls.ways(network.streets, 0, 8)
    assert len(found) == len({tuple(way) for way in found}) == 6
    assert {len(way) for way in found} == {4}


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_blocks_side_by_side(kind):
    for seed in range(2):
        instance = problems.make("separable", kind=kind, blocks=3, seed=seed)
        found, truth = certify(instance.problem), instance.truth
        assert found.status == Status.CONVERGED
        np.testing.assert_allclose([found.value, found.lower_bound], truth.value, rtol=1e-8)
        np.testing.assert_allclose(found.x, truth.x, atol=1e-7)
        np.testing.assert_allclose(found.y, truth.y, atol=1e-7)


def test_large_ones_have_a_truth_too():
    instance = problems.make("separable", kind="quadratic", blocks=200)
    value = instance.problem.upper(instance.truth.x, instance.truth.y, instance.problem.upper_data.full())
    np.testing.assert_allclose(value, instance.truth.value, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("tolls", {"width": 1}, r"width, height, pairs \(tolls\)"),
        ("tolls", {"width": 6, "height": 6, "pairs": 3}, "combinations"),
        ("separable", {"kind": "cubic"}, r"kind \(separable\)"),
        ("separable", {"blocks": 0}, r"blocks \(separable\)"),
    ],
)
def test_sizes_out_of_range_are_named(name, params, words):
    with pytest.raises(InvalidInput, match=words):
        problems.make(name, **params)
