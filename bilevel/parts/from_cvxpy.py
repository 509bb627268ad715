"""Problems whose levels are written in CVXPY: canonicalised by it, read as numbers, and stated as a `BilevelProblem`.

Of the lower level the leader's variables are parameters. The canonical form of that program,

    min w'P w/2 + q(x)'w   with   E w = e(x),   A w <= b(x),        w = (y, auxiliary variables),

is read at x = 0 and at each unit vector, which is all of it where q, e and b are affine in x and P, E and A constant.
An auxiliary variable that an equality gives is put in; others, as of |y|, remain, as the leaf "auxiliary".
"""

import warnings
from typing import Any, NamedTuple

import numpy as np

from bilevel.backend.errors import invalid
from bilevel.backend.extras import extra
from bilevel.parts import written
from bilevel.parts.written import Levels, Quadratic, Rows
from bilevel.problem import BilevelProblem

AUXILIARY = "auxiliary"
KEPT = ("nonneg", "nonpos", "pos", "neg", "bounds")  # attributes of variables that are bounds
WHOLE = ("boolean", "integer")
EXACT = 1e-9  # relative deviation from an affine or quadratic function up to which it is one
NAME = "from_cvxpy"


class _Form(NamedTuple):
    """min w'P w/2 + (q u)'w + c0 with E w = e u, A w <= b u; u = (x, 1), or 1 alone."""

    P: np.ndarray
    q: np.ndarray
    E: np.ndarray
    e: np.ndarray
    A: np.ndarray
    b: np.ndarray
    c0: float


def from_cvxpy(upper: Any, lower: Any, follower: Any) -> BilevelProblem:
    """A problem whose levels are two problems of CVXPY, which share variables.

        x, y = cp.Variable(2, name="x", bounds=[0, 2]), cp.Variable(2, name="y", nonneg=True)
        lower = cp.Problem(cp.Minimize((1 + x[0]) * y[0] + (2 + x[1]) * y[1]), [cp.sum(y) == 1])
        upper = cp.Problem(cp.Maximize(x @ y), [x[0] <= x[1] + 1])
        problem = bilevel.from_cvxpy(upper, lower, follower=[y])

    In the problem x and y are dictionaries of arrays by the variables' names. Both levels are minimised: where the
    upper one maximises, f is minus its objective. Of g the terms in x alone are left out. Where an objective needs
    auxiliary variables, as |y| does, they are a leaf "auxiliary" of the level's variables. Variables begin at their
    `value`, or at zero.

    Args:
        upper: `cvxpy.Problem` of the leader, convex and quadratic or piecewise linear in (x, y); its objective may
            also be any quadratic one. Constraints are affine; those without y are the x_set, others the upper
            constraints.
        lower: `cvxpy.Problem` of the follower: for each x a linear or convex quadratic program, with a gradient and
            constraints that are affine in (x, y), so that terms x'y are fine.
        follower: the follower's variables, a list or one; all others are the leader's.

    Raises:
        InvalidInput: names the variable or the level that is not of this kind: integers, cones, a g that CVXPY does not
            know to be convex in y.
        ModuleNotFoundError: CVXPY is not installed; the message has the command.
    """
    with extra("reference"):
        import cvxpy as cp
    xs, ys = _variables(cp, upper, lower, follower)
    below, above = _eliminated(_below(cp, lower, xs, ys), ys), _eliminated(_above(cp, upper, [*xs, *ys]), [*xs, *ys])
    n = sum(v.size for v in xs)
    x, at_x = _layout(xs, len(above.P) - n - sum(v.size for v in ys))
    y, at_y = _layout(ys, len(below.P) - sum(v.size for v in ys))
    at_y, size = at_y + len(at_x), len(at_x) + len(at_y)
    own_y = at_y[: len(above.P) - len(at_x)]
    f, rows_above = _numbers(above, np.concatenate([at_x[:n], own_y, at_x[n:]]), at_x[:0], size)
    g, rows_below = _numbers(below, at_y, at_x[:n], size)
    levels = Levels(x, y, f, g, rows_above.joined(_bounds(xs, at_x, size)), rows_below.joined(_bounds(ys, at_y, size)))
    return written.statement(levels)


