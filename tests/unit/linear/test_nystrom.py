"""The preconditioner against dense algebra, and what it is for: fewer products for the same answer."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import CG, lower, oracles
from bilevel.linear import nystrom

N, RANK = 300, 20


def symmetric(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
    return jnp.asarray((Q * np.asarray(eigenvalues)) @ Q.T)


def decaying(n=N):
    return 1e-3 + np.concatenate([np.geomspace(1.0, 1e-8, n // 3), np.zeros(n - n // 3)])


def sketch_of(M, rank=RANK):
    return jax.jit(lambda M: nystrom.sketch(lambda v: M @ v, len(M), M.dtype, rank))(M)


def dense(found, n):
    return np.asarray(jax.vmap(found, out_axes=1)(jnp.eye(n, dtype=found.rows.dtype)))


def test_it_inverts_identity_plus_low_rank():
    found = sketch_of(symmetric(decaying()))
    C = np.eye(N) + np.asarray(found.rows).T @ np.asarray(found.rows)
    np.testing.assert_allclose(dense(found, N) @ C, np.eye(N), atol=1e-10)


def test_within_a_subspace_it_inverts_the_projected_matrix():
    found = sketch_of(symmetric(decaying()))
    free = np.arange(N) % 3 > 0
    inside = found.within(lambda v: jnp.where(free, v, 0))
    C = np.eye(N) + np.asarray(found.rows).T @ np.asarray(found.rows)
    np.testing.assert_allclose(
        dense(inside, N)[np.ix_(free, free)] @ C[np.ix_(free, free)], np.eye(free.sum()), atol=1e-9
    )


SPECTRA = {
    "decaying": decaying(),
    "nineteen large": np.where(np.arange(N) < RANK - 1, 5.0, 0.01),
    "flat": np.linspace(0.5, 1.0, N),
    "condition 1e5": np.geomspace(1.0, 1e-5, N),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_the_condition_number_is_within_its_bound(spectrum, dtype):
    """With N the sketch of M, N <= M, l its last eigenvalue and mu that of M: l C = N + l (I - U'U) <= M + l I is at
    most (1 + l/mu) M, and M <= l C + |M - N| I at most (1 + |M - N|/l) l C, since C >= I.
    """
    M = symmetric(spectrum).astype(dtype)
    found = sketch_of(M)
    W = np.asarray(jax.random.normal(jax.random.key(0), (RANK, N), dtype), float)
    M = np.asarray(M, float)
    near = M @ W.T @ np.linalg.solve(W @ M @ W.T, W @ M)
    least = np.sort(np.linalg.eigvalsh((near + near.T) / 2))[-RANK]
    inverse = dense(found, N).astype(float)
    root = np.linalg.cholesky((inverse + inverse.T) / 2)  # definite, or this raises
    conditioned = np.linalg.eigvalsh(root.T @ M @ root)
    bound = (1 + np.linalg.norm(M - near, 2) / least) * (1 + least / np.linalg.eigvalsh(M)[0])
    assert conditioned[-1] / conditioned[0] <= (1 + 1e3 * float(jnp.finfo(dtype).eps)) * bound
    if spectrum is SPECTRA["decaying"]:
        assert bound < np.linalg.cond(M) / 2  # not an empty one


@pytest.mark.parametrize("M", [3.0 * np.eye(N), np.zeros((N, N)), -np.eye(N), np.full((N, N), np.nan)],
                         ids=["multiple of I", "zero", "negative", "nan"])  # fmt: skip
def test_where_it_cannot_help_it_is_the_identity(M):
    np.testing.assert_allclose(dense(sketch_of(jnp.asarray(M)), N), np.eye(N), atol=1e-12)


def test_more_products_than_unknowns_are_never_asked_for():
    M = symmetric([1.0, 2.0, 5.0])
    assert sketch_of(M).rows.shape == (3, 3)


def test_conjugate_gradients_take_fewer_products_and_their_error_never_grows():
    M = symmetric(decaying())
    found, b = sketch_of(M), jnp.asarray(np.random.default_rng(1).normal(size=N))
    exact = np.linalg.solve(M, b)
    plain, faster = (CG(preconditioner=one).prepare(lambda v: M @ v, N, M.dtype)(b) for one in (None, found))
    np.testing.assert_allclose(faster.v, exact, rtol=1e-9)
    assert faster.residual <= 1e-12 * jnp.linalg.norm(b)
    assert faster.iterations < 0.7 * plain.iterations
    root = np.linalg.cholesky(dense(found, N))
    p = np.sqrt(np.linalg.cond(root.T @ M @ root))
    p = (p - 1) / (p + 1)
    error = lambda v: float(np.sqrt((v - exact) @ M @ (v - exact)))  # noqa: E731
    limited = CG(tol=0.0, preconditioner=found)
    after = jax.jit(lambda k: dataclasses.replace(limited, max_iterations=k).iterate(lambda v: M @ v, b)[0])
    errors = [error(after(k)) for k in range(0, 40, 4)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert all(error <= 2 * p ** (4 * k) * errors[0] for k, error in enumerate(errors))  # Saad 2003, 6.11


def least_squares(y_set):
    rng = np.random.default_rng(3)
    A = jnp.asarray(rng.normal(size=(400, N)) * np.geomspace(1, 1e-15, N))
    b = jnp.asarray(rng.normal(size=400))
    g = lambda x, y, batch: jnp.mean((batch[0] @ y - batch[1]) ** 2) / 2 + jnp.exp(x[0]) / 2 * y @ y  # noqa: E731
    return bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum((y - 0.1) ** 2) + x @ x, bilevel.Minimize(g), y_set=y_set,
        lower_data=bilevel.Full((A, b)), init=lambda key: (jnp.array([-7.0]), jnp.zeros(N)),
    )  # fmt: skip


@pytest.mark.parametrize("y_set", [bilevel.Reals(), bilevel.Box(-0.02, 0.05)], ids=["reals", "box"])
def test_large_lower_levels_get_it_and_the_same_answer(y_set):
    problem = least_squares(y_set)
    x, y = problem.init(jax.random.key(0))
    assert jax.jit(lower.solve)(problem, x, y, problem.lower_data.full()).sketch is not None
    h = bilevel.hypergradient(problem, x, y)
    A, b = map(np.asarray, problem.lower_data.arrays)
    ridge, y = np.exp(-7.0), np.asarray(h.y)
    lo, hi = (-np.inf, np.inf) if isinstance(y_set, bilevel.Reals) else (-0.02, 0.05)
    H = A.T @ A / len(A) + ridge * np.eye(N)
    np.testing.assert_allclose(np.clip(y - (H @ y - A.T @ b / len(A)), lo, hi), y, atol=1e-12)  # optimal
    free = (y > lo) & (y < hi)
    assert free.any()
    assert free.all() == (lo == -np.inf)
    u = np.linalg.solve(H[np.ix_(free, free)], 2 * (y - 0.1)[free])
    gradient = 2 * np.asarray(x) - ridge * (y[free] @ u)
    np.testing.assert_allclose(h.gradient, gradient, rtol=1e-9)
    np.testing.assert_allclose(jax.grad(bilevel.implicit_objective(problem))(x), gradient, rtol=1e-9)


def test_the_hypergradient_takes_fewer_products_with_it():
    """In a box that holds nothing back, against a ball that does not either: the same steps, but a ball has none."""

    def products(y_set):
        problem, counter = least_squares(y_set), {}
        with oracles.counting_runs(counter):
            jax.block_until_ready(bilevel.hypergradient(problem, *problem.init(jax.random.key(0))))
            jax.effects_barrier()
        return counter["hvps"]

    assert products(bilevel.Box(-1e3, 1e3)) < 0.8 * products(bilevel.Ball(1e3))


def test_a_ball_has_none():
    problem = least_squares(bilevel.Ball(0.5))
    assert lower.solve(problem, *problem.init(jax.random.key(0)), problem.lower_data.full()).sketch is None
