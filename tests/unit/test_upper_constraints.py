"""Constraints of the leader in which the follower's answer stands: Jacobian, referee, solvers, multipliers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Status, UpperConstraints
from bilevel.diagnostics import REDUCED, measure, measure_global, multipliers
from bilevel.parts.reduced import Multipliers

Q = jnp.array([[2.0, 0.5, 0.2], [0.5, 1.5, 0.3], [0.2, 0.3, 1.8]])
TARGET, BUDGET = jnp.array([1.0, 2.0, -1.0]), jnp.array(0.5)


def distance(x, y, target):
    return jnp.sum((y - target) ** 2) / 2


def follows(x, y, batch):
    """Its minimiser is y(x) = 2 x."""
    return jnp.sum((y - 2 * x) ** 2) / 2


def budget(x, y, data):
    """Spends at most `data`; never active beside: y_0 <= 10."""
    return {"budget": jnp.sum(y) - data, "far": y[:1] - 10}


def tied(x, y, data):
    return y[0] - y[1]


def three(key):
    return jnp.zeros(3), jnp.zeros(3)


def closed(G=budget, H=None):
    """The leader wants y = 2 x near a target t: min |y - t|^2/2 with 1'y <= b has lam = (1't - b)/3, y = t - lam."""
    return bilevel.BilevelProblem(
        distance,
        bilevel.Minimize(follows),
        upper_data=bilevel.Full(TARGET),
        init=three,
        upper_constraints=UpperConstraints(inequality=G, equality=H, data=BUDGET),
    )


def quartic(x, y, batch):
    return y @ Q @ y / 2 - y @ x + jnp.sum(y**4) / 10


def rows_of(x, y):
    return {"a": x @ y - 0.3, "b": y[:1] * x[1]}


def ball(x, y):
    return jnp.sum(y**2) - 0.1


def curved(**kwargs):
    constraints = UpperConstraints(inequality=rows_of, equality=ball)
    return bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2) / 10,
        bilevel.Minimize(quartic),
        init=three,
        upper_constraints=constraints,
        **kwargs,
    )


@pytest.mark.parametrize("y_set", [bilevel.Reals(), bilevel.Box(-0.2, 0.25)], ids=["free", "box"])
def test_the_jacobian_is_that_of_finite_differences(y_set):
    problem, x = curved(y_set=y_set), jnp.array([0.4, 0.7, 0.2])
    found = jax.jit(lambda x: bilevel.hypergradient(problem, x))(x)
    y_of = jax.jit(bilevel.solution_map(problem))

    def values(x):
        return np.concatenate(problem.upper_constraints.values(x, y_of(x)))

    np.testing.assert_allclose(found.constraints.values, values(x), rtol=1e-12)
    steps = 1e-5 * np.eye(3)
    differences = np.stack([(values(x + e) - values(x - e)) / 2e-5 for e in steps], axis=1)
    np.testing.assert_allclose(found.constraints.jacobian, differences, atol=1e-9)
    assert np.all(found.constraints.error_bound < 1e-12)
    assert int(found.status) == Status.ESTIMATED


def test_constants_prove_the_gradient_of_f_alone():
    """y = 2 x: mu = 1, |g_yx| = 2, f_y Lipschitz with 1; the rows' errors are estimated."""
    constants = bilevel.Constants(mu=1, L_fx=0, L_fy=1, L_gxy=0, L_gyy=0, C_gxy=2, L_g=1)
    found = bilevel.hypergradient(closed(), jnp.ones(3), constants=constants)
    assert int(found.status) == Status.CONVERGED
    assert np.all(np.isfinite(found.constraints.error_bound))
    np.testing.assert_allclose(found.constraints.jacobian, [[2, 2, 2], [2, 0, 0]], atol=1e-12)


@pytest.mark.parametrize(
    "solver", [bilevel.SQP(), bilevel.AugmentedLagrangian(bilevel.LBFGS(), inner_steps=15)], ids=["SQP", "Lagrangian"]
)
def test_the_optimum_of_the_closed_form(solver):
    solution = bilevel.solve(closed(), solver, key=jax.random.key(0), max_steps=300)
    price = (jnp.sum(TARGET) - BUDGET) / 3
    assert solution.status == Status.CONVERGED
    np.testing.assert_allclose(solution.y, TARGET - price, atol=1e-6)
    np.testing.assert_allclose(solution.multipliers.inequality, [price, 0], atol=1e-6)
    assert solution.record["multiplier"][-1] == pytest.approx(float(price), abs=1e-6)
    found, wrong = REDUCED.check(closed(), solution.x, solution.y, solution.record.rows)
    assert not wrong
    assert found["hypergradient"] < 1e-6


