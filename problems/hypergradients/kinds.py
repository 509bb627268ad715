"""Draws on polyhedra: plain, weakly active, redundant, contradictory, semidefinite, linear.

Each is made from a solution y, its active rows and multipliers; h is then such that y solves it, but for rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from problems.hypergradients.answers import gradient, minimise, on_face, sides, wrong
from problems.hypergradients.draws import DIM_X, Case, Draw, Family, stationary
from problems.hypergradients.exact import Unsolved, exact
from problems.hypergradients.levels import Level, curved, quadratic
from problems.hypergradients.polyhedra import Data, Limits, Made, box, build, chosen, coupled, in_rows, mixed, simplex

Shape = Callable[..., Made]


def finish(
    draw: Draw, kind: str, made: Made, objective: Callable, H: np.ndarray, near: np.ndarray | None = None
) -> Case:
    """The case of constraints and a Hessian: with h, the exact solution, and the branches that `near` rows make."""
    g, f = draw.lower(H, objective is curved), draw.upper()
    level, pull = Level(g, made.x, objective), made.C.T @ made.lam
    g = stationary(level, g, made.y, pull)
    level, limits = Level(g, made.x, objective), in_rows(made.limits, made.x, draw.n)
    found = minimise(level, limits, [int(a) for a in made.active], exact(made.y))
    data = Data(f, g, made.limits, made.x, draw.start(made.y))
    more = [] if near is None else sides(level, limits, f, found, [int(a) for a in near])
    return draw.case(kind, data, [gradient(level, limits, f, found)], more)


def plain(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """Multipliers and slacks from 1e-3 to 1."""
    return finish(draw, name, shape(draw), objective, draw.hessian())


class Dyadic(Draw):
    """Numbers of few binary digits, so that what is made of them is exact."""

    def __init__(self, draw: Draw) -> None:
        """With the generator and scales of another draw."""
        self.__dict__.update(draw.__dict__)
        self.degenerate = True

    def normal(self, *shape: int) -> np.ndarray:
        """Multiples of 1/4 from -2 to 2, none of them 0."""
        return self.rng.choice([-1, 1], shape) * self.rng.integers(1, 9, shape) / 4

    def size(self, low: float, high: float) -> float:
        """A power of two near one."""
        return float(2.0 ** self.rng.integers(-2, 2))

    def hessian(self, n: int | None = None) -> np.ndarray:
        """M'M + 1."""
        self.condition = 1e2
        M = self.rng.integers(-2, 3, (self.n, self.n)) / 2
        return self.cast((M.T @ M + np.eye(self.n)) * (self.g / self.y**2))


