"""Where `SampledPenalty` ends: followers of 12, 16 and 24 unknowns, on a box and on a polytope that moves with x.

    python -m benchmarks.experiments.dimensions [--dims 12 16 24] [--seeds 3] [--steps 300] [kind …]

With z = Q y, Q orthogonal and drawn, and t = T x, |t_i| <= 0.4, the follower has

    g(x, y) = |z - t|^2/2 + 0.1 sum_{i <= w} (1 - cos 3 pi (z_i - t_i))    over [-1, 1]^m,

whose least value 0 is at z = t, in three wells along each of w coordinates: "few" has w = 1, three minima in all, and
"many" has w = m, 3^m of them. The leader's f = |x - a|^2 - p'y draws y away from there, to the edge of the box; F is
least at a + T'Q p/2. A polytope adds four rows A y + B x <= b, which leave room for the least y at every x.

"linear" and "quadratic" are the drawn convex followers of `problems.coupled`, with two unknowns above.

A run is right where F <= F* + 1e-3 (1 + |F*|) with g within 1e-3 of its least value. Printed for each kind and
dimension: right runs, those CONVERGED among them and among the others, gaps, and milliseconds a step with everything.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from problems import coupled

KINDS = ("box-few", "box-many", "polytope-few", "polytope-many", "linear", "quadratic")
ROWS, DEPTH = 4, 0.1


def upper(x: Any, y: Any, data: Any) -> Any:
    """The leader's objective."""
    return jnp.sum((x - data["a"]) ** 2) - data["p"] @ y


def lower(x: Any, y: Any, data: Any) -> Any:
    """The follower's, g."""
    away = data["Q"] @ y - data["T"] @ x
    return jnp.sum(away**2) / 2 + DEPTH * jnp.sum(data["waves"] * (1 - jnp.cos(3 * jnp.pi * away)))


def start(m: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Anywhere."""
    u = jax.random.uniform(key, (2 + m,), float, -1, 1)
    return u[:2], u[2:]


def wells(kind: str, m: int, seed: int) -> tuple[bilevel.BilevelProblem, float]:
    """(a problem of the first kind, F*)."""
    rng = np.random.default_rng([m, seed])
    Q, _ = np.linalg.qr(rng.normal(size=(m, m)))
    T, a, p = rng.uniform(-0.2, 0.2, (m, 2)), rng.uniform(-0.6, 0.6, 2), rng.normal(size=m)
    p = p / np.linalg.norm(p)
    best = a + T.T @ Q @ p / 2
    value = np.sum((best - a) ** 2) - p @ Q.T @ T @ best
    assert np.abs(best).max() <= 1
    data = {"Q": Q, "T": T, "a": a, "p": p, "waves": (np.arange(m) < (1 if kind.endswith("few") else m)).astype(float)}
    A = rng.normal(size=(ROWS, m))
    reach = np.abs(A @ Q.T @ T).sum(axis=1)  # of A y at z = T x, over x in [-1, 1]^2
    B = 0.1 * reach[:, None] * rng.uniform(-1, 1, (ROWS, 2))
    rows = bilevel.LinearCoupling(A, B, reach + np.abs(B).sum(axis=1))
    full = bilevel.Full(jax.tree.map(jnp.asarray, data))
    problem = bilevel.BilevelProblem(
        upper, bilevel.Minimize(lower), x_set=bilevel.Box(-jnp.ones(2), jnp.ones(2)),
        y_set=bilevel.Box(-jnp.ones(m), jnp.ones(m)), coupling=rows if kind.startswith("polytope") else None,
        upper_data=full, lower_data=full, init=functools.partial(start, m),
    )  # fmt: skip
    return problem, float(value)


def one(kind: str, m: int, seed: int, steps: int) -> tuple[bool, bool, float, float]:
    """(right, CONVERGED, the gap, seconds a step) of one run."""
    if kind in ("linear", "quadratic"):
        instance = coupled.make({"linear": "lp", "quadratic": "qp"}[kind], 2, m, seed)
        assert instance.truth is not None
        problem, best = instance.problem, instance.truth.value
    else:
        problem, best = wells(kind, m, seed)
    solution = bilevel.solve(problem, bilevel.SampledPenalty(), key=jax.random.key(seed), max_steps=steps)
    F, gap = (float(solution.record[name][-1]) for name in ("value", "lower_residual"))
    if kind not in ("linear", "quadratic"):  # the least g is known
        gap = float(lower(solution.x, solution.y, problem.lower_data.full()))
    right = F - best <= 1e-3 * (1 + abs(best)) and gap <= 1e-3
    return right, solution.status.name == "CONVERGED", gap, solution.stats["solve_time"] / solution.stats["steps"]


def main() -> None:
    """Read the arguments, run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--dims", type=int, nargs="+", default=[12, 16, 24])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for kind, m in ((kind, m) for kind in given.kinds for m in given.dims):
        runs = [one(kind, m, seed, given.steps) for seed in range(given.seeds)]
        right = [run[0] for run in runs]
        called = [sum(run[1] for run in runs if run[0] is side) for side in (True, False)]
        gaps = ", ".join(f"{run[2]:.1e}" for run in runs)
        print(
            f"{kind} m {m}: {sum(right)} of {len(runs)} right, CONVERGED {called[0]} of them and {called[1]} others, "
            f"gaps {gaps}, {1e3 * min(run[3] for run in runs):.0f} ms a step",
            flush=True,
        )


if __name__ == "__main__":
    main()
