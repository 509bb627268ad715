"""A run that only an interruption ends: endless_run.py CHECKPOINT. Prints its steps, then status and steps."""

import signal
import sys

import jax

import bilevel
import problems

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
solution = bilevel.solve(
    problems.make("quadratic", seed=0, dim_x=3, dim_y=4).problem,
    bilevel.SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.1),
    key=jax.random.key(0),
    max_steps=2_000_000_000,
    every=1000,
    tol=0.0,
    checkpoint=sys.argv[1],
    callback=lambda step, *_: print("step", step, flush=True),
)
print(solution.status.name, solution.stats["steps"], flush=True)
