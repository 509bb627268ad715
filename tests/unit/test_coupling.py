"""LinearCoupling as people type it: parts left out, and columns with the names of the leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, InvalidInput, LinearCoupling, Minimize, Polyhedron
from bilevel.constraints import joint_rows, rows

RNG = np.random.default_rng(0)
X = {"p": jnp.asarray(RNG.normal(size=2)), "q": jnp.asarray(RNG.normal())}
Y = {"w": jnp.asarray(RNG.normal(size=(2, 2))), "c": jnp.asarray(RNG.normal(size=3)), "s": jnp.asarray(RNG.normal())}
A = {"w": RNG.normal(size=(2, 2, 2)), "c": RNG.normal(size=(2, 3)), "s": RNG.normal(size=2)}
B = {"p": RNG.normal(size=(2, 2)), "q": RNG.normal(size=2)}
b = RNG.normal(size=2)


def by_hand(part):
    """One array with the columns of the raveled entries: leaves in the order of their names."""
    return np.concatenate([np.reshape(part[name], (2, -1)) for name in sorted(part)], axis=1)


def f(x, y, batch):
    return jnp.sum(y["w"]) + 0.5 * jnp.sum(y["c"] ** 2) + y["s"] * jnp.sum(x["p"]) + x["q"] ** 2


def g(x, y, batch):
    tilt = jnp.sum(x["p"]) * jnp.sum(y["c"]) + x["q"] * jnp.sum(y["w"])
    return 0.5 * sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(y)) + tilt


def start(key):
    return X, Y


def problem(*parts, **named):
    return BilevelProblem(f, Minimize(g), coupling=LinearCoupling(*parts, **named), init=start)


def same_rows(one, two):
    for describe in (rows, joint_rows):
        jax.tree.map(np.testing.assert_array_equal, describe(one, X, Y), describe(two, X, Y))


@pytest.mark.parametrize("kind", ["inequality", "equality", "both"])
def test_columns_by_named_leaves_are_those_of_the_raveled_form(kind):
    leaves, flat = (A, B, b), (by_hand(A), by_hand(B), b)
    none = (None, None, None)
    pick = {"inequality": lambda p: (*p, *none), "equality": lambda p: (*none, *p), "both": lambda p: (*p, *p)}[kind]
    named, raveled = (problem(*pick(parts)).validate() for parts in (leaves, flat))
    same_rows(named, raveled)
    values = [bilevel.oracles.coupling_values(one, X, Y) for one in (named, raveled)]
    jax.tree.map(np.testing.assert_array_equal, *values)


def test_named_leaves_give_the_same_hypergradient_as_the_raveled_form():
    found = [bilevel.hypergradient(one, X) for one in (problem(A, B, b), problem(by_hand(A), by_hand(B), b))]
    assert found[0].status in (bilevel.Status.ESTIMATED, bilevel.Status.WEAKLY_ACTIVE)
    jax.tree.map(np.testing.assert_array_equal, *(one.gradient for one in found))
    slack = bilevel.oracles.coupling_values(problem(A, B, b), X, found[0].y)[0]
    assert np.max(slack) < 1e-10
    assert np.min(np.abs(slack)) < 1e-10  # one of the rows holds, so that they matter


def test_what_is_left_out_is_zero():
    full_A, zero_B = by_hand(A), np.zeros((2, 3))
    empty = np.zeros((0, 8)), np.zeros((0, 3)), np.zeros(0)
    same_rows(problem(A_eq=full_A, b_eq=b).validate(), problem(*empty, full_A, zero_B, b).validate())
    same_rows(problem(A=A, b=b).validate(), problem(full_A, zero_B, b).validate())
    some = {"w": A["w"], "c": None, "s": None}  # no row holds c and s
    same_rows(problem(some, None, b).validate(), problem(by_hand(A | {k: 0 * A[k] for k in "cs"}), zero_B, b))
    same_rows(problem(full_A, {"p": B["p"], "q": None}, b), problem(full_A, by_hand(B | {"q": np.zeros(2)}), b))


def test_equalities_alone_are_solved_and_differentiated():
    """y = argmin |y - x|^2/2 on the line 1'y = 1: y = x + (1 - 1'x)/2, F = |y|^2/2, so that F' = y - mean(y)."""
    line = BilevelProblem(
        lambda x, y, batch: 0.5 * jnp.sum(y**2),
        Minimize(lambda x, y, batch: 0.5 * jnp.sum((y - x) ** 2)),
        coupling=LinearCoupling(A_eq=np.ones((1, 2)), b_eq=np.ones(1)),
        init=lambda key: (jnp.array([0.5, -1.0]), jnp.zeros(2)),
    )
    x = jnp.array([0.5, -1.0])
    h = bilevel.hypergradient(line, x)
    np.testing.assert_allclose(h.y, [1.25, -0.25], atol=1e-12)
    np.testing.assert_allclose(h.gradient, [0.75, -0.75], atol=1e-12)
    solution = bilevel.solve(line, bilevel.AiPOD(), key=jax.random.key(0), max_steps=200)
    np.testing.assert_allclose(jnp.sum(solution.y), 1.0, atol=1e-8)
    assert dataclasses.replace(line, coupling=LinearCoupling(A=[[1.0, 1.0]], b=[1.0])).validate()


