"""Kinds of stationary points: a follower whose single level is x = y - lam with y, lam >= 0 and y lam = 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, Full, InvalidInput, LinearCoupling, Minimize, SmoothCoupling
from bilevel.diagnostics import classify


def slope(x, y, batch):
    """p y + q lam, to first order, since lam = y - x on the feasible set, and a bowl."""
    return batch[0] * y[0] + batch[1] * (y[0] - x[0]) + jnp.sum(x**2) + jnp.sum(y**2)


def near_x(x, y, batch):
    return jnp.sum((y - x) ** 2) / 2


def origin(key):
    return jnp.zeros(1), jnp.zeros(1)


def corner(p, q, rows=1):
    """y = max(x, 0); `rows` times the same row -y <= 0."""
    coupling = LinearCoupling(-np.ones((rows, 1)), None, np.zeros(rows))
    data = Full(jnp.array([p, q], float))
    return BilevelProblem(slope, Minimize(near_x), coupling=coupling, upper_data=data, init=origin)


@pytest.mark.parametrize(
    ("p", "q", "word", "b"),
    [(1, 2, "S", True), (0, 2, "S", True), (0, -1, "M", False), (-1, -2, "C", False), (1, -1, "W", False)],
)
def test_the_kind_at_a_corner_is_that_of_its_two_slopes(p, q, word, b):
    """xi and eta are the slopes of f along y > 0 and along lam > 0; f falls where one of them is negative."""
    found = classify(corner(p, q), *origin(None))
    assert (found.word, found.b_stationary, found.biactive, found.unique) == (word, b, (0,), True)
    assert found.descent == pytest.approx(max(-p, -q, 0))
    assert ("not B-stationary" in str(found)) == (not b)


@pytest.mark.parametrize(("p", "q", "b"), [(1, 2, True), (1, -1, False), (-1, 2, False)])
def test_multipliers_that_are_not_unique_leave_b_stationarity_as_it_is(p, q, b):
    found = classify(corner(p, q, rows=3), *origin(None))
    assert not found.unique
    assert found.b_stationary == b


@pytest.mark.parametrize(("x", "y", "lam"), [(0.5, 0.5, 0.0), (-0.5, 0.0, 0.5)])
def test_away_from_the_corner_all_kinds_are_the_same(x, y, lam):
    at = jnp.array([x]), jnp.array([y])
    found = classify(corner(-4 * y, -4 * x if x > 0 else 2 * x), *at)
    np.testing.assert_allclose(found.multipliers, lam, atol=1e-12)
    assert (found.biactive, found.word) == ((), "S" if x < 0 else found.word)
    slopes = {"x": 2 * x, "y": 2 * y - 4 * y}
    assert (found.word == "S") == (abs(sum(slopes.values())) < 1e-9 if x > 0 else True)


def test_what_is_no_answer_of_the_follower_is_not_classified():
    found = classify(corner(1, 2), jnp.ones(1), jnp.zeros(1))
    assert (found.word, found.b_stationary) == ("unknown", None)
    assert "not feasible" in str(found)
    assert np.isnan(found.descent)


def bent(x, y, data):
    return jnp.sum(y**2) - data


def test_rows_that_bend_are_classified_where_multipliers_are_unique():
    """y = x/|x| on the circle: f = |y - (3, 4)/5|^2 falls unless x is along (3, 4)."""
    target = jnp.array([0.6, 0.8])
    problem = BilevelProblem(
        lambda x, y, batch: jnp.sum((y - batch) ** 2) + (jnp.sum(x**2) - 4) ** 2, Minimize(near_x),
        coupling=SmoothCoupling(bent, data=jnp.ones(1)), upper_data=Full(target),
        init=lambda key: (jnp.ones(2), jnp.zeros(2)),
    )  # fmt: skip
    found = classify(problem, 2 * target, target)
    assert (found.word, found.b_stationary) == ("S", True)
    np.testing.assert_allclose(found.multipliers, [0.5])
    away = classify(problem, jnp.array([2.0, 0.0]), jnp.array([1.0, 0.0]))
    assert (away.word, away.b_stationary) == ("none", None)
    assert "not all constraints are affine" in away.reason
    twice = dataclasses.replace(problem, coupling=SmoothCoupling(bent, data=jnp.ones(2)))
    assert classify(twice, 2 * target, target).b_stationary is None


def test_other_problems_are_refused_by_name():
    with pytest.raises(InvalidInput, match="x_set = Ball"):
        classify(dataclasses.replace(corner(1, 1), x_set=bilevel.Ball(1.0)), *origin(None))


def test_the_referee_by_pieces_says_where_f_falls_and_where_y_is_no_answer():
    measure = jax.jit(bilevel.diagnostics.STATIONARY.measure)
    rates = [float(measure(corner(*pair), *origin(None)).hypergradient) for pair in ((1, 2), (1, -1), (-3, -1))]
    assert rates == pytest.approx([0, 1, 3])
    wrong = measure(corner(1, 2), jnp.ones(1), jnp.zeros(1))
    assert float(wrong.hypergradient) == np.inf
    assert float(wrong.lower_residual) == pytest.approx(0.5)
    down = dataclasses.replace(corner(1, 2), lower=Minimize(lambda x, y, batch: -near_x(x, y, batch)))
    assert int(measure(down, *origin(None)).status) == bilevel.Status.SADDLE


def test_strong_stationarity_shows_b_stationarity_where_the_pieces_are_too_many():
    m = 11
    problem = BilevelProblem(
        lambda x, y, batch: jnp.sum(y) + jnp.sum((y - x) ** 2) / 2 + jnp.sum(y - x), Minimize(near_x),
        coupling=LinearCoupling(-np.eye(m), None, np.zeros(m)), init=lambda key: (jnp.zeros(m), jnp.zeros(m)),
    )  # fmt: skip
    found = classify(problem, *problem.init(None))
    assert (found.word, found.b_stationary, len(found.biactive), found.reason) == ("S", True, m, "")
    turned = dataclasses.replace(problem, upper=lambda x, y, batch: jnp.sum(y) - jnp.sum(y - x))
    assert classify(turned, *problem.init(None)).b_stationary is None
