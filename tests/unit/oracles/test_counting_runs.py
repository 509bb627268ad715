"""Calls counted as compiled code runs, against those that the interpreter makes."""

import jax

import bilevel
import problems
from bilevel import oracles


def test_three_steps_of_lbfgs_cost_what_they_say(key):
    """A lower level in R^5: each Hessian that is formed counts five products."""
    problem, solver = problems.make("quadratic", seed=1, dim_x=3, dim_y=5).problem, bilevel.LBFGS()
    counter: dict[str, int] = {}
    begin = state = solver.init(problem, key)

    def step(state):
        with oracles.counting_runs(counter):
            return solver.step(problem, state, key)

    compiled, evaluations = jax.jit(step), 0
    for _ in range(3):
        state, info = compiled(state)
        evaluations += int(info.evaluations)
    jax.effects_barrier()
    with jax.disable_jit(), oracles.counting() as count:
        state = begin
        for _ in range(3):
            state, _ = solver.step(problem, state, key)
    assert {name: number for name, number in count().as_dict().items() if number} == counter
    assert counter["upper_gradients"] >= evaluations
    assert counter["hvps"] >= 5 * evaluations
