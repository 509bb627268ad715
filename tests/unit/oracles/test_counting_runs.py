"""Calls counted as compiled code runs, against those that the interpreter makes."""

import jax

import bilevel
import problems
from bilevel import oracles


def test_a_step_of_lbfgs_costs_what_it_says(key):
    """A lower level in R^5: each Hessian that is formed counts five products."""
    problem, solver = problems.make("quadratic", seed=1, dim_x=3, dim_y=5).problem, bilevel.LBFGS()
    counter: dict[str, int] = {}
    begin = solver.init(problem, key)

    def step(state):
        with oracles.counting_runs(counter):
            return solver.step(problem, state, key)

    evaluations = int(jax.jit(step)(begin)[1].evaluations)
    jax.effects_barrier()
    with jax.disable_jit(), oracles.counting() as count:
        solver.step(problem, begin, key)
    assert {name: number for name, number in count().as_dict().items() if number} == counter
    assert counter["upper_gradients"] >= evaluations
    assert counter["hvps"] >= 5 * evaluations
