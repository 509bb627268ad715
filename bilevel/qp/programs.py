"""Linear and convex quadratic programs with complementary pairs, on the host: statement, relaxation, proofs of bounds.

    min z'Q z/2 + c'z + constant   with   E z = e,   A z <= b,   lo <= z <= hi,   z_i z_j = 0 for the pairs (i, j) >= 0.

Without the pairs it is a convex program, `relax`: HiGHS (through SciPy) solves it where Q = 0, and Clarabel elsewhere.
Weak duality makes a lower bound of any point w and any multipliers nu of E and lam <= 0 of A,

    min over lo <= z <= hi of (Q w + c - E'nu - A'lam)'z  + e'nu + b'lam - w'Q w/2 + constant,

which is all that a proof of a relaxation needs (`Proof`); with Q = 0, c = 0, one above zero says that no z exists.
"""

from typing import Any, NamedTuple

import numpy as np

from bilevel.backend.extras import extra

FINEST = 1e-9  # feasibility asked of the solvers, rows having entries up to 1
POLISHED = 400  # unknowns and active rows of a quadratic program up to which its end is made exact
STEEP = 1e-7  # least fall of the objective along a ray of entries up to 1


class Program(NamedTuple):
    """The numbers of the program, float64; n unknowns."""

    Q: np.ndarray
    """[n, n], positive semidefinite; all zeros where the program is linear."""
    c: np.ndarray
    constant: float
    E: np.ndarray
    e: np.ndarray
    A: np.ndarray
    b: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    pairs: np.ndarray
    """[k, 2], indices of two unknowns with lo = 0 each, of which one is zero."""

    @property
    def linear(self) -> bool:
        """Whether Q = 0."""
        return not self.Q.any()

    def fixed(self, sides: np.ndarray) -> np.ndarray:
        """The upper ends hi [n] where of pair k the first unknown is zero, sides[k] = 1, the second, 2, or none, 0."""
        hi = self.hi.copy()
        for which in (0, 1):
            hi[self.pairs[sides == which + 1, which]] = 0.0
        return hi

    def value(self, z: np.ndarray) -> float:
        """The objective at z [n]."""
        return float(z @ self.Q @ z / 2 + self.c @ z + self.constant)


class Proof(NamedTuple):
    """What proves a bound of a relaxation by weak duality, or that it is empty."""

    empty: bool
    w: np.ndarray
    """[n], the point of linearisation."""
    nu: np.ndarray
    """Multipliers of E, [rows]."""
    lam: np.ndarray
    """Multipliers of A, [rows], at most zero."""


class Relaxed(NamedTuple):
    """How a relaxation ended."""

    word: str
    """"solved", "empty", "unbounded", or "failed", of which nothing is known."""
    bound: float
    """A lower bound: infinite where it is empty, minus infinity where it is unbounded or has failed."""
    z: np.ndarray | None
    """A minimiser, or where the word is "unbounded" any point."""
    proof: Proof | None
    ray: np.ndarray | None = None
    """A direction in which the objective falls for ever from z, entries up to 1."""


def lower_bound(program: Program, hi: np.ndarray, proof: Proof) -> float:
    """What the proof proves: a lower bound of the relaxation with the upper ends hi, infinite where it is empty."""
    cost = np.zeros_like(program.c) if proof.empty else program.Q @ proof.w + program.c
    lam = np.minimum(proof.lam, 0)
    left = cost - program.E.T @ proof.nu - program.A.T @ lam
    size = 1 + np.abs(cost) + np.abs(program.E.T) @ np.abs(proof.nu) + np.abs(program.A.T) @ np.abs(lam)
    end = np.where(left > 0, program.lo, hi)
    unknown = ~np.isfinite(end)
    if (np.abs(left[unknown]) > 1e-8 * size[unknown]).any():
        return -np.inf
    terms = np.concatenate([program.e * proof.nu, program.b * lam, left[~unknown] * end[~unknown]])
    best = terms.sum()
    if proof.empty:
        noise = FINEST * (1 + np.abs(proof.nu).max(initial=0)) + 1e-12 * np.abs(terms).sum()
        return np.inf if best > noise else -np.inf
    return float(best - proof.w @ program.Q @ proof.w / 2 + program.constant)


def relax(program: Program, hi: np.ndarray, warm: "Warm | None" = None) -> Relaxed:
    """Solve the program without its pairs and with the upper ends hi [n]. warm: of this program, if it is linear."""
    if (hi < program.lo).any():
        return _empty(program, hi)
    if not program.linear:
        word, z, nu, lam = _quadratic(program, hi)
    else:
        found = None if warm is None else warm.solve(hi)
        found = _linear(program.c, program, hi) if found is None else found
        word, z, nu, lam = found
    if word == "solved" and z is not None:
        proof = Proof(False, z, nu, lam)
        bound = lower_bound(program, hi, proof)
        if np.isfinite(bound):
            return Relaxed("solved", bound, z, proof)
        return Relaxed("failed", -np.inf, z, None)
    if word == "empty":
        return _empty(program, hi, Proof(True, program.c * 0, nu, lam))
    return _falls(program, hi) if word == "unbounded" else Relaxed("failed", -np.inf, None, None)


