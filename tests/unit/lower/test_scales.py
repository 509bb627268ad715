"""The hypergradient at any scale of f, of g and of y: squares of small numbers underflow, those of large ones overflow.

The gradient of F is in proportion to the scale of f, and to that of y; the scale of g does not matter. At 1e20 a
float32 g of y overflows itself: 1e18 is the largest here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel.backend.norms import norms
from bilevel.backend.tree import norm
from bilevel.lower import ActiveSet, Newton, ProjectedNewton
from bilevel.record import Status

H = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 3.0]])
X = np.array([1.0, -2.0, 0.5])
SCALES = {np.float32: (1e-20, 1e-10, 1.0, 1e10, 1e18), np.float64: (1e-150, 1e-80, 1.0, 1e80, 1e150)}


def upper(x, y, s):
    return s[0] * (y @ jnp.array([1.0, -2.0, 1.0], y.dtype))


def lower(x, y, s):
    return s[1] * (y @ (jnp.asarray(H, y.dtype) @ y) / 2 - s[2] * (x @ y))


def zeros(dtype, key):
    return jnp.zeros(3, dtype), jnp.zeros(3, dtype)


START = {dtype: functools.partial(zeros, dtype) for dtype in SCALES}  # made once, so that scales compile nothing


def problem(dtype, y_set, s):
    data = bilevel.Full(jnp.asarray(s, dtype))
    return bilevel.BilevelProblem(
        upper=upper, lower=bilevel.Minimize(lower), upper_data=data, lower_data=data, y_set=y_set, init=START[dtype]
    )


METHODS = {
    "Newton": (Newton(), lambda s: bilevel.Reals()),
    "Newton by products": (Newton(dense=False), lambda s: bilevel.Reals()),
    "ActiveSet": (ActiveSet(), lambda s: bilevel.Box(-0.5 * s, 10.0 * s)),
    "ProjectedNewton": (ProjectedNewton(), lambda s: bilevel.Box(-0.5 * s, 10.0 * s)),
    "ProjectedNewton, ball": (ProjectedNewton(), lambda s: bilevel.Ball(10.0 * s)),
}


def right(free):
    """The gradient at scales of one, y_i at its bound where not free."""
    inverse = np.zeros((3, 3))
    inverse[np.ix_(free, free)] = np.linalg.inv(H[np.ix_(free, free)])
    return inverse @ np.array([1.0, -2.0, 1.0])


CASES = [(name, np.float32) for name in METHODS] + [("Newton", np.float64), ("ActiveSet", np.float64)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_scales_of_f_g_and_y(name, dtype):
    method, y_set = METHODS[name]
    call = jax.jit(lambda problem, x: bilevel.hypergradient(problem, x, lower=method))
    bounded = name in ("ActiveSet", "ProjectedNewton")
    expected, x = right([0, 2] if bounded else [0, 1, 2]), jnp.asarray(X, dtype)
    for part in range(3):
        for scale in SCALES[dtype]:
            s = [1.0, 1.0, 1.0]
            s[part] = scale
            found = call(problem(dtype, y_set(jnp.array(s[2], dtype)), s), x)
            off = np.linalg.norm(np.asarray(found.gradient, float) / s[0] / s[2] - expected)
            assert Status(int(found.status)) == Status.ESTIMATED, (part, scale)
            # three times the worst that rounding may do, and more where one residual has much of that: up to 1000 eps
            assert off <= float(found.error_bound) / s[0] / s[2] <= 1000 * jnp.finfo(dtype).eps, (part, scale)


@pytest.mark.parametrize("solver", [bilevel.linear.CG(), bilevel.linear.MINRES(), bilevel.linear.GMRES(),
                                    bilevel.linear.Dense(), bilevel.linear.Neumann(step_size=0.25)])  # fmt: skip
def test_linear_solvers_at_any_scale_of_b(solver):
    M = jnp.asarray(H, jnp.float32)
    solve = jax.jit(solver.prepare(lambda v: M @ v, 3, jnp.float32))
    right = np.linalg.solve(H, X)
    for scale in SCALES[np.float32]:
        v = np.asarray(solve(jnp.asarray(scale * X, jnp.float32)).v, float) / scale
        np.testing.assert_allclose(v, right, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norms_at_any_scale(dtype):
    z = np.random.default_rng(0).standard_normal((5, 7)).astype(dtype)
    for scale in SCALES[dtype]:
        one = dtype(scale)
        right = np.linalg.norm(z.astype(np.float64), axis=1) * float(one)
        np.testing.assert_allclose(norms(jnp.asarray(z * one))[0], right, rtol=1e-6)
        np.testing.assert_allclose(norm(jnp.asarray(z[0] * one)), right[0], rtol=1e-6)
    assert norm(jnp.zeros(3)) == 0
    assert norm(jnp.array([jnp.inf, 1.0])) == jnp.inf
    assert jnp.isnan(norm(jnp.array([jnp.nan])))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_norm_of_entries_of_all_sizes(dtype):
    """From the smallest normal number to the largest: those that count, and no unit of another in between."""
    info = np.finfo(dtype)
    powers = np.linspace(info.minexp + 1, info.maxexp - 2, 40)
    sizes = np.array([2.0 ** np.round(power) for power in powers], np.longdouble)
    for end in range(1, 41):
        part = sizes[max(0, end - 3) : end]
        right = float(np.sqrt(np.sum(part**2)))
        np.testing.assert_allclose(norm(jnp.asarray(part.astype(dtype))), right, rtol=10 * info.eps)


def test_a_long_vector_and_its_derivative():
    """Beyond `ONE_PASS` the norm is taken in two passes: the same, up to the order of the sum."""
    z = jnp.asarray(np.random.default_rng(1).standard_normal(70_000))
    np.testing.assert_allclose(norm(z), np.linalg.norm(z), rtol=1e-14)
    np.testing.assert_allclose(norm(z[:1000]), np.linalg.norm(z[:1000]), rtol=1e-14)
    np.testing.assert_allclose(jax.grad(norm)(1e200 * z[:9]), z[:9] / np.linalg.norm(z[:9]), rtol=1e-14)
    assert norm(z[:1000]) * 2.0**400 == norm(z[:1000] * 2.0**400)
