"""Families whose optima are known by other means than a bilevel solver, against certificates."""

import numpy as np
import pytest

import problems
from bilevel import InvalidInput, Status
from bilevel.diagnostics import certify
from problems import textbook, tolls


@pytest.mark.parametrize(("width", "height", "pairs"), [(2, 2, 1), (3, 3, 2)])
def test_tolls_are_the_best_of_all_ways(width, height, pairs):
    instance = problems.make("tolls", width=width, height=height, pairs=pairs, seed=1)
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
    instance = problems.make("separable", kind=kind, blocks=3)
    found, truth = certify(instance.problem), instance.truth
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose([found.value, found.lower_bound], truth.value, rtol=1e-8)
    np.testing.assert_allclose(found.x, truth.x, atol=1e-7)
    np.testing.assert_allclose(found.y, truth.y, atol=1e-7)


def test_large_ones_have_a_truth_too():
    instance = problems.make("separable", kind="quadratic", blocks=200)
    value = instance.problem.upper(instance.truth.x, instance.truth.y, instance.problem.upper_data.full())
    np.testing.assert_allclose(value, instance.truth.value, rtol=1e-10)


@pytest.mark.parametrize("case", textbook.CASES)
def test_textbook_optima(case):
    instance = problems.make("textbook", case=case)
    found = certify(instance.problem)
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose([found.value, found.lower_bound], instance.truth.value, atol=1e-8)


@pytest.mark.parametrize("case", [name for name, case in textbook.CASES.items() if len(case.c) == 2])
def test_textbook_optima_on_a_grid(case):
    """One unknown of each level: y is the end of an interval, or the vertex of a parabola, and no x is better."""
    given = textbook.CASES[case]
    terms = lambda H, x, y: sum(number * (x, y)[i] * (x, y)[j] for i, j, number in H)  # noqa: E731
    x = np.linspace(0, min(given.x_ends[1], 20), 200_001)
    lo, hi = (np.full(x.shape, end) for end in given.y_ends)
    for (a, b), h in zip(given.A, given.b, strict=True):
        end = (h - a * x) / b
        lo, hi = (lo, np.minimum(hi, end)) if b > 0 else (np.maximum(lo, end), hi)
    curvature = 2 * terms(given.G, 0, 1)
    slope = given.d[1] + terms(given.G, x, 1) - terms(given.G, x, 0) - curvature / 2
    y = np.clip(-slope / curvature, lo, hi) if curvature else np.where(slope > 0, lo, hi)
    F = terms(given.H, x, y) + given.c[0] * x + given.c[1] * y + given.c0
    good = lo <= hi + 1e-9
    for row, end in zip(given.U, given.u, strict=True):
        good &= row[0] * x + row[1] * y <= end + 1e-9
    np.testing.assert_allclose(F[good].min(), given.value, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("tolls", {"width": 1}, r"width, height, pairs \(tolls\)"),
        ("tolls", {"width": 6, "height": 6, "pairs": 3}, "combinations"),
        ("textbook", {"case": "none"}, r"case \(textbook\)"),
        ("separable", {"kind": "cubic"}, r"kind \(separable\)"),
        ("separable", {"blocks": 0}, r"blocks \(separable\)"),
    ],
)
def test_sizes_out_of_range_are_named(name, params, words):
    with pytest.raises(InvalidInput, match=words):
        problems.make(name, **params)


def test_the_ridge_is_bounded_and_its_optimum_global():
    instance = problems.make("constrained", kind="ridge", dim=np.int64(2))
    found = certify(instance.problem)
    assert found.status == Status.CONVERGED
    assert found.value == pytest.approx(instance.truth.value, abs=1e-8)
