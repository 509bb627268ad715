"""Compiled functions are bounded in number and freed, and functions made anew for each call are named."""

import gc
import warnings
import weakref

import jax
import jax.numpy as jnp
import pytest

import bilevel
from bilevel.backend import bounded
from bilevel.backend.bounded import ALIKE, MOST, bounded_jit
from bilevel.run import lanes
from bilevel.struct import static, struct


@struct
class Level:
    """Stands for a problem: a function, an array."""

    f: object = static()
    b: object = 0.0


@bounded_jit(num_static=1)
def value(level, x, times):
    return level.f(x) + times * level.b


@pytest.fixture(autouse=True)
def nothing_kept():
    bounded.clear()
    yield
    bounded.clear()


def square(x):
    return x * x


def named(k):
    """A function of its own code and name: no new object of an old one."""
    scope = {}
    exec(f"def f_{k}(x):\n    return x + {k}.0", scope)
    return scope[f"f_{k}"]


def test_it_is_jit():
    level = Level(square, jnp.array(3.0))
    assert value(level, jnp.array(2.0), 2) == 10
    assert value(level, jnp.array(5.0), 2) == 31
    assert value.count() == 1  # of another array no second program
    assert value(Level(square, jnp.array(1.0)), jnp.array(2.0), 2) == 6
    assert value.count() == 1
    assert value(level, jnp.array(2.0), 1) == 7
    assert value.count() == 2
    assert jax.jit(jax.grad(lambda x: value(level, x, 1)))(jnp.array(2.0)) == 4
    assert jax.vmap(lambda x: value(level, x, 1))(jnp.arange(3.0)).tolist() == [3, 4, 7]
    assert "bounded" not in value.lower(level, jnp.array(2.0), 1).as_text()


def test_what_was_not_used_for_long_is_freed():
    first = named(0)
    gone = weakref.ref(first)
    often = named(1)
    value(Level(first), jnp.ones(()), 1)
    del first
    for k in range(2, MOST + 2):
        value(Level(often), jnp.ones(()), 1)
        value.lower(Level(named(k)), jnp.ones(()), 1)
    gc.collect()
    assert gone() is None
    before = value.count()
    value(Level(often), jnp.ones(()), 1)
    assert value.count() == before  # it was kept


def test_functions_made_anew_are_named_before_the_limit():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(ALIKE):
            value.lower(Level(named(k)), jnp.ones(()), 1)
        for _ in range(ALIKE - 1):
            value.lower(Level(lambda x: x), jnp.ones(()), 1)
    with pytest.warns(RuntimeWarning, match=r"identity of their functions \(.*<lambda>\).*Define them once"):
        value.lower(Level(lambda x: x), jnp.ones(()), 1)


def test_the_memory_maps_of_this_process_are_counted():
    maps = bounded.memory_maps()
    assert maps is None or 0 < maps[0] < maps[1]


@pytest.mark.parametrize("many", [False, True])
def test_a_weakly_typed_start_compiles_once_and_in_the_set_up(many, key):
    """A second compilation would be booked as the solver's time."""
    start = jnp.full(2, 0.5)
    assert start.weak_type

    def distance(x, y, batch):
        return jnp.sum((y - x) ** 2)

    problem = bilevel.BilevelProblem(distance, bilevel.Minimize(distance), init=lambda key: (start, start))
    solver = bilevel.SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.1)
    if many:
        bilevel.solve_many(problem, solver, keys=jax.random.split(key, 2), max_steps=2, every=1, tol=0.0)
    else:
        bilevel.solve(problem, solver, key=key, max_steps=2, every=1, tol=0.0)
    assert [function.count() for function in (lanes.init, lanes.advance_lanes, lanes.measure_lanes)] == [1, 1, 1]
