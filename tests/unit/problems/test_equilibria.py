"""Markets, chosen active sets and inverse optimisation: their optima by other means than the ones that made them."""

import jax
import numpy as np
import pytest

import bilevel
import problems
from bilevel import InvalidInput, Status
from bilevel.diagnostics import certify, classify


def cournot(costs, capacities, a, x):
    """The firms' equilibrium by best answers in turn, each the middle of three numbers."""
    y = np.zeros(len(costs))
    for _ in range(200):
        for i, cost in enumerate(costs):
            y[i] = np.clip((a - cost - x - (y.sum() - y[i])) / 2, 0, capacities[i])
    return y


@pytest.mark.parametrize(("firms", "seed"), [(1, 0), (3, 4)])
def test_a_markets_optimum_is_that_of_a_grid(firms, seed):
    instance = problems.make("stackelberg", firms=firms, seed=seed)
    data = jax.tree.map(np.asarray, instance.problem.upper_data.full())
    capacities = np.asarray(instance.problem.y_set.hi)
    profits = []
    for x in np.linspace(0, 20, 41):
        y = cournot(data["costs"], capacities, data["a"], x)
        profits.append(float((data["a"] - x - y.sum() - data["c"]) * x))
    assert -1 < instance.truth.value + max(profits) <= 1e-9
    y = cournot(data["costs"], capacities, data["a"], instance.truth.x[0])
    np.testing.assert_allclose(instance.truth.y, y, atol=1e-9)
    found = classify(instance.problem, instance.truth.x, instance.truth.y)
    assert found.b_stationary


def test_mpec_finds_a_markets_optimum_at_a_kink_or_beside_it():
    instance = problems.make("stackelberg", firms=3, seed=4)
    run = bilevel.solve(instance.problem, bilevel.MPEC(), key=jax.random.key(0), max_steps=200)
    assert run.status == Status.CONVERGED
    assert run.record["value"][-1] == pytest.approx(instance.truth.value, rel=1e-6)


@pytest.mark.parametrize("weak", [0, 3])
def test_chosen_active_sets_are_those_of_the_optimum(weak):
    instance = problems.make("mpec", dim_x=2, dim_y=4, rows=4, strong=1, weak=weak, seed=1)
    found = certify(instance.problem)
    assert found.status == Status.CONVERGED
    assert abs(found.value) < 1e-8
    np.testing.assert_allclose(found.x, instance.truth.x, atol=1e-5)
    kind = classify(instance.problem, instance.truth.x, instance.truth.y)
    assert (kind.word, kind.b_stationary, len(kind.biactive)) == ("S", True, weak)
    assert (kind.multipliers > 1e-3).sum() == 1


def test_inverse_costs_are_the_projection_that_a_certificate_finds():
    instance = problems.make("inverse", dim=3, rows=4, seed=2)
    found = certify(instance.problem)
    assert found.status == Status.CONVERGED
    assert found.value == pytest.approx(instance.truth.value, rel=1e-7)
    np.testing.assert_allclose(found.x, instance.truth.x, atol=1e-5)
    np.testing.assert_allclose(found.y, instance.truth.y, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("mpec", {"dim_x": 0}, r"dim_x \(mpec\)"),
        ("mpec", {"rows": 7}, r"rows, strong \+ weak"),
        ("mpec", {"strong": 4, "weak": 2}, r"rows, strong \+ weak"),
        ("stackelberg", {"firms": 9}, r"firms \(stackelberg\)"),
        ("inverse", {"rows": 0}, r"rows \(inverse\)"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name, params, says):
    with pytest.raises(InvalidInput, match=says):
        problems.make(name, **params)
