"""Every product of a traced program asks for the precision of its arguments, unless the user chose another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
import problems
from bilevel import diagnostics
from bilevel.backend.precision import full_precision
from bilevel.diagnostics.gap import lower_gap
from bilevel.run import lanes

PROBLEM = problems.make("quadratic", dim_x=3, dim_y=4).problem
X, Y = jnp.ones(3), jnp.ones(4)
MDP = irl.MDP.dense(np.full((4, 2, 4), 0.25), start=np.full(4, 0.25), discount=0.9)


def products(jaxpr):
    """The precisions of all matrix products, those of inner programs among them."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def constrained():
    problem = problems.make("constrained", kind="random", dim=4, rows=3).problem
    x, y = problem.init(jax.random.key(0))
    return bilevel.hypergradient(problem, x, y)


def run():
    solver, key = bilevel.AID(lower_step_size=0.1, upper_step_size=0.1), jax.random.key(0)
    state, _ = bilevel.advance(PROBLEM, solver, lanes.init(PROBLEM, solver, key, False), key, 0, 2)
    return lanes.measure_lanes(PROBLEM, *solver.output(PROBLEM, state), False, diagnostics.measure)


def sweeps():
    return irl.occupancy(MDP, irl.policy(irl.value_iteration(MDP, jnp.ones((4, 2))).Q))


def chosen():
    problem = problems.make("nonconvex", case="mb_3_19").problem
    solver, key = bilevel.SampledPenalty(num_samples=16, num_slots=2, num_starts=1, num_ladders=1), jax.random.key(0)
    compiled = lanes.compiled(problem, solver, key, False, diagnostics.measure)
    return compiled.output(compiled.init())


def onto_a_simplex():
    simplex = bilevel.Simplex()
    map_ = bilevel.FixedPoint(lambda x, y, batch: simplex.project(0.5 * y + batch @ x))
    data = bilevel.Full(jnp.ones((4, 3)) / 4)
    start = lambda key: (X, Y / 4)  # noqa: E731
    problem = bilevel.BilevelProblem(lambda x, y, batch: jnp.sum(y**2), map_, lower_data=data, init=start)
    return jax.grad(bilevel.implicit_objective(problem))(X)


CALLS = {
    "hypergradient": lambda: bilevel.hypergradient(PROBLEM, X),
    "dense": lambda: bilevel.hypergradient(PROBLEM, X, method=bilevel.Dense()),
    "unrolled": lambda: bilevel.hypergradient(PROBLEM, X, method=bilevel.Unrolled(0.1, 3)),
    "constrained": constrained,
    "implicit": lambda: jax.hessian(bilevel.implicit_objective(PROBLEM))(X),
    "gap": lambda: lower_gap(PROBLEM, X, Y, num_points=8, num_starts=1),
    "run": run,
    "output": chosen,
    "simplex": onto_a_simplex,
    "soft": sweeps,
}


@pytest.mark.parametrize("name", CALLS)
def test_products_are_in_full_precision(name):
    highest = (jax.lax.Precision.HIGHEST,) * 2
    found = list(products(jax.make_jaxpr(CALLS[name])().jaxpr))
    assert found
    assert set(found) == {highest}


def test_what_the_user_chose_wins():
    product = lambda: full_precision(lambda a: a @ a)(jnp.ones((2, 2)))  # noqa: E731
    with jax.default_matmul_precision("tensorfloat32"):
        chosen = list(products(jax.make_jaxpr(product)().jaxpr))
    assert chosen != list(products(jax.make_jaxpr(product)().jaxpr))