def _variables(cp: Any, upper: Any, lower: Any, follower: Any) -> tuple[list, list]:
    """(the leader's variables, the follower's), each in the order of their names."""
    for name, level in (("upper", upper), ("lower", lower)):
        if not isinstance(level, cp.Problem):
            invalid(f"{name} ({NAME})", type(level).__name__, "a cvxpy.Problem", "Write cp.Problem(objective, rows).")
    given = [follower] if isinstance(follower, cp.Variable) else list(follower)
    if not given or not all(isinstance(v, cp.Variable) for v in given):
        got = f"{len(given)} of kinds {sorted({type(v).__name__ for v in given})}"
        invalid(f"follower ({NAME})", got, "the follower's cvxpy.Variables, one at least", "Pass follower=[y].")
    known = {v.id for v in given}
    others = {v.id: v for v in [*upper.variables(), *lower.variables()] if v.id not in known}
    if not others:
        invalid(f"upper ({NAME})", "no variable but the follower's", "one of the leader", "Solve it by cvxpy alone.")
    xs, ys = (sorted(vs, key=lambda v: v.name()) for vs in (others.values(), {v.id: v for v in given}.values()))
    for vs in (xs, ys):
        names = [v.name() for v in vs]
        if len({*names, AUXILIARY}) <= len(names):
            invalid(f"variables ({NAME})", names, f"names that differ, none {AUXILIARY!r}", "Pass name= to Variable.")
        for v in vs:
            on = [what for what, value in v.attributes.items() if value is not None and value is not False]
            whole = [what for what in on if what in WHOLE]
            if whole:
                do = "Relax it: BranchAndBound branches on the follower's complementarity, not on whole numbers."
                invalid(f"variable {v.name()} ({NAME})", f"{whole[0]}=True", "a variable of real numbers", do)
            if other := [what for what in on if what not in KEPT]:
                do = "Write it as constraints."
                invalid(f"variable {v.name()} ({NAME})", f"{other[0]}=…", f"no attribute but {', '.join(KEPT)}", do)
    return xs, ys


def _ends(v: Any) -> tuple[np.ndarray, np.ndarray]:
    """(lo, hi) of a variable's attributes, raveled as it is by columns."""
    given = v.attributes
    lo = np.full(v.shape, 0.0 if given["nonneg"] or given["pos"] else -np.inf)
    hi = np.full(v.shape, 0.0 if given["nonpos"] or given["neg"] else np.inf)
    if given.get("bounds") is not None:
        below, above = (np.broadcast_to(np.asarray(getattr(end, "value", end), float), v.shape)
                        for end in given["bounds"])  # fmt: skip
        lo, hi = np.maximum(lo, below), np.minimum(hi, above)
    return lo.ravel(order="F"), hi.ravel(order="F")


def _bounds(vs: list, at: np.ndarray, size: int) -> Rows:
    ends = [_ends(v) for v in vs]
    lo, hi = (np.concatenate([pair[k] for pair in ends]) for k in (0, 1))
    C = np.zeros((len(lo), size))
    C[np.arange(len(lo)), at[: len(lo)]] = 1.0
    return Rows(C, lo, hi)


