"""The public strategies draw what they promise, and shrink to something readable."""

import re

import jax
import numpy as np
import pytest
from hypothesis import Phase, find, given, settings

from bilevel import InvalidInput
from problems import strategies
from problems.quadratic import closed_form


@given(strategies.spd_matrices(strategies.spectra(3)))
def test_spd_matrices(matrix):
    np.testing.assert_array_equal(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix)[0] > 0


@given(strategies.spd_matrices((0.5, 2.0)))
def test_spd_matrices_have_the_given_spectrum(matrix):
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), [0.5, 2.0], rtol=1e-12)


@settings(max_examples=6)
@given(strategies.quadratics(max_dim=2))
def test_quadratics_know_their_optimum(instance):
    exact = closed_form(instance.problem.upper_data.full(), instance.problem.lower_data.full())
    np.testing.assert_allclose(exact.M @ instance.truth.x + exact.q, 0, atol=1e-10)


def by_cvxpy(drawn, x):
    """F(x) from the lower QP solved by CLARABEL."""
    import cvxpy

    H, G, h = (np.asarray(part) for part in drawn.problem.lower_data.arrays)
    coupling, target = drawn.problem.coupling, np.asarray(drawn.problem.upper_data.arrays)
    y = cvxpy.Variable(len(h))
    rows = np.asarray(coupling.A) @ y <= np.asarray(coupling.b) - np.asarray(coupling.B) @ x
    cost = cvxpy.Minimize(cvxpy.quad_form(y, H) / 2 + (G.T @ x + h) @ y)
    cvxpy.Problem(cost, [rows]).solve(solver="CLARABEL")
    return np.sum((y.value - target) ** 2) / 2 + x @ x / 2, y.value


@settings(max_examples=8)
@given(strategies.constrained_quadratics())
def test_constrained_quadratics_fulfil_the_kkt_conditions(drawn):
    H, G, h = (np.asarray(part) for part in drawn.problem.lower_data.arrays)
    A, B, b = (np.asarray(getattr(drawn.problem.coupling, name)) for name in "ABb")
    np.testing.assert_allclose(H @ drawn.y + G.T @ drawn.x + h + A.T @ drawn.multipliers, 0, atol=1e-12)
    slack = b - A @ drawn.y - B @ drawn.x
    np.testing.assert_allclose(slack[drawn.active], 0, atol=1e-12)
    assert (slack[~drawn.active] >= 0.5 - 1e-9).all()
    assert (drawn.multipliers[drawn.active] >= 0.5).all()


def test_a_constrained_gradient_against_cvxpy():
    drawn = strategies.constrained_quadratic(seed=3, dim=3, rows=4, num_active=2)
    np.testing.assert_allclose(by_cvxpy(drawn, drawn.x)[1], drawn.y, atol=1e-6)
    slopes = [(by_cvxpy(drawn, drawn.x + d)[0] - by_cvxpy(drawn, drawn.x - d)[0]) / 2e-3 for d in 1e-3 * np.eye(3)]
    np.testing.assert_allclose(slopes, drawn.gradient, atol=1e-4)
    with pytest.raises(InvalidInput, match="num_active"):
        strategies.constrained_quadratic(seed=0, dim=1, rows=3, num_active=2)


def test_nonconvex_truth_against_a_finer_scan():
    """The truth is attained, and no x of another, finer grid does better by more than the stated accuracy."""
    for seed in range(3):
        instance = strategies.nonconvex(seed, points=101)
        f, g = (
            strategies.Waves(*map(np.asarray, part.arrays))
            for part in (instance.problem.upper_data, instance.problem.lower_data)
        )
        xs, ys = np.linspace(-1, 1, 397)[:, None], np.linspace(-1, 1, 4973)[None, :]
        lower = strategies._wave(xs, ys, g, np)
        best = np.take_along_axis(
            (ys - xs) ** 2 / 2 + strategies._wave(xs, ys, f, np), lower.argmin(axis=1)[:, None], 1
        )
        assert instance.truth.value <= best.min() + 1e-3
        x, y = np.asarray(instance.truth.x), np.asarray(instance.truth.y)
        attained = float(instance.problem.upper(x, y, instance.problem.upper_data.arrays))
        assert attained == pytest.approx(instance.truth.value, abs=1e-12)


@settings(max_examples=10)
@given(strategies.mdps())
def test_mdps_are_ergodic_with_bounded_reward(task):
    P = np.asarray(task.mdp.transitions)
    np.testing.assert_allclose(P.sum(axis=-1), 1, atol=1e-12)
    assert P.min() >= 0.05 / len(P) - 1e-12
    assert 0 <= task.reward.min() <= task.reward.max() <= 1


@settings(max_examples=5)
@given(strategies.demonstrations(3, 2, max_trajectories=2, max_length=2))
def test_demonstrations_fit_the_process(demonstrations):
    assert demonstrations.states.max() < 3
    assert demonstrations.actions.max() < 2
    assert demonstrations.lengths.min() >= 1


@given(strategies.pytrees())
def test_pytrees_have_one_float_dtype(tree):
    leaves = jax.tree.leaves(tree)
    assert leaves
    assert len({leaf.dtype for leaf in leaves}) == 1
    assert np.issubdtype(leaves[0].dtype, np.floating)


def test_draws_shrink_to_something_readable():
    quick = settings(database=None, max_examples=30)
    smallest = find(strategies.quadratics(max_dim=1), lambda instance: True, settings=quick)
    assert float(smallest.constants.mu) == 1.0
    few = find(strategies.demonstrations(3, 2, 1, 1), lambda d: d.states.max() > 0, settings=quick)
    assert few.states.tolist() == [[1]]
    smallest = find(strategies.constrained_quadratics(), lambda drawn: drawn.active.any(), settings=quick)
    assert (smallest.y.shape, smallest.active.tolist()) == ((1,), [True])
    task = find(strategies.mdps(), lambda task: task.mdp.num_actions > 1, settings=quick)
    assert task.reward.shape == (1, 2)


def test_a_failing_test_prints_the_call_that_made_its_instance():
    @settings(database=None, max_examples=10, derandomize=True, phases=[Phase.generate, Phase.shrink])
    @given(strategies.quadratics(max_dim=2))
    def fails(instance):
        assert instance.truth.x.size < 2

    with pytest.raises(AssertionError) as failure:
        fails()
    printed = re.sub(r"#[^\n]*|\s", "", "\n".join(failure.value.__notes__))
    assert "instance=make(seed=0,dim_x=2,dim_y=1,condition_x=1.0,condition_y=1.0" in printed
