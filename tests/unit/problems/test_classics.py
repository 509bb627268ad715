"""Optima of small programs of the literature, on a grid of x and y."""

import numpy as np
import pytest

import problems
from bilevel import InvalidInput
from problems.classics import CASES

POINTS = 601  # of each axis: 1/4, 1/2, 2/3 and 1 are among them on unit intervals


def by_grid(given):
    """The least f on the grid, over the y of least g at each x among those within the rows, where G holds."""
    x, y = (np.linspace(*ends, POINTS) for ends in (given.x_ends, given.y_ends))
    X, Y = [x[:, None]], [y[None]]
    full = np.zeros((POINTS, POINTS))
    f, g = given.f(X, Y) + full, given.g(X, Y) + full
    inside = np.ones_like(full, bool)
    for row in given.rows:
        inside &= row(X, Y) + full <= 1e-9
    g = np.where(inside, g, np.inf)
    least = g.min(axis=1, keepdims=True)
    answer = inside & (g <= least + 1e-9 * (1 + np.abs(least)))
    for row in given.leader:
        answer &= row(X, Y) + full <= (y[1] - y[0]) * 1.01  # y is off by up to a step
    return np.where(answer, f, np.inf).min()


COARSE = {
    "macal_hurter": 0.05,
    "colson_exponential": 0.05,
    "colson_cubes": 0.1,
    "colson_cubic": 0.02,
    "gumus_floudas": 0.02,
}


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].dim == 1])
def test_the_optimum_is_that_of_a_grid(case):
    given = CASES[case]
    assert by_grid(given) == pytest.approx(given.value, abs=COARSE.get(case, 0.01) * (1 + abs(given.value)))


def test_two_coordinates_are_one_twice():
    """Each coordinate of allende_still by a grid of its own: y = clip(x, 1/2, 3/2)."""
    x = np.linspace(0, 2, 2001)
    value = (x**2 - 2 * x + np.clip(x, 0.5, 1.5) ** 2).min()
    assert 2 * value == pytest.approx(CASES["allende_still"].value, abs=1e-6)


def test_problems_are_valid_and_their_rows_are_the_functions():
    for case in ("clark_westerberg", "colson_exponential", "dempe_root", "allende_still"):
        problem = problems.make("classics", case=case).problem.validate()
        if case == "clark_westerberg":
            rows = problem.coupling
            at = np.asarray(rows.A)[:, 0] * 2 + np.asarray(rows.B)[:, 0] * 3 - np.asarray(rows.b)
            np.testing.assert_allclose(at, [row([3.0], [2.0]) for row in CASES[case].rows])
    with pytest.raises(InvalidInput, match=r"case \(classics\)"):
        problems.make("classics", case="none")
