"""Several followers in equilibrium, and three levels, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, Box, Full, InvalidInput, Minimize, nash

A, B, C_LEADER = 10.0, 1.0, 3.0
COSTS = {"east": 2.0, "west": 3.0}


def price(x, y):
    return A - B * (x[0] + y["east"] + y["west"])


def east(x, y, batch):
    return -(price(x, y) - batch["east"]) * y["east"]


def west(x, y, batch):
    return -(price(x, y) - batch["west"]) * y["west"]


def leader(x, y, batch):
    return -(price(x, y) - C_LEADER) * x[0]


def start(key):
    return jnp.ones(1), {"east": jnp.array(0.5), "west": jnp.array(0.5)}


def market(costs, sets=None):
    data = Full({name: jnp.asarray(cost) for name, cost in costs.items()})
    return BilevelProblem(
        leader, nash({"east": east, "west": west}, sets), x_set=Box(0.0, 10.0), lower_data=data, init=start
    )


def test_a_leader_of_two_cournot_firms():
    """q_i = (a - b x - 2 c_i + c_j)/(3 b), so that the leader's x is (a + c_1 + c_2 - 3 c)/(2 b)."""
    problem = market(COSTS)
    run = bilevel.solve(problem, bilevel.LBFGS(), key=jax.random.key(0), max_steps=50)
    x = (A + 2 + 3 - 3 * C_LEADER) / (2 * B)
    assert run.status == bilevel.Status.CONVERGED
    np.testing.assert_allclose(run.x, [x], rtol=1e-6)
    np.testing.assert_allclose(run.y["east"], (A - B * x - 2 * 2 + 3) / (3 * B), atol=1e-6)
    assert max(bilevel.diagnostics.regrets(problem, run.x, run.y).values()) < 1e-10
    together = {name: jnp.asarray(value) for name, value in (("east", 2.5), ("west", 0.0))}  # a cartel's quantities
    assert max(bilevel.diagnostics.regrets(problem, run.x, together).values()) > 0.01


def test_a_firm_that_stays_out():
    """West's costs of 8 leave nobody in but east: q = (a - b x - c_1)/(2 b), so x = (a + c_1 - 2 c)/(2 b) = 3."""
    positive = Box(0.0, jnp.inf)
    problem = market({"east": 2.0, "west": 8.0}, {"east": positive, "west": positive})
    run = bilevel.solve(problem, bilevel.LBFGS(), key=jax.random.key(0), max_steps=50)
    assert run.status == bilevel.Status.CONVERGED
    np.testing.assert_allclose(run.x, [3.0], rtol=1e-6)
    np.testing.assert_allclose((run.y["east"], run.y["west"]), (2.5, 0.0), atol=1e-6)
    assert max(bilevel.diagnostics.regrets(problem, run.x, run.y).values()) < 1e-10
    again = market({"east": 2.0, "west": 8.0}, {"east": Box(0.0, jnp.inf), "west": Box(0.0, jnp.inf)})
    assert again.lower.T == problem.lower.T  # nothing compiles again
    assert hash(again.lower.T) == hash(problem.lower.T)


def push(x, y, batch):
    return y["a"] ** 2 / 2 + y["a"] * y["b"] - x[0] * y["a"]


def pull(x, y, batch):
    return y["b"] ** 2 / 2 - y["a"] * y["b"]


def test_followers_whose_forces_are_no_gradient():
    """a + b = x and b = a: y = (x/2, x/2); the Jacobian [[1, 1], [-1, 1]] is not symmetric. dF/dx by hand."""
    problem = BilevelProblem(
        lambda x, y, batch: (y["a"] - 1) ** 2 + y["b"], nash({"a": push, "b": pull}),
        init=lambda key: (jnp.ones(1), {"a": jnp.zeros(()), "b": jnp.zeros(())}),
    )  # fmt: skip
    F = bilevel.implicit_objective(problem)
    x = jnp.array([3.0])
    np.testing.assert_allclose(F(x), 0.25 + 1.5, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(F)(x), [(1.5 - 1) + 0.5], rtol=1e-10)


def test_wrong_followers_are_refused_by_name():
    with pytest.raises(InvalidInput, match="costs"):
        nash({})
    with pytest.raises(InvalidInput, match=r"sets\['south'\]"):
        nash({"east": east}, {"south": Box(0.0, 1.0)})
    with pytest.raises(InvalidInput, match="step_size"):
        nash({"east": east}, step_size=0.0)
    with pytest.raises(InvalidInput, match=r"keys \['east'\]"):
        BilevelProblem(leader, nash({"east": east}), init=start).validate()
    with pytest.raises(InvalidInput, match="nash"):
        bilevel.diagnostics.regrets(BilevelProblem(leader, Minimize(east), init=start), *start(None))


def lowest(uv, z, batch):
    """z = u + v."""
    u, v = uv
    return jnp.sum((z - u - v) ** 2)


def middle_cost(uv, z, batch):
    """(v - u)^2 + z^2/2 with z = u + v: least at v = u/3."""
    u, v = uv
    return jnp.sum((v - u) ** 2) + jnp.sum(z**2) / 2


def of_middle(u, v, batch):
    below = BilevelProblem(middle_cost, Minimize(lowest), init=lambda key: ((u, v), jnp.zeros_like(v)))
    return bilevel.implicit_objective(below)((u, v))


def top(u, v, batch):
    return jnp.sum((v - 1) ** 2) + 0.1 * jnp.sum(u**2)


def test_three_levels_by_an_implicit_objective_as_lower_objective():
    """v(u) = u/3 and F(u) = (u/3 - 1)^2 + u^2/10, so that u = (1/3)/(1/9 + 1/10) = 30/19."""
    problem = BilevelProblem(top, Minimize(of_middle), init=lambda key: (jnp.ones(1), jnp.zeros(1)))
    run = bilevel.solve(problem, bilevel.LBFGS(), key=jax.random.key(0), max_steps=30)
    assert run.status == bilevel.Status.CONVERGED
    np.testing.assert_allclose(run.x, [30 / 19], rtol=1e-6)
    np.testing.assert_allclose(run.y, [10 / 19], rtol=1e-6)