BAD = {
    "nothing": ({}, "coupling (LinearCoupling)", "nothing"),
    "b alone": ({"b": b}, "coupling.A (LinearCoupling)", "None"),
    "no b": ({"A": A}, "coupling.b (LinearCoupling)", "None"),
    "a leaf's shape": ({"A": A | {"c": np.ones((2, 2))}, "b": b}, r"coupling.A (LinearCoupling)['c']", "(2, 2)"),
    "a leaf's rows": ({"A": A | {"s": np.ones(3)}, "b": b}, r"coupling.A (LinearCoupling)['s']", "(3,)"),
    "a NaN": ({"A_eq": A | {"s": np.full(2, np.nan)}, "b_eq": b}, r"coupling.A_eq (LinearCoupling)['s']", "non-finite"),
    "a missing leaf": ({"A": {"w": A["w"]}, "b": b}, "coupling.A (LinearCoupling)", "a dict"),
    "a tuple": ({"A": (A["w"], A["c"]), "b": b}, "coupling.A (LinearCoupling)", "a tuple"),
    "x's names": ({"A": A, "B": A, "b": b}, "coupling.B (LinearCoupling)", "a dict"),
}


@pytest.mark.parametrize("name", BAD)
def test_named_errors(name):
    parts, argument, got = BAD[name]
    with pytest.raises(InvalidInput) as caught:
        problem(**parts).validate()
    before, after = str(caught.value).split("; expected ", 1)
    assert before.startswith(f"{argument}: got ")
    assert got in before
    assert after.endswith(".")


def test_a_polyhedron_takes_columns_by_named_leaves():
    named, raveled = Polyhedron(A, b), Polyhedron(by_hand(A), b)
    named.validate("y_set", Y)
    for what in ("project", "active", "violation", "rows"):
        jax.tree.map(np.testing.assert_array_equal, *(getattr(one, what)(Y) for one in (named, raveled)))
    np.testing.assert_allclose(
        np.asarray(by_hand(A)) @ jax.flatten_util.ravel_pytree(raveled.project(Y))[0] <= b + 1e-9, True
    )
    some = Polyhedron({"w": None, "c": A["c"], "s": None}, b)
    zero = Polyhedron(by_hand({"w": 0 * A["w"], "c": A["c"], "s": 0 * A["s"]}), b)
    jax.tree.map(np.testing.assert_array_equal, some.rows(Y), zero.rows(Y))


@pytest.mark.parametrize(
    ("part", "argument"),
    [
        ({**A, "c": A["c"][:, :2]}, r"y_set\.A \(Polyhedron\)\['c'\]"),
        ({"w": A["w"]}, r"y_set\.A \(Polyhedron\)"),
        ({**A, "s": np.array([np.nan, 0])}, r"y_set\.A \(Polyhedron\)\['s'\]"),
    ],
)
def test_a_polyhedron_names_the_leaf_that_does_not_fit(part, argument):
    with pytest.raises(InvalidInput, match=argument):
        Polyhedron(part, b).validate("y_set", Y)
