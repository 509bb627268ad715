"""Instance files of linear bilevel programs: an MPS file with an auxiliary one, as MibS and instance libraries have.

The MPS file has the leader's objective and all rows and bounds; the auxiliary one says which rows and variables are the
follower's, and his objective. It comes in two forms: by names, "@VARSBEGIN", and by numbers from 0, "LC 3".
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel.backend.errors import invalid
from bilevel.backend.extras import extra
from bilevel.oracles import polynomial
from bilevel.parts import kkt, written
from bilevel.parts.written import Levels, Quadratic, Rows
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any
LINEAR = 1e-9  # deviation from an affine function, relative to 1, up to which it is one
SECTIONS = {"VARSBEGIN": "variables", "CONSTRSBEGIN": "rows", "CONSTRBEGIN": "rows"}
DO = "See the format at https://coin-or.github.io/MibS/input.html."


class MibS(NamedTuple):
    """An instance as it was read."""

    problem: BilevelProblem
    """x and y are arrays, [n] and [m]."""
    x_names: tuple[str, ...]
    """The leader's variables, by the columns of the MPS file."""
    y_names: tuple[str, ...]
    """The follower's."""


class _Auxiliary(NamedTuple):
    """What the auxiliary file says; numbers stand for themselves where it counts from 0."""

    variables: list[str | int]
    costs: list[float]
    rows: list[str | int]


def read_mibs(mps: str | Path, aux: str | Path | None = None) -> MibS:
    """Read an MPS file and its auxiliary file, both forms of it.

    Bounds of the follower's variables are his; rows that the auxiliary file does not name are the leader's. Both levels
    are minimised: what a file maximises is negated.

    Args:
        mps: the path of the MPS file; a quadratic objective of the leader is read, too.
        aux: that of the auxiliary file. Default: the same with the ending .aux.

    Raises:
        InvalidInput: names what cannot be read: a file, a name that the other file does not have, whole numbers.
        ModuleNotFoundError: highspy is not installed; it comes with the extra `reference`.
    """
    model, highspy = _read(Path(mps))
    lp = model.lp_
    columns, rows = list(lp.col_names_), list(lp.row_names_)
    whole = [columns[k] for k, kind in enumerate(lp.integrality_) if kind != highspy.HighsVarType.kContinuous]
    if whole:
        got = (
            f"{len(whole)} whole or semi-continuous variables: {', '.join(whole[:5])}{', …' if len(whole) > 5 else ''}"
        )
        do = "BranchAndBound takes real numbers alone; relax them in the file."
        invalid(f"mps ({Path(mps).name})", got, "real variables", do)
    path = Path(mps).with_suffix(".aux") if aux is None else Path(aux)
    said = _auxiliary(path)
    at_y, below = (_places(path, *pair) for pair in ((said.variables, columns), (said.rows, rows)))
    at_x = np.setdiff1d(np.arange(len(columns)), at_y)
    order = np.concatenate([at_x, at_y]).astype(int)
    sign = -1.0 if lp.sense_ == highspy.ObjSense.kMaximize else 1.0
    H = sign * _hessian(model.hessian_, len(columns))
    f = Quadratic(H[np.ix_(order, order)], sign * np.asarray(lp.col_cost_)[order], sign * lp.offset_)
    g = Quadratic(np.zeros_like(H), np.concatenate([np.zeros(len(at_x)), np.asarray(said.costs, float)]))
    both = Rows(_matrix(lp, highspy)[:, order], np.asarray(lp.row_lower_, float), np.asarray(lp.row_upper_, float))
    ends = Rows(np.eye(len(order)), *(np.asarray(end, float)[order] for end in (lp.col_lower_, lp.col_upper_)))
    lower, upper = both.split(np.isin(np.arange(len(rows)), below))
    own, other = ends.split(np.arange(len(order)) >= len(at_x))
    levels = Levels(np.zeros(len(at_x)), np.zeros(len(at_y)), f, g, upper.joined(other), lower.joined(own))
    names = [tuple(columns[k] for k in at) for at in (at_x, at_y)]
    return MibS(written.statement(levels), *names)


