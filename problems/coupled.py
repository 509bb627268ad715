"""Followers whose set Y(x) moves with the leader: drawn instances of LP, convex and non-convex followers, optima known.

    min c'x + e'y  over x in [0, 5]^dim_x,  y in argmin { g(x, y) : A y + B x <= b, 0 <= y <= 6 },

dim_x and dim_y small, with small whole numbers in A, B, c, e and

    lp:      g = d'y,
    qp:      g = y'H y/2 - (G x + d)'y,    H diagonal and positive,
    concave: g = -|y - G x - d|^2/2: minimisers are vertices of Y(x), and jump from one to another as x moves.

So F is discontinuous in places, lower minimisers are on rows that move with x, and of the seeds 2, 5, 8, … the
optimum is where Y(x) is about to become empty ("edge"): its least inner radius is 0 there, and beyond there is none.

The value is optimistic: where there are several minimisers it is that of the best of them for f. It is computed with
the instance: of lp and qp as a mixed-integer program, lower-level optimality conditions with a binary number for each
complementary pair, by HiGHS, and once more on the active set that it found, as an LP; the two must agree. Of concave
followers by looking at all vertices of Y(x) for x on a grid (1 or 2 unknowns), refined around the best points.

    make(kind="lp", dim_x=2, dim_y=3, seed=0)

Settings that work: `SampledPenalty()`.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import BilevelProblem, Box, Full, LinearCoupling, Minimize
from bilevel.diagnostics import BY_VALUE
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

PyTree = Any
KINDS = "lp", "qp", "concave"
TOP_X, TOP_Y, BIG = 5.0, 6.0, 1e3  # ends of the boxes; beyond every multiplier
SUITE = {  # the sizes of the suite `coupled`, three seeds each: 60 instances
    "lp": ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (5, 6)),
    "qp": ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (5, 6)),
    "concave": ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)),
}


class Data(NamedTuple):
    """The numbers of an instance, as in the module's docstring; H is its diagonal. Zeros where a kind has none."""

    c: np.ndarray
    e: np.ndarray
    A: np.ndarray
    B: np.ndarray
    b: np.ndarray
    d: np.ndarray
    H: np.ndarray
    G: np.ndarray


