"""Closed forms, constants and certified bounds of the problem families, against NumPy, SciPy and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
import problems
from bilevel import lower as lower_level
from problems import hyper_cleaning, logistic, quadratic, ridge

hypergradient = jax.jit(lambda problem, x, constants: bilevel.hypergradient(problem, x, constants=constants))


unsolved = jax.jit(lambda problem, x, y, c: bilevel.hypergradient(problem, x, y, lower=bilevel.AsGiven(), constants=c))


@functools.cache
def make(name, **params):
    return problems.make(name, **params)


def dense_f(problem, x, y):
    """The upper objective by NumPy from the sampled matrices, sample by sample."""
    P, Q, S, p, s = (np.asarray(leaf) for leaf in problem.upper_data.full())
    return np.mean([y @ P[i] @ y / 2 + x @ Q[i] @ y + x @ S[i] @ x / 2 + p[i] @ y + s[i] @ x for i in range(len(P))])


QUADRATICS = [
    {},
    {"dim_x": 3, "dim_y": 7, "condition_x": 50.0, "condition_y": 200.0, "coupling": 2.0},
    {"dim_x": 5, "dim_y": 1, "num_samples": 8, "batch_size": 2},
]


@pytest.mark.parametrize("params", QUADRATICS)
@pytest.mark.parametrize("seed", [0, 1])
class TestQuadratic:
    def test_closed_form_is_the_objective(self, params, seed):
        """F = f(x, y(x)) with y(x) from a dense solve; the gradient against central differences of that F."""
        problem = make("quadratic", seed=seed, **params).problem
        exact = quadratic.closed_form(problem.upper_data.full(), problem.lower_data.full())
        H, G, h = (np.asarray(leaf).mean(axis=0) for leaf in problem.lower_data.full())
        x = np.random.default_rng(seed).normal(size=len(exact.q))

        def F(x):
            return dense_f(problem, x, -np.linalg.solve(H, G.T @ x + h))

        np.testing.assert_allclose(x @ exact.M @ x / 2 + exact.q @ x + exact.r, F(x), rtol=1e-10, atol=1e-10)
        steps = 1e-2 * np.eye(len(x))  # exact for quadratics but for rounding
        slopes = np.array([(F(x + e) - F(x - e)) / 2e-2 for e in steps])
        np.testing.assert_allclose(exact.M @ x + exact.q, slopes, rtol=1e-8, atol=1e-8)

    def test_hypergradient_and_its_bound(self, params, seed):
        instance = make("quadratic", seed=seed, **params)
        problem = instance.problem
        exact = quadratic.closed_form(problem.upper_data.full(), problem.lower_data.full())
        x = np.random.default_rng(seed).normal(size=len(exact.q))
        result = hypergradient(problem, jnp.asarray(x), instance.constants)
        error = np.linalg.norm(result.gradient - (exact.M @ x + exact.q))
        assert error <= 1e-9
        assert error <= result.error_bound
        assert result.error_bound <= 1e-7
        assert bilevel.Status(int(result.status)) == bilevel.Status.CONVERGED

    def test_optimum_is_stationary_and_lowest(self, params, seed):
        instance = make("quadratic", seed=seed, **params)
        problem, truth = instance.problem, instance.truth
        result = hypergradient(problem, truth.x, instance.constants)
        assert np.linalg.norm(result.gradient) <= 1e-9
        np.testing.assert_allclose(result.value, truth.value, rtol=1e-9)
        np.testing.assert_allclose(result.y, truth.y, atol=1e-9)
        for k in range(3):
            direction = jax.random.normal(jax.random.key(k), truth.x.shape)
            assert hypergradient(problem, truth.x + 0.1 * direction, instance.constants).value > truth.value

    def test_constants_are_the_spectra(self, params, seed):
        """From JAX's derivatives of the objectives, not from the matrices that made them."""
        instance = make("quadratic", seed=seed, **params)
        problem, c = instance.problem, instance.constants
        x, y = problem.init(jax.random.key(0))
        f = functools.partial(problem.upper, batch=problem.upper_data.full())
        g = functools.partial(problem.lower.g, batch=problem.lower_data.full())
        spectrum = np.linalg.eigvalsh(jax.jit(jax.hessian(g, argnums=1))(x, y))
        np.testing.assert_allclose([c.mu, c.L_g], spectrum[[0, -1]], rtol=1e-9)
        size_y, size_x = params.get("condition_y", 10.0), params.get("condition_x", 10.0)
        np.testing.assert_allclose(spectrum[-1] / spectrum[0], size_y if len(y) > 1 else 1.0, rtol=1e-8)
        exact = quadratic.closed_form(problem.upper_data.full(), problem.lower_data.full())
        np.testing.assert_allclose(np.linalg.cond(exact.M), size_x, rtol=1e-8)
        for constant, function, order in (
            (c.C_gxy, g, (0, 1)), (c.L_fx, f, (0, 1)), (c.L_fy, f, (1, 1)),
        ):  # fmt: skip
            block = jax.jit(jax.jacfwd(jax.grad(function, argnums=order[0]), argnums=order[1]))(x, y)
            np.testing.assert_allclose(constant, np.linalg.norm(block, 2), rtol=1e-9)


