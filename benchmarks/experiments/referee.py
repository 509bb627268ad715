"""How right the referee by value is, on drawn problems whose truth other programs know.

    python -m benchmarks.experiments.referee [--num N] [check …]

Lower levels over {y in [0, 6]^3 : A y + B x <= b}, three rows, x in R^2. The checks, and what they compare with:

- linear, quadratic: v(x) by `diagnostics.lower_gap` with HiGHS, and of convex quadratic g of any rank with Clarabel.
- nonconvex: v(x) of a sum of waves over two unknowns, with a grid of 400^2 points; what counts is how far above.
- slopes: the rate of descent with max over d of -F'(x; d), at points inside of X = {x >= 0, x_1 + x_2 <= 1} and on its
  edges; below a strongly convex quadratic g, by the branches of `diagnostics.steepest_descent`.
- vertices: the same below a linear g, by quotients of F at 180 directions, from HiGHS.
- curved: the same on a disc that moves and grows with x, where F is known.
- optima: the rate at the global optimum of integer linear problems over both levels, which an enumeration of the lower
  level's dual bases finds, HiGHS each; it should be 0. Some are where Y(x) is about to become empty.

It prints the largest error of each, relative to one plus the true value, and how many are beyond what is allowed.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import diagnostics
from bilevel.diagnostics.gap import measure_global

N, ROWS, TOP = 3, 3, 6.0
TRIANGLE = bilevel.Polyhedron(np.vstack([-np.eye(2), np.ones((1, 2))]), np.array([0.0, 0.0, 1.0]))
Numbers = dict[str, np.ndarray]
measure = jax.jit(measure_global)


def upper(x, y, data):
    """f, a convex quadratic function."""
    far = x - data["middle"]
    return data["cx"] @ x + data["cy"] @ y + y @ (data["Q"] @ y) / 2 + far @ far / 2 * data["q"]


def linear(x, y, data):
    """A linear g."""
    return data["dy"] @ y


def quadratic(x, y, data):
    """A convex quadratic g."""
    return data["dy"] @ y + x @ (data["D"] @ y) + y @ (data["H"] @ y) / 2


def waves(x, y, data):
    """A g with several minima."""
    return jnp.sum(jnp.sin(data["P"] @ y + data["R"] @ x + data["s"])) + y @ (data["H"] @ y) / 20


def start(key):
    """Where runs start."""
    return jnp.zeros(2), jnp.zeros(N)


def start_plane(key):
    """The same for two lower unknowns."""
    return jnp.zeros(2), jnp.zeros(2)


def problem_of(g: Callable, numbers: Numbers, x_set: Any, init: Callable = start) -> bilevel.BilevelProblem:
    """The problem of A, B, b and the objectives' numbers."""
    rows = bilevel.LinearCoupling(*(jnp.asarray(numbers[name]) for name in ("A", "B", "b")))
    data = bilevel.Full({name: jnp.asarray(part) for name, part in numbers.items()})
    return bilevel.BilevelProblem(upper, bilevel.Minimize(g), x_set, bilevel.Box(0.0, TOP), rows, data, data, init)


def draw(seed: int, rank: int | None = None, ridge: float = 0.0) -> tuple[Numbers, np.ndarray]:
    """(numbers of a problem with real coefficients, an x at which Y(x) is not empty); rank and ridge of H."""
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(ROWS, N)), rng.normal(size=(ROWS, 2))
    x = rng.uniform(0, 1, 2)
    x = x / x.sum() if seed % 3 == 1 or x.sum() > 1 else x
    x = x * [0, 1] if seed % 3 == 2 else x
    V = rng.normal(size=(N, N)) * (np.arange(N) < (rng.integers(N + 1) if rank is None else rank))
    numbers = {
        "A": A, "B": B, "b": A @ rng.uniform(0, 3, N) + B @ x + rng.uniform(0, 1, ROWS),
        "H": V @ V.T + ridge * np.eye(N),
        "cx": rng.normal(size=2), "cy": rng.normal(size=N), "dy": 2 * rng.normal(size=N), "D": rng.normal(size=(2, N)),
        "Q": np.eye(N), "q": np.ones(()), "middle": rng.uniform(0, 1, 2),
    }  # fmt: skip
    return numbers, x


def draw_integers(seed: int) -> tuple[Numbers, np.ndarray]:
    """The same with whole numbers, many ties, and all functions linear."""
    rng = np.random.default_rng(seed)
    A, B = rng.integers(-3, 4, (ROWS, N)).astype(float), rng.integers(-2, 3, (ROWS, 2)).astype(float)
    y, x = rng.uniform(0, 3, N), rng.uniform(0, 3, 2)
    b = np.ceil(A @ y + B @ x + rng.uniform(0, 1, ROWS))
    dy, cx = rng.integers(-3, 4, N).astype(float), rng.integers(-5, 6, 2).astype(float)
    zero = {"Q": np.zeros((N, N)), "q": np.zeros(()), "middle": np.zeros(2)}
    return {"A": A, "B": B, "b": b, "dy": dy, "cx": cx, "cy": rng.integers(-5, 6, N).astype(float)} | zero, x


