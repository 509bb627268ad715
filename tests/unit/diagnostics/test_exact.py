"""The referee by value over polyhedra: least values, rates of descent and optima, with HiGHS, Clarabel and branches.

Small samples of the campaign `benchmarks.experiments.referee`, which draws as many as one likes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from benchmarks.experiments import referee
from bilevel.diagnostics import BY_VALUE, IMPLICIT
from bilevel.diagnostics.gap import lower_gap
from bilevel.qp.active_set import Rows
from bilevel.qp.step import step
from bilevel.run import referee_of
from problems import coupled


@pytest.mark.parametrize(
    ("check", "num"),
    [("linear", 20), ("quadratic", 10), ("nonconvex", 5), ("slopes", 12), ("curved", 12), ("optima", 10)],
)
def test_a_fixed_sample_of_the_campaign(check, num):
    """At the optima of seeds 0, 1 and 6 Y(x) is about to become empty."""
    off = referee.errors(check, num)
    assert len(off) == num
    assert (off <= referee.CHECKS[check][1]).all()


def test_the_error_says_whether_the_value_is_proved():
    """A duality gap below linear and convex functions; infinite where g bends downwards."""
    numbers, x = referee.draw(3)
    problem = referee.problem_of(referee.quadratic, numbers, referee.TRIANGLE)
    y = jnp.zeros(3)
    assert lower_gap(problem, jnp.asarray(x), y).error <= 1e-9
    bent = referee.problem_of(referee.quadratic, numbers | {"H": -np.eye(3)}, referee.TRIANGLE)
    found = lower_gap(bent, jnp.asarray(x), y)
    assert found.error == np.inf
    corners = np.stack(np.meshgrid(*3 * [np.linspace(0, 6, 61)]), axis=-1).reshape(-1, 3)
    corners = corners[(corners @ numbers["A"].T + numbers["B"] @ x <= numbers["b"]).all(axis=1)]
    values = corners @ (numbers["dy"] + x @ numbers["D"]) - np.sum(corners**2, axis=1) / 2
    assert found.value <= values.min() + 1e-4


def test_of_many_minimisers_the_best_one_counts():
    """Below y_2 -> min with y_2 >= x_1, all y_1 and y_3 are minimisers. Of f = (y_1 - 4)^2 + y_2 + x_1 - 16 the best
    one has y_1 = 4, F = 2 x_1 - 16.
    """
    numbers, _ = referee.draw_integers(0)
    numbers |= {"A": np.diag([0.0, -1.0, 0.0]), "B": np.diag([0.0, 1.0, 0.0])[:, 1:], "b": np.zeros(3)}
    numbers |= {"cx": np.array([1.0, 0.0]), "cy": np.array([-8.0, 1.0, 0.0]), "Q": np.diag([2.0, 0.0, 0.0])}
    problem = referee.problem_of(referee.linear, numbers | {"dy": np.array([0.0, 1.0, 0.0])}, bilevel.Box(0.0, 5.0))
    xs = ([1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    ys = ([4.0, 1.0, 2.0], [2.0, 1.0, 0.0], [4.0, 0.0, 0.0], [4.0, 0.5, 0.0])
    found = [referee.measure(problem, jnp.array(x), jnp.array(y)) for x, y in zip(xs, ys, strict=True)]
    column = lambda name: [getattr(row, name) for row in found]  # noqa: E731
    np.testing.assert_allclose(column("value"), [-14, -10, -16, -15.5], atol=1e-12)
    np.testing.assert_allclose(column("lower_residual"), [0, 0, 0, 0.5], atol=1e-9)
    np.testing.assert_allclose(column("hypergradient"), [2, 2, 0, 0], atol=1e-6)
    np.testing.assert_allclose(column("lower_distance"), [0, 4 / 15, 0, 0.5 / 17], atol=1e-6)  # f could be lower here


def test_both_minimisers_are_followed_from_a_jump():
    """Of g = -(y - 3.3288 - 0.258 x)^2/2 over 2 + x/3 <= y <= min(6, 8 - 2 x) the left end is the least one from
    x = 1.5313 on, where F = 2 x + 2 y jumps down from 12.94 to 8.0834. A hair to the right, points of least g are all
    near it.
    """
    problem = coupled.make("concave", 1, 1, 1).problem
    x = 1.53127214 + 2e-8
    found = jax.jit(BY_VALUE.measure)(problem, jnp.array([x]), jnp.array([2 + x / 3]))
    np.testing.assert_allclose(found.value, 8.083392, atol=1e-6)
    assert found.lower_residual <= 1e-8
    assert found.hypergradient == 0


def test_rows_that_contradict_each_other_say_how():
    """The weights w are such that w'C = 0 and w'bound < 0: y_1 + y_2 <= 1, y_1 >= 1, y_2 >= 0.5."""
    C, inf = jnp.array([[2.0, 2.0], [1.0, 0.0], [0.0, 1.0]]), jnp.inf
    rows = Rows(C, jnp.array([-inf, 1.0, 0.5]), jnp.array([2.0, inf, inf]), jnp.zeros((3, 1)))
    found = step(jnp.eye(2), jnp.zeros(2), rows, jnp.zeros(2), jnp.ones(()))
    assert found.empty
    np.testing.assert_allclose(found.multipliers @ C, 0, atol=1e-12)
    assert found.multipliers[0] > 0
    assert found.multipliers @ jnp.array([2.0, 1.0, 0.5]) < 0


@pytest.mark.parametrize("solver", [bilevel.BLOCC(), bilevel.BiCGAFFA(), bilevel.LVHBA(), bilevel.SampledPenalty()])
def test_methods_that_compare_values_are_judged_by_value_where_minimisers_may_be_many(solver):
    """Below linear functions and flat quadratic ones; a strongly convex one has an implicit gradient."""
    numbers, _ = referee.draw(0, rank=3, ridge=0.3)
    flat, _ = referee.draw(0, rank=2)
    linear = referee.problem_of(referee.linear, numbers, referee.TRIANGLE)
    assert referee_of(linear, solver) is BY_VALUE
    assert referee_of(referee.problem_of(referee.quadratic, flat, referee.TRIANGLE), solver) is BY_VALUE
    if not isinstance(solver, bilevel.SampledPenalty):  # which is never judged by a gradient here
        assert referee_of(referee.problem_of(referee.quadratic, numbers, referee.TRIANGLE), solver) is IMPLICIT


def test_a_linear_lower_level_may_end_well():
    """LVHBA on whole numbers: it is called converged at the optimum, which it misses with a small penalty."""
    numbers, x = referee.draw_integers(2)
    F, _, _ = referee.optimum(numbers)
    problem = referee.problem_of(referee.linear, numbers, bilevel.Box(0.0, 5.0))

    def run(penalty):
        solver = bilevel.LVHBA(penalty=penalty)
        more = {"x0": jnp.asarray(x), "max_steps": 3000, "every": 300, "progress": False}
        return bilevel.solve(problem, solver, key=jax.random.key(0), **more)

    good = run(50.0)
    assert good.status == bilevel.Status.CONVERGED
    np.testing.assert_allclose(good.record["value"][-1], F, rtol=1e-6)
    assert run(0.1).status != bilevel.Status.CONVERGED
