"""`recommend`, and `solve` without a solver."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import bilevel
from bilevel.parts.seen import LARGEST
from bilevel.solver import KNOWN

rules = importlib.import_module("bilevel.recommend")  # the package has the function under this name


def above(x, y, batch):
    return jnp.sum((y - 1) ** 2) + 0.1 * jnp.sum(x**2)


def bowl(x, y, batch):
    return jnp.sum((y - x) ** 2)


def waves(x, y, batch):
    return jnp.sum(jnp.sin(5 * (y - x)))


def one_sided(x, y, batch):
    return jnp.sum((y[:1] - x[:1]) ** 2)


def halved(x, y, batch):
    return 0.5 * jnp.tanh(y) + x


def doubled(x, y, batch):
    return 2 * y + x


def start(key):
    return jnp.full(2, 0.1), jnp.zeros(2)


def make(lower: Any = bilevel.Minimize(bowl), **fields: Any):  # noqa: B008
    return bilevel.BilevelProblem(above, lower, init=start, **fields)


def row(x, y):
    return y[:1] ** 2 - 0.5


@pytest.mark.parametrize(
    ("problem", "curvature", "first"),
    [
        (make(), "strongly convex", "LBFGS"),
        (make(bilevel.Minimize(one_sided)), "flat", None),
        (make(bilevel.Minimize(waves), y_set=bilevel.Box(-2.0, 2.0)), "not convex", "SampledPenalty"),
        (make(y_set=bilevel.Box(-2.0, 2.0)), "strongly convex", "BranchAndBound"),
        (make(bilevel.FixedPoint(halved)), "contraction", "LBFGS"),
        (make(bilevel.FixedPoint(doubled)), "no contraction", "LBFGS"),
        (make(upper_constraints=bilevel.UpperConstraints(inequality=row)), "strongly convex", "SQP"),
        (make(x_set=bilevel.Ball(), upper_constraints=None), "strongly convex", "LBFGS"),
    ],
)
def test_what_is_seen_and_who_comes_first(problem, curvature, first):
    found = bilevel.recommend(problem)
    assert found.seen.curvature == curvature
    assert first in (None, found[0].name)
    assert [choice.name for choice in found] == [choice.name for choice in found.choices]
    assert all(problem.upper_constraints is not None or one.solver.unsupported(problem) is None for one in found)
    names = {choice.name for choice in found} | set(found.others)
    assert not names & set(found.refused)
    assert {name for name, kind in KNOWN.items() if bilevel.solver.complete(kind)} <= names | set(found.refused)


def test_it_prints_itself_as_an_aligned_list():
    found = bilevel.recommend(make())
    lines = str(found).splitlines()
    assert lines[0] == "2 + 2 unknowns, float64; g strongly convex where probed (condition 1e+00)"
    assert lines[1] == f"{found.rule}:"
    at = {line.index(choice.why) for line, choice in zip(lines[2:], found, strict=False)}
    assert len(at) == 1
    assert repr(found) == str(found)
    assert found.as_dict()["ranked"][0] == {"solver": found[0].name, "why": found[0].why}


def test_solve_takes_the_first_and_says_why(key):
    first = bilevel.recommend(make())[0]
    solution = bilevel.solve(make(), key=key, max_steps=20)
    assert solution.status == bilevel.Status.CONVERGED
    assert solution.stats["solver"] == first.name
    assert f"recommended. {first.name}: {first.why}" in str(solution)
    named = bilevel.solve(make(), first.solver, key=key, max_steps=20)
    assert named.stats["recommended"] == ""
    assert "recommended" not in str(named)
    many = bilevel.solve_many(make(), keys=jax.random.split(key, 2), max_steps=20)
    assert [one.stats["recommended"] for one in many] == [solution.stats["recommended"]] * 2


def test_a_new_solver_is_found_and_not_ranked(monkeypatch):
    """One that nobody wrote into a rule, and one that is made around another."""
    monkeypatch.setitem(KNOWN, "Newcomer", type("Newcomer", (bilevel.AID,), {}))
    assert "Newcomer" in bilevel.recommend(make()).others
    assert "AugmentedLagrangian" not in bilevel.recommend(make()).others


def test_where_no_rule_ranks_those_that_take_it_are_listed(monkeypatch):
    monkeypatch.setattr(rules, "RULES", ())
    found = bilevel.recommend(make())
    assert found.rule == rules.UNRANKED
    assert found.others == ()
    assert found[0].name == min(KNOWN.keys() - found.refused.keys() - {"AugmentedLagrangian"})


def test_every_solver_of_a_rule_exists():
    for rule in rules.RULES:
        assert all(isinstance(rules.build(name), bilevel.Solver) for name in rule.solvers)


def test_no_solver_and_no_numbers_are_named_errors():
    curved = bilevel.SmoothCoupling(lambda x, y: jnp.sum(y**2)[None] - 1)
    with pytest.raises(bilevel.Unsupported, match="no solver takes this problem: 2 \\+ 2 unknowns"):
        bilevel.recommend(make(bilevel.FixedPoint(halved), coupling=curved))
    with pytest.raises(bilevel.InvalidInput, match="a call inside of"):
        jax.jit(lambda key: bilevel.recommend(make(), key))(jax.random.key(0))
    with pytest.raises(bilevel.InvalidInput, match="solver"):
        bilevel.solve(make(), bilevel.LBFGS, key=jax.random.key(0))  # pyright: ignore[reportArgumentType]


def saddled(x, y, batch):
    return jnp.sum(y[1:] ** 2) - batch * y[0] ** 2 + jnp.sum(x) * y[0]


def many(key):
    return jnp.zeros(2), jnp.zeros(LARGEST + 1)


@pytest.mark.parametrize(("bend", "curvature"), [(0.0, "not seen to bend down"), (1.0, "not convex")])
def test_of_many_unknowns_products_alone_are_taken(bend, curvature):
    problem = make(bilevel.Minimize(saddled), lower_data=bilevel.Full(jnp.array(bend)))
    found = bilevel.recommend(dataclasses.replace(problem, init=many))
    assert found.seen.curvature == curvature
