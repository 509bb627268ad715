"""On eight devices solvers give what they give on one, and programs are split: ends without a word, or fails.

Run with XLA_FLAGS=--xla_force_host_platform_device_count=8; --all: with the solver that takes longest to compile, too.
"""

import sys
import warnings

warnings.simplefilter("error")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

import bilevel  # noqa: E402
import irl  # noqa: E402
import problems  # noqa: E402
from bilevel import oracles  # noqa: E402
from bilevel.backend import sharding  # noqa: E402
from bilevel.oracles import samples as sample_oracles  # noqa: E402
from bilevel.problem import BilevelProblem  # noqa: E402
from bilevel.run import lanes  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), ("hosts", "data"))  # all axes together, Explicit or not


def close(a, b, tolerance):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        u, v = np.asarray(u, float), np.asarray(v, float)
        assert np.max(np.abs(u - v)) <= tolerance * (1 + np.max(np.abs(u))), np.max(np.abs(u - v))


def measure(problem, x, y):  # F at the solver's y: nothing is solved for it, so that little is compiled
    value = problem.upper(x, y, problem.upper_data.full())
    return bilevel.diagnostics.Measurement(value, *(jnp.ones_like(value) for _ in range(5)))


def solved(problem, solver):
    return [
        bilevel.solve(
            problem,
            solver,
            key=jax.random.key(0),
            max_steps=12,
            every=6,
            tol=0.0,
            progress=False,
            measure=measure,
            mesh=m,
        )
        for m in (None, mesh)
    ]


# upper and lower batches
for bits, tolerance in ((64, 1e-12), (32, 1e-6)):
    with jax.enable_x64(bits == 64):
        problem = problems.make("quadratic", dim_x=3, dim_y=4, num_samples=64, batch_size=16).problem
        one, eight = solved(problem, bilevel.SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.01))
        close((one.x, one.y), (eight.x, eight.y), tolerance)
        close(one.record["value"], eight.record["value"], tolerance)
        assert eight.x.sharding.is_fully_replicated

jax.config.update("jax_enable_x64", True)
placed = sharding.place_data(problem.upper_data, mesh)
assert {leaf.sharding.spec for leaf in jax.tree.leaves(placed)} == {PartitionSpec(("hosts", "data"))}


def program(problem, solver, state, key, devices):  # the compiled steps, and what they are given
    parts = problem.on_mesh(devices), *sharding.place((solver, state, key), devices)
    return lanes.advance_lanes.lower(*parts, 0, 3, False).compile(), parts


# demonstrations: batches of trajectories
problem = problems.make("gridworld", size=3, trajectories=16, length=8, batch_size=8).problem
solver = irl.MLIRL(upper_step_size=0.1)
one, eight = solved(problem, solver)
assert np.max(np.abs(one.x)) > 1e-3
close((one.x, one.y), (eight.x, eight.y), 1e-12)
state = lanes.init(problem, solver, jax.random.key(0), False)
with sharding.on(mesh) as devices:
    text = program(problem, solver, state, jax.random.key(0), devices)[0].as_text()
# a trajectory a device, of the batch of 8
assert "[8,8]" in text
assert "[1,8]" in text
assert "all-reduce" in text


# samples of a penalty, and perturbations by oracles.batched: the same numbers, and the program is split
def f(x, y, batch):
    return jnp.sum(jnp.sin(x) * y) + jnp.sum(y**4)


problem = BilevelProblem(f, bilevel.Minimize(f), init=lambda key: (jnp.zeros(3), jnp.zeros(3)))
x, ys = jnp.arange(3.0), jax.random.normal(jax.random.key(1), (64, 3))
a, b = jnp.linspace(0, 1, 64), jnp.linspace(2, 1, 64)


def penalty():
    return jax.jit(lambda ys: sample_oracles.sample_gradients(problem, x, ys, a, b, None, None))


def smoothed():
    return jax.jit(lambda q: jnp.mean(oracles.batched(lambda q: jax.grad(f)(x + q, x, None))(q), axis=0))


