"""Followers whose set moves with the leader: runs on the suite of `problems.coupled`, and the projection they rest on.

    python -m benchmarks.experiments.coupled [--seeds 10] [--first 0] [--solver NAME] … [--limit S] [kind:n:m …]
    python -m benchmarks.experiments.coupled --projection [--num 1000]
    python -m benchmarks.experiments.coupled --gradients [--num 200]

The first solves each instance (all 60, or those of the sizes given) with each solver's defaults and `seeds` keys from
`first` on, at most S seconds a run (240), and prints for each run F*, F, the gap, the violation, the status and the
steps. A run is right where |F - F*| <= 1e-3 (1 + |F*|) with a gap and a violation of at most 1e-3 and 1e-6. Where a
run is CONVERGED and not right, F's least value within 1e-3 of x says whether it is at a local minimum: it is "local"
where F is lower there by at most 1e-5 (1 + |F|), and "astray" where it is not. A solver's last line counts.

The second moves 64 points into each of `num` drawn polytopes of dimension 1 to 10 (whole-number rows, rows of lengths
from 1e-3 to 1e3, nearly parallel ones, corners) and prints the largest violation, relative to a row's length and |b|,
in float64 and in float32, and how many points say themselves that they are not exact.

The third compares the gradient of the penalised objective, eight samples in Y(x) and their motion, with central
differences on `num` drawn problems of sums of waves in two and one to four unknowns, below a box, two inequalities and,
every second time, an equality, and prints the largest error relative to 1 plus the largest difference, how many are
above 1e-5, and in how many problems inequalities hold samples.
"""

import argparse
import collections
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel.constraints import Rows, project_on
from bilevel.sampled import Blocks
from bilevel.sampled.feasible import restore_all
from bilevel.sampled.penalised import Form, Penalised
from bilevel.sampled.renewal import Samples
from problems import coupled

POINTS, PARALLEL = 64, 1e-7
NEAR = 1e-3  # how far from a wrong answer F is looked at


def verdict(size: tuple[str, int, int], number: int, solution: bilevel.Solution, best: float) -> str:
    """What a run is worth: see the module's docstring."""
    F, gap, violation = (float(solution.record[name][-1]) for name in ("value", "lower_residual", "violation"))
    if abs(F - best) <= 1e-3 * (1 + abs(best)) and gap <= 1e-3 and violation <= 1e-6:
        return "right"
    if solution.status.name != "CONVERGED":
        return "wrong"
    least = coupled.least_near(*size, number, np.asarray(solution.x, float), NEAR)
    return "local" if least is not None and least >= F - NEAR * 1e-2 * (1 + abs(F)) else "astray"


def suite(given: list[str], name: str, seeds: range, limit: float) -> None:
    """Solve and print."""
    solver = getattr(bilevel, name)()
    sizes = [size.split(":") for size in given]
    sizes = [(k, int(n), int(m)) for k, n, m in sizes] or [
        (k, n, m) for k, all_of in coupled.SUITE.items() for n, m in all_of
    ]
    count = collections.Counter[str]()
    for size, number, seed in itertools.product(sizes, range(3), seeds):
        kind, n, m = size
        instance = coupled.make(kind, n, m, number)
        assert instance.truth is not None
        if solver.unsupported(instance.problem) is not None:
            count["refused"] += 1
            continue
        solution = bilevel.solve(instance.problem, solver, key=jax.random.key(seed), time_limit=limit)
        F, gap, violation = (float(solution.record[part][-1]) for part in ("value", "lower_residual", "violation"))
        word, status = verdict(size, number, solution, instance.truth.value), solution.status.name
        count.update(("runs", word, status, f"{word} and {status}"))
        label = f"{name} coupled[kind={kind},dim_x={n},dim_y={m},seed={number}] {seed}"
        known = f"F* {instance.truth.value:.6f} F {F:.6f} gap {gap:.1e} violation {violation:.1e}"
        print(f"{label}: {known} {word} {status} {solution.stats['steps']} steps", flush=True)
    print(name, *(f"{what}: {number};" for what, number in sorted(count.items())), flush=True)


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


