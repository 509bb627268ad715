"""Step rules: floats, schedules and optax transformations behind one interface."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import BLOCC, F2SA, LBFGS, SOBA, InvalidInput
from bilevel.step import StepRule, as_step, check_step, require_size, stepper

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
DIRECTIONS = [{"a": jnp.array([0.5, 1.0]) * k, "b": jnp.array(-1.0) / k} for k in (1.0, 2.0, 3.0)]


def walk(rule):
    params, move = PARAMS, stepper(rule, None, PARAMS)
    for direction in DIRECTIONS:
        params, move = move(params, direction)
    return params


def test_a_float():
    want = {"a": PARAMS["a"] - 0.1 * jnp.array([3.0, 6.0]), "b": PARAMS["b"] + 0.1 * (1 + 1 / 2 + 1 / 3)}
    chex.assert_trees_all_close(walk(as_step(0.1)), want, rtol=1e-15)


def test_a_schedule_counts_from_zero():
    def halving(count):
        return 0.4 * 0.5**count

    rates = (0.4, 0.2, 0.1)
    want = jax.tree.map(lambda p, *ds: p - sum(r * d for r, d in zip(rates, ds, strict=True)), PARAMS, *DIRECTIONS)
    chex.assert_trees_all_close(walk(as_step(halving)), want, rtol=1e-15)
    move = stepper(as_step(halving), None, PARAMS)
    first, move = move.size()
    second, move = move.size()
    np.testing.assert_allclose([first, second], [0.4, 0.2], rtol=1e-15)


@pytest.mark.parametrize("make", [lambda: optax.sgd(0.1), lambda: optax.adam(0.1), lambda: optax.sgd(0.1, momentum=0.9),
                                  lambda: optax.adam(optax.cosine_decay_schedule(0.1, 2))])  # fmt: skip
def test_optax_transformations_equal_optax_itself(make):
    transformation = make()
    params, state = PARAMS, transformation.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        for direction in DIRECTIONS:
            updates, state = transformation.update(direction, state, params)
            params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(walk(as_step(make())), params, rtol=1e-15)


def test_optax_schedules_under_strict_dtypes():
    rate, _ = stepper(as_step(optax.cosine_decay_schedule(0.2, 10)), None, PARAMS).size()
    np.testing.assert_allclose(rate, 0.2, rtol=1e-6)


def test_defaults_and_conversions():
    rule = as_step(0.3)
    assert as_step(rule) is rule
    assert as_step(None) is None
    assert stepper(None, 0.7, PARAMS).size()[0] == 0.7
    assert jax.tree.leaves(rule) == [0.3]  # a leaf: vmap over step sizes works
    assert jax.tree.leaves(as_step(optax.adam(0.1))) == []


def test_vmap_over_step_sizes_and_dtypes():
    def one(size):
        return stepper(StepRule(size), None, PARAMS)(PARAMS, DIRECTIONS[0])[0]["b"]

    np.testing.assert_allclose(jax.vmap(one)(jnp.array([0.0, 1.0, 2.0])), [3, 4, 5])
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), PARAMS)
    for rule in (0.1, optax.adam(0.1), lambda count: 0.1):
        moved, _ = stepper(as_step(rule), None, small)(small, small)
        assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, "fast", True, [0.1, 0.2], {"a": 1.0}, np.array([0.1, 0.0])])
def test_named_errors(bad):
    with pytest.raises(InvalidInput, match=r"SOBA\.lower_step_size: got .*; expected a positive finite number.*\."):
        SOBA(lower_step_size=bad)


@pytest.mark.parametrize("good", [1, 0.1, np.float32(0.1), jnp.array(0.1), np.array([0.1, 0.2]), optax.sgd(1.0)])
def test_good_step_sizes(good):
    check_step("s", as_step(good))
    assert isinstance(SOBA(lower_step_size=good).lower_step_size, StepRule)


def test_rules_without_a_size():
    require_size("s", as_step(0.1))
    require_size("s", None)
    with pytest.raises(InvalidInput, match="s: got an optax transformation; expected a number > 0"):
        require_size("s", as_step(optax.adam(0.1)))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, "fast", True, lambda count: 0.1, optax.adam(0.1)])
def test_settings_that_stay_constant_are_plain_numbers(bad):
    solver = BLOCC(penalty=2.0, lower_step_size=0.25)
    assert (solver.penalty, solver.lower_step_size, solver.dual_step_size) == (2.0, 0.25, None)
    assert jax.tree.leaves(solver) == [0.25, 2.0]
    with pytest.raises(InvalidInput, match=r"BLOCC\.penalty: got .*; expected a (positive finite )?number"):
        BLOCC(penalty=bad)
    with pytest.raises(InvalidInput, match=r"BLOCC\.dual_step_size: got .*; expected a (positive finite )?number"):
        dataclasses.replace(solver, dual_step_size=bad)


def test_settings_that_are_scheduled_have_a_size():
    with pytest.raises(InvalidInput, match=r"F2SA\.penalty: got an optax transformation; expected a number > 0 or an"):
        F2SA(penalty=optax.adam(0.1))
    rate, _ = stepper(F2SA(penalty=lambda count: 3.0 + count).penalty, None, ()).size()
    assert rate == 3


def test_solvers_can_be_rebuilt_and_built_anywhere():
    """JAX rebuilds pytrees from tracers and placeholders; and a solver may be made inside of a jitted function."""
    solver = SOBA(lower_step_size=0.1)
    assert jax.tree.map(lambda leaf: -leaf, solver).lower_step_size.value == -0.1
    placeholder = object()
    assert jax.tree.map(lambda _: placeholder, solver).lower_step_size.value is placeholder
    assert jax.jit(lambda: SOBA(lower_step_size=0.25).lower_step_size.value * 2)() == 0.5
    assert jax.jit(lambda size: SOBA(lower_step_size=size).lower_step_size.value * 2)(0.25) == 0.5


def test_counts_are_whole_numbers_of_python_or_numpy():
    for count in (3, np.int64(3)):
        assert LBFGS(memory=count).memory == 3
    for bad in (0, -1, 2.5, True, "3", np.float64(3)):
        with pytest.raises(InvalidInput, match=r"LBFGS\.memory: got .*a whole number >= 1"):
            LBFGS(memory=bad)
    with pytest.raises(InvalidInput, match=r"max_evaluations: got 1; expected a whole number >= 2"):
        LBFGS(max_evaluations=1)
