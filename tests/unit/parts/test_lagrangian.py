"""Multipliers and the max-min steps that first-order solvers of coupled lower levels share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import bilevel
from bilevel import oracles
from bilevel.lower import polyhedral
from bilevel.parts import lagrangian, spectrum

rng = np.random.default_rng(3)
A, B, b = rng.normal(size=(3, 5)), rng.normal(size=(3, 2)), rng.normal(size=3)
X, Y = jnp.asarray(rng.normal(size=2)), jnp.asarray(rng.normal(size=5))


def upper(x, y, batch):
    return jnp.sum(y**2)


def lower(x, y, batch):
    return jnp.sum(y**2) + jnp.sum(y) * x[0]


def problem(coupling):
    return bilevel.BilevelProblem(upper, bilevel.Minimize(lower), coupling=coupling, init=lambda key: (X, Y))


LINEAR = problem(bilevel.LinearCoupling(*map(jnp.asarray, (A[:2], B[:2], b[:2], A[2:], B[2:], b[2:]))))
SMOOTH = problem(bilevel.SmoothCoupling(lambda x, y: jnp.stack([x[0] * y[0] ** 2, jnp.sum(y) - x[1] ** 3])))
NONE = problem(None)


def test_multipliers_and_slacks_have_the_signs_of_their_rows():
    m = jnp.array([-1.0, 3.0, -3.0])
    np.testing.assert_array_equal(lagrangian.clip(LINEAR, m), [0, 3, -3])
    np.testing.assert_array_equal(lagrangian.clip(LINEAR, m, 2.0), [0, 2, -2])
    np.testing.assert_array_equal(lagrangian.clip_slacks(LINEAR, m), [-1, 0, 0])
    np.testing.assert_array_equal(lagrangian.active(LINEAR, m), [False, True, True])
    np.testing.assert_array_equal(lagrangian.clip(SMOOTH, jnp.array([-1.0, 2.0])), [0, 2])
    assert lagrangian.zeros(LINEAR, X, Y).shape == (3,)
    assert lagrangian.zeros(NONE, X, Y).shape == (0,)


@pytest.mark.parametrize("which", [LINEAR, SMOOTH, NONE], ids=["linear", "smooth", "none"])
def test_pullback_is_the_transposed_derivative(which):
    h, pull = oracles.coupling_pullback(which, X, Y)
    derivative = oracles.coupling_derivative(which, X, Y)
    m = jnp.asarray(rng.normal(size=h.shape))
    np.testing.assert_allclose(jnp.concatenate(pull(m)), derivative.T @ m, rtol=1e-12, atol=1e-12)
    for k in range(h.size):  # the derivative against differences
        value = lambda z: float(oracles.coupling_pullback(which, z[:2], z[2:])[0][k])  # noqa: E731, B023
        differences = optimize.approx_fprime(np.concatenate([X, Y]), value, 1e-7)
        np.testing.assert_allclose(derivative[k], differences, atol=1e-5)


def test_the_bound_of_the_derivative_is_one():
    J = jax.jit(lagrangian.lipschitz)(LINEAR, jax.random.key(0), X, Y)[2]
    exact = np.linalg.norm(np.hstack([B, A]), 2)
    assert exact <= J <= 2 * exact


def test_smoothness_sees_the_largest_curvature_not_the_mean():
    """Of 100 eigenvalues one is 1 and the others 0.01: random directions see 0.1. Against dense algebra, from below."""
    Q, _ = np.linalg.qr(rng.normal(size=(100, 100)))
    H = jnp.asarray((Q * np.r_[1.0, np.full(99, 0.01)]) @ Q.T)
    curved = bilevel.BilevelProblem(
        lambda x, y, batch: 3 * y @ H @ y / 2, bilevel.Minimize(lambda x, y, batch: y @ H @ y / 2),
        init=lambda key: (jnp.zeros(1), jnp.zeros(100)),
    )  # fmt: skip
    x, y = curved.init(jax.random.key(0))
    found = np.array(spectrum.smoothness(curved, jax.random.key(0), x, y))
    truth = np.array([3.0, 1.0]) * np.linalg.eigvalsh(H)[-1]
    assert (found <= truth * (1 + 1e-9)).all()
    np.testing.assert_allclose(found, truth, rtol=0.02)


def test_eigenvalues_of_the_max_min_iteration():
    """Those of max_min's docstring, p and q Rayleigh quotients of an eigenvector's part in y: all inside the circle."""
    for seed in range(5):
        draw = np.random.default_rng(seed)
        H, C = draw.normal(size=(5, 5)), draw.normal(size=(3, 5))
        H = H @ H.T + 0.1 * np.eye(5)
        s = 1 / np.linalg.eigvalsh(H)[-1]
        r = 1.9 / (s * np.linalg.norm(C, 2) ** 2)
        step = np.block([[np.eye(5) - s * H, -s * C.T], [r * C @ (np.eye(5) - s * H), np.eye(3) - s * r * C @ C.T]])
        values, vectors = np.linalg.eig(step)
        assert np.abs(values).max() < 1
        for z, v in zip(values, vectors.T, strict=True):
            y = v[:5] / np.linalg.norm(v[:5])
            p, q = (y.conj() @ H @ y).real, np.linalg.norm(C @ y) ** 2
            assert abs(z**2 - z * (2 - s * p - s * r * q) + 1 - s * p) < 1e-8


@pytest.mark.parametrize("num_primal_steps", [1, 5])
def test_max_min_finds_the_solution_and_its_multipliers(num_primal_steps):
    """Against the active-set method, which knows nothing of steps."""
    exact = jax.jit(polyhedral.solve)(LINEAR, X, Y, None)

    @jax.jit
    def run(m):
        look = lambda y: oracles.residual(LINEAR, X, y, None)  # noqa: E731
        size, dual_size = lagrangian.sizes(LINEAR, jax.random.key(0), X, Y, None, None, 0.0)
        return lagrangian.max_min(LINEAR, X, Y, m, look, size, dual_size, 3000, num_primal_steps)

    y, m = run(lagrangian.zeros(LINEAR, X, Y))
    np.testing.assert_allclose(y, exact.y, atol=1e-8)
    # its rows are the equality first, then the inequalities
    np.testing.assert_allclose(m, np.roll(exact.multipliers, -1), atol=1e-7)