class Warm:
    """A linear program in HiGHS itself, which begins each solve where the last one ended: a tenth of the time."""

    @classmethod
    def of(cls, program: Program) -> "Warm | None":
        """The program's; None where it is quadratic, or where `highspy` is not installed (the extra `reference`)."""
        try:
            import highspy
        except ModuleNotFoundError:
            return None
        return cls(program, highspy) if program.linear and len(program.e) + len(program.b) else None

    def __init__(self, program: Program, highspy: Any) -> None:
        """Hand the program over."""
        from scipy import sparse

        self.program, self.words = program, highspy.HighsModelStatus
        self.columns = np.arange(len(program.c), dtype=np.int32)
        self.highs = highspy.Highs()
        options = {"output_flag": False, "presolve": "off", "solver": "simplex"}
        options |= {"primal_feasibility_tolerance": FINEST, "dual_feasibility_tolerance": FINEST}
        for name, value in options.items():
            self.highs.setOptionValue(name, value)
        matrix = sparse.csc_array(np.concatenate([program.E, program.A]))
        model = highspy.HighsLp()
        model.num_row_, model.num_col_ = len(program.e) + len(program.b), len(program.c)
        model.col_cost_, model.col_lower_, model.col_upper_ = program.c, program.lo, program.hi
        model.row_lower_ = np.append(program.e, np.full(len(program.b), -np.inf))
        model.row_upper_ = np.append(program.e, program.b)
        parts = model.a_matrix_
        parts.start_, parts.index_, parts.value_ = matrix.indptr, matrix.indices, matrix.data
        self.highs.passModel(model)

    def solve(self, hi: np.ndarray) -> tuple[str, Any, np.ndarray, np.ndarray] | None:
        """(word, z, nu, lam) with the upper ends hi, of an empty program the multipliers that may prove it; None where
        HiGHS came to neither.
        """
        program, m = self.program, len(self.program.e)
        self.highs.changeColsBounds(len(hi), self.columns, program.lo, hi)
        self.highs.run()
        word = self.highs.getModelStatus()
        if word == self.words.kOptimal:
            found = self.highs.getSolution()
            rows = np.asarray(found.row_dual)
            return "solved", np.clip(np.asarray(found.col_value), program.lo, hi), rows[:m], rows[m:]
        if word == self.words.kInfeasible:
            _, known, ray = self.highs.getDualRay()
            rows = np.asarray(ray) if known else np.zeros(m + len(program.b))
            return "empty", None, rows[:m], rows[m:]
        unbounded = word in (self.words.kUnbounded, self.words.kUnboundedOrInfeasible)
        return ("unbounded", None, program.e * 0, program.b * 0) if unbounded else None


def _linear(c: np.ndarray, program: Program, hi: np.ndarray) -> tuple[str, Any, np.ndarray, np.ndarray]:
    """(word, z, nu, lam) of the linear program with the cost c."""
    from scipy import sparse
    from scipy.optimize import linprog

    options = {"primal_feasibility_tolerance": FINEST, "dual_feasibility_tolerance": FINEST}
    A, E = (sparse.csr_array(part) if len(part) else None for part in (program.A, program.E))
    b, e = (part if len(part) else None for part in (program.b, program.e))
    found: Any = None
    for method in ("highs", "highs-ipm"):  # the second where the first has failed
        found = linprog(c, A, b, E, e, np.stack([program.lo, hi], axis=1), method, options=options)
        if found.status in (0, 2, 3):
            break
    if found.status == 0:
        return "solved", np.clip(found.x, program.lo, hi), found.eqlin.marginals, found.ineqlin.marginals
    word = {2: "empty", 3: "unbounded", 4: "unbounded"}.get(found.status, "failed")  # 4: one of the two
    return word, None, program.e * 0, program.b * 0