def write_mibs(problem: BilevelProblem, mps: str | Path, aux: str | Path | None = None) -> None:
    """Write a problem as an MPS file and the auxiliary file of MibS, by names.

    Variables have the names of x's and y's leaves and a number; the follower's bounds and rows are named in the
    auxiliary file, those of one variable become bounds.

    Args:
        problem: f affine or quadratic, g(x, .) linear in y without products with x, and all constraints affine.
        mps: the path to write to, ending in .mps.
        aux: that of the auxiliary file. Default: the same with the ending .aux.

    Raises:
        InvalidInput: names what these files cannot say.
        ModuleNotFoundError: highspy is not installed; it comes with the extra `reference`.
    """
    problem = problem.validate().on_full_data()
    mps = Path(mps)
    aux = mps.with_suffix(".aux") if aux is None else Path(aux)
    if mps.suffix != ".mps":
        invalid("mps (write_mibs)", mps.name, "a name that ends in .mps", "Rename it.")
    x, y = problem.init(jax.random.key(0))
    model, upper, lower = _rows(problem, x, y)
    n = ravel_pytree(x)[0].size
    names = [*_names(x, "x"), *_names(y, "y")]
    if len({*names}) < len(names):
        names = [f"x_{k}" for k in range(n)] + [f"y_{k}" for k in range(len(names) - n)]
    own = np.arange(len(names)) >= n
    (of_x, upper), (of_y, lower) = (_bounds(rows, mine) for rows, mine in ((upper, ~own), (lower, own)))
    called = [f"{who}_{k}" for who, rows in (("leader", upper), ("follower", lower)) for k in range(len(rows.C))]
    ends = np.where(own, of_y[0], of_x[0]), np.where(own, of_y[1], of_x[1])
    _write(mps, model, ends, upper.joined(lower), names, called)
    costs = [f"{name} {cost:.17g}" for name, cost in zip(names[n:], np.asarray(model.residual.c, float), strict=True)]
    parts = ["@NUMVARS", str(own.sum()), "@NUMCONSTRS", str(len(lower.C)), "@VARSBEGIN", *costs, "@VARSEND"]
    parts += ["@CONSTRSBEGIN", *called[len(upper.C) :], "@CONSTRSEND", "@NAME", mps.stem, "@MPS", mps.name, ""]
    aux.write_text("\n".join(parts), "utf8")


def _rows(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[polynomial.Model, Rows, Rows]:
    """(the functions' coefficients, the leader's rows, the follower's) in (x, y)."""
    polyhedral = all(one.polyhedral for part in (problem.x_set, problem.y_set) for one in part.simple())
    if not isinstance(problem.lower, Minimize) or not polyhedral:
        sets = f"x_set = {type(problem.x_set).__name__}, y_set = {type(problem.y_set).__name__}"
        got = f"{type(problem.lower).__name__}, {sets}"
        invalid("problem (write_mibs)", got, "Minimize(g) and sets described by linear rows", DO)
    found = kkt.numbers(problem, x, y)
    model, m = found.model, ravel_pytree(y)[0].size
    far = np.asarray(polynomial.deviations(problem, x, y, model), float)
    for what, size in zip(kkt.KINDS, far, strict=True):
        if not size <= LINEAR:
            invalid("problem (write_mibs)", f"a deviation of {size:.1e} from that", what, DO)
    if np.asarray(model.residual.J).any():
        invalid("problem (write_mibs)", "a g with products of variables", "g linear in y, with constant costs", DO)
    C, lo, hi, B = (np.asarray(part, float) for part in found.lower)
    D, below, above = (np.asarray(part, float) for part in found.upper)
    upper = Rows(np.pad(D, ((0, 0), (0, m))), below, above).joined(_values(model.G, False), _values(model.H, True))
    lower = Rows(np.concatenate([B, C], axis=1), lo, hi).joined(_values(model.h, False), _values(model.h_eq, True))
    return model, upper, lower


def _values(part: polynomial.Affine, equal: bool) -> Rows:
    """J z + c <= 0, or = 0."""
    J, c = np.asarray(part.J, float), np.asarray(part.c, float)
    return Rows(J, -c if equal else np.full(len(c), -np.inf), -c)


def _bounds(rows: Rows, mine: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], Rows]:
    """((lo, hi) [n + m] by the rows that have one unknown, which is `mine`; the other rows that have an end)."""
    rows = rows.of(np.isfinite(rows.lo) | np.isfinite(rows.hi))
    single = ((rows.C != 0).sum(axis=1) == 1) & rows.C[:, mine].any(axis=1)
    lo, hi = np.full(len(mine), -np.inf), np.full(len(mine), np.inf)
    for row, *ends in zip(*rows.of(single), strict=True):
        j = int(np.argmax(row != 0))
        below, above = sorted(end / row[j] for end in ends)
        lo[j], hi[j] = max(lo[j], below), min(hi[j], above)
    return (lo, hi), rows.of(~single)