def test_finite_sum_has_convex_components_and_the_same_means():
    one = make("quadratic", dim_x=4, dim_y=6).problem
    many = make("quadratic", dim_x=4, dim_y=6, num_samples=16, batch_size=4, noise=0.9).problem
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a[0], np.mean(b, axis=0), atol=1e-12)
    H = np.asarray(many.lower_data.arrays.H)
    lowest = np.linalg.eigvalsh(H)[:, 0]
    assert lowest.min() >= (1 - 0.9) * 0.1 - 1e-12  # (1 - noise) mu
    assert np.linalg.norm(H - H.mean(axis=0), 2, axis=(1, 2)).max() > 0.3  # and there is noise to reduce


def test_saba_finds_the_optimum_of_the_finite_sum():
    instance = make("quadratic", dim_x=4, dim_y=4, num_samples=16, batch_size=4)
    solution = bilevel.solve(
        instance.problem, bilevel.SABA(), key=jax.random.key(0), max_steps=6000, every=6000, tol=0.0
    )
    np.testing.assert_allclose(solution.x, instance.truth.x, atol=1e-5)


def ridge_dense(problem, x):
    """(w, gradient of F) by NumPy: w = (Z'Z/n + D)^-1 Z't/n, dF/dx_i = -exp(x_i) w_i [(Z'Z/n + D)^-1 grad f]_i."""
    Z, t = (np.asarray(leaf) for leaf in problem.lower_data.full())
    V, u = (np.asarray(leaf) for leaf in problem.upper_data.full())
    K = Z.T @ Z / len(t) + np.diag(np.exp(x))
    w = np.linalg.solve(K, Z.T @ t / len(t))
    return w, -np.exp(x) * w * np.linalg.solve(K, V.T @ (V @ w - u) / len(u))


@pytest.mark.parametrize("seed", range(3))
def test_ridge_gradient_and_bound(seed):
    instance = make("ridge", seed=seed)
    x = np.random.default_rng(seed).uniform(ridge.LOWEST, ridge.HIGHEST, 10)
    w, gradient = ridge_dense(instance.problem, x)
    result = hypergradient(instance.problem, jnp.asarray(x), instance.constants)
    np.testing.assert_allclose(result.y, w, atol=1e-11)
    error = np.linalg.norm(result.gradient - gradient)
    assert error <= 1e-9
    assert error <= result.error_bound <= 1e-6


