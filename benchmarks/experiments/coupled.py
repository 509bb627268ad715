"""Followers whose set moves with the leader: runs on the suite of `problems.coupled`, and the projection they rest on.

    python -m benchmarks.experiments.coupled [--seeds 10] [--solver SampledPenalty] [kind:dim_x:dim_y …]
    python -m benchmarks.experiments.coupled --projection [--num 1000]

The first solves each instance (all 60, or those of the sizes given) with a solver's defaults, and prints for each run
F*, F, the status and the steps. A run is right where |F - F*| <= 1e-3 (1 + |F*|). The last line counts the right runs,
those called CONVERGED among the right and among the others, and those that ended NONFINITE. A wrong run that is
CONVERGED may still be at a local minimum: the referee looks around x, not everywhere.

The second moves 64 points into each of `num` drawn polytopes of dimension 1 to 10 (whole-number rows, rows of lengths
from 1e-3 to 1e3, nearly parallel ones, corners) and prints the largest violation, relative to a row's length and |b|,
in float64 and in float32, and how many points say themselves that they are not exact.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel.constraints import Rows, project_on
from problems import coupled

POINTS, PARALLEL = 64, 1e-7


def suite(sizes: list[str], solver: bilevel.Solver, seeds: int) -> None:
    """Solve and print."""
    chosen = [size.split(":") for size in sizes]
    chosen = chosen or [[kind, *size] for kind, every in coupled.SUITE.items() for size in every]
    count = dict.fromkeys(("runs", "right", "right and CONVERGED", "wrong and CONVERGED", "NONFINITE"), 0)
    for (kind, n, m), number in ((size, number) for size in chosen for number in range(3)):
        instance = coupled.make(str(kind), int(n), int(m), number)
        assert instance.truth is not None
        value = instance.truth.value
        for seed in range(seeds):
            solution = bilevel.solve(instance.problem, solver, key=jax.random.key(seed))
            F, status = float(solution.record["value"][-1]), solution.status.name
            right = abs(F - value) <= 1e-3 * (1 + abs(value))
            count["runs"] += 1
            count["right"] += right
            count["right and CONVERGED"] += right and status == "CONVERGED"
            count["wrong and CONVERGED"] += not right and status == "CONVERGED"
            count["NONFINITE"] += status == "NONFINITE"
            name = f"coupled[kind={kind},dim_x={n},dim_y={m},seed={number}]"
            print(f"{name} {seed}: F* {value:.6f} F {F:.6f} {status} {solution.stats['steps']} steps", flush=True)
    print(count)


def polytope(rng: np.random.Generator, n: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C, lo, hi) of a box and rows that leave room for a point, but for corners, where they meet in one."""
    rows = max(2, n // 2 + 1)
    y0, A = rng.uniform(0, 3, n), rng.normal(size=(rows, n)) * 10 ** rng.uniform(-3, 3, (rows, 1))
    if kind in ("whole", "corner"):
        A, y0 = rng.integers(-3, 4, (rows, n)).astype(float), np.round(y0)
    if kind == "parallel":
        A[-1] = 2 * A[0] + PARALLEL * rng.normal(size=n)
    room = 0.3 * rng.uniform(size=rows) * np.abs(A).sum(axis=1) * (kind != "corner")
    hi = np.concatenate([np.full(n, 6.0), A @ y0 + room])
    return np.concatenate([np.eye(n), A]), np.concatenate([np.zeros(n), np.full(rows, -np.inf)]), hi


@jax.jit
def beyond(C: jax.Array, lo: jax.Array, hi: jax.Array, points: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the largest violation of the points that say they are exact; how many do not), of stacked polytopes."""

    def one(C: jax.Array, lo: jax.Array, hi: jax.Array, points: jax.Array) -> tuple[jax.Array, jax.Array]:
        limits = Rows(C, lo, hi, C[:, :0])
        found = jax.vmap(lambda u: project_on(limits, u))(points)
        size = jnp.linalg.norm(C, axis=1) + jnp.abs(hi) + jnp.finfo(C.dtype).tiny
        at = found.y @ C.T
        over = jnp.maximum(at - hi[None], lo[None] - at) / size[None]
        over = jnp.where(jnp.any(C != 0, axis=1)[None] & found.exact[:, None], over, 0)
        return jnp.max(over), jnp.sum(~found.exact)

    return jax.vmap(one)(C, lo, hi, points)


def projection(num: int) -> None:
    """Draw, move and print."""
    kinds = "whole", "scaled", "parallel", "corner"
    for dtype in (np.float64, np.float32):
        worst, inexact = 0.0, 0
        for n in range(1, 11):
            rng = np.random.default_rng(n)
            drawn = [polytope(rng, n, kinds[k % len(kinds)]) for k in range(num // 10)]
            parts = *(np.stack(part) for part in zip(*drawn, strict=True)), rng.uniform(-1, 7, (len(drawn), POINTS, n))
            over, bad = beyond(*(jnp.asarray(part, dtype) for part in parts))
            worst, inexact = max(worst, float(jnp.max(over))), inexact + int(jnp.sum(bad))
        print(f"{np.dtype(dtype).name}: largest violation {worst:.1e}, {inexact} of {num * POINTS} points not exact")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("sizes", nargs="*")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--solver", default="SampledPenalty")
    parser.add_argument("--projection", action="store_true")
    parser.add_argument("--num", type=int, default=1000)
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if given.projection:
        projection(given.num)
    else:
        suite(given.sizes, getattr(bilevel, given.solver)(), given.seeds)


if __name__ == "__main__":
    main()
