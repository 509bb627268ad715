"""What sets say of themselves: rows, bounds, faces, the nets of points that fill them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Ball, Box, Polyhedron, Product, Reals, Simplex
from bilevel.sampled.nets import kronecker

PRODUCT = Product({"a": Box(-1.0, jnp.array([0.5, jnp.inf])), "b": Simplex(2.0)})
POINT = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
DESCRIBED = {
    "box": Box(jnp.array([-jnp.inf, -1.0, 0.0, 0.0, -2.0]), jnp.array([1.0, 1.0, 0.0, jnp.inf, jnp.inf])),
    "simplex": Simplex(0.7),
    "polyhedron": Polyhedron(jnp.array([[1.0, 2, 0, 0, -1], [0, 0, 1, 1, 0]]), jnp.array([1.0, -2.0])),
    "product": PRODUCT,
}


def all_rows(chosen, z):
    """How far z is outside of the rows that describe the set."""
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(z)])
    outside = [jnp.max(jnp.maximum(lo - C @ flat, C @ flat - hi), initial=0) for C, lo, hi in chosen.rows(z)]
    return max([0.0, *map(float, outside)])


@pytest.mark.parametrize("kind", DESCRIBED)
def test_rows_hold_on_the_set_and_nowhere_else(kind):
    rng = np.random.default_rng(7)
    chosen = DESCRIBED[kind]
    assert chosen.polyhedral
    for _ in range(5):
        z = jax.tree.map(lambda leaf: 10 * rng.normal(size=leaf.shape), POINT if kind == "product" else jnp.zeros(5))
        z = jax.tree.map(jnp.asarray, z)
        assert all_rows(chosen, chosen.project(z)) <= 1e-9
        assert (all_rows(chosen, z) > 1e-9) == (float(chosen.violation(z)) > 1e-9)


@pytest.mark.parametrize("chosen", [Box(-1.0, 2.0), Ball(2.0, 0.5), Simplex(3.0)], ids=lambda s: type(s).__name__)
def test_fill_is_even(chosen):
    """Points on a net have the means and deviations of random samples, which are uniform."""
    net = kronecker(4096, 3, float).at[0].set(0.5)  # the middle of the cube has no direction
    points = chosen.fill(net, jax.random.key(0), jnp.zeros(3))
    samples = jax.vmap(lambda key: chosen.sample(key, jnp.zeros(3)))(jax.random.split(jax.random.key(1), 4096))
    assert max(chosen.violation(z) for z in points[:50]) <= 1e-12
    np.testing.assert_allclose(jnp.mean(points, axis=0), jnp.mean(samples, axis=0), atol=0.08)
    np.testing.assert_allclose(jnp.std(points, axis=0), jnp.std(samples, axis=0), atol=0.08)


def test_a_product_knows_what_its_factors_know():
    nested = Product((PRODUCT, Reals()))
    assert [type(one).__name__ for one in nested.simple()] == ["Box", "Simplex", "Reals"]
    assert nested.polyhedral
    assert nested.faced
    assert nested.unbounded
    assert not nested.bounded
    assert not nested.intervals
    assert not nested.whole
    assert Product((Box(0.0, 1.0), Reals())).intervals
    assert not Product((Box(0.0, 1.0), Ball())).polyhedral
    assert not Product((Box(0.0, 1.0), Polyhedron(jnp.eye(2), jnp.ones(2)))).faced
    assert Box(0.0, 1.0).bounds(jnp.zeros(2))[1].tolist() == [1, 1]
    assert Ball().bounds(jnp.zeros(2)) is None


def test_the_face_of_a_product_is_that_of_its_factors():
    """A step into the bound of the box and out of the simplex: one coordinate of each stays, and the simplex's sum."""
    y = {"a": jnp.array([0.5, 0.0]), "b": jnp.array([1.5, 0.5, 0.0])}
    R = {"a": jnp.array([-1.0, 0.0]), "b": jnp.array([0.0, 0.0, 1.0])}
    face = PRODUCT.face(y, R, jnp.asarray(0.1))
    assert face.free.tolist() == [False, True, True, True, False]
    v = face.tangent(jnp.array([1.0, 2.0, 3.0, 5.0, 7.0]))
    np.testing.assert_allclose(v, [0, 2, -1, 1, 0], atol=1e-15)
    np.testing.assert_allclose(face.margin, 0.1)
    assert not face.mu.any()