def upper(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """The leader's c'x + e'y."""
    return batch["c"] @ x + batch["e"] @ y


def lower_lp(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """The follower's d'y."""
    return batch["d"] @ y


def lower_qp(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """The follower's y'H y/2 - (G x + d)'y."""
    return y @ (batch["H"] * y) / 2 - (batch["G"] @ x + batch["d"]) @ y


def lower_concave(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """The follower's -|y - G x - d|^2/2."""
    return -jnp.sum((y - batch["G"] @ x - batch["d"]) ** 2) / 2


LOWER = {"lp": lower_lp, "qp": lower_qp, "concave": lower_concave}


@functools.cache
def _init(dim_x: int, dim_y: int) -> Any:
    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = jax.random.uniform(key, (dim_x + dim_y,))
        return TOP_X * u[:dim_x], TOP_Y * u[dim_x:]

    return init


def make(kind: str = "lp", dim_x: int = 2, dim_y: int = 3, seed: int = 0) -> Instance:
    """The instance of a kind and size with a number; an optimum on an edge of the domain where seed % 3 == 2.

    Args:
        kind: "lp", "qp" or "concave".
        dim_x: unknowns of the leader, >= 1; 1 or 2 for "concave".
        dim_y: unknowns of the follower, >= 1; at most 3 for "concave".
        seed: >= 0.

    Raises:
        InvalidInput: another kind, or numbers out of range.
    """
    if kind not in KINDS:
        invalid("kind (coupled)", repr(kind), " or ".join(KINDS), "Choose one.")
    if dim_x < 1 or dim_y < 1 or (kind == "concave" and (dim_x > 2 or dim_y > 3)):
        do = "The optimum of a concave follower is found on a grid of x and among vertices."
        invalid("dim_x, dim_y (coupled)", (dim_x, dim_y), ">= 1, and at most (2, 3) for concave", do)
    data, value, *_ = _drawn(kind, dim_x, dim_y, seed)
    batch = {name: floats(getattr(data, name)) for name in ("c", "e", "d", "H", "G")}
    problem = BilevelProblem(
        upper,
        Minimize(LOWER[kind]),
        x_set=Box(floats(np.zeros(dim_x)), floats(np.full(dim_x, TOP_X))),
        y_set=Box(floats(np.zeros(dim_y)), floats(np.full(dim_y, TOP_Y))),
        coupling=LinearCoupling(*map(floats, (data.A, data.B, data.b))),
        upper_data=Full(batch),
        lower_data=Full(batch),
        init=_init(dim_x, dim_y),
    )
    tags = {"known-optimum", "coupled", f"{kind}-follower"} | ({"edge"} if seed % 3 == 2 else set())
    tags |= {"nonconvex-lower"} if kind == "concave" else set()
    return Instance(problem, Truth(value), tags=frozenset(tags), referee=BY_VALUE)


@functools.cache
def _drawn(kind: str, dim_x: int, dim_y: int, seed: int) -> tuple[Data, float, np.ndarray, np.ndarray]:
    """(data, F*, x*, y*): the first draw whose optimum is on an edge of the domain, or is not, as the seed asks."""
    solve = _by_vertices if kind == "concave" else _by_conditions
    for k in range(500):
        data = _draw(kind, dim_x, dim_y, np.random.default_rng([KINDS.index(kind), dim_x, dim_y, seed, k]))
        found = solve(kind, data)
        if found is None:
            continue
        value, x, y = found
        on_edge = inner_radius(data, x) <= 1e-7
        if on_edge == (seed % 3 == 2):
            return data, value, x, y
    raise AssertionError("500 draws without an optimum of this kind")  # pragma: no cover


def least_near(kind: str, dim_x: int, dim_y: int, seed: int, x: np.ndarray, radius: float) -> float | None:
    """The least F at points of X of which no coordinate is farther from x than a radius, by the searches that find F*;
    None where there is none. A point is a local minimum where this is not less than its F.
    """
    solve = _by_vertices if kind == "concave" else _by_conditions
    box = np.clip(x - radius, 0, TOP_X), np.clip(x + radius, 0, TOP_X)
    found = solve(kind, _drawn(kind, dim_x, dim_y, seed)[0], box)
    return None if found is None else found[0]


def _draw(kind: str, n: int, m: int, rng: np.random.Generator) -> Data:
    """Numbers with a point (x0, y0) that the rows leave room for."""
    rows = max(2, min(m, 4))
    A, B = rng.integers(-3, 4, (rows, m)).astype(float), rng.integers(-2, 3, (rows, n)).astype(float)
    x0, y0 = rng.uniform(0, 4, n), rng.uniform(0, 4, m)
    b = np.ceil(A @ y0 + B @ x0 + rng.uniform(0, 1, rows))
    c, e = rng.integers(-5, 6, n).astype(float), rng.integers(-5, 6, m).astype(float)
    H, G, d = np.zeros(m), np.zeros((m, n)), rng.integers(-3, 4, m).astype(float)
    if kind == "lp":
        d = np.where(d == 0, 1.0, d)
    if kind == "qp":
        H, G, d = rng.integers(1, 4, m).astype(float), rng.integers(-2, 3, (m, n)).astype(float), 2 * d
    if kind == "concave":
        G, d = rng.uniform(-0.5, 0.5, (m, n)), rng.uniform(1, 5, m)
    return Data(c, e, A, B, b, d, H, G)


def inner_radius(data: Data, x: np.ndarray) -> float:
    """The radius of the largest ball in Y(x), by an LP; negative where Y(x) is empty."""
    from scipy.optimize import linprog

    m = len(data.e)
    A = np.concatenate([data.A, np.eye(m), -np.eye(m)])
    hi = np.concatenate([data.b - data.B @ x, np.full(m, TOP_Y), np.zeros(m)])
    rows = np.column_stack([A, np.maximum(np.linalg.norm(A, axis=1), 1e-12)])
    found = linprog(np.append(np.zeros(m), -1.0), A_ub=rows, b_ub=hi, bounds=[(None, None)] * (m + 1))
    return float(-found.fun)


def _by_conditions(
    kind: str, data: Data, box: tuple[Any, Any] = (0.0, TOP_X)
) -> tuple[float, np.ndarray, np.ndarray] | None:
    """(F*, x*, y*) over the points that fulfil the lower level's optimality conditions, with x in a box; None where
    there is none.
    """
    import scipy.optimize

    scipy_optimize: Any = scipy.optimize  # its stubs know numbers alone where it takes arrays
    constraint = scipy_optimize.LinearConstraint
    n, m, rows = len(data.c), len(data.e), len(data.b)
    C = np.concatenate([data.A, np.eye(m), -np.eye(m)])  # C y + D x <= h
    D = np.concatenate([data.B, np.zeros((2 * m, n))])
    h = np.concatenate([data.b, np.full(m, TOP_Y), np.zeros(m)])
    k = rows + 2 * m
    gradient = np.concatenate([-data.G, np.diag(data.H), C.T, np.zeros((m, k))], axis=1)
    target = -data.d if kind == "lp" else data.d
    # where z_i = 1 row i holds with equality, and else its multiplier is 0
    room = TOP_X * np.abs(D).sum(axis=1) + TOP_Y * np.abs(C).sum(axis=1) + np.abs(h)
    slack = np.concatenate([-D, -C, np.zeros((k, k)), np.diag(room)], axis=1)
    small = np.concatenate([np.zeros((k, n + m)), np.eye(k), -BIG * np.eye(k)], axis=1)
    inside = np.concatenate([D, C, np.zeros((k, 2 * k))], axis=1)
    f = np.concatenate([data.c, data.e, np.zeros(2 * k)])
    lo = np.concatenate([np.broadcast_to(box[0], n), np.zeros(m + 2 * k)])
    hi = np.concatenate([np.broadcast_to(box[1], n), np.full(m, TOP_Y), np.full(k, BIG), np.ones(k)])
    found = scipy_optimize.milp(
        f,
        constraints=[
            constraint(gradient, target, target),
            constraint(slack, -np.inf, room - h),
            constraint(small, -np.inf, 0),
            constraint(inside, -np.inf, h),
        ],
        integrality=np.arange(len(f)) >= n + m + k,
        bounds=scipy_optimize.Bounds(lo, hi),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    on = np.round(found.x[n + m + k :]) == 1
    ends = np.column_stack([lo, hi])[: n + m + k]
    ends[n + m :][~on] = 0
    equal = np.concatenate([gradient, inside[on]])[:, : n + m + k]
    exact = scipy_optimize.linprog(
        f[: n + m + k], A_ub=inside[:, : n + m + k], b_ub=h, A_eq=equal, b_eq=np.append(target, h[on]), bounds=ends
    )
    if exact.x is None or abs(exact.fun - found.fun) > 1e-5 * (1 + abs(exact.fun)) or exact.x[n + m :].max() > BIG / 10:
        return None
    return float(exact.fun), exact.x[:n], exact.x[n : n + m]


class _Vertices(NamedTuple):
    """Candidates of vertices of Y(x), affine in x: y = P x + q, shapes [K, m, n] and [K, m]."""

    P: np.ndarray
    q: np.ndarray


def _by_vertices(
    kind: str, data: Data, box: tuple[Any, Any] = (0.0, TOP_X)
) -> tuple[float, np.ndarray, np.ndarray] | None:
    """(F*, x*, y*) by the vertices of Y(x), for x on a grid over a box that is refined around the best points."""
    n = len(data.c)
    vertices = _vertices(data)
    lo, hi = (np.broadcast_to(np.asarray(end, float), n) for end in box)
    count, width = 4001 if n == 1 else 201, hi - lo
    centers, best = [(lo + hi) / 2], (np.inf, np.zeros(n), np.zeros(len(data.e)))
    for k in range(7 if n == 1 else 12):
        looks = []
        for center in centers:
            ends = np.clip(center - width / 2, lo, hi), np.clip(center + width / 2, lo, hi)
            axes = np.linspace(*ends, count, axis=1)
            grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, n)
            values, ys = _optimistic(data, vertices, grid)
            order = np.argsort(values)[: 4 * 40 : 40] if k == 0 else np.argsort(values)[:1]
            looks += [(values[i], grid[i], ys[i]) for i in order if np.isfinite(values[i])]
        if not looks:
            return None
        looks.sort(key=lambda look: look[0])
        best = looks[0] if looks[0][0] < best[0] else best
        centers = [look[1] for look in looks[:4]]
        width, count = width / 20, 401 if n == 1 else 61
    return float(best[0]), best[1], best[2]


def _vertices(data: Data) -> _Vertices:
    m, n = len(data.e), len(data.c)
    C = np.concatenate([data.A, np.eye(m), np.eye(m)])
    D, h = np.concatenate([data.B, np.zeros((2 * m, n))]), np.concatenate([data.b, np.full(m, TOP_Y), np.zeros(m)])
    P, q = [], []
    for chosen in itertools.combinations(range(len(C)), m):
        rows = list(chosen)
        if abs(np.linalg.det(C[rows])) > 1e-9:
            inverse = np.linalg.inv(C[rows])
            P.append(-inverse @ D[rows])
            q.append(inverse @ h[rows])
    return _Vertices(np.stack(P), np.stack(q))


def _optimistic(data: Data, vertices: _Vertices, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F at the points [K, n] of a grid, infinite where Y(x) is empty; y there [K, m])."""
    values, points = np.full(len(grid), np.inf), np.zeros((len(grid), len(data.e)))
    least = np.full(len(grid), np.inf)
    middle, bound = grid @ data.G.T + data.d, data.b - grid @ data.B.T
    for P, q in zip(vertices.P, vertices.q, strict=True):
        y = grid @ P.T + q
        inside = (y @ data.A.T <= bound + 1e-9).all(axis=1)
        inside &= ((y >= -1e-9) & (y <= TOP_Y + 1e-9)).all(axis=1)
        g = np.where(inside, -((y - middle) ** 2).sum(axis=1) / 2, np.inf)
        f = grid @ data.c + y @ data.e
        better = (g < least - 1e-9) | ((g < least + 1e-9) & (f < values))
        values, points = np.where(better, f, values), np.where(better[:, None], y, points)
        least = np.minimum(least, g)
    return values, points
