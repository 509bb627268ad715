"""Problems that others got wrong: the answers by hand, and derivatives by hand where those were wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from benchmarks.judge import referee
from bilevel import Status
from bilevel.diagnostics import certify
from problems.regressions import CASES, EPS

EXACT = [case for case in CASES if CASES[case]().exact]


@pytest.mark.parametrize("case", EXACT)
def test_the_answer_by_hand(case):
    instance = problems.make("regressions", case=case)
    found = certify(instance.problem)
    if instance.truth is None:
        assert (found.status, found.lower_bound) == (Status.INFEASIBLE, np.inf)
        return
    assert found.status == Status.CONVERGED
    truth = instance.truth
    np.testing.assert_allclose([found.value, found.lower_bound], truth.value, atol=1e-9)
    np.testing.assert_allclose(found.y, truth.y, atol=1e-7)
    if truth.x is not None:
        np.testing.assert_allclose(found.x, truth.x, atol=1e-7)


@pytest.mark.parametrize(
    ("case", "x", "gradient"),
    [
        ("slack_row", [0.5, 0.0, 0.0], [1.5, -2.0, 3.0]),  # F' = x - (-1, 2, -3): the row is slack
        ("held_row", [1.5, 0.0, 0.0], [0.0, -2.0, 3.0]),  # y0 = 1, whatever x0 is
        ("kink", [0.9], [-1 / 6]),
        ("kink", [1.1], [1 / 4]),
        ("near_rows", [0.0, 0.0], [-2 + 6 / EPS, -6 / EPS]),
        ("softmax", [0.0], [-0.2]),  # 2 (y0 - 7/10) 2 y0 (1 - y0) at y0 = 1/2
    ],
)
def test_derivatives_by_hand(case, x, gradient):
    problem = problems.make("regressions", case=case).problem
    found = jax.jit(bilevel.hypergradient)(problem, jnp.array(x))
    assert found.status in (Status.ESTIMATED, Status.CONVERGED)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-7, atol=1e-9)


def test_a_kink_says_so():
    found = jax.jit(bilevel.hypergradient)(problems.make("regressions", case="kink").problem, jnp.array([1.0]))
    assert found.status == Status.WEAKLY_ACTIVE


def test_derivatives_in_the_matrix_and_the_bound_of_a_row_with_a_multiplier():
    """y = c - lam a, lam = (a'c - b - x)/|a|^2 = 3/2: dF/da = (c - 2 lam a) 1'a/|a|^2 + lam, and dF/db = -1'a/|a|^2."""
    problem = problems.make("regressions", case="active_row").problem
    moved = bilevel.sensitivity(problem, jnp.array([1.0])).coupling
    np.testing.assert_allclose(moved.A, [[1.5, -0.5]], rtol=1e-8)
    np.testing.assert_allclose(moved.b, [-1.0], rtol=1e-8)


def test_the_markets_answer():
    """The follower's gradient is zero at q1 = q2 = (12 - Q)/3, and F there is least at Q = 6."""
    problem = problems.make("regressions", case="market").problem
    at = lambda Q: (jnp.array([Q]), jnp.full(2, (12 - Q) / 3))  # noqa: E731
    slope = jax.grad(problem.lower.g, argnums=1)
    values = []
    for Q in (5.9, 6.0, 6.1, 0.0, 11.9):
        np.testing.assert_allclose(slope(*at(Q), None), 0.0, atol=1e-12)
        values.append(float(problem.upper(*at(Q), None)))
    assert np.argmin(values) == 1
    np.testing.assert_allclose(values[1], -12.0)


def test_the_judge_of_studies_sees_the_leaders_constraints():
    """y = 1 is beyond y <= 0 by 1, in the run and for the judge."""
    instance = problems.make("regressions", case="late_cap")
    x, y = instance.problem.init(jax.random.key(0))
    measured = jax.jit(instance.referee.measure)(instance.problem, x, y)
    row = {name: float(value) for name, value in measured._asdict().items()}
    assert row["violation"] == 1
    assert referee.judge(instance, x, y, [row])["violation"] == 1


def test_other_names_are_refused():
    with pytest.raises(bilevel.InvalidInput, match=r"case \(regressions\)"):
        problems.make("regressions", case="none")
