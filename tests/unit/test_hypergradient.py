"""Hypergradients: against finite differences and dense algebra, and the error they claim."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
import problems
from bilevel import CG, GMRES, MINRES, Dense, Neumann, Status, Unrolled, diagnostics, oracles, reference

DIM_X, DIM_Y = 3, 5


def upper(x, y, batch):
    return jnp.mean(jnp.cos(batch["t"] @ y)) + 0.1 * jnp.sum(y**2) + x @ batch["Q"] @ y + 0.1 * jnp.sum(x**4)


def lower(x, y, batch):
    """Strongly convex with modulus >= 1/2: logistic loss, curved penalties, a coupling that is not bilinear."""
    logistic = jnp.mean(jnp.logaddexp(0.0, batch["Z"] @ y))
    return logistic + 0.5 * jnp.sum(jnp.exp(x)) * jnp.sum(y**2) + jnp.sin(x) @ batch["G"] @ y + 0.25 * jnp.sum(y**2)


def contraction(x, y, batch):
    return 0.5 * jnp.tanh(batch["W"] @ y) + batch["G"].T @ jnp.sin(x)


def make(seed, fixed_point=False, dtype=float):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    W = np.linalg.qr(rng.normal(size=(DIM_Y, DIM_Y)))[0]
    lower_batch = {"Z": draw(20, DIM_Y), "G": draw(DIM_X, DIM_Y), "W": jnp.asarray(W, dtype)}
    start = (jnp.zeros(DIM_X, dtype), jnp.zeros(DIM_Y, dtype))
    return bilevel.BilevelProblem(
        upper=upper,
        lower=bilevel.FixedPoint(contraction) if fixed_point else bilevel.Minimize(lower),
        upper_data=bilevel.Full({"t": draw(7, DIM_Y), "Q": draw(DIM_X, DIM_Y)}),
        lower_data=bilevel.Full(lower_batch),
        init=_start64 if dtype is float else (lambda key: start),
    ), jnp.asarray(rng.uniform(-1, 1, DIM_X), dtype)


def _start64(key):
    return jnp.zeros(DIM_X), jnp.zeros(DIM_Y)


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)


@pytest.mark.parametrize("fixed_point", [False, True], ids=["minimize", "fixed_point"])
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_equals_dense_algebra_and_finite_differences_to_1e_9(fixed_point, seed):
    problem, x = make(seed, fixed_point)
    h = bilevel.hypergradient(problem, x)
    value, dense = reference.hypergradient(problem, x, jnp.zeros(DIM_Y))
    assert h.status == Status.ESTIMATED
    assert float(h.value) == pytest.approx(value, rel=1e-12)
    assert relative(h.gradient, dense) < 1e-9
    differences = reference.finite_differences(reference.objective(problem, jnp.zeros(DIM_Y)), x, step=5e-3)
    assert relative(h.gradient, differences) < 1e-9


METHODS = [
    CG(),
    MINRES(),
    GMRES(),
    Neumann(step_size=0.05, max_iterations=20_000),
    Dense(),
    Dense(positive_definite=True),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_methods_agree_for_minimize(method):
    problem, x = make(1)
    exact = reference.hypergradient(problem, x, jnp.zeros(DIM_Y))[1]
    h = bilevel.hypergradient(problem, x, method=method)
    assert relative(h.gradient, exact) < 1e-10
    assert h.linear_residual < 1e-11


@pytest.mark.parametrize("method", [GMRES(), Neumann(), Dense()], ids=lambda m: type(m).__name__)
def test_methods_agree_for_a_fixed_point_whose_operator_is_not_symmetric(method):
    problem, x = make(2, fixed_point=True)
    exact = reference.hypergradient(problem, x, jnp.zeros(DIM_Y))[1]
    assert relative(bilevel.hypergradient(problem, x, method=method).gradient, exact) < 1e-10


def test_unrolling_converges_geometrically_to_the_implicit_gradient():
    problem, x = make(3)
    exact = bilevel.hypergradient(problem, x).gradient
    errors = []
    for steps in (20, 40, 80):
        h = bilevel.hypergradient(problem, x, jnp.ones(DIM_Y), method=Unrolled(0.1, steps), lower=bilevel.AsGiven())
        errors.append(relative(h.gradient, exact))
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.04 * errors[1]
    assert np.isnan(h.linear_residual)


def test_finite_at_a_solved_lower_level():
    """A value-function gradient divides by |g_y|; at |g_y| = 0, where every run ends, this one must not."""
    instance = problems.make("quadratic", seed=0, dim_x=3, dim_y=4)
    x, y = instance.truth.x, instance.truth.y
    for lower in (bilevel.AsGiven(), bilevel.Newton()):
        h = bilevel.hypergradient(instance.problem, x, y, lower=lower)
        assert np.isfinite(h.gradient).all()
        assert diagnostics.norm(h.gradient) < 1e-12


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 1e-8, 1e-3, 1.0]))
def test_the_proved_bound_holds_and_is_not_vacuous(seed, offset):
    """200 draws of (x, y) a call, y off the solution by `offset`; constants of the quadratic family are exact."""
    instance = problems.make("quadratic", seed=seed, dim_x=4, dim_y=5)
    H, G, h0 = (np.asarray(leaf)[0] for leaf in instance.problem.lower_data.arrays)
    rng = np.random.default_rng(seed)
    xs = rng.normal(size=(200, 4))
    ys = np.linalg.solve(H, -(xs @ G + h0).T).T + offset * rng.normal(size=(200, 5))
    truth = jax.vmap(lambda x: bilevel.hypergradient(instance.problem, x).gradient)(jnp.asarray(xs))
    for method in (Dense(), CG(tol=1e-4), Neumann(tol=1e-3)):
        settings_of = {"lower": bilevel.AsGiven(), "method": method, "constants": instance.constants}
        h = jax.vmap(partial(bilevel.hypergradient, instance.problem, **settings_of))(jnp.asarray(xs), jnp.asarray(ys))
        errors = np.linalg.norm(np.asarray(h.gradient - truth), axis=1)
        assert (errors <= h.error_bound).all()
        if offset == 1.0:  # a bound a factor 1e4 above the error would say nothing
            assert np.median(h.error_bound / errors) < 1e4
        assert (h.status == Status.CONVERGED).all()


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-6, 1e-4, 1e-2]))
def test_the_estimated_error_is_of_the_right_size_for_small_residuals(seed, size):
    problem, x = make(seed)
    exact = bilevel.hypergradient(problem, x)
    y = exact.y + size * jax.random.normal(jax.random.key(seed), (DIM_Y,))
    h = bilevel.hypergradient(problem, x, y, lower=bilevel.AsGiven())
    error = float(diagnostics.distance(h.gradient, exact.gradient))
    assert error <= float(h.error_bound) <= 4 * error
    assert h.status == Status.ESTIMATED


def test_an_inexact_linear_solve_is_seen_by_the_estimate():
    problem, x = make(5)
    exact = bilevel.hypergradient(problem, x).gradient
    h = bilevel.hypergradient(problem, x, method=CG(max_iterations=2))
    error = float(diagnostics.distance(h.gradient, exact))
    assert error > 1e-6
    assert h.linear_residual > 1e-5
    # The same two CG iterations measure the change, so the estimate is rough; it must be of the error's order.
    assert 0.2 * error <= float(h.error_bound) <= 20 * error


def test_implicit_objective_under_every_transformation():
    problem, x = make(6)
    F = bilevel.implicit_objective(problem)
    exact = bilevel.hypergradient(problem, x)
    assert float(F(x)) == pytest.approx(float(exact.value), rel=1e-12)
    np.testing.assert_allclose(jax.grad(F)(x), exact.gradient, rtol=1e-10)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(F))(x), exact.gradient, rtol=1e-10)
    xs = jnp.stack([x, 0.5 * x, -x])
    each = [bilevel.hypergradient(problem, row).gradient for row in xs]
    np.testing.assert_allclose(jax.vmap(jax.grad(F))(xs), jnp.stack(each), rtol=1e-10)
    np.testing.assert_allclose(F(x, exact.y + 0.1), F(x), rtol=1e-12)  # a warm start changes nothing
    assert np.abs(jax.grad(F, argnums=1)(x, exact.y)).max() == 0
    hessian = jax.hessian(F)(x)
    rows = [(jax.grad(F)(x.at[i].add(1e-5)) - jax.grad(F)(x.at[i].add(-1e-5))) / 2e-5 for i in range(DIM_X)]
    np.testing.assert_allclose(hessian, jnp.stack(rows), atol=1e-7)


def test_implicit_objective_of_a_fixed_point_in_both_modes():
    problem, x = make(7, fixed_point=True)
    F = bilevel.implicit_objective(problem)
    exact = reference.hypergradient(problem, x, jnp.zeros(DIM_Y))[1]
    np.testing.assert_allclose(jax.grad(F)(x), exact, rtol=1e-10)
    np.testing.assert_allclose(jax.jacfwd(F)(x), exact, rtol=1e-10)


def test_implicit_objective_inside_an_optax_loop():
    instance = problems.make("quadratic", seed=1, dim_x=3, dim_y=4)
    F, optimiser = bilevel.implicit_objective(instance.problem), optax.sgd(0.5)

    @jax.jit
    def run(x):
        def body(carry, _):
            x, state = carry
            updates, state = optimiser.update(jax.grad(F)(x), state)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(body, (x, optimiser.init(x)), length=400)[0][0]

    np.testing.assert_allclose(run(jnp.zeros(3)), instance.truth.x, atol=1e-6)


def test_what_is_no_problem_is_named():
    """An Instance above all, which prints like one."""
    instance = problems.make("quadratic", dim_x=3, dim_y=3)
    for other, name in ((instance, "Instance"), ("quadratic", "str")):
        for call in (lambda other: bilevel.hypergradient(other, jnp.zeros(3)), bilevel.implicit_objective):
            with pytest.raises(bilevel.InvalidInput, match=f"(?s)problem.*{name}.*BilevelProblem"):
                call(other)


def test_another_instance_of_the_family_compiles_nothing():
    traces = []

    def counted(x, y, batch):
        traces.append(x)
        return upper(x, y, batch)

    (first, x), (second, other) = ((dataclasses.replace(problem, upper=counted), x) for problem, x in map(make, (8, 9)))
    compiled = jax.jit(lambda problem, x: bilevel.hypergradient(problem, x).gradient)
    for function in (bilevel.hypergradient, compiled, lambda problem, x: bilevel.implicit_objective(problem)(x)):
        function(first, x)
        before = len(traces)
        function(second, other)
        assert len(traces) == before > 0


def test_counted_oracles_of_an_implicit_hypergradient():
    problem, x = make(10)
    with jax.disable_jit(), oracles.counting() as count:
        bilevel.hypergradient(
            problem, x, jnp.zeros(DIM_Y), lower=bilevel.AsGiven(), method=CG(tol=0.0, max_iterations=3), estimate=False
        )
    calls = count()
    # R at y, and two looks, at v = 0 and at the solved v, of one product each. CG: three iterations, and the recomputed
    # residual, which is all that is left where nothing is to solve after the second look.
    assert (calls.upper_gradients, calls.lower_gradients, calls.hvps, calls.jvps) == (2, 1 + 2, 2 + 4 + 1, 2)


def test_float32_has_float32_accuracy():
    problem, x = make(11, dtype=jnp.float32)
    exact, at = make(11)
    h = bilevel.hypergradient(problem, x)
    assert h.gradient.dtype == jnp.float32
    assert h.status == Status.ESTIMATED
    assert relative(h.gradient, bilevel.hypergradient(exact, at).gradient) < 1e-5


def test_pytrees_of_any_shape():
    def f(x, y, batch):
        return jnp.sum((y["a"] - 1) ** 2) + y["b"] ** 2 + jnp.sum(x["u"] ** 2) + x["w"]

    def g(x, y, batch):
        return jnp.sum((y["a"] - x["u"]) ** 2) + (y["b"] - x["w"]) ** 2 * 3

    start = {"u": jnp.ones((2, 3)), "w": jnp.array(0.5)}, {"a": jnp.zeros((2, 3)), "b": jnp.array(0.0)}
    problem = bilevel.BilevelProblem(f, bilevel.Minimize(g), init=lambda key: start)
    h = bilevel.hypergradient(problem, start[0])
    np.testing.assert_allclose(h.gradient["u"], 2 * (1 - 1) + 2 * np.ones((2, 3)), atol=1e-12)
    np.testing.assert_allclose(h.gradient["w"], 2 * 0.5 + 1, atol=1e-12)


def test_an_estimate_by_cg_sees_the_soft_half_of_a_residual():
    """R's soft half is 1/200 of its stiff one, and all of y's error: a correction to two digits of R would miss it."""
    stiff = jnp.repeat(jnp.array([1e4, 1.0]), 20)
    problem = bilevel.BilevelProblem(
        lambda x, y, batch: 0.5 * jnp.sum((y - 1) ** 2),
        bilevel.Minimize(lambda x, y, batch: 0.5 * jnp.sum(stiff * (y - x) ** 2)),
        init=lambda key: (jnp.zeros(40), jnp.zeros(40)),
    )
    x, R = jnp.linspace(0, 2, 40), jnp.where(stiff > 1, 0.1, 0.1 / 200)
    h = bilevel.hypergradient(problem, x, x + R / stiff, method=CG(), lower=bilevel.AsGiven())
    error = np.linalg.norm(h.gradient - (x - 1))
    assert error > 2e-3
    assert error <= h.error_bound <= 3.1 * error  # three times, and rounding


def test_statuses_tell_the_truth():
    problem, x = make(12)
    assert bilevel.hypergradient(problem, x, lower=bilevel.Newton(max_steps=1)).status == Status.MAX_STEPS
    broken = dataclasses.replace(
        problem, lower_data=bilevel.Full({**problem.lower_data.arrays, "G": jnp.full((3, 5), jnp.nan)})
    )
    h = bilevel.hypergradient(broken, x)
    assert h.status == Status.NONFINITE
    assert h.error_bound == jnp.inf
    assert "NONFINITE" in str(h)
    assert np.isnan(bilevel.implicit_objective(broken)(x))


def test_errors_are_named():
    problem, x = make(13)
    with pytest.raises(bilevel.InvalidInput, match=r"x: got float64\[2\]; expected float64\[3\], as init's x0"):
        bilevel.hypergradient(problem, x[:2])
    with pytest.raises(bilevel.InvalidInput, match="y: got"):
        bilevel.hypergradient(problem, x, {"y": jnp.zeros(5)})
    row = bilevel.LinearCoupling(jnp.ones((1, 5)), jnp.ones((1, 3)), jnp.ones(1))
    mixed = dataclasses.replace(problem, y_set=bilevel.Ball(1.0), coupling=row)
    with pytest.raises(NotImplementedError, match=r"hypergradient: y_set must be .*got Ball"):
        bilevel.hypergradient(mixed, x)
    with pytest.raises(NotImplementedError, match="implicit_objective"):
        bilevel.implicit_objective(mixed)(x)


def test_an_estimate_by_a_solver_that_has_not_solved_is_infinite():
    """CG stops at negative curvature with v = 0, and would find its own error to be 0."""
    problem = bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum(y),
        bilevel.Minimize(lambda x, y, batch: -0.5 * jnp.sum(y**2) - x @ y),
        init=lambda key: (jnp.ones(2), jnp.zeros(2)),
    )
    h = bilevel.hypergradient(problem, jnp.ones(2), method=CG(), lower=bilevel.AsGiven())
    assert h.status == Status.UNSOLVED_LINEAR
    assert h.error_bound == jnp.inf


def test_a_bound_that_overflows_is_no_proof():
    problem, x = make(14)
    constants = bilevel.Constants(mu=1e-3, L_fx=1.0, L_fy=1.0, L_gxy=1.0, L_gyy=1.0, C_gxy=1e308, L_g=1.0)
    h = bilevel.hypergradient(problem, x, constants=constants)
    assert h.error_bound == jnp.inf
    assert h.status == Status.NONFINITE


def test_no_bound_is_not_called_an_estimate():
    problem, x = make(14)
    for h in (
        bilevel.hypergradient(problem, x, estimate=False),
        bilevel.hypergradient(problem, x, method=Unrolled(0.1, 5)),
    ):
        assert h.status == Status.UNCHECKED
        assert np.isnan(h.error_bound)


def test_more_unknowns_than_a_dense_hessian_is_formed_for():
    """With y = x/h: grad F = (y - 1)/h. The lower level, its residual and the adjoint take products alone."""
    curvature = jnp.linspace(1.0, 3.0, 300)
    problem = bilevel.BilevelProblem(
        lambda x, y, batch: 0.5 * jnp.sum((y - 1) ** 2),
        bilevel.Minimize(lambda x, y, batch: 0.5 * y @ (curvature * y) - x @ y),
        init=lambda key: (jnp.zeros(300), jnp.zeros(300)),
    )
    x = jnp.linspace(-1.0, 2.0, 300)
    h = bilevel.hypergradient(problem, x)
    exact = (x / curvature - 1) / curvature
    assert h.status == Status.ESTIMATED
    assert jnp.linalg.norm(h.gradient - exact) <= h.error_bound < 1e-11
    np.testing.assert_allclose(h.lower_residual, jnp.linalg.norm(curvature * h.y - x), rtol=1e-6, atol=1e-15)
