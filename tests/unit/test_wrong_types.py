"""What is given in a wrong type is named in four parts: which argument, what was got, what was expected, what to do."""

import jax
import jax.numpy as jnp
import pytest

import bilevel
import irl
import problems

INSTANCE = problems.make("quadratic", dim_x=2, dim_y=2)
PROBLEM, X, KEY = INSTANCE.problem, jnp.zeros(2), jax.random.key(0)


def with_set(y_set):
    return bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum(x * y), bilevel.Minimize(lambda x, y, batch: jnp.sum((y - x) ** 2)), y_set=y_set,
        init=lambda key: (jnp.zeros(2), jnp.zeros(2)),
    ).validate()  # fmt: skip


def solve(solver=bilevel.AID(), **arguments):  # noqa: B008
    return bilevel.solve(PROBLEM, solver, **{"key": KEY, "max_steps": 1, **arguments})


CASES = {
    "x, a text": (lambda: bilevel.hypergradient(PROBLEM, "a"), r"x: got 'a'; expected a number or an array"),
    "y, a text": (lambda: bilevel.hypergradient(PROBLEM, X, "a"), r"y: got 'a'; expected"),
    "v, a text": (lambda: bilevel.hypergradient(PROBLEM, X, v="a"), r"adjoint\.v: got 'a'; expected"),
    "x of F": (lambda: bilevel.implicit_objective(PROBLEM)("a"), r"x: got 'a'; expected"),
    "lower": (lambda: bilevel.hypergradient(PROBLEM, X, lower=bilevel.CG()), r"lower .*of type CG; expected a Lower"),
    "a lower's class": (lambda: bilevel.hypergradient(PROBLEM, X, lower=bilevel.Newton), r"lower .*the class Newton"),
    "a ball": (lambda: with_set(bilevel.Ball("a")), r"y_set\.radius \(Ball\): got str; expected numbers"),
    "a simplex": (lambda: with_set(bilevel.Simplex("a")), r"y_set\.scale \(Simplex\): got str; expected numbers"),
    "a set's class": (lambda: with_set(bilevel.Ball), r"y_set: got type; expected a set"),
    "to_bilevel": (lambda: irl.to_bilevel(None, None, None), r"mdp \(to_bilevel\): got NoneType; expected an MDP"),
    "an MDP's class": (lambda: irl.to_bilevel(irl.MDP, None, None), r"mdp \(to_bilevel\): got the class MDP"),
    "a solver's class": (lambda: solve(bilevel.AID), r"solver: got the class AID; expected a solver"),
    "a setting's class": (lambda: solve(bilevel.AID(linear=bilevel.CG)), r"AID\.linear: got the class CG; expected an"),
    "a checkpoint": (lambda: solve(checkpoint=3), r"checkpoint: got int; expected a path"),
    "an instance": (lambda: bilevel.solve(INSTANCE, bilevel.AID(), key=KEY), r"problem: got Instance; expected"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_type_is_named(name):
    call, expected = CASES[name]
    with pytest.raises(bilevel.InvalidInput, match=f"^{expected}") as caught:
        call()
    assert str(caught.value).endswith(".")
