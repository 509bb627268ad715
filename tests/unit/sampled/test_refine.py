"""Points moved into Y(x) and minimisers over it, against exact projections, closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel.sampled import Blocks, refine

BOX = bilevel.Box(-50.0, 50.0)


def pulled(x, y, batch):
    return jnp.sum(x) * 0.0 + 1e-6 * jnp.sum(y)


def bowl(x, y, batch):
    return jnp.sum((y - batch) ** 2) / 2


def start(key):
    return jnp.zeros(2), jnp.zeros(3)


@jax.jit
def nearest(A, B, b, x, target):
    """(argmin |y - target|^2/2 over A y + B x <= b, its multipliers)."""
    coupling, data = bilevel.LinearCoupling(A, B, b), bilevel.Full(target)
    problem = bilevel.BilevelProblem(pulled, bilevel.Minimize(bowl), BOX, BOX, coupling, lower_data=data, init=start)
    view = Blocks.of(problem, target)
    y = refine.polish(view, x, 0 * target[None])
    return y[0], refine.multipliers(view, x, y, (y - target[None]))[0]


@jax.jit
def project(A, b, target):
    return bilevel.Polyhedron(A, b).project(target)


@given(st.integers(0, 2**20))
@settings(max_examples=25)
def test_a_minimiser_over_a_coupled_polyhedron_is_the_exact_projection(seed):
    """And its multipliers give the slope of the least value in x: v_x = B' lam (envelope theorem)."""
    rng = np.random.default_rng(seed)
    A, B, b = rng.normal(size=(2, 3)), rng.normal(size=(2, 2)), rng.uniform(-1, 1, 2)
    x, target = rng.normal(size=2), 2 * rng.normal(size=3)
    y, lam = nearest(*map(jnp.asarray, (A, B, b, x, target)))
    np.testing.assert_allclose(y, project(A, b - B @ x, target), atol=1e-7)
    assert (lam >= 0).all()
    np.testing.assert_allclose(y - target + A.T @ lam, 0, atol=1e-5)
    v = lambda x: np.sum((np.asarray(project(A, b - B @ x, target)) - target) ** 2) / 2  # noqa: E731
    d, h = rng.normal(size=2), 1e-6
    np.testing.assert_allclose(lam @ B @ d, (v(x + h * d) - v(x - h * d)) / (2 * h), atol=1e-4)


def stiff(x, y, batch):
    return (y[0] - jnp.sin(3 * y[1])) ** 2 + 1e-2 * (y[2] + y[1]) ** 2


def aim(x, y, batch):
    return jnp.sum((y - 0.3) ** 2)


def test_stiff_penalties_do_not_slow_the_descent():
    """F + 1e6 g has condition numbers about 1e6 along a curved valley; its gradient vanishes after 12 steps."""
    problem = bilevel.BilevelProblem(aim, bilevel.Minimize(stiff), BOX, BOX, init=start)
    x = jnp.zeros(2)

    @jax.jit
    def descend(y):
        return refine.improve(Blocks.of(problem, y), x, y[None], 1.0, 1e6, 12).y[0]

    total = lambda y: aim(x, y, None) + 1e6 * stiff(x, y, None)  # noqa: E731
    for y in (jnp.array([0.1, 0.2, 0.0]), jnp.array([0.5, 0.1, -0.3])):
        assert jnp.linalg.norm(jax.grad(total)(descend(y))) <= 1e-5 * jnp.linalg.norm(jax.grad(total)(y))


def terms(x, y, batch):
    return jnp.sum((y - batch) ** 2 * (y + 2) ** 2, axis=1) + jnp.sum(x) * 0.0


def test_blocks_are_taken_apart_and_put_together_again():
    separable = bilevel.Separable(terms)
    problem = bilevel.BilevelProblem(
        separable, bilevel.Minimize(separable), BOX, BOX,
        upper_data=bilevel.Full(jnp.ones((1, 1))), lower_data=bilevel.Full(jnp.ones((1, 1))),
        init=lambda key: (jnp.zeros(2), {"a": jnp.zeros((4, 1)), "b": jnp.zeros((4, 1, 2))}),
    )  # fmt: skip
    view = Blocks.of(problem, problem.init(None)[1])
    z = jnp.arange(12.0).reshape(4, 3)
    assert (view.n, view.m) == (4, 3)
    np.testing.assert_array_equal(view.pack(view.unpack(z)), z)
    np.testing.assert_array_equal(view.unpack(z)["b"][2, 0], z[2, 1:])