def waves(x: Any, y: Any, w: Any) -> Any:
    """A sum of three sines."""
    return jnp.sum(jnp.sin(w[:, :2] @ x + w[:, 2:-1] @ y + w[:, -1]))


@functools.cache
def start(m: int) -> Any:
    """A start, the same function for every problem of a size, so that they share what is compiled."""

    def anywhere(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = jax.random.uniform(key, (2 + m,), float, -1, 1)
        return u[:2], u[2:]

    return anywhere


def half_planes(rng: np.random.Generator, m: int, equality: bool) -> bilevel.LinearCoupling:
    """Rows that some y of |y| <= 0.35 fulfils at every x of [-1, 1]^2."""
    A, B = rng.normal(size=(2, m)), rng.normal(size=(2, 2))
    parts = [A, B, np.abs(B).sum(axis=1) + 0.35 * np.linalg.norm(A, axis=1) + 0.05]
    if equality:
        normal = rng.normal(size=(1, m))
        parts += [normal / np.linalg.norm(normal), rng.uniform(-0.15, 0.15, (1, 2)), rng.uniform(-0.05, 0.05, 1)]
    return bilevel.LinearCoupling(*map(jnp.asarray, parts))


@jax.jit
def slope(problem: Any, x: Any, points: Any, held: Any, rho: Any, t: Any) -> tuple[Any, Any, Any, Any]:
    """(the points moved into Y(x), what holds them, P there, its gradient); held: the rows that they stay on."""
    view = Blocks.of(problem, points[0, 0])
    P = Penalised(view, Form(joint=False, entropic=True, frozen=False), rho, rho * t, chunk=1024)
    points, _, held, lift = restore_all(view, x, points, held)
    f, g = view.values(x, points)
    found = P.at(f, g)
    direction = P.gradient(x, Samples(points, f, g, held), lift[:4], found)
    assert direction.motion is not None
    return points, direction.motion.held, found.value, direction.x


def gradients(num: int) -> None:
    """Draw, differentiate and print."""
    errors, active, h, box = [], 0, 1e-6, bilevel.Box(-1.0, 1.0)
    for k in range(num):
        rng, m, equality = np.random.default_rng(k), 1 + k % 4, k % 8 >= 4 and k % 4 > 0
        f, g = (bilevel.Full(jnp.asarray(w)) for w in rng.uniform(-3, 3, (2, 3, 3 + m)))
        rows = half_planes(rng, m, equality)
        problem = bilevel.BilevelProblem(waves, bilevel.Minimize(waves), box, box, rows, f, g, start(m))
        x, points = rng.uniform(-0.5, 0.5, 2), rng.uniform(-1, 1, (8, 1, m))
        rho, t, free = 10 ** rng.uniform(-1, 1.3), rng.uniform(0.05, 1), jnp.zeros((8, 1, 2 + equality + m))
        points, held, _, gradient = slope(problem, x, points, free, rho, t)
        values = [[float(slope(problem, x + s * h * d, points, held, rho, t)[2]) for s in (1, -1)] for d in np.eye(2)]
        difference = np.subtract(*np.transpose(values)) / (2 * h)
        errors.append(np.abs(np.asarray(gradient) - difference).max() / (1 + np.abs(difference).max()))
        active += bool(np.any(np.asarray(held)[:, 0, :2]))
    above = sum(not error <= 1e-5 for error in errors)
    print(f"gradients: worst {max(errors):.1e}, {above} of {num} above 1e-5; inequalities hold samples in {active}")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("sizes", nargs="*")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--solver", action="append")
    parser.add_argument("--limit", type=float, default=240.0)
    parser.add_argument("--projection", action="store_true")
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--num", type=int)
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if given.projection:
        projection(given.num or 1000)
    elif given.gradients:
        gradients(given.num or 200)
    else:
        for name in given.solver or ["SampledPenalty"]:
            suite(given.sizes, name, range(given.first, given.first + given.seeds), given.limit)


if __name__ == "__main__":
    main()
