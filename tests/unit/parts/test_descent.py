"""Runs of simple steps against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

import bilevel
from bilevel.parts.descent import barzilai_borwein

LO, HI = -0.3, 0.5


def test_barzilai_borwein_finds_the_minimiser_over_a_box():
    """Of an ill-conditioned quadratic on a dictionary, against SciPy; no step raises the value."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    H, c = Q @ np.diag(np.geomspace(1, 1e3, 6)) @ Q.T, 10 * rng.normal(size=6)

    def value(z):
        return z @ H @ z / 2 + c @ z

    def of_tree(y):
        return value(jnp.concatenate([y["a"], y["b"]]))

    run = jax.jit(
        lambda y, num: barzilai_borwein(bilevel.Box(LO, HI), jax.value_and_grad(of_tree), y, num), static_argnums=1
    )
    start = {"a": jnp.zeros(2), "b": jnp.zeros(4)}
    values = [float(run(start, num)[1]) for num in (0, 1, 5, 200)]
    assert values == sorted(values, reverse=True)
    y, last = run(start, 200)
    exact = optimize.minimize(
        value, np.zeros(6), jac=lambda z: H @ z + c, bounds=[(LO, HI)] * 6, method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-12},
    )  # fmt: skip
    np.testing.assert_allclose(np.concatenate([y["a"], y["b"]]), exact.x, atol=1e-7)
    np.testing.assert_allclose(last, exact.fun, rtol=1e-12)
