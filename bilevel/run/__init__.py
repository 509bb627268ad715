"""The one driver of all solvers: `solve`, `solve_many`, `advance`, and checkpoints of what they do."""

from bilevel.run import checkpoint
from bilevel.run.arguments import referee_of
from bilevel.run.driver import solve, solve_many
from bilevel.run.lanes import advance, passes_per_step
from bilevel.run.optima import Optimum, local_optima

__all__ = [
    "Optimum", "advance", "checkpoint", "local_optima", "passes_per_step", "referee_of", "solve", "solve_many",
]  # fmt: skip
