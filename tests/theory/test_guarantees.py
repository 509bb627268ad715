"""Executable theorems: the engine on toy claims, bounds against NumPy, guarantees on few draws, planted faults."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from benchmarks.experiments import mutants
from bilevel import SOBA, Constants, InvalidInput, theory
from bilevel.backend.draws import numbers_below
from bilevel.guarantees import Guarantee, Path, Recipe, judge, ratios, search
from problems import strategies
from problems.guarantees import guarantees, sets, stochastic


class Toy(NamedTuple):
    """A number and its bound."""

    value: jax.Array
    constants: jax.Array


def toy(key, value, limit):
    return Toy(value, limit)


def positive(instance):
    return instance.value


def claim(limit, assumptions=(), horizon=(1, 2, 4), **changed):
    """Value/k <= limit/k, for values up to 1."""
    drawn = strategies.recipes(toy, value=strategies.fractions(-0.5, 1.0), limit=st.just(limit))
    made = Guarantee(
        "toy", "here", assumptions, drawn,
        lambda instance, ks: jnp.stack([instance.value / k for k in ks]), lambda constants, k: constants / k,
        horizon, lambda constants: 0.0, "a toy", "power",
    )  # fmt: skip
    return dataclasses.replace(made, **changed)


def test_search_climbs_and_reports_the_tightest():
    finding = search(claim(1.0), examples=100, lanes=2)
    assert finding.verdict == "holds"
    assert finding.instances == 2 * finding.draws == 200
    assert finding.tightest.worst == 1.0
    np.testing.assert_allclose(finding.tightest.fit("power"), (-1, 0), atol=1e-12)
    assert search(claim(1.0), examples=100, lanes=2).tightest.drawn == finding.tightest.drawn


def test_a_false_claim_is_shrunk_and_reproduced():
    guarantee = claim(0.9)
    finding = search(guarantee, examples=300, lanes=2)
    assert finding.verdict == "broken"
    drawn = finding.counterexample.path.drawn
    assert drawn.seed == 0
    assert drawn.numbers["value"] == min(-0.5 + 1.5 * k / 64 for k in range(65) if -0.5 + 1.5 * k / 64 > 0.9)
    path, again = judge(guarantee, drawn, guarantee.try_on(drawn, 2))
    assert again.broken == "bound"
    np.testing.assert_array_equal(path.ratio, finding.counterexample.path.ratio)


def test_broken_assumptions_nan_and_time():
    finding = search(claim(9.0, (positive,)), examples=100, lanes=2)
    assert (finding.verdict, finding.counterexample.broken) == ("bad instances", "positive")
    nan = claim(9.0, measure=lambda instance, ks: jnp.full(len(ks), jnp.nan))
    assert search(nan, examples=3, lanes=2).counterexample.path.worst == np.inf
    assert search(claim(9.0), seconds=0.0).verdict == "not tried"


def test_finished_instances_are_tried_one_by_one():
    single = st.integers(0, 3).map(lambda k: Toy(jnp.asarray(float(k)), jnp.asarray(2.5)))
    finding = search(claim(0.0, instances=single), examples=20)
    assert finding.verdict == "broken"
    assert float(finding.counterexample.path.drawn.value) == 3.0


def test_bad_guarantees_are_refused():
    for changed, match in (({"horizon": ()}, "horizon"), ({"horizon": (2, 1)}, "horizon"), ({"rate": "fast"}, "rate")):
        with pytest.raises(InvalidInput, match=match):
            claim(1.0, **changed)
    with pytest.raises(InvalidInput, match="measure"):
        claim(1.0, measure=lambda instance, ks: instance.value).try_on(Recipe(toy, 0, {"value": 1.0, "limit": 1.0}))


def test_rates_are_fitted_where_rounding_does_not_reach():
    k = np.array([1, 2, 5, 10, 20, 50])
    values = np.maximum(3 * 0.5**k, 1e-9)
    path = Path(None, tuple(k), np.ones(6), values, 3 * 0.6**k, 1e-10)
    np.testing.assert_allclose(path.fit("geometric"), (0.5, 0), atol=1e-7)  # the interval's own rounding is 1e-8
    np.testing.assert_allclose(path.fit("geometric", of_bound=True), (0.6, 0), atol=1e-7)
    assert path.fit("") is None


def test_bounds_against_numpy():
    for condition, k in ((1.0, 2), (4.0, 3), (100.0, 7)):
        x = (condition + 1) / (condition - 1) if condition > 1 else np.inf
        exact = 1 / np.polynomial.chebyshev.chebval(x, [0] * k + [1]) if condition > 1 else 0.0
        assert float(theory.chebyshev(jnp.asarray(condition), k)) == pytest.approx(exact, rel=1e-12, abs=1e-15)
    M = np.abs(np.random.default_rng(0).normal(size=(3, 3)))
    radius = max(abs(np.linalg.eigvals(M)))
    assert radius <= float(theory.growth(jnp.asarray(M))) * (1 + 1e-9)
    assert float(theory.growth(jnp.asarray(M))) == pytest.approx(radius, rel=1e-3)


def test_theory_steps_contract_and_are_accepted_by_the_solver():
    constants = Constants(mu=0.2, L_g=1.0, L_fx=0.3, L_fy=1.0, L_gxy=0.0, L_gyy=0.0, C_gxy=0.5)
    solver = SOBA.from_theory(constants, 0.1, 1.0)
    steps = theory.Steps(*(getattr(solver, f"{name}_step_size").value for name in ("lower", "linear", "upper")))
    M = np.asarray(theory.single_loop_matrix(constants, 0.1, 1.0, steps))[:3]
    assert max(abs(np.linalg.eigvals(M))) < 1


# The others take seconds each to compile: `bilevax verify` runs them all.
QUICK = ("soba", "cg", "project-box", "soft-bellman")


@pytest.mark.parametrize("name", QUICK)
def test_guarantees_hold_on_few_draws(name):
    finding = search(guarantees()[name], examples=10)
    assert finding.verdict == "holds", finding.counterexample
    assert finding.instances == 640


def test_every_guarantee_says_what_it_claims():
    known = guarantees()
    assert len(known) >= 40
    for guarantee in known.values():
        assert guarantee.source
        assert guarantee.statement


def test_sabas_keys_draw_every_pair_of_blocks():
    keys = jax.random.split(jax.random.key(0), stochastic.NUM_KEYS)
    draw = jax.vmap(lambda key: jnp.stack(numbers_below(key, stochastic.BLOCKS, stochastic.BLOCKS)))
    assert len({tuple(pair) for pair in np.asarray(draw(keys)).tolist()}) == stochastic.BLOCKS**2


def test_planted_faults_are_caught():
    """A few; `python -m benchmarks.experiments.mutants` plants them all."""
    identity = mutants._set(sets._ball, lambda ball, z: z)
    planted = [
        next(mutants.linear_solvers()),
        mutants.Mutant("projection left out", sets.projection(identity, "ball")),
        next(mutants.solvers()),
    ]
    survived = [m.fault for m in planted if search(m.guarantee, examples=60, shrink=False).verdict != "broken"]
    assert not survived


def test_ratios_take_the_largest_component():
    guarantee = claim(
        1.0, horizon=(1,), measure=lambda i, ks: jnp.stack([i.value, 2 * i.value])[None], bound=lambda c, k: jnp.ones(2)
    )
    trial = guarantee.try_on(Recipe(toy, 0, {"value": 0.25, "limit": 1.0}), 1)
    np.testing.assert_allclose(ratios(trial), [[0.5]])
