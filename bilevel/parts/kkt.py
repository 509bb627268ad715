"""A bilevel problem with a convex quadratic follower as one program with complementary pairs, by the follower's KKT
conditions.

    min f(x, y)  with  x in X,  G(x, y) <= 0,  H(x, y) = 0,
                       g_y(x, y) + C'lam + C_eq'mu = 0,  C y + B x + s = h,  C_eq y + B_eq x = h_eq,  lam_i s_i = 0,

lam, s >= 0. g_y and all constraints are affine in (x, y), g(x, .) is convex, f convex quadratic or affine: then these
conditions say exactly that y is a minimiser of g(x, .) on Y(x), and where it has several the leader chooses.

`numbers` reads the problem's functions under JAX; what follows is NumPy on the host.
"""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import constraints
from bilevel.backend.extras import missing
from bilevel.oracles import polynomial
from bilevel.problem import BilevelProblem
from bilevel.qp.branching import Search
from bilevel.qp.programs import Program, relax

PyTree = Any
GAP = 1e-8  # relative to 1 + |F|: where a search stops
FLAT = 1e-9  # of the largest eigenvalue: below minus that a Hessian is indefinite
FINEST = 1e-11  # what an absolute gap may be at least, in units in which f's largest coefficient is 1
BALANCING = 12  # sweeps
KEPT = 8  # searches that are remembered
KINDS = (  # what is asked of the fields of `polynomial.Model`
    "f quadratic",
    "f quadratic",
    "g(x, .) quadratic, with a gradient in y that is affine in (x, y)",
    "upper_constraints.inequality affine in (x, y)",
    "upper_constraints.equality affine in (x, y)",
    "SmoothCoupling.h affine in (x, y)",
    "SmoothCoupling.equality affine in (x, y)",
)


class Numbers(NamedTuple):
    """What is known of a problem's functions and sets, arrays of JAX or NumPy."""

    model: polynomial.Model
    lower: tuple[Array, Array, Array, Array]
    """C, lo, hi, B of lo <= C y + B x <= hi: the coupling's rows and those of Y."""
    upper: tuple[Array, Array, Array]
    """C, lo, hi of lo <= C x <= hi: the rows of X."""


class Sizes(NamedTuple):
    """How z = (x, y, s, lam, mu) is laid out: n, m, k, k and q unknowns."""

    n: int
    m: int
    k: int
    q: int


class Conditions(NamedTuple):
    """The program, and how its point is read."""

    program: Program
    sizes: Sizes
    constant: float
    """What f has beside the program's objective."""
    scale: float
    """Of the objective: F is `scale` times the program's value, plus `constant`."""
    widths: np.ndarray
    """Of the unknowns: z is `widths` times the program's point."""
    row: np.ndarray
    """[k], the two-sided row of the follower that each pair belongs to; those of a smooth coupling come last."""
    weight: np.ndarray
    """[k], what makes lam that row's multiplier: positive at its upper end, negative at its lower one."""
    row_eq: np.ndarray
    """[q], the same of mu."""
    weight_eq: np.ndarray
    num_rows: int
    follower: Program
    """The follower's own, in y, at x = 0; `answer` moves it."""
    P: np.ndarray
    """[m, n], g_yx in the follower's units."""
    B: np.ndarray
    """[k, n], of its inequalities."""
    B_eq: np.ndarray
    """[q, n]."""


def numbers(problem: BilevelProblem, x: PyTree, y: PyTree) -> Numbers:
    """Read the problem at (x, y). Pure; for a polyhedral X and Y and Minimize(g)."""
    flat = ravel_pytree(x)[0]
    found = constraints.rows(problem, jax.tree.map(jnp.zeros_like, x), y)
    blocks = problem.x_set.rows(x)
    none = jnp.zeros((0, flat.size), flat.dtype), jnp.zeros(0, flat.dtype), jnp.zeros(0, flat.dtype)
    C, lo, hi = (jnp.concatenate([a, *more]) for a, *more in zip(none, *blocks, strict=True))
    return Numbers(polynomial.model(problem, x, y), (found.C, found.lo, found.hi, found.B), (C, lo, hi))