for make in (penalty, smoothed):
    alone = make()(ys)
    with sharding.on(mesh) as devices:
        placed = sharding.place(ys, devices)
        lowered = make().lower(placed)
        assert "optimization_barrier" in lowered.as_text()  # without it XLA splits, wrongly, what made the samples
        compiled = lowered.compile()
        close(alone, compiled(placed), 1e-12)
    assert "all-reduce" in compiled.as_text() or "all-gather" in compiled.as_text()
    assert "f64[8,3]" in compiled.as_text()  # 64 samples on 8 devices


# the same in whole solvers: samples of the penalty, perturbations q with the lower level of each
def wavy(x, y, batch):
    return jnp.sum(jnp.cos(4 * y) + (y - x) ** 2)


def near(x, y, batch):
    return jnp.sum((x - 0.3) ** 2) + jnp.sum(y)


box = bilevel.Box(-1.0, 1.0)
penalised = BilevelProblem(
    near, bilevel.Minimize(wavy), x_set=box, y_set=box, init=lambda key: (jnp.full(1, 0.5), jnp.zeros(1))
)
kinked = BilevelProblem(
    lambda x, y, batch: jnp.sum((y - 1) ** 2) / 2 + jnp.sum(x**2) / 2,
    bilevel.Minimize(lambda x, y, batch: jnp.sum((y - x) ** 2) / 2),
    coupling=bilevel.LinearCoupling(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.full(1, 0.5)),
    init=lambda key: (jnp.array([0.6, -0.2]), jnp.zeros(2)),
)
sampled = bilevel.SampledPenalty(num_samples=16, num_slots=2, num_starts=1, num_ladders=1, num_ladder_steps=4)
whole_solvers = (kinked, bilevel.DSBLO(num_perturbations=8)), (penalised, sampled)
for problem, solver in whole_solvers[: 2 if "--all" in sys.argv else 1]:
    key = jax.random.key(1)
    state = lanes.init(problem, solver, key, False)
    alone = lanes.advance_lanes(problem, solver, state, key, 0, 3, False)
    with sharding.on(mesh) as devices:
        compiled, parts = program(problem, solver, state, key, devices)
        together = compiled(jax.tree.leaves((*parts, 0, 3)))
    assert "all-gather" in compiled.as_text() or "all-reduce" in compiled.as_text()
    assert np.max(np.abs(state.x - alone[0].x)) > 1e-3
    close((alone[0].x, alone[0].y, alone[1]), (together[0].x, together[0].y, together[1]), 1e-12)

# keys over devices: the same numbers, and nothing moves
problem = problems.make("quadratic", dim_x=3, dim_y=4, num_samples=64, batch_size=16).problem
keys = jax.random.split(jax.random.key(0), 16)
solver = bilevel.SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.01)
settings = {"keys": keys, "max_steps": 12, "every": 6, "tol": 0.0, "progress": False, "measure": measure}
vmapped, spread = (bilevel.solve_many(problem, solver, mesh=m, **settings) for m in (None, mesh))
for a, b in zip(vmapped, spread, strict=True):
    close((a.x, a.y, a.record["value"]), (b.x, b.y, b.record["value"]), 1e-12)
many = sharding.automatic(mesh)
parts = sharding.place((problem, solver), many)
state = lanes.init(*parts, sharding.place(keys, many), many)
assert state.x.sharding.spec == PartitionSpec(("hosts", "data"))
text = lanes.advance_lanes.lower(*parts, state, sharding.place(keys, many), 0, 3, many).compile().as_text()
assert not [word for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if word in text]
with pytest.raises(bilevel.InvalidInput, match="8 devices"):
    bilevel.solve_many(problem, solver, keys=keys[:12], mesh=mesh)
with pytest.raises(bilevel.InvalidInput, match="make_mesh"):
    bilevel.solve(problem, bilevel.AID(), key=jax.random.key(0), mesh="8")