def _names(part: PyTree, what: str) -> list[str]:
    """A name for each entry of the raveled variable."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(part):
        label = re.sub(r"\W+", "_", jax.tree_util.keystr(path)).strip("_") or what
        found += [label] if jnp.ndim(leaf) == 0 else [f"{label}_{k}" for k in range(jnp.size(leaf))]
    return found


def _highs() -> tuple[Any, Any]:
    """(a silent HiGHS, its module)."""
    with extra("reference"):
        import highspy
    highs: Any = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    return highs, highspy


def _read(path: Path) -> tuple[Any, Any]:
    """(the model of an MPS file, the module)."""
    highs, highspy = _highs()
    if not path.is_file():
        invalid("mps (read_mibs)", f"no file {path}", "the path of an MPS file", "Look at the path.")
    if path.suffix != ".mps":
        invalid("mps (read_mibs)", path.name, "a file whose name ends in .mps", "Unpack it, or rename it.")
    if highs.readModel(str(path)) == highspy.HighsStatus.kError:
        invalid("mps (read_mibs)", f"{path.name}, which HiGHS cannot read", "an MPS file", "Look at its sections.")
    model = highs.getModel()
    if (len(model.lp_.col_names_), len(model.lp_.row_names_)) != (model.lp_.num_col_, model.lp_.num_row_):
        got = f"{path.name}, in which a name stands twice"
        invalid("mps (read_mibs)", got, "names that differ, each column in one piece", "Sort the file.")
    return model, highspy


def _write(
    path: Path, model: polynomial.Model, ends: tuple[np.ndarray, np.ndarray], rows: Rows, names: list, called: list
) -> None:
    """Write f, the bounds and all rows."""
    from scipy import sparse

    highs, highspy = _highs()
    given = highspy.HighsModel()
    lp, matrix = given.lp_, sparse.csc_array(rows.C.reshape(-1, len(names)))
    lp.num_row_, lp.num_col_ = len(rows.C), len(names)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = np.asarray(model.slope.c, float), *ends
    lp.row_lower_, lp.row_upper_, lp.offset_ = rows.lo, rows.hi, float(model.value)
    lp.col_names_, lp.row_names_ = names, called
    parts = lp.a_matrix_
    parts.start_, parts.index_, parts.value_ = matrix.indptr, matrix.indices, matrix.data
    H = np.asarray(model.slope.J, float)
    if H.any():
        curved = sparse.csc_array(np.tril(H))
        square = given.hessian_
        square.dim_, square.format_ = len(names), highspy.HessianFormat.kTriangular
        square.start_, square.index_, square.value_ = curved.indptr, curved.indices, curved.data
    bad = highspy.HighsStatus.kError
    if highs.passModel(given) == bad or highs.writeModel(str(path)) == bad:
        invalid("mps (write_mibs)", f"{path}, which HiGHS does not write", "a path to write to, and finite numbers", DO)


def _matrix(lp: Any, highspy: Any) -> np.ndarray:
    """The rows' coefficients, [rows, columns]."""
    from scipy import sparse

    parts, shape = lp.a_matrix_, (lp.num_row_, lp.num_col_)
    kind = sparse.csc_array if parts.format_ == highspy.MatrixFormat.kColwise else sparse.csr_array
    data = np.asarray(parts.value_, float), np.asarray(parts.index_, int), np.asarray(parts.start_, int)
    return kind(data, shape=shape).toarray()


def _hessian(given: Any, n: int) -> np.ndarray:
    """H of z'H z/2, of which HiGHS keeps the lower triangle."""
    from scipy import sparse

    if given.dim_ == 0:
        return np.zeros((n, n))
    data = np.asarray(given.value_, float), np.asarray(given.index_, int), np.asarray(given.start_, int)
    half = sparse.csc_array(data, shape=(n, n)).toarray()
    return half + np.tril(half, -1).T


def _auxiliary(path: Path) -> _Auxiliary:
    """Read either form.

    Raises:
        InvalidInput: there is no such file, or a line of it is of neither form.
    """
    if not path.is_file():
        invalid("aux (read_mibs)", f"no file {path}", "the path of an auxiliary file", "Pass aux=.")
    said, section, sign = _Auxiliary([], [], []), "", 1.0
    lines = [line.split() for line in path.read_text("utf8").splitlines()]
    for number, words in enumerate(lines, 1):
        if not words or words[0].startswith(("*", "#")):
            continue
        try:
            if words[0].startswith("@"):
                section = SECTIONS.get(words[0][1:].upper(), "")
            elif section == "variables":
                said.variables.append(words[0])
                said.costs.append(float(words[1]) if len(words) > 1 else 0.0)
            elif section == "rows":
                said.rows.append(words[0])
            elif words[0].upper() in ("LC", "LR", "LO", "OS"):
                sign = _numbered(said, words[0].upper(), words[1], sign)
        except (ValueError, IndexError):
            invalid(f"aux ({path.name}), line {number}", " ".join(words), "a name, or a name and a number", DO)
    if not said.variables or len(said.costs) != len(said.variables):
        got = f"{len(said.variables)} variables and {len(said.costs)} numbers of the objective"
        invalid(f"aux ({path.name})", got, "the follower's variables, a number for each", DO)
    return said._replace(costs=[sign * cost for cost in said.costs])


def _numbered(said: _Auxiliary, word: str, value: str, sign: float) -> float:
    """Take a line of the older form; return the sign of the follower's objective."""
    if word == "LC":
        said.variables.append(int(value))
    elif word == "LR":
        said.rows.append(int(value))
    elif word == "LO":
        said.costs.append(float(value))
    else:
        return float(value)  # 1: he minimises, -1: he maximises
    return sign


def _places(path: Path, wanted: list, names: list) -> np.ndarray:
    """Where the names are, or the numbers themselves; in the order of the auxiliary file."""
    known = {name: k for k, name in enumerate(names)} | {k: k for k in range(len(names))}
    missing = [str(name) for name in wanted if name not in known]
    if missing or len({*wanted}) < len(wanted):
        got = f"{', '.join(missing[:5])}, not in the MPS file" if missing else "a name twice"
        invalid(f"aux ({path.name})", got, "names of the MPS file, or numbers from 0, each once", DO)
    return np.array([known[name] for name in wanted], int)
