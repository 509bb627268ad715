"""The family `unlearning` against closed forms, and BOME without x against the updates of two papers in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import bilevel
import problems
from bilevel import InvalidInput
from problems import unlearning


def quadratics(problem):
    """(f, its gradient, g, its gradient) of least-squares in NumPy."""
    found = []
    for source in (problem.upper_data, problem.lower_data):
        Z, t, base = (np.asarray(source.full()[name]) for name in ("Z", "t", "base"))
        found.append(lambda y, Z=Z, t=t, base=base: np.mean((Z @ (base + y) - t) ** 2) / 2)
        found.append(lambda y, Z=Z, t=t, base=base: Z.T @ (Z @ (base + y) - t) / len(t))
    return found


def test_the_known_optimum_solves_both_levels():
    """By the constrained least squares' own KKT system, and by SciPy."""
    instance = problems.make("unlearning", dim=6, forget=2)
    f, df, _, dg = quadratics(instance.problem)
    y = np.asarray(instance.truth.y)
    assert np.linalg.norm(dg(y)) < 1e-12
    Z = np.asarray(instance.problem.lower_data.full()["Z"])
    np.testing.assert_allclose(df(y) - Z.T @ np.linalg.lstsq(Z.T, df(y), rcond=None)[0], 0, atol=1e-12)
    rows = {"type": "eq", "fun": lambda y: Z @ (np.asarray(instance.problem.lower_data.full()["base"]) + y)}
    found = scipy.optimize.minimize(f, np.zeros(6), jac=df, constraints=rows, options={"ftol": 1e-14})
    assert found.fun == pytest.approx(instance.truth.value, rel=1e-8)
    measured = unlearning.within(instance.problem, jnp.zeros(0), instance.truth.y)
    np.testing.assert_allclose([measured.value, measured.hypergradient], [instance.truth.value, 0], atol=1e-10)
    off = unlearning.within(instance.problem, jnp.zeros(0), instance.truth.y + 0.1)
    assert off.lower_residual > 1e-2
    row = {name: float(getattr(off, name)) for name in ("value", "hypergradient", "lower_residual")}
    assert unlearning.check_within(instance.problem, None, instance.truth.y + 0.1, [row])[1] == []
    row["hypergradient"] *= 1.001
    assert unlearning.check_within(instance.problem, None, instance.truth.y + 0.1, [row])[1] == ["hypergradient"]


def path(problem, steps, **settings):
    solver = bilevel.BOME(lower_step_size=0.1, num_lower_steps=1, **settings)
    state = solver.init(problem, jax.random.key(0))
    step, found = jax.jit(solver.step), []
    for _ in range(steps):
        found.append(np.asarray(state.y))
        state, info = step(problem, state, jax.random.key(0))
    return np.array(found), info


@pytest.mark.parametrize("equality", [False, True])
def test_without_x_bome_is_the_dynamic_barrier_step(equality):
    """y <- y - a (df + lam dg), lam = gamma - df'dg/|dg|^2: BLUR; not below 0: dynamic barrier gradient descent."""
    problem = problems.make("unlearning", dim=6, forget=2).problem
    _, df, _, dg = quadratics(problem)
    found, _ = path(problem, 60, upper_step_size=0.05, decrease=0.3, equality=equality)
    y, negative = np.zeros(6), 0
    for k in range(60):
        np.testing.assert_allclose(found[k], y, atol=1e-12)
        lam = 0.3 - df(y) @ dg(y) / (dg(y) @ dg(y))
        negative += lam < 0
        y = y - 0.05 * (df(y) + (lam if equality else max(0, lam)) * dg(y))


def test_where_the_two_differ_the_barrier_lowers_both_more():
    """The retain gradient alone lowers g faster than asked there: BLUR slows both. From a start where both agree."""
    problem = problems.make("unlearning", dim=6, forget=2).problem
    _, df, _, dg = quadratics(problem)
    rng, seen = np.random.default_rng(0), 0
    for y in 3 * rng.normal(size=(200, 6)):
        r, g = df(y), dg(y)
        lam = 0.3 - r @ g / (g @ g)
        if lam < 0:
            seen += 1
            assert r @ r > r @ (r + lam * g)
            assert g @ r > g @ (r + lam * g)
            np.testing.assert_allclose(g @ (r + lam * g), 0.3 * g @ g)
    assert seen > 20


def test_shrinking_steps_come_to_the_optimum():
    instance = problems.make("unlearning", dim=6, forget=2)
    solver = bilevel.BOME(
        lower_step_size=0.1, upper_step_size=optax.polynomial_schedule(0.1, 1e-4, 1, 20_000), num_lower_steps=1
    )
    solution = bilevel.solve(
        instance.problem, solver, key=jax.random.key(0), measure=instance.referee, max_steps=20_000, every=10_000
    )
    np.testing.assert_allclose(solution.y, instance.truth.y, atol=2e-2)
    assert solution.status == bilevel.Status.MAX_STEPS  # near, and never called converged
    assert "within the minimisers of g" in str(solution)


def test_digits():
    """Losses by hand at the start; the retrained model has never seen the digit; what is not finite says so."""
    instance = problems.make("unlearning", kind="digits", loss="npo", seed=3)
    problem = instance.problem.validate()
    x, y = problem.init(jax.random.key(0))
    data = problem.lower_data.full()
    assert problem.lower.g(x, y, data) == pytest.approx(2 / 0.15 * np.log(2))  # p = p_base
    p = np.asarray(jax.nn.softmax(unlearning.scores(data["base"], data["Z"])))
    assert unlearning.uniform(x, y, data) == pytest.approx(np.mean(np.log(0.1) - np.log(p)))
    before, retrained = (instance.baselines[name]() for name in ("before", "retrained"))
    assert before["forget_accuracy"] > 0.9
    assert min(before["retain_accuracy"], retrained["retain_accuracy"]) > 0.9
    assert retrained["forget_accuracy"] == 0
    assert abs(retrained["kl_to_retrained"]) < 1e-12 < before["kl_to_retrained"]
    measured = unlearning.across(problem, x, y)
    assert measured.lower_residual > 0
    assert np.isfinite(measured.hypergradient)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, y)
    assert np.isnan(instance.metrics(x, bad)["forget_accuracy"])
    assert unlearning.across(problem, x, bad).status == bilevel.Status.NONFINITE


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"kind": "text"}, r"kind \(unlearning\)"),
        ({"loss": "kl"}, r"loss \(unlearning\)"),
        ({"sharpness": 0.0}, r"sharpness \(unlearning\)"),
        ({"dim": 1}, r"dim \(unlearning\)"),
        ({"forget": 10}, r"forget \(unlearning\)"),
        ({"rows": 9}, r"rows \(unlearning\)"),
    ],
)
def test_bad_parameters_are_named(params, words):
    with pytest.raises(InvalidInput, match=words):
        problems.make("unlearning", **params)
