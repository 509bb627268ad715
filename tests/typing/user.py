"""What a user writes, for pyright: a comment on a line says which type it must reveal or which error it must see."""
# ruff: noqa

import jax
import jax.numpy as jnp
import optax
from typing import reveal_type

import bilevel
import irl

reveal_type(bilevel.SOBA())  # type: SOBA
reveal_type(irl.MLIRL())  # type: MLIRL
bilevel.SOBA(
    lower_step_size=0.1, linear_step_size=optax.cosine_decay_schedule(0.1, 10), upper_step_size=optax.adam(0.1)
)
bilevel.SOBA(lower_step_size=lambda k: 0.1 / (k + 1))
bilevel.GPBGD(penalty=jnp.array(10.0), upper_step_size=1)
bilevel.DSBLO(gamma_1=10, num_lower_steps=3)
bilevel.SOBA(lower_stepsize=3)  # error: No parameter named "lower_stepsize"
bilevel.SOBA(0.1)  # error: Expected 0 positional arguments
bilevel.SOBA(lower_step_size="fast")  # error: cannot be assigned to parameter "lower_step_size"
bilevel.VPBGD(penalty=optax.adam(0.1))  # error: cannot be assigned to parameter "penalty"
bilevel.AID(num_lower_steps=1.5)  # error: cannot be assigned to parameter "num_lower_steps"
bilevel.SOBBA()  # error: "SOBBA" is not a known attribute of module "bilevel"
irl.MLIRLL()  # error: "MLIRLL" is not a known attribute of module "irl"

problem = bilevel.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    lower=bilevel.Minimize(lambda x, y, batch: jnp.sum((y - x) ** 2)),
    x_set=bilevel.Box(-1.0, 1.0),
    init=lambda key: (jnp.zeros(2), jnp.zeros(2)),
)
solution = bilevel.solve(problem, bilevel.SOBA(), key=jax.random.key(0), max_steps=10)
reveal_type(solution)  # type: Solution
reveal_type(solution.status)  # type: Status
reveal_type(bilevel.Status.CONVERGED.advice)  # type: str
reveal_type(solution.stats["steps"])  # type: int
reveal_type(solution.stats["solve_time"])  # type: float
solution.stats["stepps"]  # error: "stepps" is not a defined key in "Stats"
row = solution.record.rows[-1]
reveal_type(row["value"])  # type: float
reveal_type(row["status"])  # type: int
row["valeu"]  # error: "valeu" is not a defined key in "Row"
reveal_type(solution.record["value"])  # type: ndarray
h = bilevel.hypergradient(problem, solution.x)
reveal_type(h)  # type: Hypergradient
reveal_type(h.error_bound)  # type: Array
reveal_type(bilevel.__version__)  # type: str