def reason(found: Numbers, deviations: np.ndarray) -> str | None:
    """Why the problem is not of the kind that is written here as a program, or None; deviations: those of
    `polynomial.deviations`.
    """
    model, eps = found.model, float(np.finfo(np.asarray(found.model.value).dtype).eps)
    most = 100 * eps**0.75  # rounding of the user's functions stays below, curvature and kinks do not
    for what, size in zip(KINDS, np.asarray(deviations, float), strict=True):
        if not size <= most:
            return f"needs {what}, beside Minimize(g); got a deviation of {size:.1e} from that"
    n = np.asarray(found.upper[0]).shape[1]
    least, largest = _extremes(np.asarray(model.residual.J, float)[:, n:])
    if least < -max(FLAT, 10 * eps) * largest:
        return f"needs a convex g(x, .) of Minimize(g); got g_yy with an eigenvalue of {least:.3g}"
    if conditions(found) is None:
        least = _extremes(np.asarray(model.slope.J, float))[0]
        return f"needs an f convex in (x, y) above Minimize(g); got its Hessian with an eigenvalue of {least:.3g}"
    return None


def lacks(found: Numbers) -> str | None:
    """What is not installed that the problem needs, or None."""
    n = np.asarray(found.upper[0]).shape[1]
    if np.asarray(found.model.residual.J)[:, n:].any() or np.asarray(found.model.slope.J).any():
        try:
            import clarabel  # noqa: F401
        except ModuleNotFoundError as error:
            return f"needs Clarabel, for quadratic programs; got none: {missing(error, 'reference')}"
    return None


def _extremes(H: np.ndarray) -> tuple[float, float]:
    """The least and the largest absolute eigenvalue of a symmetric matrix."""
    if not H.size:
        return 0.0, 1.0
    eigenvalues = np.linalg.eigvalsh((H + H.T) / 2)
    return float(eigenvalues[0]), float(np.abs(eigenvalues).max())


class _Rows(NamedTuple):
    """Rows C y + B x <= h (or = h) with the number and the weight of the two-sided row that each comes from."""

    C: np.ndarray
    B: np.ndarray
    h: np.ndarray
    row: np.ndarray
    weight: np.ndarray

    def of(self, chosen: np.ndarray) -> "_Rows":
        """Some of them."""
        return _Rows(*(part[chosen] for part in self))


def _follower_rows(found: Numbers) -> tuple[_Rows, _Rows]:
    """(inequalities, equalities) of the follower, each with a largest entry of 1."""
    C, lo, hi, B = (np.asarray(part, float) for part in found.lower)
    n = B.shape[1]
    for part, equal in ((found.model.h, False), (found.model.h_eq, True)):
        J, c = np.asarray(part.J, float), np.asarray(part.c, float)
        C, B = np.concatenate([C, J[:, n:]]), np.concatenate([B, J[:, :n]])
        lo, hi = np.append(lo, -c if equal else np.full(len(c), -np.inf)), np.append(hi, -c)
    size = np.abs(np.concatenate([C, B], axis=1)).max(axis=1, initial=0)
    size = np.where(size > 0, size, 1)
    C, B, lo, hi, number = C / size[:, None], B / size[:, None], lo / size, hi / size, np.arange(len(size))
    same, below, above = lo == hi, np.isfinite(lo) & (lo < hi), np.isfinite(hi) & (lo < hi)
    one = _Rows(C, B, hi, number, 1 / size)
    parts = zip(one.of(above), _Rows(-C, -B, -lo, number, -1 / size).of(below), strict=True)
    return _Rows(*(np.concatenate(pair) for pair in parts)), one.of(same)


class _Quadratic(NamedTuple):
    """The follower's gradient P x + Q y + d, in units of its largest number."""

    P: np.ndarray
    Q: np.ndarray
    d: np.ndarray
    unit: float

    @classmethod
    def of(cls, residual: polynomial.Affine, n: int) -> "_Quadratic":
        """The gradient that a model has, with n unknowns of x."""
        J, d = np.asarray(residual.J, float), np.asarray(residual.c, float)
        unit = max(np.abs(J).max(initial=0), np.abs(d).max(initial=0)) or 1.0
        Q = J[:, n:] / unit
        return cls(J[:, :n] / unit, (Q + Q.T) / 2, d / unit, unit)


