"""Frozen pytree dataclasses and the one error for bad input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel.struct import InvalidInput, invalid, static, struct


@struct
class Point:
    """Two leaves, one static field."""

    a: Any
    b: Any = 2.0
    power: int = static(3)


def test_leaves_are_the_fields_that_are_not_static():
    point = Point(1.0, {"c": 4.0})
    assert jax.tree.leaves(point) == [1.0, 4.0]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, point)
    assert (doubled.a, doubled.b, doubled.power) == (2.0, {"c": 8.0}, 3)


def test_frozen_and_replaceable():
    point = Point(1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.a = 2.0
    assert dataclasses.replace(point, power=4).power == 4


@struct
class Other(Point):
    """The same fields as `Point`."""


def test_two_classes_with_the_same_fields_are_two_structures():
    """Else jit, whose cache compares structures where hashes collide, may run one class's code for another's."""
    assert jax.tree.structure(Point(1.0)) == jax.tree.structure(Point(2.0))
    assert jax.tree.structure(Point(1.0)) != jax.tree.structure(Other(1.0))
    assert jax.tree.structure(bilevel.SOBA()) != jax.tree.structure(bilevel.SABA())


def test_paths_name_the_fields():
    (first, _), (second, _) = jax.tree_util.tree_leaves_with_path(Point(1.0, {"c": 4.0}))
    assert (jax.tree_util.keystr(first), jax.tree_util.keystr(second)) == (".a", ".b['c']")


def test_equality_is_identity():
    assert Point(jnp.ones(2)) != Point(jnp.ones(2))


def test_static_fields_are_the_compilation_key():
    traces = []

    @jax.jit
    def f(point):
        traces.append(point.power)
        return point.a**point.power

    assert f(Point(2.0)) == 8
    assert f(Point(3.0)) == 27
    assert f(Point(3.0, power=2)) == 9
    assert traces == [3, 2]  # another leaf value: no second trace


def test_vmap_over_leaves():
    np.testing.assert_array_equal(jax.vmap(lambda p: p.a * p.power)(Point(jnp.arange(3.0), jnp.zeros(3))), [0, 3, 6])


def test_the_error_says_four_things():
    with pytest.raises(InvalidInput, match=r"^radius: got -1; expected a number >= 0\. Take the absolute value\.$"):
        invalid("radius", -1, "a number >= 0", "Take the absolute value.")
    assert issubclass(InvalidInput, ValueError)
