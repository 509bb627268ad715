"""The referee: right numbers pass, wrong ones are caught field by field, and what it cannot judge it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from benchmarks.judge import referee
from bilevel import reference
from bilevel.diagnostics import BY_VALUE, Referee
from problems.instance import Instance
from problems.quadratic import closed_form

FIELDS = ("value", "hypergradient", "lower_residual", "violation")


def quadratic():
    """(instance, x, y, the row that a right run ends with, the lower gap), in closed form."""
    instance = problems.make("quadratic", seed=0, dim_x=3, dim_y=4)
    x, y = jax.random.normal(jax.random.key(3), (3,)), jax.random.normal(jax.random.key(4), (4,))
    f, g = instance.problem.upper_data.full(), instance.problem.lower_data.full()
    exact, H = closed_form(f, g), np.asarray(g.H[0])
    away = np.asarray(y) - exact.A @ x - exact.c
    value = x @ exact.M @ x / 2 + exact.q @ x + exact.r
    row = (value, np.linalg.norm(exact.M @ x + exact.q), np.linalg.norm(H @ away), 0.0)
    return instance, x, y, dict(zip(FIELDS, map(float, row), strict=True)), float(away @ H @ away) / 2


def kink():
    """The same with g = |y - x|^2/2 on 0 <= y <= 1, so that y(x) = clip(x) and F' = 1[0 < x < 1] - 0.3 + 0.2 x."""
    instance = problems.make("constrained", kind="kink", dim=3)
    x, y = jnp.array([0.25, -0.5, 1.75]), jnp.array([0.25, 0.5, 0.75])
    clipped = np.clip(x, 0, 1)
    value = clipped.sum() - 0.3 * x.sum() + 0.1 * x @ x
    slope = np.array([0.7, -0.3, -0.3]) + 0.2 * x
    row = (value, np.linalg.norm(slope), np.linalg.norm(y - clipped), 0.0)
    gap = np.sum((y - x) ** 2 - (clipped - x) ** 2) / 2
    return instance, x, y, dict(zip(FIELDS, map(float, row), strict=True)), float(gap)


@pytest.mark.parametrize("make", [quadratic, kink])
def test_wrong_numbers_are_caught(make):
    instance, x, y, row, lower_gap = make()
    found = referee.judge(instance, x, y, [row])
    assert found["verdict"] == "agrees", found
    assert found["lower_gap"] == pytest.approx(lower_gap, abs=1e-9)
    assert found["gradient"] == pytest.approx(row["hypergradient"], rel=1e-9)
    held = dataclasses.replace(instance, problem=dataclasses.replace(instance.problem, x_set=bilevel.Box(x, x)))
    found = referee.judge(held, x, y, [row | {"hypergradient": 0.0}])  # where x cannot move, it is stationary
    assert (found["verdict"], found["hypergradient"]) == ("agrees", 0.0)
    assert found["gradient"] == pytest.approx(row["hypergradient"], rel=1e-9)
    for field in FIELDS:
        wrong = row | {field: row[field] * (1 + 1e-5) + 1e-5}
        found = referee.judge(instance, x, y, [row, wrong])
        assert found["verdict"] == "disagrees"
        assert found["reason"].startswith(field)


def waves(x, y, batch):
    """Many minimisers; the least value is x^2 - 1, at y = 0."""
    return jnp.sum(x**2) + jnp.sum(0.1 * y**2) - jnp.cos(5 * y[0])


def test_a_missed_global_minimum_is_caught():
    problem = bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum((y - x) ** 2), bilevel.Minimize(waves), y_set=bilevel.Box(-3.0, 3.0),
        init=lambda key: (jnp.zeros(1), jnp.zeros(1)),
    )  # fmt: skip
    instance = Instance(problem, referee=BY_VALUE)
    x, y = jnp.array([0.5]), jnp.array([1.2517])  # near another local minimiser
    true = float(waves(x, y, None)) - (0.25 - 1)
    row = dict(zip(FIELDS, (float((y[0] - x[0]) ** 2), float("nan"), true, 0.0), strict=True))
    found = referee.judge(instance, x, y, [row])
    assert found["verdict"] == "agrees", found
    assert found["lower_gap"] == pytest.approx(true, abs=1e-9)
    found = referee.judge(instance, x, y, [row | {"lower_residual": 0.0}])
    assert found["verdict"] == "disagrees"
    assert found["reason"].startswith("lower_gap")


def test_what_it_cannot_judge_it_says(monkeypatch):
    instance, x, y, row, _ = kink()
    assert referee.judge(instance, x, y, [])["reason"] == "nothing was measured"
    assert "float64" in referee.judge(instance, x.astype(jnp.float32), y, [row])["reason"]
    own = Instance(instance.problem, referee=Referee("own", instance.referee.measure))
    assert "own way" in referee.judge(own, x, y, [row])["reason"]
    monkeypatch.setattr(referee, "LARGEST", 2)
    assert "3 lower unknowns, more than 2" in referee.judge(instance, x, y, [row])["reason"]


def test_the_reference_of_a_polyhedron_gives_the_margin_to_the_kink():
    instance, x, y, *_ = kink()
    found = reference.constrained(instance.problem, x, y)
    np.testing.assert_allclose(found.y, [0.25, 0, 1], atol=1e-12)
    np.testing.assert_allclose(found.gradient, np.array([0.7, -0.3, -0.3]) + 0.2 * x, atol=1e-12)
    assert found.margin == pytest.approx(0.25, abs=1e-7)


@pytest.mark.parametrize("x1", [2e-7, 3e-8, 0.0, -1e-7])
def test_the_reference_reads_rows_that_are_almost_active_by_their_signs(x1):
    """The ridge F = 5|x1| + (x2 - 3)^2/2: one step of 1e-7 from the kink a row is within Clarabel's accuracy of it."""
    instance = problems.make("constrained", kind="ridge")
    found = reference.constrained(instance.problem, jnp.array([x1, 1.3]), instance.problem.init(jax.random.key(0))[1])
    assert found.value == pytest.approx(5 * abs(x1) + 1.7**2 / 2, abs=1e-14)
    assert found.margin == pytest.approx(abs(x1), abs=1e-12)
    if x1:
        np.testing.assert_allclose(found.gradient, [5 * np.sign(x1), -1.7], atol=1e-12)