def conditions(found: Numbers) -> Conditions | None:
    """The program; None where f is not convex on it, also not without its term x'K y (`_objective`)."""
    model = found.model
    rows, equal = _follower_rows(found)
    seen = np.abs(rows.C).max(axis=1, initial=0) > 0
    outside, rows = rows.of(~seen), rows.of(seen)  # those in which there is no y restrict x alone
    sizes = Sizes(rows.B.shape[1], rows.C.shape[1], len(rows.h), len(equal.h))
    n, m, k, q = sizes
    g = _Quadratic.of(model.residual, n)
    E, e = _equations(g, rows, equal)
    more_E, more_e = _scaled(np.asarray(model.H.J, float), -np.asarray(model.H.c, float))
    more_A, more_b = _scaled(np.asarray(model.G.J, float), -np.asarray(model.G.c, float))
    C_x, lo_x, hi_x = (np.asarray(part, float) for part in found.upper)
    lo, hi, A, b = _bounds(C_x, lo_x, hi_x, m)
    A = np.concatenate([A, np.concatenate([outside.B, outside.C], axis=1), more_A])
    rest = 2 * k + q
    wide = lambda M: np.concatenate([M, np.zeros((len(M), rest))], axis=1)  # noqa: E731
    Q, c = _objective(model.slope, g, rows, equal)
    pairs = n + m + np.stack([np.arange(k), k + np.arange(k)], axis=1)
    program, widths, scale = _balanced(Program(
        Q, c, 0.0, np.concatenate([E, wide(more_E)]), np.append(e, more_e),
        wide(A), np.concatenate([b, outside.h, more_b]), np.concatenate([lo, np.zeros(2 * k), np.full(q, -np.inf)]),
        np.append(hi, np.full(rest, np.inf)), pairs,
    ))  # fmt: skip
    program = _convex(program)
    if program is None:
        return None
    free = np.full(m, np.inf)
    follower = Program(g.Q, g.d, 0.0, equal.C, equal.h, rows.C, rows.h, -free, free, pairs[:0])
    num_rows = len(np.asarray(found.lower[1])) + len(model.h.c) + len(model.h_eq.c)
    return Conditions(program, sizes, float(model.value), scale, widths, rows.row, g.unit * rows.weight, equal.row,
                      g.unit * equal.weight, num_rows, follower, g.P, rows.B, equal.B)  # fmt: skip


def _objective(slope: polynomial.Affine, g: _Quadratic, rows: _Rows, equal: _Rows) -> tuple[np.ndarray, np.ndarray]:
    """(Q, c) of the objective in (x, y, s, lam, mu), without f's term x'K y where g has the same but for a factor.

    Where the follower's rows do not move with x, complementarity makes of the stationary g, times y,

        y'P x + y'Q y + d'y + lam'h + mu'h_eq = 0,

    f plus any multiple of that is f at all points that count: a seller's revenue x'y, which the buyer pays, is
    linear in the multipliers.
    """
    m, (k, n), q = len(g.d), rows.B.shape, len(equal.h)
    Q, c = np.zeros((n + m + 2 * k + q,) * 2), np.zeros(n + m + 2 * k + q)
    Q[: n + m, : n + m], c[: n + m] = np.asarray(slope.J, float), np.asarray(slope.c, float)
    K, size = Q[:n, n : n + m].copy(), float((g.P**2).sum())
    if rows.B.any() or equal.B.any() or not size or not K.any():
        return Q, c
    factor = -float((K * g.P.T).sum()) / size
    rest = K + factor * g.P.T
    rest[np.abs(rest) <= 100 * np.finfo(np.asarray(slope.J).dtype).eps * np.abs(K).max()] = 0
    Q[:n, n : n + m], Q[n : n + m, :n] = rest, rest.T
    Q[n : n + m, n : n + m] += 2 * factor * g.Q
    c[n : n + m] += factor * g.d
    c[n + m + k :] += factor * np.concatenate([rows.h, equal.h])
    return Q, c


def _equations(g: _Quadratic, rows: _Rows, equal: _Rows) -> tuple[np.ndarray, np.ndarray]:
    """(E, e) of E z = e: g's gradient with the multipliers, the rows with their slacks, the follower's equalities."""
    m, k, q = len(g.d), len(rows.h), len(equal.h)
    zero = np.zeros
    blocks = [
        [g.P, g.Q, zero((m, k)), rows.C.T, equal.C.T],
        [rows.B, rows.C, np.eye(k), zero((k, k)), zero((k, q))],
        [equal.B, equal.C, zero((q, k)), zero((q, k)), zero((q, q))],
    ]
    return np.block(blocks), np.concatenate([-g.d, rows.h, equal.h])