@pytest.mark.parametrize("name", ["quadratic", "ridge"])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-1])
def test_bound_holds_at_a_lower_level_that_is_not_solved(name, size):
    """The bound covers the true error, which is real here, and is of its order of accuracy: a constant times `size`.

    The constant is large for ridge, where mu is that of the whole box, 0.01, and enters squared.
    """
    instance = make(name)
    rng = np.random.default_rng(0)
    x = rng.uniform(-2.0, 1.0, 10)
    if name == "ridge":
        y, gradient = ridge_dense(instance.problem, x)
    else:
        exact = quadratic.closed_form(instance.problem.upper_data.full(), instance.problem.lower_data.full())
        y, gradient = exact.A @ x + exact.c, exact.M @ x + exact.q
    result = unsolved(instance.problem, jnp.asarray(x), y + size * rng.normal(size=10), instance.constants)
    error = np.linalg.norm(result.gradient - gradient)
    assert 1e-3 * size <= error <= result.error_bound <= (1e5 if name == "quadratic" else 1e8) * error


def test_ridge_baselines_are_scikit_learns():
    from sklearn.linear_model import LinearRegression

    instance = make("ridge", seed=1)
    Z, t = (np.asarray(leaf) for leaf in instance.problem.lower_data.full())
    V, u = (np.asarray(leaf) for leaf in instance.problem.upper_data.full())
    fit = LinearRegression(fit_intercept=False).fit(Z, t)
    numbers = {name: baseline() for name, baseline in instance.baselines.items()}
    np.testing.assert_allclose(numbers["least squares"]["val_mse"], np.mean((fit.predict(V) - u) ** 2), rtol=1e-10)
    assert numbers["one penalty, by validation"]["val_mse"] <= numbers["least squares"]["val_mse"]
    np.testing.assert_allclose([Z.mean(axis=0), Z.std(axis=0)], [np.zeros(10), np.ones(10)], atol=1e-12)


def test_ridge_constants_bound_the_derivatives():
    instance = make("ridge")
    problem, c = instance.problem, instance.constants
    residual = jax.jit(jax.grad(lambda x, w: problem.lower.g(x, w, problem.lower_data.full()), argnums=1))
    by_x, by_w = jax.jit(jax.jacfwd(residual)), jax.jit(jax.jacfwd(residual, argnums=1))
    for seed in range(20):
        x = np.random.default_rng(seed).uniform(ridge.LOWEST, ridge.HIGHEST, 10)
        w = ridge_dense(problem, x)[0]
        spectrum = np.linalg.eigvalsh(by_w(x, w))
        assert c.mu <= spectrum[0] + 1e-12
        assert spectrum[-1] <= c.L_g + 1e-12
        assert np.linalg.norm(by_x(x, w), 2) <= c.C_gxy
        z = w + np.random.default_rng(seed + 100).normal(size=10)
        assert np.linalg.norm(by_x(x, w) - by_x(x, z), 2) <= c.L_gxy * np.linalg.norm(w - z)


def logistic_parts(problem):
    (Z, targets), (V, clean) = problem.lower_data.full(), problem.upper_data.full()
    return tuple(np.asarray(leaf) for leaf in (Z, targets, V, clean))


def softmax(scores):
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("penalties", ["class", "feature"])
def test_logistic_gradient_against_dense_algebra(penalties):
    """With y from scipy.optimize, the Hessian as a dense 650 x 650 matrix in NumPy."""
    from scipy.optimize import minimize

    instance = make("logistic", penalties=penalties, train=200, val=100)
    problem = instance.problem
    Z, T, V, U = logistic_parts(problem)
    x = np.random.default_rng(0).uniform(-4.0, 0.0, logistic.SHAPES[penalties])
    weights = np.broadcast_to(np.exp(x), (65, 10))

    def g(flat):
        W = flat.reshape(65, 10)
        p = softmax(Z @ W)
        value = -np.mean(np.log((p * T).sum(axis=1))) + (weights * W**2).sum() / 2
        return value, (Z.T @ (p - T) / len(Z) + weights * W).ravel()

    W = minimize(g, np.zeros(650), jac=True, method="L-BFGS-B", options={"maxiter": 3000, "ftol": 0, "gtol": 1e-9}).x

    def hessian(flat):
        p = softmax(Z @ flat.reshape(65, 10))
        blocks = np.einsum("nk,kl->nkl", p, np.eye(10)) - p[:, :, None] * p[:, None, :]
        return np.einsum("ni,nj,nkl->ikjl", Z, Z, blocks, optimize=True).reshape(650, 650) / len(Z) + np.diag(
            weights.ravel()
        )

    for _ in range(3):
        W = W - np.linalg.solve(hessian(W), g(W)[1])
    fy = (V.T @ (softmax(V @ W.reshape(65, 10)) - U) / len(V)).ravel()
    v = np.linalg.solve(hessian(W), fy)
    gradient = -(weights * W.reshape(65, 10) * v.reshape(65, 10)).sum(axis=0 if penalties == "class" else 1)

    result = hypergradient(problem, jnp.asarray(x), instance.constants)
    error = np.linalg.norm(np.ravel(result.gradient) - gradient)
    assert error <= 1e-9
    assert error <= result.error_bound
    np.testing.assert_allclose(np.ravel(result.y), W, atol=1e-9)


