"""Many devices give the result of one: eight forced host devices in one subprocess, which checks everything at once."""

import os
import subprocess
import sys

SCRIPT = """
import warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
import bilevel, irl, problems
from bilevel import oracles, sample_oracles, sharding
from bilevel.problem import BilevelProblem
from jax.sharding import PartitionSpec

jax.config.update("jax_numpy_dtype_promotion", "strict")
assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), ("hosts", "data"))  # all axes together, Explicit or not

def close(a, b, tolerance):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        u, v = np.asarray(u), np.asarray(v)
        assert np.max(np.abs(u - v)) <= tolerance * (1 + np.max(np.abs(u))), np.max(np.abs(u - v))

def measure(problem, x, y):  # F at the solver's y: nothing is solved for it, so that little is compiled
    value = problem.upper(x, y, problem.upper_data.full())
    return bilevel.diagnostics.Measurement(value, *(jnp.ones_like(value) for _ in range(5)))

def solved(problem, solver):
    return [
        bilevel.solve(
            problem, solver, key=jax.random.key(0), max_steps=12, every=6, tol=0.0, progress=False, measure=measure,
            mesh=m,
        )
        for m in (None, mesh)
    ]

# upper and lower batches
for bits, tolerance in ((64, 1e-12), (32, 1e-6)):
    with jax.enable_x64(bits == 64):
        problem = problems.make("quadratic", dim_x=3, dim_y=4, num_samples=64, batch_size=16).problem
        one, eight = solved(problem, bilevel.SOBA(0.1, 0.1, 0.01))
        close((one.x, one.y), (eight.x, eight.y), tolerance)
        close(one.record["value"], eight.record["value"], tolerance)
        assert eight.x.sharding.is_fully_replicated

jax.config.update("jax_enable_x64", True)
placed = sharding.place_data(problem.upper_data, mesh)
assert {leaf.sharding.spec for leaf in jax.tree.leaves(placed)} == {PartitionSpec(("hosts", "data"))}

# demonstrations
problem = problems.make("gridworld", size=3, trajectories=16, length=8).problem
one, eight = solved(problem, irl.MLIRL(upper_step_size=0.1))
close((one.x, one.y), (eight.x, eight.y), 1e-12)

# samples of a penalty, and perturbations by oracles.batched: the same numbers, and the program is split
def f(x, y, batch):
    return jnp.sum(jnp.sin(x) * y) + jnp.sum(y**4)

problem = BilevelProblem(f, bilevel.Minimize(f), init=lambda key: (jnp.zeros(3), jnp.zeros(3)))
x, ys = jnp.arange(3.0), jax.random.normal(jax.random.key(1), (64, 3))
a, b = jnp.linspace(0, 1, 64), jnp.linspace(2, 1, 64)
penalty = lambda: jax.jit(lambda ys: sample_oracles.sample_gradients(problem, x, ys, a, b, None, None))
smoothed = lambda: jax.jit(lambda q: jnp.mean(oracles.batched(lambda q: jax.grad(f)(x + q, x, None))(q), axis=0))
for make in (penalty, smoothed):
    alone = make()(ys)
    with sharding.on(mesh) as devices:
        placed = sharding.place(ys, devices)
        lowered = make().lower(placed)
        assert "optimization_barrier" in lowered.as_text()  # without it XLA splits, wrongly, what made the samples
        program = lowered.compile()
        close(alone, program(placed), 1e-12)
    assert "all-reduce" in program.as_text() or "all-gather" in program.as_text()
    assert "f64[8,3]" in program.as_text()  # 64 samples on 8 devices
try:
    bilevel.solve(problem, bilevel.AID(), key=jax.random.key(0), mesh="8")
except bilevel.struct.InvalidInput as error:
    assert "make_mesh" in str(error)
else:
    raise AssertionError("no error")
"""


def test_eight_devices_give_the_result_of_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
