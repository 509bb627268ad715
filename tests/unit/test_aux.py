"""Functions that return (value, aux), and hypergradients on a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
from bilevel import BilevelProblem, Full, InvalidInput, Minibatch, Minimize

DATA = jnp.arange(12.0).reshape(6, 2) / 10
SOLVER = bilevel.SOBA(lower_step_size=0.5, linear_step_size=0.5, upper_step_size=0.1)


def f(x, y, batch):
    return 0.5 * jnp.mean((y[None] - batch) ** 2) + 0.05 * jnp.sum(x**2)


def f_and_more(x, y, batch):
    return f(x, y, batch), {"rows": jnp.sum(batch, axis=0), "y": y}


def g(x, y, batch):
    return 0.5 * jnp.sum((y - jnp.sin(x) * jnp.mean(batch)) ** 2)


def g_and_more(x, y, batch):
    return g(x, y, batch), jnp.sum(y)


def start(key):
    return jnp.full(2, 0.3), jnp.zeros(2)


PLAIN = BilevelProblem(f, Minimize(g), upper_data=Full(DATA), lower_data=Minibatch(DATA, 3), init=start)
WITH = dataclasses.replace(PLAIN, upper=f_and_more, lower=Minimize(g_and_more, has_aux=True), has_aux=True)
X = jnp.array([0.3, -0.4])


def run(problem):
    return bilevel.solve(problem, SOLVER, key=jax.random.key(0), max_steps=6, every=3, tol=0.0)


def test_a_run_is_the_same_with_and_without_aux():
    assert WITH.validate().has_aux
    assert WITH.lower.has_aux
    assert not PLAIN.has_aux
    one, two = run(WITH), run(PLAIN)
    jax.tree.map(np.testing.assert_array_equal, (one.state, one.record["value"]), (two.state, two.record["value"]))
    assert two.aux is None
    np.testing.assert_array_equal(one.aux["y"], one.y)
    np.testing.assert_allclose(one.aux["rows"], jnp.sum(DATA, axis=0), rtol=1e-14)  # all of the data
    np.testing.assert_array_equal(WITH.aux(X, one.y)["y"], one.y)


def test_hypergradients_are_the_same_with_and_without_aux():
    one, two = (bilevel.hypergradient(problem, X) for problem in (WITH, PLAIN))
    np.testing.assert_array_equal(one.gradient, two.gradient)
    assert one.value == two.value


def test_replace_keeps_has_aux_as_it_keeps_a_field():
    assert dataclasses.replace(WITH, upper_data=Full(2 * DATA)).has_aux
    other = dataclasses.replace(WITH, upper=lambda x, y, batch: (f(x, y, batch), "more"))
    assert other.upper(X, X, DATA) == f(X, X, DATA)
    back = dataclasses.replace(WITH, upper=f, has_aux=False).validate()
    assert (back.upper, back.has_aux) == (f, False)


def test_two_problems_with_one_function_compile_once():
    structures = {jax.tree.structure(dataclasses.replace(PLAIN, upper=f_and_more, has_aux=True)) for _ in range(2)}
    assert len(structures) == 1


@pytest.mark.parametrize(
    ("changes", "argument", "expected"),
    [
        ({"upper": f, "has_aux": True}, "upper", "(value, aux), as has_aux=True says"),
        ({"upper": f_and_more}, "upper", "a scalar, shape []. Of (value, aux) say has_aux=True"),
        ({"lower": Minimize(g, has_aux=True)}, "lower (Minimize)", "(value, aux)"),
        ({"lower": Minimize(g_and_more)}, "lower (Minimize)", "has_aux=True"),
        ({"upper": 1.0, "has_aux": True}, "upper", "a function of arguments"),
    ],
)
def test_named_errors(changes, argument, expected):
    with pytest.raises(InvalidInput) as caught:
        dataclasses.replace(PLAIN, **changes).validate()
    assert str(caught.value).startswith(f"{argument}: got ")
    assert expected in str(caught.value).split("; expected ", 1)[1]


def test_a_hypergradient_on_a_batch_is_that_of_a_problem_with_that_data():
    """Here y = sin(x) m, m the mean of g's batch, so that F' = (y - mean of f's batch) m cos(x)/2 + x/10."""
    upper, lower = DATA[:2], DATA[1:4]
    h = bilevel.hypergradient(PLAIN, X, batch=(upper, lower))
    m = jnp.mean(lower)
    y = jnp.sin(X) * m
    np.testing.assert_allclose(h.y, y, atol=1e-14)
    expected = (y - jnp.mean(upper, axis=0)) * m * jnp.cos(X) / 2 + X / 10
    np.testing.assert_allclose(h.gradient, expected, atol=1e-14)
    assert h.error_bound < 1e-12
    whole = bilevel.hypergradient(PLAIN, X, batch=(DATA, DATA))
    np.testing.assert_array_equal(whole.gradient, bilevel.hypergradient(PLAIN, X).gradient)


def test_batches_of_the_sources_under_vmap():
    keys = jax.random.split(jax.random.key(1), 3)
    source = PLAIN.lower_data
    batches = jax.vmap(lambda key: source.next(source.init(key), key, X, X)[0])(keys)
    found = jax.vmap(lambda batch: bilevel.hypergradient(PLAIN, X, batch=(DATA, batch)).gradient)(batches)
    for k in range(3):
        alone = bilevel.hypergradient(PLAIN, X, batch=(DATA, batches[k])).gradient
        np.testing.assert_allclose(found[k], alone, rtol=1e-12)


def test_what_is_no_batch_is_refused():
    with pytest.raises(InvalidInput, match=r"^batch \(hypergradient\): got ArrayImpl; expected a pair"):
        bilevel.hypergradient(PLAIN, X, batch=DATA)
    mdp = irl.MDP(jnp.ones((2, 2, 2)) / 2, jnp.array([1.0, 0.0]), 0.5)
    problem = irl.to_bilevel(mdp, jnp.ones((2, 2)), irl.TableReward(2, 2))
    with pytest.raises(InvalidInput, match=r"^batch: got TabularImitation, whose data follow"):
        bilevel.hypergradient(problem, jnp.zeros((2, 2)), batch=(None, None))