def highs(d: np.ndarray, numbers: Numbers, x: np.ndarray) -> Any:
    """SciPy's HiGHS on min d'y over Y(x)."""
    from scipy.optimize import linprog

    return linprog(
        d, A_ub=numbers["A"], b_ub=numbers["b"] - numbers["B"] @ x, bounds=[(0, TOP)] * len(d), method="highs"
    )


def clarabel(numbers: Numbers, x: np.ndarray) -> float:
    """Clarabel's v(x) of `quadratic`."""
    import cvxpy as cp

    y, d = cp.Variable(N), numbers["dy"] + x @ numbers["D"]
    limits = [numbers["A"] @ y <= numbers["b"] - numbers["B"] @ x, y >= 0, y <= TOP]
    program = cp.Problem(cp.Minimize(d @ y + cp.quad_form(y, cp.psd_wrap(numbers["H"])) / 2), limits)
    program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return float(np.asarray(program.value))


Pairs = Iterator[tuple[float, float]]


def check_linear(num: int) -> Pairs:
    """Pairs (v(x), HiGHS's)."""
    for seed in range(num):
        numbers, x = draw_integers(seed)
        found = diagnostics.lower_gap(problem_of(linear, numbers, bilevel.Box(0.0, 5.0)), jnp.asarray(x), jnp.zeros(N))
        yield float(found.value), float(highs(numbers["dy"], numbers, x).fun)


def check_quadratic(num: int) -> Pairs:
    """Pairs (v(x), Clarabel's)."""
    for seed in range(num):
        numbers, x = draw(seed)
        found = diagnostics.lower_gap(problem_of(quadratic, numbers, TRIANGLE), jnp.asarray(x), jnp.zeros(N))
        yield float(found.value), clarabel(numbers, x)


def check_nonconvex(num: int, points: int = 400) -> Pairs:
    """Pairs (by how much it is above the grid, 0)."""
    grid = np.stack(np.meshgrid(*2 * [np.linspace(0, TOP, points)]), axis=-1).reshape(-1, 2)
    on_grid = jax.jit(jax.vmap(waves, in_axes=(None, 0, None)))
    for seed in range(num):
        numbers, x = draw(seed)
        rng = np.random.default_rng(seed)
        plane = {name: numbers[name] for name in ("cx", "q", "middle")} | {"A": numbers["A"][:, :2], "B": numbers["B"]}
        plane |= {"P": rng.normal(size=(3, 2)) * 2, "R": rng.normal(size=(3, 2)), "s": rng.uniform(0, 6, 3)}
        plane |= {"H": np.diag(rng.normal(size=2)), "cy": numbers["cy"][:2], "Q": np.eye(2)}
        plane["b"] = plane["A"] @ rng.uniform(1, 5, 2) + plane["B"] @ x + rng.uniform(0, 1, ROWS)
        problem = problem_of(waves, plane, TRIANGLE, start_plane)
        values = np.asarray(on_grid(jnp.asarray(x), jnp.asarray(grid), problem.lower_data.full()))
        inside = (grid @ plane["A"].T + plane["B"] @ x <= plane["b"]).all(axis=1)
        found = diagnostics.lower_gap(problem, jnp.asarray(x), jnp.zeros(2))
        yield max(float(found.value) - values[inside].min(initial=np.inf), 0.0), 0.0


def check_slopes(num: int) -> Pairs:
    """Pairs (rate, that by branches)."""
    for seed in range(num):
        numbers, x = draw(seed, rank=N, ridge=0.3)
        problem, x, y = problem_of(quadratic, numbers, TRIANGLE), jnp.asarray(x), jnp.zeros(N)
        yield float(measure(problem, x, y).hypergradient), diagnostics.steepest_descent(problem, x, y).descent


def inside(x: np.ndarray) -> bool:
    """Whether x is in the triangle, up to rounding."""
    return bool(x.min() >= -1e-15 and x.sum() <= 1 + 1e-15)


def check_vertices(num: int, length: float = 1e-6) -> Pairs:
    """Pairs (rate, that by quotients)."""
    angles = np.append(np.linspace(0, 2 * np.pi, 180, endpoint=False), np.pi * np.array([0.75, 1.75]))
    ways = length * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for seed in range(num):
        numbers, x = draw(seed)

        def F(x: np.ndarray, numbers: Numbers = numbers) -> float:
            found = highs(numbers["dy"], numbers, x)
            return float(upper(x, found.x, numbers)) if found.status == 0 else np.inf

        true = max([0.0, *((F(x) - F(x + d)) / length for d in ways if inside(x + d))])
        problem = problem_of(linear, numbers, TRIANGLE)
        yield float(measure(problem, jnp.asarray(x), jnp.zeros(N)).hypergradient), true