def test_logistic_constants_bound_the_derivatives():
    """Third derivatives along random and greedy directions never pass the bounds; neither do the spectra."""
    instance = make("logistic", train=100, val=100)
    problem, c = instance.problem, instance.constants
    batch = problem.lower_data.full()
    Z = np.asarray(batch[0])

    @jax.jit
    def change(x, W, direction, u):
        """|d/dt R_y(W + t direction) u| at t = 0, for unit u and direction."""
        residual = jax.grad(problem.lower.g, argnums=1)
        hvp = lambda W: jax.jvp(lambda W: residual(x, W, batch), (W,), (u,))[1]  # noqa: E731
        return jnp.linalg.norm(jax.jvp(hvp, (W,), (direction,))[1])

    @jax.jit
    def product(x, W, u):
        return jax.jvp(lambda W: jax.grad(problem.lower.g, argnums=1)(x, W, batch), (W,), (u,))[1]

    rng = np.random.default_rng(0)
    top = np.linalg.svd(Z, full_matrices=False)[2][0]
    for k in range(10):
        x = jnp.asarray(rng.uniform(logistic.LOWEST, logistic.HIGHEST, (1, 10)))
        W = rng.normal(size=(65, 10)) * rng.choice([0.01, 0.3, 1.0])
        u = np.outer(top, rng.normal(size=10)) if k % 2 else rng.normal(size=(65, 10))
        u = u / np.linalg.norm(u)
        Hu = np.asarray(product(x, W, u))
        assert c.mu <= (u * Hu).sum()
        assert np.linalg.norm(Hu) <= c.L_g
        assert change(x, W, u, u) <= c.L_gyy
    solved = jax.jit(lower_level.solve)(problem, x, jnp.zeros((65, 10)), batch).y
    assert np.linalg.norm(np.exp(x) * np.asarray(solved), axis=0).max() <= c.C_gxy


@pytest.fixture(scope="module")
def cleaning():
    """A small hyper-cleaning problem, solved by SOBA, and its baselines."""
    instance = make("hyper_cleaning")
    solver = bilevel.SOBA(lower_step_size=1.0, linear_step_size=0.5, upper_step_size=optax.adam(0.02))
    solution = bilevel.solve(instance.problem, solver, key=jax.random.key(0), max_steps=800, every=800, tol=0.0)
    names = ("train on everything", "train on the clean subset", "train on everything, ridge by validation")
    return instance, solution, {name: instance.baselines[name]() for name in names}


def test_hyper_cleaning_beats_training_on_everything(cleaning):
    instance, solution, baselines = cleaning
    test = {name: numbers["test_accuracy"] for name, numbers in baselines.items()}
    metrics = instance.metrics(solution.x, solution.y)
    assert test["train on the clean subset"] >= test["train on everything"] + 0.05
    assert metrics["test_accuracy"] >= test["train on everything"] + 0.05
    assert metrics["test_accuracy"] > test["train on everything, ridge by validation"]
    assert metrics["corrupted_f1"] >= 0.85


