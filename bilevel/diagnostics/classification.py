"""Which kind of stationary point of the single level (`oracles.single_level`) a point is, and what is shown of it.

With the follower's multipliers lam, a row c_i of his is biactive where c_i = lam_i = 0. A point is weakly stationary if
there are multipliers a, xi, eta of the single level, with leader's ones of the right signs, such that

    f_x + E_x'a + c_x'xi + … = 0,    f_y + E_y'a + c_y'xi + … = 0,    eta_i = c_y,i a,
    xi_i = 0 where c_i < 0,    eta_i = 0 where lam_i > 0,              E = g_y + c_y'lam,

and on biactive rows C-stationary if xi_i eta_i >= 0, M-stationary if moreover both are positive where none is zero, and
S-stationary if xi_i, eta_i >= 0. It is B-stationary if f falls along no direction into the feasible set. That set is,
to first order, a union of pieces, one for each set I of active rows that may hold with a multiplier,

    E_x dx + E_y dy + g_y + c_y'lam = 0,    c_i' d = 0 and lam_i >= 0 in I,    c_i'd <= 0 and lam_i = 0 outside,

and a linear program on each piece, with |d| <= 1 in each entry and lam free to change, finds the steepest descent. This
union contains all directions into the feasible set, so that no descent on it shows B-stationarity; with affine rows c
for any multipliers that the point may have. Where rows bend E_x and E_y depend on lam, which then must be unique.

Reference: Scheel, Scholtes. Mathematical programs with complementarity constraints: stationarity, optimality, and
sensitivity. Mathematics of Operations Research 25, 2000, section 2. Flegel, Kanzow. On M-stationary points for
mathematical programs with equilibrium constraints. Journal of Mathematical Analysis and Applications 310, 2005. Dempe,
Dutta. Is bilevel programming a special case of a mathematical program with complementarity constraints? Mathematical
Programming 131, 2012: multipliers that are not unique.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.bounded import bounded_jit
from bilevel.backend.host import on_host
from bilevel.backend.precision import full_precision
from bilevel.backend.tree import norm
from bilevel.diagnostics.checks import check_by_value
from bilevel.diagnostics.referees import LARGEST, for_many_minimisers
from bilevel.oracles import polynomial, single_level
from bilevel.oracles.single_level import EQUAL, UNEQUAL, Slopes, Values
from bilevel.parts.reduced import upper_violation
from bilevel.problem import BilevelProblem, Minimize, SmoothCoupling
from bilevel.record import Measurement, Referee, Status
from bilevel.struct import invalid

PyTree = Any
MOST = 10  # active rows without a multiplier up to which all pieces are looked at, 2^MOST
FEW = 6  # biactive rows up to which M and C are looked for, 3^FEW and 2^FEW sign patterns
EXPONENT = 0.4  # of eps: what counts as zero, times 10


class Classification(NamedTuple):
    """What is shown of a point; printing it says so in sentences."""

    word: str
    """The strongest of "S", "M", "C" and "W" whose multipliers were found, "none" where there are none, and "unknown"
    where the point is not feasible, or y not a KKT point of the follower."""
    b_stationary: bool | None
    """Whether it is shown that f falls along no direction into the feasible set; None where nothing is shown."""
    descent: float
    """The rate of the steepest descent on the pieces, f'd for |d| <= 1 in each entry; NaN where none was looked for."""
    biactive: tuple[int, ...]
    """The follower's rows with c_i = lam_i = 0, by their numbers in `oracles.single_level`."""
    multipliers: np.ndarray
    """lam of the follower's rows."""
    unique: bool
    """Whether these are the only ones, since the active rows are independent."""
    follower_residual: float
    """|g_y + c_y'lam| over 1 + |g_y|, and the largest of min(lam_i, |c_i|), both relative."""
    violation: float
    """Of X, Y, the coupling and the upper constraints."""
    reason: str
    """Why something is not shown; empty otherwise."""

    def __str__(self) -> str:
        """Sentences."""
        what = {"S": "strongly (S-)", "M": "M-", "C": "C-", "W": "weakly "}.get(self.word)
        first = "no kind of stationarity is shown" if what is None else f"{what}stationary for the KKT system"
        by = f"steepest descent {self.descent:.1e}"
        b = {True: f"B-stationary ({by})", False: f"not B-stationary ({by})", None: "B-stationarity is not shown"}
        ends = f"; {self.reason}" if self.reason else ""
        return (
            f"{first}; {b[self.b_stationary]}; {len(self.biactive)} biactive rows, multipliers "
            f"{'unique' if self.unique else 'not unique'}{ends}\n"
            f"follower's residual {self.follower_residual:.1e}, violation {self.violation:.1e}"
        )


