"""Calls counted as compiled code runs, against what solvers declare, loops included."""

import jax

import bilevel
import problems
from bilevel import lower, oracles


def test_three_compiled_steps_cost_three_times_what_one_declares(key):
    """The steps are a loop, with loops of lower steps and of conjugate gradients inside."""
    problem = problems.make("quadratic", seed=1, dim_x=3, dim_y=12).problem
    solver = bilevel.AID(lower_step_size=0.1, upper_step_size=0.1)
    counter: dict[str, int] = {}
    state = solver.init(problem, key)
    with oracles.counting_runs(counter):
        run = jax.jit(lambda state: bilevel.advance(problem, solver, state, key, 0, 3)).lower(state).compile()
    counter.clear()
    run(state)
    jax.effects_barrier()
    assert counter == {kind: 3 * number for kind, number in solver.cost(problem).as_dict().items() if number}


def test_a_hessian_that_is_formed_counts_its_products(key):
    """A quadratic of five unknowns is factored once; Newton's first step ends at its minimum."""
    problem = problems.make("quadratic", seed=1, dim_x=3, dim_y=5).problem
    x, y = problem.init(key)
    counter: dict[str, int] = {}
    with oracles.counting_runs(counter):
        found = jax.jit(lambda x, y: lower.solve(problem, x, y, problem.lower_data.full()))(x, y)
    jax.effects_barrier()
    assert counter == {"hvps": 5, "lower_gradients": int(found.steps)}