def _quadratic(program: Program, hi: np.ndarray) -> tuple[str, Any, np.ndarray, np.ndarray]:
    """The same of the quadratic program, by Clarabel's interior points: right to some nine digits."""
    with extra("reference"):
        import clarabel
    from scipy import sparse

    solver: Any = clarabel  # which has no types

    n, eye = len(program.c), np.eye(len(program.c))
    pinned = hi <= program.lo
    below, above = np.isfinite(program.lo) & ~pinned, np.isfinite(hi) & ~pinned
    equal, rows = [program.E, eye[pinned]], [program.A, -eye[below], eye[above]]
    bound = [program.e, hi[pinned], program.b, -program.lo[below], hi[above]]
    m, k = len(program.e) + pinned.sum(), len(program.b) + below.sum() + above.sum()
    settings = solver.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    cones = [solver.ZeroConeT(int(m)), solver.NonnegativeConeT(int(k))]
    matrix = sparse.csc_matrix(np.concatenate([*equal, *rows]).reshape(-1, n))
    found = solver.DefaultSolver(
        sparse.csc_matrix(np.triu(program.Q)), program.c, matrix, np.concatenate(bound), cones, settings
    ).solve()
    word, none = str(found.status), (program.e * 0, program.b * 0)
    if word in ("PrimalInfeasible", "AlmostPrimalInfeasible"):
        return "empty", None, *none
    if word in ("DualInfeasible", "AlmostDualInfeasible"):
        return "unbounded", None, *none
    if word not in ("Solved", "AlmostSolved"):
        return "failed", None, *none
    K, h = matrix.toarray(), np.concatenate(bound)
    z, dual = _polished(program, K, h, int(m), np.asarray(found.x), np.asarray(found.z))
    nu, lam = -dual[: len(program.e)], -np.maximum(dual[m : m + len(program.b)], 0)
    return "solved", np.clip(z, program.lo, hi), nu, lam


def _polished(
    program: Program, K: np.ndarray, h: np.ndarray, m: int, z: np.ndarray, dual: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(z, dual) of K z <= h, the first m rows equalities, made exact by Newton's step on the rows that seem active;
    as they were where that breaks a row or a sign, and in large programs.
    """
    n, slack = len(z), h - K @ z
    on = (np.arange(len(h)) < m) | (dual > slack)
    if n + on.sum() > POLISHED:
        return z, dual
    active, size = K[on], int(on.sum())
    M = np.block([[program.Q, active.T], [active, np.zeros((size, size))]])
    new, multipliers = z.copy(), np.where(on, dual, 0.0)
    for _ in range(2):
        left = np.concatenate([-(program.Q @ new + program.c + K.T @ multipliers), h[on] - active @ new])
        step = np.linalg.lstsq(M, left, rcond=None)[0]
        new, multipliers[on] = new + step[:n], multipliers[on] + step[n:]
    signs = multipliers[m:].min(initial=0) >= -FINEST * (1 + np.abs(multipliers).max(initial=0))
    inside = (h - K @ new)[m:].min(initial=0) >= -FINEST * (1 + np.abs(new).max(initial=0))
    return (new, multipliers) if signs and inside else (z, dual)


def _empty(program: Program, hi: np.ndarray, guess: Proof | None = None) -> Relaxed:
    """A relaxation said to be empty, with a proof: the guess with one sign or the other, or the multipliers of the
    program that violates the rows least.
    """
    for sign in (1, -1):
        proof = Proof(True, program.c * 0, sign * guess.nu, sign * guess.lam) if guess is not None else None
        if proof is not None and lower_bound(program, hi, proof) == np.inf:
            return Relaxed("empty", np.inf, None, proof)
    n, m, k = len(program.c), len(program.e), len(program.b)
    if (hi < program.lo).any():
        return Relaxed("empty", np.inf, None, Proof(True, np.zeros(n), np.zeros(m), np.zeros(k)))
    wide = Program(
        np.zeros((n + 2 * m + k,) * 2), np.append(np.zeros(n), np.ones(2 * m + k)), 0.0,
        np.concatenate([program.E, np.eye(m), -np.eye(m), np.zeros((m, k))], axis=1), program.e,
        np.concatenate([program.A, np.zeros((k, 2 * m)), -np.eye(k)], axis=1), program.b,
        np.append(program.lo, np.zeros(2 * m + k)), np.append(hi, np.full(2 * m + k, np.inf)), program.pairs[:0],
    )  # fmt: skip
    word, _, nu, lam = _linear(wide.c, wide, wide.hi)
    proof = Proof(True, np.zeros(n), nu, lam)
    if word == "solved" and lower_bound(program, hi, proof) == np.inf:
        return Relaxed("empty", np.inf, None, proof)
    return Relaxed("failed", -np.inf, None, None)


def _falls(program: Program, hi: np.ndarray) -> Relaxed:
    """A relaxation said to be unbounded (or perhaps empty), with a point and a ray."""
    word, z, *_ = _linear(program.c * 0, program, hi)
    if word == "empty":
        return _empty(program, hi)
    if word != "solved":
        return Relaxed("failed", -np.inf, None, None)
    E = np.concatenate([program.E, program.Q])
    lo, ends = np.where(np.isfinite(program.lo), 0.0, -1.0), np.where(np.isfinite(hi), 0.0, 1.0)
    cone = program._replace(E=E, e=np.zeros(len(E)), b=program.b * 0, lo=lo, hi=ends)
    word, ray, *_ = _linear(program.c, cone, ends)
    if word == "solved" and program.c @ ray < -STEEP:
        return Relaxed("unbounded", -np.inf, z, None, ray)
    return Relaxed("failed", -np.inf, z, None)
