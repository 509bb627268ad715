"""BilevelProblem.validate: good problems pass, every mistake has its named error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import (  # fmt: skip
    BilevelProblem,
    Box,
    FixedPoint,
    Full,
    InvalidInput,
    LinearCoupling,
    Minibatch,
    Minimize,
    Reals,
    SmoothCoupling,
    Source,
)
from bilevel.struct import struct

DATA = jnp.arange(8.0).reshape(4, 2)


def upper(x, y, batch):
    return jnp.mean(x[0] * batch) + jnp.sum(y**2)


def lower(x, y, batch):
    return jnp.sum((y - jnp.mean(batch) * jnp.sum(x)) ** 2)


def contraction(x, y, batch):
    return 0.5 * y + jnp.sum(x) + 0 * jnp.mean(batch)


def start(key):
    return jnp.ones(2), jnp.zeros(3)


def problem(**changes):
    base = BilevelProblem(upper, Minimize(lower), upper_data=Full(DATA), lower_data=Minibatch(DATA, 2), init=start)
    return dataclasses.replace(base, **changes)


A, B, b = np.ones((2, 3)), np.ones((2, 2)), np.ones(2)

GOOD = {
    "minimize": {},
    "fixed point": {"lower": FixedPoint(contraction)},
    "sets": {"x_set": Box(-1.0, 1.0), "y_set": bilevel.Ball(2.0)},
    "linear coupling": {"coupling": LinearCoupling(A, B, b)},
    "equalities": {"coupling": LinearCoupling(A, B, b, A[:1], B[:1], b[:1])},
    "smooth coupling": {"coupling": SmoothCoupling(lambda x, y: y - jnp.sum(x))},
    "numpy start": {"init": lambda key: (np.ones(2), np.zeros(3))},
}


@pytest.mark.parametrize("name", GOOD)
def test_good_problems_pass(name):
    good = problem(**GOOD[name])
    assert good.validate() is good


def test_pytrees_and_no_data_pass():
    def init(key):
        return {"w": jnp.zeros((2, 2)), "c": jnp.zeros(())}, (jnp.zeros(3), jnp.zeros(1))

    good = BilevelProblem(
        lambda x, y, batch: jnp.sum(x["w"]) + y[0][0],
        FixedPoint(lambda x, y, batch: (0.5 * y[0] + x["c"], y[1] / 2)),
        x_set=bilevel.Product({"w": Reals(), "c": Box(0.0, 1.0)}),
        coupling=LinearCoupling(np.ones((1, 4)), np.ones((1, 5)), np.ones(1)),
        init=init,
    )
    assert good.validate() is good


def test_float32_passes():
    def init(key):
        return jnp.ones(2, jnp.float32), jnp.zeros(3, jnp.float32)

    data = Full(DATA.astype(jnp.float32))
    problem(init=init, upper_data=data, lower_data=data).validate()


@struct
class Broken(Source):
    """A source without `next`."""


FLOATS = {"key": None}
BAD = {
    "upper is a number": ({"upper": 1.0}, "upper", "float", "a function f(x, y, batch) -> []"),
    "bare lower function": ({"lower": lower}, "lower", "function", "Minimize(g) or FixedPoint(T)"),
    "Minimize of a number": ({"lower": Minimize(3.0)}, "lower (Minimize)", "float", "a function g(x, y, batch) -> []"),
    "FixedPoint of a number": ({"lower": FixedPoint(3.0)}, "lower (FixedPoint)", "float", "a function T(x, y, batch)"),
    "x_set is a tuple": ({"x_set": (0, 1)}, "x_set", "tuple", "a set"),
    "y_set is a class": ({"y_set": Reals}, "y_set", "type", "a set"),
    "bare data": ({"upper_data": DATA}, "upper_data", "Array", "a source"),
    "coupling is a function": ({"coupling": lower}, "coupling", "function", "LinearCoupling, SmoothCoupling or None"),
    "init is a pair": ({"init": (1.0, 2.0)}, "init", "tuple", "a function key -> (x0, y0)"),
    "init fails": ({"init": lambda: None}, "init", "TypeError", "a function key -> (x0, y0)"),
    "init gives a list": ({"init": lambda key: [1, 2]}, "init", "list", "(x0, y0)"),
    "init gives one": ({"init": lambda key: (jnp.ones(2),)}, "init", "tuple", "(x0, y0)"),
    "python number": ({"init": lambda key: (1.0, jnp.zeros(3))}, "x0", "float", "a float array"),
    "whole numbers": ({"init": lambda key: (jnp.ones(2), jnp.zeros(3, int))}, "y0", "int64", "floating-point"),
    "typed key": ({"init": lambda key: (key, jnp.zeros(3))}, "x0", "key", "floating-point"),
    "empty x": ({"init": lambda key: ({}, jnp.zeros(3))}, "x0", "an empty pytree", "at least one"),
    "no numbers": ({"init": lambda key: (jnp.ones(2), jnp.zeros((0, 3)))}, "y0", "no entries", "at least one number"),
    "NaN start": ({"init": lambda key: (jnp.ones(2), jnp.full(3, jnp.nan))}, "y0", "non-finite", "finite numbers"),
    "lo > hi": ({"x_set": Box(1.0, 0.0)}, "x_set", "lo = 1.0", "lo <= hi"),
    "empty set": ({"y_set": bilevel.Ball(-1.0)}, "y_set.radius", "-1.0", ">= 0"),
    "set's shape": ({"y_set": Box(jnp.zeros(2), 1.0)}, "y_set.lo", "(2,)", "(3,)"),
    "datum": ({"lower_data": Full(DATA.at[1, 0].set(jnp.inf))}, "lower_data", "[1, 0]", "finite numbers"),
    "batch size": ({"upper_data": Minibatch(DATA, 9)}, "upper_data.batch_size", "9", "[1, 4]"),
    "source without next": ({"lower_data": Broken()}, "lower_data", "NotImplementedError", "a source whose next()"),
    "vector objective": ({"upper": lambda x, y, batch: y}, "upper", "shape [3]", "a scalar, shape []"),
    "vector lower": ({"lower": Minimize(lambda x, y, batch: y)}, "lower (Minimize)", "shape [3]", "a scalar, shape []"),
    "a pair": ({"upper": lambda x, y, batch: (1.0, y)}, "upper", "shape", "a scalar, shape []"),
    "nothing": ({"upper": lambda x, y, batch: None}, "upper", "None", "a scalar, shape []"),
    "counts": ({"upper": lambda x, y, batch: jnp.array(1)}, "upper", "int64", "floating-point"),
    "wrong shapes": ({"upper": lambda x, y, batch: jnp.sum(batch @ y)}, "upper", "TypeError", "float64[4, 2]"),
    "arity": ({"lower": Minimize(lambda x, y: 0.0)}, "lower (Minimize)", "TypeError", "float64[2, 2]"),
    "map's shape": ({"lower": FixedPoint(lambda x, y, batch: x)}, "lower (FixedPoint)", "float64[2]", "float64[3]"),
    "map's dtype": ({"lower": FixedPoint(lambda x, y, batch: jnp.zeros(3, "f4"))}, "FixedPoint", "float32", "float64"),
    "map's structure": ({"lower": FixedPoint(lambda x, y, batch: (y,))}, "FixedPoint", "structure", "y's structure"),
    "A's columns": ({"coupling": LinearCoupling(B, B, b)}, "coupling.A", "(2, 2)", "(2, 3)"),
    "B's columns": ({"coupling": LinearCoupling(A, A, b)}, "coupling.B", "(2, 3)", "(2, 2)"),
    "b's shape": ({"coupling": LinearCoupling(A, B, 1.0)}, "coupling.b", "()", "(rows,)"),
    "NaN coupling": ({"coupling": LinearCoupling(A, B, b * np.nan)}, "coupling.b", "non-finite", "finite numbers"),
    "half of the equalities": ({"coupling": LinearCoupling(A, B, b, A)}, "coupling.b_eq", "None", "(rows,)"),
    "table coupling": ({"coupling": SmoothCoupling(lambda x, y: y[:, None])}, "coupling", "[3, 1]", "of shape [rows]"),
    "coupling fails": ({"coupling": SmoothCoupling(lambda x, y: x + y)}, "coupling", "TypeError", "float64[3]"),
    "coupling of a number": ({"coupling": SmoothCoupling(2.0)}, "coupling", "float", "a function h(x, y)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_named_errors(name):
    changes, argument, got, expected = BAD[name]
    with pytest.raises(InvalidInput) as caught:
        problem(**changes).validate()
    before, after = str(caught.value).split("; expected ", 1)
    who, what = before.split(": got ", 1)
    assert argument in who
    assert got in what
    assert expected in after
    assert after.rstrip().endswith(".")


def test_init_must_be_given():
    with pytest.raises(InvalidInput, match="init: got nothing; expected a function"):
        BilevelProblem(upper, Minimize(lower)).validate()


def test_solve_validates():
    with pytest.raises(InvalidInput, match="x_set"):
        bilevel.solve(problem(x_set=Box(1.0, 0.0)), bilevel.SOBA(), key=jax.random.key(0), max_steps=1)


def test_a_second_instance_of_the_family_compiles_nothing():
    traces = []

    @jax.jit
    def value(problem, x, y):
        traces.append(1)
        return problem.upper(x, y, problem.upper_data.full())

    x, y = start(None)
    first, second = value(problem(), x, y), value(problem(upper_data=Full(2 * DATA)), x, y)
    assert second == 2 * first
    assert len(traces) == 1


def test_constrained_lower_and_full_data():
    assert not problem().constrained_lower
    assert problem(y_set=Box(0.0, 1.0)).constrained_lower
    assert problem(coupling=LinearCoupling(A, B, b)).constrained_lower
    full = problem().on_full_data()
    assert isinstance(full.lower_data, Full)
    np.testing.assert_array_equal(full.lower_data.full(), DATA)
