"""Lower levels whose g_yy is singular: the derivative where the active rows make y(x) unique, else a word for it."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel.record import Status


def upper(x, y, batch):
    return jnp.sum(y**2) + x**2


def partly_linear(x, y, parts):
    """-y_0 exp(x) + a (y_1 - x)^2/2 + c y_1, linear in y_0."""
    a, c = parts
    return -y[0] * jnp.exp(x) + a * (y[1] - x) ** 2 / 2 + c * y[1]


@jax.jit
@jax.vmap
def on_a_box(parts):
    problem = bilevel.BilevelProblem(
        upper, bilevel.Minimize(partly_linear), y_set=bilevel.Box(-1.0, 1.0), lower_data=bilevel.Full(parts),
        init=lambda key: (jnp.array(0.3), jnp.array([1.0, 0.0])),
    )  # fmt: skip
    return bilevel.hypergradient(problem, jnp.array(0.3))


def test_linear_parts_linear_programs_and_many_minimisers():
    """y = (1, x); (1, -1), a vertex; (1, anything); and a g that is concave in y_1."""
    found = on_a_box((jnp.array([1.0, 0.0, 0.0, -1.0]), jnp.array([0.0, 1.0, 0.0, 0.0])))
    words = [Status(int(status)) for status in found.status]
    assert words == [Status.ESTIMATED, Status.ESTIMATED, Status.UNDETERMINED, Status.SADDLE]
    np.testing.assert_allclose(found.y[:2], [[1, 0.3], [1, -1]], rtol=1e-14)
    np.testing.assert_allclose(found.gradient[:2], [1.2, 0.6], rtol=1e-14)
    np.testing.assert_allclose(found.value[:2], [1.18, 2.09], rtol=1e-14)
    assert (np.abs(found.gradient[:2] - np.array([1.2, 0.6])) <= found.error_bound[:2]).all()
    assert (found.error_bound[:2] < 1e-12).all()
    assert np.isnan(found.gradient[2:]).all()
    assert np.isnan(found.value[2:]).all()