def _scaled(J: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows J z <= b with a largest entry of 1 each."""
    size = np.abs(J).max(axis=1, initial=0)
    size = np.where(size > 0, size, 1)
    return J / size[:, None], b / size


def _bounds(C: np.ndarray, lo: np.ndarray, hi: np.ndarray, m: int) -> tuple[np.ndarray, ...]:
    """(lo, hi) of (x, y) and rows A (x, y) <= b, of lo <= C x <= hi: rows of one entry are bounds."""
    n = C.shape[1]
    ends = np.full(n + m, -np.inf), np.full(n + m, np.inf)
    single = (C != 0).sum(axis=1) == 1
    for row, low, high in zip(C[single], lo[single], hi[single], strict=True):
        j = int(np.argmax(row != 0))
        low, high = sorted((low / row[j], high / row[j]))
        ends[0][j], ends[1][j] = max(ends[0][j], low), min(ends[1][j], high)
    C, lo, hi = C[~single], lo[~single], hi[~single]
    parts = [(C[np.isfinite(hi)], hi[np.isfinite(hi)]), (-C[np.isfinite(lo)], -lo[np.isfinite(lo)])]
    A, b = _scaled(np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))
    return *ends, np.concatenate([A, np.zeros((len(A), m))], axis=1), b


def _balanced(program: Program) -> tuple[Program, np.ndarray, float]:
    """(the program in other units, those of its unknowns, that of its objective): the largest entries of all rows and
    columns near 1 (Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices, 2001).
    """
    whole = np.concatenate([program.E, program.A])
    rows, widths = np.ones(len(whole)), np.ones(whole.shape[1])
    for _ in range(BALANCING):
        sizes = np.abs(whole * rows[:, None] * widths)
        for part, axis in ((rows, 1), (widths, 0)):
            largest = sizes.max(axis=axis, initial=0)
            part /= np.sqrt(np.where(largest > 0, largest, 1))
    own, other = rows[: len(program.e)], rows[len(program.e) :]
    Q, c = program.Q * widths * widths[:, None], program.c * widths
    scale = max(np.abs(Q).max(initial=0), np.abs(c).max(initial=0)) or 1.0
    return Program(
        Q / scale, c / scale, program.constant, program.E * own[:, None] * widths, program.e * own,
        program.A * other[:, None] * widths, program.b * other, program.lo / widths, program.hi / widths, program.pairs,
    ), widths, scale  # fmt: skip


def _convex(program: Program) -> Program | None:
    """The same program with a positive semidefinite Q: where Q curves down across the equalities alone, their squares
    are added, which are zero at all points.
    """
    if program.linear:
        return program
    for weight in (0.0, 1.0, 10.0, 100.0, 1000.0):
        Q = program.Q + weight * program.E.T @ program.E
        least, largest = _extremes(Q)
        if least >= -FLAT * largest:
            Q = Q + max(0.0, -least) * np.eye(len(Q)) if weight else Q
            more = weight * program.e
            return program._replace(
                Q=Q, c=program.c - more @ program.E, constant=program.constant + float(more @ program.e) / 2
            )
    return None


def answer(found: Conditions, x: np.ndarray) -> np.ndarray | None:
    """A point of the program near its point x [n], the follower's own program solved there; None where that fails."""
    own, x = found.follower, x * found.widths[: found.sizes.n]
    at = own._replace(c=own.c + found.P @ x, e=own.e - found.B_eq @ x, b=own.b - found.B @ x)
    solved = relax(at, at.hi)
    if solved.word != "solved" or solved.z is None or solved.proof is None:
        return None
    slack = at.b - at.A @ solved.z
    z = np.concatenate([x, solved.z, np.maximum(slack, 0), np.maximum(-solved.proof.lam, 0), -solved.proof.nu])
    return z / found.widths


def point(found: Conditions, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x [n], y [m]) of a point of the program."""
    n, m, *_ = found.sizes
    z = found.widths * z + 0.0  # no -0
    return z[:n], z[n : n + m]


_searches: dict[bytes, tuple[Conditions, Search]] = {}


def searched(found: Numbers, max_nodes: int) -> tuple[Conditions, Search]:
    """The program of a problem and its search after at most so many nodes were split: a function of the arguments. The
    last searches are remembered.
    """
    leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(found)]
    digest = hashlib.sha256(str([(leaf.shape, leaf.dtype.str) for leaf in leaves] + [max_nodes]).encode())
    for leaf in leaves:
        digest.update(leaf.tobytes())
    key = digest.digest()
    if key not in _searches:
        program = conditions(found)
        assert program is not None, "a problem that was not refused"
        allowed = GAP * min(1.0, 1 / program.scale)
        search = Search(program.program, (max(allowed, FINEST), GAP), lambda z: answer(program, z[: program.sizes.n]))
        while len(_searches) >= KEPT:
            _searches.pop(next(iter(_searches)))
        _searches[key] = program, search.run(max_nodes)
    return _searches[key]


def multipliers(found: Conditions, z: np.ndarray) -> np.ndarray:
    """Those of the follower's two-sided rows at z, [rows]: positive at an upper end, negative at a lower one."""
    (n, m, k, _), z = found.sizes, found.widths * z
    values = np.zeros(found.num_rows)
    np.add.at(values, found.row, found.weight * z[n + m + k : n + m + 2 * k])
    np.add.at(values, found.row_eq, found.weight_eq * z[n + m + 2 * k :])
    return values