def optimum(numbers: Numbers) -> tuple[float, np.ndarray, np.ndarray]:
    """(F, x, y) at the optimum over x in [0, 5]^2 of what `draw_integers` makes: of the least over all dual bases."""
    from scipy.optimize import linprog

    C = np.vstack([numbers["A"], np.eye(N), -np.eye(N)])
    joint = np.hstack([np.vstack([numbers["B"], np.zeros((2 * N, 2))]), C])
    bound = np.concatenate([numbers["b"], np.full(N, TOP), np.zeros(N)])
    best = np.inf, np.zeros(2), np.zeros(N)
    for rows in itertools.combinations(range(len(C)), N):
        if abs(np.linalg.det(C[list(rows)])) < 1e-9:
            continue
        multipliers = np.linalg.solve(C[list(rows)].T, -numbers["dy"])
        held = [row for row, size in zip(rows, multipliers, strict=True) if abs(size) > 1e-9]
        if multipliers.min() < -1e-9:
            continue
        found = linprog(
            np.concatenate([numbers["cx"], numbers["cy"]]), joint, bound, joint[held] if held else None,
            bound[held] if held else None, bounds=[(0, 5)] * 2 + [(None, None)] * N, method="highs",
        )  # fmt: skip
        if found.status == 0 and found.fun < best[0] - 1e-9:
            best = float(found.fun), found.x[:2], found.x[2:]
    return best


def move_disc(x, y):
    """|y - M x| <= 1 + x_1/4."""
    middle = jnp.stack([x[0] - 0.3 * x[1], 0.5 * x[1]])
    return jnp.stack([jnp.sum((y - middle) ** 2) - (1 + x[0] / 4) ** 2])


def check_curved(num: int) -> Pairs:
    """Pairs (rate, |Proj(-grad F)|) below a linear g on a disc that moves and grows with x, where y(x) is known."""
    M, e = np.array([[1.0, -0.3], [0.0, 0.5]]), np.ones(2) / 2**0.5
    for seed in range(num):
        rng = np.random.default_rng(seed)
        (c, d_f, d_g), x, on_edge = rng.normal(size=(3, 2)), rng.uniform(0, 1, 2), seed % 2 == 1
        x = x / x.sum() if on_edge else 0.4 * x
        data = {"cx": c, "cy": d_f, "dy": d_g, "Q": np.zeros((2, 2)), "q": np.zeros(()), "middle": np.zeros(2)}
        source = bilevel.Full({name: jnp.asarray(part) for name, part in data.items()})
        problem = bilevel.BilevelProblem(
            upper, bilevel.Minimize(linear), TRIANGLE, bilevel.Box(-4.0, 4.0), bilevel.SmoothCoupling(move_disc),
            source, source, start_plane,
        )  # fmt: skip
        unit = d_g / np.linalg.norm(d_g)
        down = -c - M.T @ d_f + np.array([d_f @ unit / 4, 0.0])
        down = down - (down @ e) * e if on_edge and down @ e > 0 else down
        found = measure(problem, jnp.asarray(x), jnp.asarray(M @ x - (1 + x[0] / 4) * unit))
        yield float(found.hypergradient + found.lower_residual + found.lower_distance), float(np.linalg.norm(down))


def check_optima(num: int) -> Pairs:
    """Pairs (rate, or how much F or the lower residual are off, 0)."""
    for seed in range(num):
        numbers, _ = draw_integers(seed)
        F, x, y = optimum(numbers)
        problem = problem_of(linear, numbers, bilevel.Box(0.0, 5.0))
        found = measure(problem, jnp.asarray(x), jnp.asarray(y))
        yield float(max(found.hypergradient, abs(found.value - F), found.lower_residual, found.lower_distance)), 0.0


CHECKS: dict[str, tuple[Callable[[int], Pairs], float]] = {  # the largest error allowed, relative to 1 + |true|
    "linear": (check_linear, 1e-7),
    "quadratic": (check_quadratic, 1e-7),
    "nonconvex": (check_nonconvex, 1e-4),
    "slopes": (check_slopes, 1e-3),
    "vertices": (check_vertices, 1e-3),
    "curved": (check_curved, 1e-3),
    "optima": (check_optima, 1e-4),
}


def errors(name: str, num: int) -> np.ndarray:
    """The relative errors of a check on `num` draws."""
    found, true = np.array(list(CHECKS[name][0](num)), float).T
    return np.abs(found - true) / (1 + np.abs(true))


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)}; default all")
    parser.add_argument("--num", type=int, default=100, help="draws of each")
    chosen = parser.parse_args(arguments)
    for name in chosen.checks or CHECKS:
        off = errors(name, chosen.num)
        off = np.where(np.isnan(off), np.inf, off)
        print(f"{name:10s} {len(off)} draws, largest error {off.max():.1e}, beyond {CHECKS[name][1]:.0e}: "
              f"{(off > CHECKS[name][1]).sum()} {np.flatnonzero(off > CHECKS[name][1])[:10]}", flush=True)  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
