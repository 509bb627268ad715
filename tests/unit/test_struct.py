"""Frozen pytree dataclasses and the one error for bad input."""

import dataclasses
import inspect
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
from bilevel.struct import InvalidInput, derived, invalid, static, struct


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


@struct
class Square(Point):
    """`b` is the square of `a`, whatever `a` becomes."""

    b: Any = derived(lambda point: point.a**2)


def test_a_derived_field_is_read_and_never_given():
    square = Square(3.0)
    assert (square.b, square.power) == (9.0, 3)
    assert jax.tree.leaves(square) == [3.0]
    assert dataclasses.replace(square, a=4.0).b == 16
    assert jax.jit(lambda s: jax.tree.map(lambda leaf: 2 * leaf, s))(square).b == 36
    with pytest.raises(TypeError):
        Square(3.0, b=5.0)
    with pytest.raises(ValueError, match=r"field b .*init=False"):
        dataclasses.replace(square, b=5.0)


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


@struct(kw_only=True)
class Settings:
    """Arguments by name; one of them had another name before."""

    first: Any = 1.0
    second: int = static(default=2)
    renamed = MappingProxyType({"zweite": "second"})


@struct(kw_only=True)
class More(Settings):
    """One more, as solvers inherit them."""

    third: Any = 3.0


@struct
class Plain(Settings):
    """A subclass without fields, as tests have them."""


def test_keyword_only_as_signatures_say():
    assert [p.kind for p in inspect.signature(More).parameters.values()] == [inspect.Parameter.KEYWORD_ONLY] * 3
    more = More(third=5.0, first=4.0)
    assert (more.first, more.second, more.third) == (4.0, 2, 5.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'fourth'"):
        More(fourth=1)


def test_positions_work_with_a_warning_at_the_callers_line():
    with pytest.warns(DeprecationWarning, match="More takes its settings by name: first=, second=, third=") as caught:
        more = More(4.0, 5, 6.0)
    assert caught[0].filename == __file__
    assert (more.first, more.second, more.third) == (4.0, 5, 6.0)
    with pytest.warns(DeprecationWarning, match="Plain takes its settings by name: first="):
        assert Plain(4.0).first == 4.0
    with pytest.raises(TypeError, match="More got first twice"):
        More(1.0, first=2.0)
    with pytest.raises(TypeError, match="More has 3 settings, all by name; got 4 by position"):
        More(1.0, 2, 3.0, 4.0)


def test_old_names_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"More\.zweite is second now") as caught:
        more = More(zweite=7)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"More\.zweite is second now"):
        assert more.zweite == more.second == 7
    with pytest.warns(DeprecationWarning, match=r"More\.zweite is second now"):
        assert dataclasses.replace(more, zweite=8).second == 8


ALL_SOLVERS = {**bilevel.solvers.ALL, **irl.solvers.ALL}


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_settings_of_every_solver_go_by_name(name):
    parameters = inspect.signature(ALL_SOLVERS[name]).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    assert set(ALL_SOLVERS[name].renamed.values()) <= {p.name for p in parameters}


def test_the_error_says_four_things():
    with pytest.raises(InvalidInput, match=r"^radius: got -1; expected a number >= 0\. Take the absolute value\.$"):
        invalid("radius", -1, "a number >= 0", "Take the absolute value.")
    assert issubclass(InvalidInput, ValueError)
