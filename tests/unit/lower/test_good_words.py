"""A good status only where y is the minimiser: at the edge of the domain of an entropy, and at a large condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel.record import Status

GOOD = [Status.CONVERGED, Status.ESTIMATED, Status.WEAKLY_ACTIVE]


def weighted(x, y, w):
    return w @ y


def entropy(x, y, batch):
    return -jnp.dot(x, y) + jnp.sum(y * jnp.log(y))


def test_softmax_as_the_minimiser_of_an_entropy():
    """A full step ends on a vertex, where rounding leaves 1e-17 of y: g is finite there, and its Hessian 1e17. Where y
    falls to e^-25 many short steps lead.
    """
    w = jnp.array([1.0, 0.0, -1.0])
    problem = bilevel.BilevelProblem(
        weighted, bilevel.Minimize(entropy), y_set=bilevel.Simplex(), upper_data=bilevel.Full(w),
        init=lambda key: (jnp.zeros(3), jnp.full(3, 1 / 3)),
    )  # fmt: skip
    x = jnp.concatenate([jnp.array([[1.0, 5.0, -3.0]]), jax.random.normal(jax.random.key(0), (60, 3))])
    x = jnp.concatenate([x, jnp.array([[0.0, -12.0, -25.0], [3.0, 25.0, 0.0]])])
    found = jax.jit(jax.vmap(lambda x: bilevel.hypergradient(problem, x)))(x)
    assert np.isin(np.asarray(found.status), GOOD).all()
    np.testing.assert_allclose(found.y, jax.nn.softmax(x), rtol=1e-10, atol=1e-15)  # eps of the largest entry
    right = jax.vmap(jax.grad(lambda x: w @ jax.nn.softmax(x)))(x)
    np.testing.assert_allclose(found.gradient, right, atol=1e-13)


def to_one(x, y, batch):
    return jnp.sum((y - 1) ** 2) / 2


def stretched(x, y, H):
    return jnp.sum(H * y * y) / 2 + x @ y


def on_ball(dtype):
    nothing = jnp.zeros(8, dtype)
    return bilevel.BilevelProblem(
        to_one, bilevel.Minimize(stretched), lower_data=bilevel.Full(jnp.geomspace(1, 1e5, 8, dtype=dtype)),
        y_set=bilevel.Ball(jnp.array(0.1, dtype)), init=lambda key: (nothing, nothing),
    )  # fmt: skip


def test_slow_progress_is_no_solution():
    """Condition 1e5 in float32: the accelerated steps crawl long before y is right, which was called solved."""
    x = jax.random.normal(jax.random.key(1), (8, 8)) * jnp.array([1.0, 1, 1, 10, 10, 10, 100, 100])[:, None]
    x = x.at[0].set(jnp.array([1.0, -1, 1, -1, 1, -1, 1, -1])).astype(jnp.float32)
    call = lambda dtype: jax.jit(jax.vmap(lambda x: bilevel.hypergradient(on_ball(dtype), x)))(x.astype(dtype))  # noqa: E731
    single, double = call(jnp.float32), call(jnp.float64)
    assert np.isin(np.asarray(double.status), GOOD).all()
    good = np.isin(np.asarray(single.status), GOOD)
    assert good.sum() >= 5
    off = np.linalg.norm(np.asarray(single.gradient) - np.asarray(double.gradient), axis=1)
    assert (off[good] <= 1e-4).all()


@pytest.mark.parametrize("lower", [bilevel.ProjectedNewton(), bilevel.ActiveSet()], ids=["projected", "active_set"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_direction_of_the_face_without_curvature_is_told(lower, dtype):
    """g = (y_0 + y_1 - x)^2/2 on a box: the minimisers are a segment, and f tells its points apart."""
    problem = bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum(y * jnp.array([1.0, 3.0], dtype)) + jnp.sum(x),
        bilevel.Minimize(lambda x, y, batch: jnp.sum((jnp.sum(y) - x) ** 2) / 2),
        y_set=bilevel.Box(-5.0, 5.0),
        init=lambda key: (jnp.ones(1, dtype), jnp.zeros(2, dtype)),
    )
    found = bilevel.hypergradient(problem, jnp.ones(1, dtype), lower=lower)
    assert int(found.status) == Status.UNDETERMINED
    assert np.isinf(float(found.error_bound))