def test_equalities_and_bounds_beside_them():
    """With y_0 = y_1 and x <= 0.4; the reference is SciPy's SLSQP on the closed form y = 2 x."""
    from scipy.optimize import minimize

    problem = dataclasses.replace(closed(H=tied), x_set=bilevel.Box(-3.0, 0.4))
    solution = bilevel.solve(problem, bilevel.SQP(), key=jax.random.key(0), max_steps=100)
    rows = [
        {"type": "ineq", "fun": lambda x: float(BUDGET) - 2 * x.sum()},
        {"type": "eq", "fun": lambda x: x[0] - x[1]},
    ]
    right = minimize(
        lambda x: np.sum((2 * x - np.asarray(TARGET)) ** 2) / 2, np.zeros(3), bounds=[(-3, 0.4)] * 3, constraints=rows
    )
    assert solution.status == Status.CONVERGED
    np.testing.assert_allclose(solution.x, right.x, atol=1e-6)


def test_the_referee_sees_a_multiplier_of_the_wrong_sign_and_a_violation():
    problem = closed()
    inside = jnp.array([0.0, 0.0, 0.25])  # on the edge of the budget, where F falls away from it
    problem = dataclasses.replace(problem, upper_data=bilevel.Full(-jnp.ones(3)))
    wrong = measure(problem, inside, 2 * inside)
    assert float(wrong.violation) <= 1e-12
    assert float(wrong.hypergradient) > 1
    outside = measure(problem, jnp.ones(3), 2 * jnp.ones(3))
    assert float(outside.violation) == pytest.approx(5.5)
    by_value = measure_global(dataclasses.replace(problem, y_set=bilevel.Box(-3.0, 3.0)), jnp.ones(3), 2 * jnp.ones(3))
    assert float(by_value.violation) == pytest.approx(5.5)


def test_a_solver_says_that_it_does_not_see_them():
    with pytest.raises(bilevel.Unsupported, match="AugmentedLagrangian"):
        bilevel.solve(closed(), bilevel.AID(), key=jax.random.key(0))
    free = dataclasses.replace(closed(), upper_constraints=None)
    with pytest.raises(bilevel.Unsupported, match="AID itself"):
        bilevel.solve(free, bilevel.AugmentedLagrangian(bilevel.AID()), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"upper_constraints": UpperConstraints()}, "inequality, or equality"),
        ({"upper_constraints": UpperConstraints(inequality=lambda x, y: jnp.zeros(0))}, "no rows"),
        ({"upper_constraints": UpperConstraints(equality=lambda x, y: jnp.ones(2, int))}, "floating-point"),
        ({"upper_constraints": UpperConstraints(inequality=3)}, "upper_constraints.inequality"),
        ({"upper_constraints": budget}, "UpperConstraints or None"),
        ({"x_set": bilevel.Ball(1.0)}, "x_set"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(change, named):
    with pytest.raises(bilevel.InvalidInput, match=named):
        dataclasses.replace(closed(), **change).validate()


def test_multipliers_and_the_value_s_slope_in_the_data():
    """dF*/db = -lam, and dF*/dt = t - y by the envelope theorem, at the optimum of the closed form."""
    price = (jnp.sum(TARGET) - BUDGET) / 3
    x = (TARGET - price) / 2
    found = multipliers(closed(), x)
    assert isinstance(found, Multipliers)
    np.testing.assert_allclose(found.inequality, [price, 0], atol=1e-8)
    slopes = bilevel.sensitivity(closed(), x)
    assert float(slopes.upper_constraints.data) == pytest.approx(-float(price), abs=1e-8)
    np.testing.assert_allclose(slopes.upper_data.arrays, jnp.full(3, price), atol=1e-8)
    with pytest.raises(bilevel.InvalidInput, match="no upper_constraints"):
        multipliers(dataclasses.replace(closed(), upper_constraints=None), x)


def test_the_slope_in_the_follower_s_data_through_an_active_bound():
    """min over x of (y - 1)^2/2 - x with y = min(x, hi), x <= 3: F* = (hi - 1)^2/2 - 3 for hi < 1, slope hi - 1."""
    problem = bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum((y - 1) ** 2) / 2 - jnp.sum(x),
        bilevel.Minimize(lambda x, y, batch: jnp.sum((y - x) ** 2) / 2),
        x_set=bilevel.Box(-3.0, 3.0),
        y_set=bilevel.Box(jnp.full(1, -5.0), jnp.full(1, 0.3)),
        init=lambda key: (jnp.zeros(1), jnp.zeros(1)),
    )
    slopes = bilevel.sensitivity(problem, jnp.full(1, 3.0))
    np.testing.assert_allclose(slopes.y_set.hi, [-0.7], atol=1e-10)
    np.testing.assert_allclose(slopes.y_set.lo, [0.0], atol=1e-10)
