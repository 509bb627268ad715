"""One trial of `platform` in a process of its own: `python -m benchmarks.judge.platform_probe svd|cholesky|solve`."""

import hashlib
import json
import sys
import time
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import bilevel  # noqa: E402


def svd() -> dict[str, Any]:
    """Seconds and largest error of six batched singular-value decompositions of one program."""
    batches = [np.random.default_rng(k).standard_normal((64, 3, 6, 12)) for k in range(6)]
    run = jax.jit(lambda parts: [jnp.linalg.svd(part, compute_uv=False) for part in parts])
    begin = time.perf_counter()
    for _ in range(20):
        found = jax.block_until_ready(run(batches))
    seconds = time.perf_counter() - begin
    exact = [np.linalg.svd(part, compute_uv=False) for part in batches]
    return {"seconds": seconds, "error": max(float(np.abs(a - b).max()) for a, b in zip(found, exact, strict=True))}


def cholesky() -> dict[str, Any]:
    """Median milliseconds of a Cholesky factor of 50 unknowns and two solves with it."""
    R = np.random.default_rng(0).standard_normal((50, 50))
    H, b = jnp.asarray(R @ R.T / 50 + np.eye(50)), jnp.ones(50)
    run = jax.jit(lambda H, b: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(H), b))
    jax.block_until_ready(run(H, b))
    times = []
    for _ in range(100):
        begin = time.perf_counter()
        jax.block_until_ready(run(H, b))
        times.append(time.perf_counter() - begin)
    return {"ms": 1e3 * float(np.median(times))}


def solve() -> dict[str, Any]:
    """The bits of a short run and of a hypergradient by a dense factor of 120 unknowns."""
    M = jnp.asarray(np.random.default_rng(2).standard_normal((120, 120)) / 11)
    problem = bilevel.BilevelProblem(
        upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
        lower=bilevel.Minimize(lambda x, y, batch: jnp.sum((M @ y - x) ** 2) + jnp.sum(y**2) + jnp.sum(y**4)),
        init=lambda key: (jax.random.normal(key, (120,)), jnp.zeros(120)),
    )
    solver = bilevel.AID(lower_step_size=0.02, upper_step_size=0.02)  # given ones compile less
    solution = bilevel.solve(problem, solver, key=jax.random.key(0), max_steps=20)
    h = bilevel.hypergradient(problem, solution.x)
    parts = [np.asarray(leaf).tobytes() for leaf in (solution.x, solution.y, h.gradient, h.value)]
    return {"bits": hashlib.sha256(b"".join(parts)).hexdigest()}


if __name__ == "__main__":
    print(json.dumps({"svd": svd, "cholesky": cholesky, "solve": solve}[sys.argv[1]]()))
