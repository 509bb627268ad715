"""Adversarial and rotation problems: their functions against NumPy, SciPy and finite differences, on small data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import bilevel
import problems
from bilevel.oracles import per_sample
from problems import adversarial, images, rotation

SMALL = {"train": 6, "val": 3, "test": 5, "batch_size": 2, "dtype": "float64"}


scores = jax.jit(images.scores)


@functools.cache
def make(name, **params):
    return problems.make(name, **SMALL, **params)


def small_network(problem, key):
    x, y = problem.init(key)
    return x, problem.y_set.sample(key, y)


def softmax(values):
    values = np.exp(values - values.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_adversarial_objectives_are_the_formulas(loss, key):
    problem = make("adversarial", loss=loss, lam=2.0, decay=0.1, beta=3.0).problem.validate()
    x, y = small_network(problem, key)
    batch = problem.upper_data.full()
    Z, targets = (np.asarray(part) for part in batch[1])
    assert np.all((np.abs(y) <= 0.15 + 1e-12) & (Z + y >= -1e-12) & (Z + y <= 1 + 1e-12))
    p, q = (softmax(np.asarray(scores(x, jnp.asarray(part)))) for part in (Z, Z + np.asarray(y)))
    ce = -np.log(np.sum((q if loss == "ce" else p) * targets, axis=1))
    divergence = np.sum(p * np.log(p / q), axis=1)
    raised = ce if loss == "ce" else divergence
    upper = np.mean(ce + (3.0 * divergence if loss == "trades" else 0))
    upper += 0.05 * sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(x))
    at = [jax.jit(function)(x, y, batch) for function in (problem.upper, problem.lower.g, problem.lower.diagonal)]
    np.testing.assert_allclose(at[0], upper, rtol=1e-10)
    np.testing.assert_allclose(at[1], np.sum(np.square(y)) - np.sum(raised), rtol=1e-9)
    np.testing.assert_array_equal(at[2], np.full(y.shape, 2.0))


@jax.jit
def both_ways(problem, x, y, batch):
    """How many samples a batch has; f and g on it, each put together from single samples and at once."""
    pairs = []
    for function, total in ((problem.upper, jnp.mean), (problem.lower.g, jnp.sum)):
        each = per_sample.single(problem, function, x, y, batch)
        pairs.append((total(each), function(x, y, batch)))
    return jnp.array(len(each)), pairs


def test_single_values_are_those_of_the_batch(key):
    """Of f the mean, of g the sum over single samples, which is what PerSamplePenalty supposes."""
    for name in ("adversarial", "rotation"):
        problem = make(name, decay=0.0).problem
        x, y = small_network(problem, key)
        here = per_sample.view(problem, y, problem.upper_data.take(jnp.array([4, 1, 3])))
        size, pairs = both_ways(here.problem, x, here.y, here.upper)
        assert size == 3
        np.testing.assert_allclose(*np.array(pairs).T, rtol=1e-10)


def test_the_reported_attack_lowers_accuracy_and_stays_in_the_box(key):
    instance = make("adversarial")
    x, _ = small_network(instance.problem, key)
    Z, targets = images.split(images.load("digits"), 0, 6, 3, 20, "float64").test
    right = np.argmax(scores(x, Z), axis=1) == np.argmax(targets, axis=1)
    tiny, small, large = (np.asarray(adversarial.attack(x, Z, targets, eps, key, 10, 2)) for eps in (1e-12, 0.02, 0.3))
    np.testing.assert_array_equal(tiny, right)
    assert np.all(large <= small)
    assert np.all(small <= right)
    assert large.sum() < right.sum()


def test_warp_is_scipys_rotation_and_shift():
    rng = np.random.default_rng(0)
    Z = np.zeros((9, 9))
    Z[2:7, 2:7] = rng.uniform(size=(5, 5))
    warp = jax.jit(lambda *args: rotation.warp(jnp.asarray(Z)[..., None], *args)[..., 0])
    np.testing.assert_allclose(warp(0.0, 0.0, 0.0), Z, atol=1e-14)
    np.testing.assert_allclose(warp(np.pi / 2, 0.0, 0.0), np.rot90(Z), atol=1e-12)
    np.testing.assert_allclose(warp(0.0, 1.0, -2.0), np.roll(Z, (-2, 1), (0, 1)), atol=1e-14)
    np.testing.assert_allclose(warp(0.0, 0.4, 0.7), ndimage.shift(Z, (0.7, 0.4), order=1), atol=1e-12)
    turned = ndimage.rotate(Z, 25.0, reshape=False, order=1)
    np.testing.assert_allclose(warp(np.deg2rad(25.0), 0.0, 0.0), turned, atol=1e-12)


def test_warp_is_differentiable():
    Z = jnp.asarray(np.random.default_rng(1).uniform(size=(6, 6, 1)))
    F = jax.jit(lambda y: jnp.sum(jnp.sin(3 * rotation.warp_all(Z[None], y[None], 30.0, 1.0))))
    y, h = np.array([0.3, -0.45, 0.62]), 1e-6
    slopes = [(F(y + h * e) - F(y - h * e)) / (2 * h) for e in np.eye(3)]
    np.testing.assert_allclose(jax.grad(F)(y), slopes, rtol=1e-6)


def ndimage_warp(Z, turn, right, down):
    """30 turn degrees, then shifts, by SciPy's affine map."""
    angle = np.deg2rad(30.0 * turn)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    offset = 3.5 - matrix @ (3.5 + np.array([down, right]))
    return ndimage.affine_transform(Z[..., 0], matrix, offset, order=1, mode="grid-constant")[..., None]


def test_search_tries_all_of_the_grid(key):
    problem = make("rotation").problem
    x, _ = small_network(problem, key)
    Z, targets = problem.upper_data.arrays
    least, where = rotation.search(x, Z, targets, 30.0, 1.0, (3, 2, 2))
    points = np.array([[a, b, c] for a in (-1, 0, 1) for b in (-1, 1) for c in (-1, 1)], float)
    moved = np.array([[ndimage_warp(image, *point) for image in np.asarray(Z)] for point in points])
    all_of = np.array(rotation.margin(images.scores(x, jnp.reshape(moved, (-1, 8, 8, 1))), jnp.tile(targets, (12, 1))))
    all_of = all_of.reshape(12, 6)
    np.testing.assert_allclose(least, all_of.min(axis=0), rtol=1e-10)
    np.testing.assert_array_equal(where, points[all_of.argmin(axis=0)])
    values, labels = jnp.array([[1.0, 3.0, 2.0], [4.0, 0.0, 1.0]]), jnp.eye(3)[jnp.array([1, 2])]
    np.testing.assert_allclose(rotation.margin(values, labels), [1.0, -3.0])


@pytest.mark.parametrize(
    ("name", "params", "match"),
    [
        ("adversarial", {"loss": "hinge"}, "loss .*ce or trades"),
        ("adversarial", {"eps": 0.0}, "eps"),
        ("adversarial", {"lam": -1.0}, "lam"),
        ("adversarial", {"decay": -1.0}, "decay"),
        ("rotation", {"angle": 200.0}, "angle"),
        ("rotation", {"shift": -1.0}, "shift"),
    ],
)
def test_bad_parameters_are_named(name, params, match):
    with pytest.raises(bilevel.InvalidInput, match=match):
        problems.make(name, **params)