def weak(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """One or two active rows without a multiplier, exactly."""
    draw = Dyadic(draw)
    made = shape(draw)
    equal = np.zeros(len(made.active), bool)
    equal[: {mixed: 2, simplex: 1}.get(shape, 0)] = True
    loose = np.flatnonzero((made.active != 0) & ~equal)
    if not loose.size:
        raise Unsolved("no active row")
    loose = draw.rng.permutation(loose)[: draw.rng.integers(1, 3)]
    near = np.zeros_like(made.active)
    near[loose] = made.active[loose]
    made.lam[loose] = 0
    return finish(draw, f"{name}, weakly active", made, objective, draw.hessian(), near)


def nearly_weak(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """One multiplier from a hundredth to ten thousand units of rounding."""
    draw.degenerate = True
    made = shape(draw)
    equal = {mixed: 2, simplex: 1}.get(shape, 0)
    loose = equal + np.flatnonzero(made.active[equal:] != 0)
    if not loose.size:
        raise Unsolved("no active row")
    row, near = draw.rng.choice(loose), np.zeros_like(made.active)
    near[row] = made.active[row]
    made.lam[row] *= draw.size(1e-2, 1e4) * np.finfo(draw.dtype).eps
    return finish(draw, f"{name}, nearly weak", made, objective, draw.hessian(), near)


def semidefinite(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """H of too small a rank, and as many active rows as make the solution unique; exactly or but for rounding."""
    if draw.rng.integers(0, 2):
        draw = Dyadic(draw)
    draw.condition = min(draw.condition, 1e4)
    n, equal = draw.n, {mixed: 2, simplex: 1}.get(shape, 0)
    rank = draw.rng.integers(1, n - equal) if objective is quadratic else 1
    missing = n - rank - (3 if objective is curved else 0)
    made = shape(draw, max(min(missing - equal + draw.rng.integers(0, 2), n - 1), 0))
    if isinstance(draw, Dyadic):
        M = draw.rng.integers(-2, 3, (rank, n)) / 2
    else:
        M = np.linalg.qr(draw.normal(n, n))[0][:rank] * np.sqrt(np.geomspace(1, 1 / draw.condition, rank))[:, None]
    H = draw.cast(M.T @ M * (draw.g / draw.y**2))
    if not _unique(H.astype(float), made, draw.condition):
        raise Unsolved("many solutions")
    return finish(draw, f"{name}, semidefinite", made, objective, H)


def _unique(H: np.ndarray, made: Made, condition: float) -> bool:
    """Whether H is clearly definite on the active face."""
    C = made.C[made.active != 0]
    _, s, V = np.linalg.svd(C / np.linalg.norm(C, axis=1)[:, None])
    rank = int(np.sum(s > 1e-3))
    if rank < len(C):
        return False
    Z = V[rank:]
    size = np.linalg.norm(H, 2)
    return len(Z) == 0 or bool(np.linalg.eigvalsh(Z @ H @ Z.T)[0] > size / condition / 100)


def linear(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """A linear program with one vertex as its solution."""
    n, equal = draw.n, {mixed: 2, simplex: 1}.get(shape, 0)
    draw.condition = 1.0
    made = shape(draw, n - equal)
    if not _unique(np.zeros((n, n)), made, 1.0):
        raise Unsolved("rows that are nearly dependent")
    return finish(draw, f"{name}, linear", made, quadratic, draw.cast(np.zeros((n, n))))


def flat(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """H of rank one, or 0, and fewer active rows than would make the solution unique: no status may be good."""
    draw = Dyadic(draw)
    n, equal = draw.n, {mixed: 2, simplex: 1}.get(shape, 0)
    rank = draw.rng.integers(0, 2)
    made = shape(draw, draw.rng.integers(0, n - rank - equal - 1))
    M = draw.rng.integers(-2, 3, (rank, n)) / 2
    case = finish_unsolved(draw, f"{name}, flat", made, draw.cast(M.T @ M * (draw.g / draw.y**2)))
    return case


def finish_unsolved(draw: Draw, kind: str, made: Made, H: np.ndarray) -> Case:
    """A case for which no number is right."""
    g = draw.lower(H)
    g = stationary(Level(g, made.x, quadratic), g, made.y, made.C.T @ made.lam)
    return draw.case(kind, Data(draw.upper(), g, made.limits, made.x, draw.start(made.y)), [])


def redundant(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """The last row of A is twice the first, which is active: one of them may be left out, and F is smooth."""
    made = shape(draw, draw.rng.integers(1, 4))
    return finish(draw, f"{name}, redundant", _doubled(made, 1.0), objective, draw.hessian())


def _doubled(made: Made, sign: float, gap: float = 0.0) -> Made:
    """With `sign` times twice a first active row of A in place of the last row, its bound lower by `gap`."""
    at, first, size = made.limits, 0, len(made.limits.b)
    offset = len(made.active) - size if at.lo is None else len(made.active) - size - len(at.lo)
    inside = np.flatnonzero(made.active[offset : offset + size - 1])
    if not inside.size:
        raise Unsolved("no active row")
    first = int(inside[0])
    A, B, b, C = (np.array(part) for part in (at.A, at.B, at.b, made.C))
    for part in (A, B, b):
        part[-1] = sign * 2 * part[first]
    b[-1] -= gap
    C[offset + size - 1] = sign * 2 * C[offset + first]
    active, lam = made.active.copy(), made.lam.copy()
    active[offset + size - 1] = lam[offset + size - 1] = 0
    return made._replace(limits=at._replace(A=A, B=B, b=b), C=C, active=active, lam=lam)


def kink(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """Two parallel rows that are active together, exactly, and part when x moves."""
    draw = Dyadic(draw)
    made = _doubled(shape(draw, draw.rng.integers(1, 4)), 1.0)
    at, size = made.limits, len(made.limits.b)
    B, b = np.array(at.B), np.array(at.b)
    first = int(np.flatnonzero(np.all(at.A[:-1] * 2 == at.A[-1], axis=1))[0])
    B[-1] = draw.cast(2 * draw.normal(DIM_X) * draw.y / draw.x * np.max(np.abs(at.A[-1])))
    b[-1] = at.b[-1].astype(float) + (B[-1] - 2 * B[first]).astype(float) @ made.x
    made = made._replace(limits=at._replace(B=B, b=draw.cast(b)))
    H = draw.hessian()
    g, f = draw.lower(H, objective is curved), draw.upper()
    g = stationary(Level(g, made.x, objective), g, made.y, made.C.T @ made.lam)
    level, limits = Level(g, made.x, objective), in_rows(made.limits, made.x, draw.n)
    found = on_face(level, limits, [int(a) for a in made.active], exact(made.y))
    if wrong(limits, found):
        raise Unsolved("rounding")
    offset = len(made.active) - size if at.lo is None else len(made.active) - size - len(at.lo)
    other = list(found.active)
    other[offset + first], other[offset + size - 1] = 0, 1
    second = on_face(level, limits, other, exact(made.y))
    pair = [gradient(level, limits, f, one) for one in (found, second)]
    case = draw.case(f"{name}, kink", Data(f, g, made.limits, made.x, draw.start(made.y)), [], pair)
    return case


def contradiction(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """Two opposite rows with a gap between them of 1e4 units of rounding, or more: no status may be good."""
    made = shape(draw, draw.rng.integers(1, 4))
    at = made.limits
    size = float(np.max(np.abs(at.A).astype(float) @ np.abs(made.y) + np.abs(at.B).astype(float) @ np.abs(made.x)))
    gap = size * 2 * draw.size(1e4 * np.finfo(draw.dtype).eps, 1)
    return finish_unsolved(draw, f"{name}, contradiction", _doubled(made, -1.0, gap), draw.hessian())


def nearly_dependent(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """Two equalities whose normals differ by 1e-8 to 0.1 of their length."""
    draw.degenerate = True
    made = shape(draw)
    A, B, b = (np.array(part) for part in made.limits[:3])
    apart = draw.size(1e-8, 0.1)
    A[1] = A[0] + apart * np.max(np.abs(A[0])) * draw.normal(draw.n)
    b[1] = A[1].astype(float) @ made.y + B[1].astype(float) @ made.x
    C = np.array(made.C)
    C[1] = A[1]
    lam = made.lam.copy()
    lam[1] = lam[0] * draw.normal(1)[0]
    made = made._replace(limits=made.limits._replace(A_eq=A, b_eq=b), C=C, lam=lam)
    return finish(draw, f"{name}, nearly dependent", made, objective, draw.hessian())


def apart(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """Two equalities that meet nowhere in the box, or nowhere at all: no status may be good."""
    made = shape(draw)
    at = made.limits
    A, b = np.array(at.A_eq), np.array(at.b_eq).astype(float)
    bound = np.where(np.isfinite(at.lo) & np.isfinite(at.hi), np.maximum(np.abs(at.lo), np.abs(at.hi)), 10 * draw.y)
    lo, hi = np.maximum(at.lo, -bound), np.minimum(at.hi, bound)
    delta = draw.size(1e-8, 0.1) * draw.rng.integers(0, 2) * np.max(np.abs(A[0])) * draw.normal(draw.n)
    A[1] = A[0] + draw.cast(delta)
    B = np.array(at.B_eq)
    B[1] = B[0]
    size = np.abs(A[0]).astype(float) @ np.abs(made.y) + np.abs(B[0]).astype(float) @ np.abs(made.x)
    reach = np.abs((A[1] - A[0]).astype(float)) @ bound  # the most that the two differ by in the box
    b[1] = b[0] + 2 * reach + size * draw.size(1e4 * np.finfo(draw.dtype).eps, 1)
    limits = at._replace(A_eq=A, B_eq=B, b_eq=draw.cast(b), lo=draw.cast(lo), hi=draw.cast(hi))
    return finish_unsolved(draw, f"{name}, contradiction", made._replace(limits=limits), draw.hessian())


def lasso(draw: Draw, name: str, shape: Shape, objective: Callable) -> Case:
    """|M w - d|^2/2 + penalty |w|_1 as a quadratic in w = u - v with u, v >= 0: H = [[A, -A], [-A, A]]."""
    n = draw.n // 2
    draw.condition = min(draw.condition, 1e6)
    A = draw.hessian(n)
    x, w = draw.point()
    w = w[:n] * chosen(draw, n, None)
    y = draw.cast(np.concatenate([np.maximum(w, 0), np.maximum(-w, 0)]))
    penalty = draw.g / draw.y * draw.size(1e-2, 1)
    s = np.where(w != 0, np.sign(w), draw.rng.uniform(-0.99, 0.99, n))
    lam = -np.where(y > 0, 0, np.concatenate([penalty * (1 - s), penalty * (1 + s)]))
    half = draw.normal(n, DIM_X) * (draw.g / draw.y / draw.x)
    limits = Limits(lo=draw.cast(np.zeros(2 * n)), hi=draw.cast(np.full(2 * n, np.inf)))
    g = draw.lower(np.block([[A, -A], [-A, A]]))._replace(G=draw.cast(np.concatenate([half, -half])))
    f = draw.upper()
    g = stationary(Level(g, x, quadratic), g, y, lam)
    level, exactly = Level(g, x, quadratic), in_rows(limits, x, draw.n)
    found = minimise(level, exactly, [int(a) for a in np.where(y > 0, 0, -1)], exact(y))
    data = Data(f, g, limits, x, draw.start(y))
    return draw.case(f"{name}, lasso", data, [gradient(level, exactly, f, found)])


def _some(name: str, shape: Shape, objective: Callable, kinds: list[tuple[Callable, float]]) -> Callable[[Draw], Case]:
    """One of the kinds, as often as its weight says."""

    def draw(draw: Draw) -> Case:
        weights = np.array([weight for _, weight in kinds])
        kind = kinds[draw.rng.choice(len(kinds), p=weights / weights.sum())][0]
        return kind(draw, name, shape, objective)

    return draw


SMOOTH = [(plain, 5.0), (weak, 1.0), (nearly_weak, 1.0), (semidefinite, 1.0)]
SINGULAR = [(linear, 1.0), (flat, 0.5)]
PARALLEL = [(redundant, 1.0), (kink, 0.5), (contradiction, 0.5)]


def _family(
    name: str, word: str, shape: Shape, objective: Callable, kinds: Any, n: int = 5, lower: Any = None
) -> Family:
    return Family(name, build(objective, lower), n, _some(word, shape, objective, kinds))


def families(projected: Any) -> list[Family]:
    """All of them; `projected` is a `ProjectedNewton()`."""
    make = partial(_family)
    return [
        make("box", "box", box, quadratic, [*SMOOTH, *SINGULAR, (lasso, 1.0)], n=6),
        make("rows", "rows", coupled, quadratic, [*SMOOTH, *SINGULAR, *PARALLEL]),
        make("mixed", "mixed", mixed, quadratic,
             [*SMOOTH, *SINGULAR, *PARALLEL, (nearly_dependent, 1.0), (apart, 0.5)], n=6),
        make("simplex", "simplex", simplex, quadratic, [*SMOOTH, *SINGULAR]),
        make("box-curved", "box, curved", box, curved, SMOOTH),
        make("mixed-curved", "mixed, curved", mixed, curved, SMOOTH, n=6),
        make("box-projected", "box, projected", box, quadratic, [*SMOOTH, *SINGULAR], n=6, lower=projected),
        make("simplex-projected", "simplex, projected", simplex, quadratic, [*SMOOTH, *SINGULAR], lower=projected),
    ]  # fmt: skip