def _layout(vs: list, auxiliary: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(values of the variables by name; where the entries of each, by columns, are in them raveled, auxiliary last)."""
    values = {v.name(): np.zeros(v.shape) if v.value is None else np.asarray(v.value, float) for v in vs}
    values |= {AUXILIARY: np.zeros(auxiliary)} if auxiliary else {}
    begins, offset = {}, 0
    for name in sorted(values):
        begins[name], offset = offset, offset + values[name].size
    places = [begins[v.name()] + np.arange(v.size).reshape(v.shape).ravel(order="F") for v in vs]
    return values, np.concatenate([*places, np.arange(auxiliary) + begins.get(AUXILIARY, 0)]).astype(int)


def _copied(cp: Any, level: Any, new: dict[int, Any]) -> Any:
    """The level with other leaves in place of its variables, by their ids as objects."""
    return cp.Problem(level.objective.tree_copy(new), [row.tree_copy(new) for row in level.constraints])


def _below(cp: Any, lower: Any, xs: list, ys: list) -> _Form:
    """The lower level, affine in x."""
    signs = [bool((_ends(v)[0] >= 0).all()) for v in xs]
    held = [cp.Parameter(v.shape, nonneg=sign) for v, sign in zip(xs, signs, strict=True)]
    own = [cp.Variable(v.shape) for v in ys]
    new = dict(zip(map(id, [*xs, *ys]), [*held, *own], strict=True))
    level = _copied(cp, lower, new)
    n = sum(v.size for v in xs)
    points = [*np.concatenate([np.zeros((1, n)), np.eye(n)]), np.random.default_rng(0).uniform(1, 2, n)]
    looks = []
    for point in points:
        parts = np.split(point, np.cumsum([v.size for v in xs])[:-1])
        for parameter, part in zip(held, parts, strict=True):
            parameter.value = part.reshape(parameter.shape, order="F")
        looks.append(_canonical(cp, level, own, "lower"))
    first, units, last = looks[0], looks[1:-1], looks[-1]
    for name in ("P", "E", "A"):
        if any(not _near(getattr(look, name), getattr(first, name)) for look in looks):
            do = "A gradient of g that is affine in (x, y), and rows that are, too."
            invalid(f"lower ({NAME})", "coefficients of y that move with x", "products x'y in g alone", do)

    def affine(name: str) -> np.ndarray:
        at_zero = getattr(first, name)
        slopes = [getattr(look, name) - at_zero for look in units]
        found = np.concatenate([*slopes, at_zero], axis=1)
        if not _near(found @ np.append(points[-1], 1.0), getattr(last, name)[:, 0]):
            do = "Square or bend x in the upper level."
            invalid(f"lower ({NAME})", "a part that is not affine in x", "one that is", do)
        return found

    return first._replace(**{name: affine(name) for name in ("q", "e", "b")})


def _near(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((np.abs(a - b) <= EXACT * (1 + np.abs(b).max(initial=0))).all())


def _above(cp: Any, upper: Any, vs: list) -> _Form:
    """The upper level in (x, y)."""
    own = [cp.Variable(v.shape) for v in vs]
    level = _copied(cp, upper, dict(zip(map(id, vs), own, strict=True)))
    if level.objective.is_dcp():
        return _canonical(cp, level, own, "upper")
    found = _quadratic(cp, level.objective, own)
    form = _canonical(cp, cp.Problem(cp.Minimize(0), level.constraints), own, "upper")
    more = len(form.P) - len(found.c)
    return form._replace(P=np.pad(found.H, (0, more)), q=np.append(found.c, np.zeros(more))[:, None], c0=found.c0)


def _quadratic(cp: Any, objective: Any, own: list) -> Quadratic:
    """An objective that CVXPY does not know to be convex, by its gradients at zero and at the unit vectors."""
    sizes = np.cumsum([v.size for v in own])
    sign = -1.0 if isinstance(objective, cp.Maximize) else 1.0

    def at(point: np.ndarray) -> tuple[float, np.ndarray]:
        for v, part in zip(own, np.split(point, sizes[:-1]), strict=True):
            v.value = part.reshape(v.shape, order="F")
        slopes = objective.args[0].grad
        found = [slopes.get(v, np.zeros(v.size)) for v in own]
        parts = [np.ravel(part.toarray() if hasattr(part, "toarray") else part) for part in found]
        return sign * float(objective.args[0].value), sign * np.concatenate(parts)

    c0, c = at(np.zeros(sizes[-1]))
    H = np.stack([at(unit)[1] - c for unit in np.eye(sizes[-1])])
    for point in np.random.default_rng(0).uniform(-2, 2, (3, sizes[-1])):
        value = point @ H @ point / 2 + c @ point + c0
        if not (abs(at(point)[0] - value) <= EXACT * (1 + abs(value))):
            do = "Write |y| or max by a variable of the leader's and two rows."
            invalid(f"upper ({NAME})", "an objective of another kind", "a quadratic one, or a convex one", do)
    return Quadratic((H + H.T) / 2, c, c0)


def _canonical(cp: Any, level: Any, own: list, name: str) -> _Form:
    """CVXPY's form of a level, the variables of its own first, by columns."""
    if not level.is_dcp():
        do = "Write it by CVXPY's rules (dcp.cvxpy.org)."
        invalid(f"{name} ({NAME})", "a level that CVXPY does not know to be convex", "a convex one", do)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of products of parameters, which are read at numbers here
        data = level.get_problem_data(cp.CLARABEL)[0]
    dims, known = data["dims"], data["param_prob"]
    cones = [what for what in ("exp", "soc", "psd", "p3d", "pnd") if getattr(dims, what, None)]
    if cones:
        do = "Write linear rows and quadratic objectives; norms by |.|_1 or the largest entry."
        invalid(f"{name} ({NAME})", f"cones ({', '.join(cones)})", "a linear or quadratic program", do)
    total = data["c"].size
    begins = [known.var_id_to_col.get(v.id) for v in own]
    chosen = [np.full(v.size, -1) if k is None else k + np.arange(v.size) for k, v in zip(begins, own, strict=True)]
    mine = np.concatenate(chosen).astype(int)
    order = np.concatenate([mine, np.setdiff1d(np.arange(total), mine)])
    pick = np.zeros((total + 1, len(order)))
    pick[order, np.arange(len(order))] = 1.0  # -1: a variable that the level does not have, the last row
    pick = pick[:total]
    P = np.zeros((total, total)) if "P" not in data else _both(data["P"].toarray())
    A, b, zero = data["A"].toarray() @ pick, data["b"][:, None], dims.zero
    c0 = float(known.apply_parameters(quad_obj="P" in data)[2 if "P" in data else 1])
    return _Form(pick.T @ P @ pick, pick.T @ data["c"][:, None], A[:zero], b[:zero], A[zero:], b[zero:], c0)


def _both(P: np.ndarray) -> np.ndarray:
    """A symmetric matrix of which perhaps the upper triangle alone is given."""
    return P if np.array_equal(P, P.T) else np.triu(P) + np.triu(P, 1).T


def _eliminated(form: _Form, own: list) -> _Form:
    """The same without the auxiliary variables that an equality gives."""
    first = sum(v.size for v in own)
    while True:
        pivots = np.abs(form.E[:, first:])
        if not pivots.size or pivots.max() <= EXACT:
            return form
        row, k = np.unravel_index(np.argmax(pivots), pivots.shape)
        j = first + int(k)
        T = np.eye(len(form.P))
        T[j] = -form.E[row] / form.E[row, j]
        T = np.delete(T, j, axis=1)
        S = np.zeros_like(form.q)
        S[j] = form.e[row] / form.E[row, j]  # w = T w' + S u
        rest = np.delete(np.arange(len(form.E)), row)
        E, e = form.E[rest], form.e[rest]
        c0 = form.c0 + float(form.q[:, -1] @ S[:, -1] + S[:, -1] @ form.P @ S[:, -1] / 2)
        form = _Form(
            T.T @ form.P @ T, T.T @ (form.q + form.P @ S), E @ T, e - E @ S, form.A @ T, form.b - form.A @ S, c0
        )


def _numbers(form: _Form, at: np.ndarray, at_x: np.ndarray, size: int) -> tuple[Quadratic, Rows]:
    """(objective, rows) in the raveled (x, y); at, at_x: where w and x are in it."""
    H, c = np.zeros((size, size)), np.zeros(size)
    H[np.ix_(at, at)], c[at] = form.P, form.q[:, -1]
    H[np.ix_(at, at_x)], H[np.ix_(at_x, at)] = form.q[:, :-1], form.q[:, :-1].T
    parts = []
    for C, end, equal in ((form.E, form.e, True), (form.A, form.b, False)):
        full = np.zeros((len(C), size))
        full[:, at], full[:, at_x] = C, -end[:, :-1]
        parts.append(Rows(full, end[:, -1] if equal else np.full(len(C), -np.inf), end[:, -1]))
    return Quadratic(H, c, form.c0), parts[0].joined(parts[1])