class _Here(NamedTuple):
    """The numbers at a point, of JAX or NumPy."""

    f: Array
    """[n + m], the gradient of f in (x, y)."""
    g: Array
    """[m], g_y."""
    E: Array
    """[m, n + m], the derivative of g_y + c_y'lam in (x, y)."""
    c: Array
    """[k]."""
    J: Array
    """[k, n + m]."""
    kinds: Array
    """[k]."""
    lam: Array
    """[k]."""
    leader: tuple[Array, Array, Array]
    """C, lo, hi of lo <= C (dx, dy) <= hi: what X, G and H leave of a step, in units of lengths."""
    size: Array
    """[], 1 + the largest entry of (x, y)."""


def _near(dtype: Any) -> float:
    return 10 * float(jnp.finfo(dtype).eps) ** EXPONENT


def _here(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[_Here, Array, Array, Array]:
    """(numbers, f, follower's residual, violation) at (x, y). Pure."""
    z, n = ravel_pytree((x, y))[0], ravel_pytree(x)[0].size
    sizes = single_level.sizes(problem, x, y)
    kinds = single_level.follower_rows(problem, x, y)[1]
    zero = jnp.append(z, jnp.zeros(sizes.k, z.dtype))
    at, first, wide = single_level.values(problem, x, y, zero), single_level.slopes(problem, x, y, zero), n + sizes.m
    shape = jax.ShapeDtypeStruct((sizes.k,), z.dtype)
    lam = on_host(_multipliers, shape, at.E, at.c, first.c[:, n:wide], kinds, 1 + jnp.max(jnp.abs(z)))
    slope = single_level.slopes(problem, x, y, jnp.append(z, lam))
    own = slope.c[:, :wide]
    left = at.E + own[:, n:].T @ lam
    leader = _leader(problem, x, y, at, slope)
    here = _Here(slope.f[:wide], at.E, slope.E[:, :wide], at.c, own, kinds, lam, leader,
                 1 + jnp.max(jnp.abs(z)))  # fmt: skip
    violation = problem.x_set.violation(x) + problem.y_set.violation(y) + norm(oracles.coupling_residual(problem, x, y))
    violation = violation + upper_violation(problem, x, y)
    size = 1 + jnp.max(jnp.abs(z))
    away = jnp.abs(at.c) / (size * jnp.maximum(jnp.max(jnp.abs(own), axis=1), 1e-12))
    apart = jnp.where(kinds == UNEQUAL, jnp.minimum(lam / (1 + jnp.max(jnp.abs(lam))), away), 0)
    return here, at.f, norm(left) / (1 + norm(at.E)) + jnp.max(apart), jnp.asarray(violation)


def _leader(problem: BilevelProblem, x: PyTree, y: PyTree, at: Values, slope: Slopes) -> tuple[Array, Array, Array]:
    """(C, lo, hi), lo <= C (dx, dy) <= hi: X, G and H to first order."""
    flat, m = ravel_pytree(x)[0], ravel_pytree(y)[0].size
    blocks = [(slope.G[:, : flat.size + m], jnp.full_like(at.G, -jnp.inf), jnp.maximum(-at.G, 0)),
              (slope.H[:, : flat.size + m], at.H * 0, at.H * 0)]  # fmt: skip
    for C, lo, hi in problem.x_set.rows(x):
        lo, hi = jnp.minimum(lo - C @ flat, 0), jnp.maximum(hi - C @ flat, 0)
        blocks.append((jnp.pad(C, ((0, 0), (0, m))), lo, hi))
    C, lo, hi = (jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
    return C, lo, hi


def _multipliers(g: Any, c: Any, J: Any, kinds: Any, size: Any) -> np.ndarray:
    """lam of least |g + J'lam| on the rows that hold, by SciPy's non-negative least squares; J = c_y [k, m]."""
    from scipy.optimize import nnls

    dtype = np.asarray(g).dtype
    g, c, J = (np.asarray(part, float) for part in (g, c, J))
    on = _active(c, J, np.asarray(kinds), float(size), _near(dtype))
    equal = np.flatnonzero(np.asarray(kinds) == EQUAL)
    rows = np.concatenate([J[on], J[equal], -J[equal]])
    lam = np.zeros(len(c))
    if len(rows) and np.isfinite(rows).all() and np.isfinite(g).all():
        found = nnls(rows.T, -g, maxiter=50 * len(rows) + 100)[0]
        lam[on] = found[: on.sum()]
        lam[equal] = found[on.sum() : on.sum() + len(equal)] - found[on.sum() + len(equal) :]
    return lam.astype(dtype)


def _active(c: np.ndarray, J: np.ndarray, kinds: np.ndarray, size: float, near: float) -> np.ndarray:
    """Which inequalities hold with equality."""
    length = np.maximum(np.abs(J).max(axis=1, initial=0), 1e-300)
    return (kinds == UNEQUAL) & (np.abs(c) <= near * size * np.maximum(length, 1e-12))


class _Pieces:
    """The feasible set around a point to first order, on the host."""

    def __init__(self, here: _Here) -> None:
        """Sort the rows."""
        dtype = np.asarray(here.f).dtype
        self.near = near = _near(dtype)
        self.f, self.g, self.E, self.J = (np.asarray(p, float) for p in (here.f, here.g, here.E, here.J))
        kinds, c, size = np.asarray(here.kinds), np.asarray(here.c, float), float(here.size)
        self.lam, self.m = np.asarray(here.lam, float), len(self.g)
        self.n = len(self.f) - self.m
        self.C_y = self.J[:, self.n :]
        self.on, self.equal = np.flatnonzero(_active(c, self.J, kinds, size, near)), np.flatnonzero(kinds == EQUAL)
        rows = self.C_y[np.concatenate([self.on, self.equal])]
        self.unique = np.linalg.matrix_rank(rows, tol=1e-9 * max(1.0, np.abs(rows).max(initial=0))) == len(rows)
        large = self.lam[self.on] > near * (1 + np.abs(self.lam).max(initial=0))
        self.strong, self.biactive = self.on[large], self.on[~large]
        C, lo, hi = (np.asarray(part, float) for part in here.leader)
        length = np.abs(C).max(axis=1, initial=0)
        C = C / np.where(length > 0, length, 1)[:, None]
        room = near * size * np.where(length > 0, length, 1)
        self.held = C[(hi <= room) & (lo >= -room)]
        self.upper = np.concatenate([C[(hi <= room) & (lo < -room)], -C[(lo >= -room) & (hi > room)]])

    def descent(self) -> tuple[float, str]:
        """(the rate of the steepest descent over all pieces, why there is none)."""
        weak = self.biactive if self.unique else self.on
        if len(weak) > MOST:
            if self.unique and self._multipliers([(1, 1)] * len(weak)):  # those of strong stationarity serve all pieces
                return 0.0, ""
            return np.nan, f"{len(weak)} rows may be active or not, more than {MOST}"
        rates = [self._rate(np.setdiff1d(self.on, weak), weak, np.array(pick, bool))
                 for pick in itertools.product((False, True), repeat=len(weak))]  # fmt: skip
        known = [rate for rate in rates if np.isfinite(rate)]
        return (max(known), "") if known else (np.nan, "no piece of the feasible set holds the point")

    def _rate(self, strong: np.ndarray, weak: np.ndarray, pick: np.ndarray) -> float:
        """The rate on one piece; minus infinity where the point is not on it."""
        from scipy.optimize import linprog

        inside, out, wide = np.concatenate([strong, weak[pick]]), weak[~pick], len(self.f)
        free = np.concatenate([inside, self.equal]).astype(int)
        left = self.g + self.C_y.T @ self.lam  # rounding of y's, by which the equations are moved
        E = [np.concatenate([self.E, self.C_y[free].T], axis=1)]
        e = [left - self.g]
        held = np.concatenate([self.J[free], self.held])
        E.append(np.pad(held, ((0, 0), (0, len(free)))))
        e.append(np.zeros(len(held)))
        A = np.pad(np.concatenate([self.J[out], self.upper]), ((0, 0), (0, len(free))))
        ends: Any = [(-1, 1)] * wide + [(0, None)] * len(inside) + [(None, None)] * len(self.equal)
        unit = max(1e-300, np.abs(self.f).max(initial=0))
        found = linprog(np.append(self.f / unit, np.zeros(len(free))), A, np.zeros(len(A)), np.concatenate(E),
                        np.concatenate(e), ends)  # fmt: skip
        return -np.inf if found.fun is None else max(-float(found.fun) * unit, 0.0) + 0.0  # no -0

    def word(self) -> tuple[str, str]:
        """("S", "M", "C", "W" or "none", why a stronger one was not looked for)."""
        pairs = len(self.biactive)
        if self._multipliers([(1, 1)] * pairs):
            return "S", ""
        if not self._multipliers([(0, 0)] * pairs):
            return "none", ""
        if pairs > FEW:
            return "W", f"{pairs} biactive rows, more than {FEW}: M and C were not looked for"
        kinds = (("M", ((1, 1), (None, 0), (0, None))), ("C", ((1, 1), (-1, -1))))
        for word, signs in kinds:
            if any(self._multipliers(list(pattern)) for pattern in itertools.product(signs, repeat=pairs)):
                return word, ""
        return "W", ""

    def _multipliers(self, signs: list[tuple[int | None, int | None]]) -> bool:
        """Whether there are multipliers with these signs of (xi, eta) on biactive rows; 0 for any, None for zero.

        The unknowns are a, xi on active rows and equalities, and the leader's; eta_i = c_y,i a.
        """
        from scipy.optimize import linprog

        own = np.concatenate([self.on, self.equal]).astype(int)
        M = np.concatenate([self.E, self.J[own], self.held, self.upper]).T
        among = {row: k for k, row in enumerate(own)}
        ends = [(None, None)] * (self.m + len(own) + len(self.held)) + [(0, None)] * len(self.upper)
        A, equal = [], [self.C_y[row] for row in np.concatenate([self.strong, self.equal]).astype(int)]
        for row, (xi, eta) in zip(self.biactive, signs, strict=True):
            ends[self.m + among[row]] = {1: (0, None), -1: (None, 0), 0: (None, None), None: (0, 0)}[xi]
            if eta is None:
                equal.append(self.C_y[row])
            elif eta:
                A.append(-eta * self.C_y[row])
        rest = M.shape[1] - self.m
        unit = max(1.0, np.abs(self.f).max(initial=0))
        wide = lambda rows: np.pad(np.reshape(rows, (-1, self.m)), ((0, 0), (0, rest + 1)))  # noqa: E731
        off = np.concatenate([np.concatenate([sign * M, -np.ones((len(M), 1))], axis=1) for sign in (1, -1)])
        bound = np.concatenate([-self.f / unit, self.f / unit])
        found = linprog(np.append(np.zeros(M.shape[1]), 1.0), np.concatenate([off, wide(A)]),
                        np.append(bound, np.zeros(len(A))), wide(equal), np.zeros(len(equal)),
                        [*ends, (0, None)])  # fmt: skip
        return found.fun is not None and found.fun <= self.near


@bounded_jit
@full_precision
def _look(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[_Here, Array, Array, Array]:
    return _here(problem.on_full_data(), x, y)


def _curved(problem: BilevelProblem) -> bool:
    """Whether the follower's rows may bend."""
    return not problem.y_set.polyhedral or isinstance(problem.coupling, SmoothCoupling)


def refuse(problem: BilevelProblem) -> str | None:
    """Why points of this problem are not classified, or None."""
    if not isinstance(problem.lower, Minimize):
        return f"a lower level {type(problem.lower).__name__}"
    if not problem.x_set.polyhedral:
        return f"x_set = {type(problem.x_set).__name__}"
    return None if problem.y_set.polyhedral or problem.y_set.curved else f"y_set = {type(problem.y_set).__name__}"


def classify(problem: BilevelProblem, x: PyTree, y: PyTree) -> Classification:
    """Which kind of stationary point of the single level (x, y) is, with what is shown of B-stationarity.

        print(bilevel.diagnostics.classify(problem, solution.x, solution.y))

    The follower's multipliers are computed again, by least squares; what counts as zero is 10 eps^0.4, relative to
    1 + |(x, y)|, 5e-6 in float64. The conditions are of first order: a maximum may fulfil them. That y is a minimum of
    the follower follows from them where g(x, .) and his rows are convex, which is not looked at.

    Args:
        problem: with `Minimize(g)`, an x_set described by linear rows, a y_set by rows or functions; twice
            differentiable f, g and constraints.
        x: the leader's part of the point.
        y: the follower's.

    Raises:
        InvalidInput: another kind of problem.
    """
    reason = refuse(problem.validate())
    if reason is not None:
        invalid("problem (classify)", reason, "Minimize(g) and sets described by rows", "Write sets as rows.")
    here, _, residual, outside = jax.device_get(_look(problem, x, y))
    pieces, residual, outside = _Pieces(here), float(residual), float(outside)
    found = Classification("unknown", None, np.nan, tuple(map(int, pieces.biactive)), pieces.lam, bool(pieces.unique),
                           residual, outside, "")  # fmt: skip
    if not max(residual, outside) <= pieces.near * float(here.size):
        return found._replace(reason="the point is not feasible, or y not a KKT point of the follower")
    word, why = pieces.word()
    rate, missing = pieces.descent()
    if _curved(problem) and not pieces.unique:
        rate, missing = np.nan, "the follower's rows bend, and his multipliers are not unique"
    small = rate <= pieces.near * max(1.0, float(np.abs(pieces.f).max(initial=0)))
    small = rate <= pieces.near * max(1.0, float(np.abs(pieces.f).max(initial=0)))
    shown = None if np.isnan(rate) or not (small or _affine(problem)) else bool(small)
    if shown is None and not missing:
        missing = "the descent that was found is of first order alone, since not all constraints are affine"
    return found._replace(word=word, b_stationary=shown, descent=rate, reason="; ".join(filter(None, (why, missing))))


@bounded_jit
@full_precision
def _deviation(problem: BilevelProblem) -> Array:
    """How far g_y and the constraints are from affine functions."""
    problem = problem.on_full_data()
    x, y = problem.init(jax.random.key(0))
    return jnp.max(polynomial.deviations(problem, x, y, polynomial.model(problem, x, y))[1:])


def _affine(problem: BilevelProblem) -> bool:
    """Whether the pieces are the feasible set itself, near the point, so that a descent on them is one of F."""
    found = _deviation(problem)
    return not _curved(problem) and bool(found <= 100 * float(jnp.finfo(found.dtype).eps) ** 0.75)


def measure_stationary(problem: BilevelProblem, x: PyTree, y: PyTree) -> Measurement:
    """f at (x, y), and as `hypergradient` the rate of the steepest descent on the pieces of the feasible set, infinite
    where (x, y) is not feasible, NaN where it is not known; and the residual of the follower's KKT conditions. SADDLE
    where his Lagrangian curves down at y. Pure; for problems without a reason to `refuse`.
    """
    problem = problem.on_full_data()
    here, value, residual, outside = _here(problem, x, y)
    ready = jnp.maximum(residual, outside) <= _near(value.dtype) * here.size
    curved = _curved(problem)

    def rate(ready: Any, *numbers: Any) -> float:
        if not bool(ready):
            return np.inf
        pieces = _Pieces(_Here(*numbers))
        return np.nan if curved and not pieces.unique else pieces.descent()[0]

    descent = on_host(rate, jax.ShapeDtypeStruct((), value.dtype), ready, *here)
    bent = jnp.linalg.eigvalsh((here.E[:, -here.g.size :] + here.E[:, -here.g.size :].T) / 2)
    down = bent[0] < -10 * float(jnp.finfo(value.dtype).eps) ** 0.5 * jnp.max(jnp.abs(bent))
    return Measurement(
        value=value, hypergradient=descent, error_bound=jnp.zeros_like(value), lower_residual=residual,
        violation=outside, status=jnp.where(down, Status.SADDLE, Status.ESTIMATED),
    )  # fmt: skip


STATIONARY = Referee("the follower's KKT conditions, and descent on each piece of the feasible set", measure_stationary,
                     EXPONENT, check_by_value, at_y=True)  # fmt: skip
"""Where the follower is convex, his answers perhaps many: CONVERGED is said of B-stationary points."""


def for_convex_followers(problem: BilevelProblem) -> Referee | None:
    """STATIONARY where g(x, .) is convex at init's point and constrained; `for_many_minimisers` for other constrained
    ones, and None without constraints. It computes a Hessian, so the problem's arrays must be numbers.
    """
    if refuse(problem) is not None or not problem.constrained_lower:
        return None
    x, y = problem.init(jax.random.key(0))
    if ravel_pytree(y)[0].size > LARGEST:
        return None
    bent = np.linalg.eigvalsh(np.asarray(oracles.lower_hessian(problem, x, y, problem.lower_data.full())))
    convex = bent[0] >= -10 * float(jnp.finfo(ravel_pytree(y)[0].dtype).eps) ** 0.5 * np.abs(bent).max()
    return STATIONARY if convex else for_many_minimisers(problem)