def test_hyper_cleaning_metrics_against_scikit_learn(cleaning):
    from sklearn.datasets import load_digits
    from sklearn.metrics import f1_score

    instance, solution, _ = cleaning
    raw = load_digits()
    truth = {row.tobytes(): label for row, label in zip(raw.data / 16.0, raw.target, strict=True)}
    _, Z, targets, _ = (np.asarray(leaf) for leaf in instance.problem.lower_data.arrays)
    wrong = [truth[np.ascontiguousarray(z[:64]).tobytes()] != t.argmax() for z, t in zip(Z, targets, strict=True)]
    called = 1 / (1 + np.exp(-np.asarray(solution.x))) < 0.5
    metrics = instance.metrics(solution.x, solution.y)
    np.testing.assert_allclose(metrics["corrupted_f1"], f1_score(wrong, called), rtol=1e-12)
    V, U = (np.asarray(leaf) for leaf in instance.problem.upper_data.arrays)
    scores = V @ np.asarray(solution.y)
    np.testing.assert_allclose(metrics["val_accuracy"], np.mean(scores.argmax(axis=1) == U.argmax(axis=1)))


def test_hyper_cleaning_gradient_against_dense_algebra():
    """dF/dx_i = -sigmoid'(x_i)/n <grad CE_i(w), H^-1 grad f>, everything in NumPy at a w that NumPy's Newton finds."""
    instance = make("hyper_cleaning", train=80, val=40)
    problem = instance.problem
    _, Z, T, c = (np.asarray(leaf) for leaf in problem.lower_data.full())
    V, U = (np.asarray(leaf) for leaf in problem.upper_data.full())
    x = np.random.default_rng(0).normal(size=80)
    s = 1 / (1 + np.exp(-x))
    W = np.zeros((65, 10))
    for _ in range(9):
        p = softmax(Z @ W)
        blocks = np.einsum("nk,kl->nkl", p, np.eye(10)) - p[:, :, None] * p[:, None, :]
        H = np.einsum("n,ni,nj,nkl->ikjl", s / 80, Z, Z, blocks, optimize=True).reshape(650, 650)
        H = H + 2 * c[0] * np.eye(650)
        R = Z.T @ (s[:, None] * (p - T)) / 80 + 2 * c[0] * W
        W = W - np.linalg.solve(H, R.ravel()).reshape(65, 10)
    assert np.linalg.norm(R) < 1e-11
    v = np.linalg.solve(H, (V.T @ (softmax(V @ W) - U) / 40).ravel()).reshape(65, 10)
    gradient = -s * (1 - s) / 80 * ((Z @ v) * (softmax(Z @ W) - T)).sum(axis=1)
    result = hypergradient(problem, jnp.asarray(x), None)
    error = np.linalg.norm(result.gradient - gradient)
    assert error <= 1e-9
    assert np.linalg.norm(gradient) > 1e-3


def test_mlp_is_measured_at_the_given_weights(key):
    instance = make("hyper_cleaning", model="mlp", train=100, val=50)
    x, w = instance.problem.init(key)
    measured = jax.jit(lambda problem, x, w: instance.referee.measure(problem, x, w))(instance.problem, x, w)
    V, U = (np.asarray(leaf) for leaf in instance.problem.upper_data.full())
    layers = [w["params"][name] for name in sorted(w["params"])]
    hidden = np.tanh(V[:, :64] @ np.asarray(layers[0]["kernel"]) + np.asarray(layers[0]["bias"]))
    p = softmax(hidden @ np.asarray(layers[1]["kernel"]) + np.asarray(layers[1]["bias"]))
    np.testing.assert_allclose(measured.value, -np.mean(np.log((p * U).sum(axis=1))), rtol=1e-10)
    assert np.isnan(measured.error_bound)  # nothing is certified here
    assert instance.referee is hyper_cleaning.AT_WEIGHTS
