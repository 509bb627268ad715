"""Problems written in CVXPY, and in the files of MibS: the same optima, which enumeration confirms."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

import bilevel
from bilevel import BilevelProblem, Box, InvalidInput, Minimize

cp = pytest.importorskip("cvxpy", reason="levels written in CVXPY")
pytest.importorskip("highspy", reason="it reads and writes MPS files")

# min c'x + e'y over x >= 0, y in argmin { d'y : A y + B x <= b, y >= 0 }: instances by name, optima by enumeration
INSTANCES = {
    "candler_townsley": dict(
        c=[-8, -4], e=[4, -40, -4], d=[1, 1, 2],
        A=[[-1, 1, 1], [-1, 2, -0.5], [2, -1, -0.5]], B=[[0, 0], [2, 0], [0, 2]], b=[1, 1, 1], value=-29.2,
    ),
    "anandalingam_white": dict(
        c=[-1], e=[-3], d=[1], A=[[-2], [1], [2], [-2], [2]], B=[[1], [1], [-1], [-1], [-1]],
        b=[-10 + 20, 10 + 10, 12, -12 + 24, 14], value=None,
    ),
    "two_rows": dict(c=[-4], e=[1], d=[1], A=[[-1], [2]], B=[[-2], [1]], b=[-2, 5], value=None),
}  # fmt: skip


def enumerated(c, e, d, A, B, b, **_):
    """The least c'x + e'y over all vertices (x, y) of the joint polyhedron at which y is the follower's best; a linear
    bilevel program that has an optimum has one there.
    """
    c, e, d, A, B, b = (np.asarray(part, float) for part in (c, e, d, A, B, b))
    n, m = len(c), len(e)
    C = np.concatenate([np.concatenate([B, A], axis=1), -np.eye(n + m)])
    h = np.concatenate([b, np.zeros(n + m)])
    best = np.inf
    for rows in map(list, itertools.combinations(range(len(C)), n + m)):
        if abs(np.linalg.det(C[rows])) > 1e-9:
            z = np.linalg.solve(C[rows], h[rows])
            if (C @ z <= h + 1e-9).all():
                follower = linprog(d, A, b - B @ z[:n])
                if follower.status == 0 and d @ z[n:] <= follower.fun + 1e-9:
                    best = min(best, float(c @ z[:n] + e @ z[n:]))
    return best


def in_cvxpy(c, e, d, A, B, b, **_):
    x, y = cp.Variable(len(c), name="x", nonneg=True), cp.Variable(len(e), name="y", nonneg=True)
    lower = cp.Problem(cp.Minimize(np.array(d) @ y), [np.array(A) @ y + np.array(B) @ x <= np.array(b)])
    return bilevel.from_cvxpy(cp.Problem(cp.Maximize(-np.array(c) @ x - np.array(e) @ y)), lower, follower=[y])


def in_files(folder, form, c, e, d, A, B, b, **_):
    """The instance as text, written here line by line; "numbers" is the older form of the auxiliary file."""
    n, m, both = len(c), len(e), np.concatenate([np.array(B), np.array(A)], axis=1)
    names = [f"x{k}" for k in range(n)] + [f"y{k}" for k in range(m)]
    lines = ["NAME case", "ROWS", " N cost", *(f" L r{i}" for i in range(len(b))), "COLUMNS"]
    for name, cost, column in zip(names, [*c, *e], both.T, strict=True):
        lines += [f" {name} cost {cost}", *(f" {name} r{i} {number}" for i, number in enumerate(column) if number)]
    lines += ["RHS", *(f" RHS r{i} {number}" for i, number in enumerate(b)), "ENDATA", ""]
    (folder / "case.mps").write_text("\n".join(lines))
    if form == "names":
        says = ["@NUMVARS", m, "@NUMCONSTRS", len(b), "@VARSBEGIN"]
        says += [*(f"y{k} {cost}" for k, cost in enumerate(d)), "@VARSEND", "@CONSTRSBEGIN"]
        says += [*(f"r{i}" for i in range(len(b))), "@CONSTRSEND", "@NAME", "case", "@MPS", "case.mps"]
    else:
        says = [f"N {m}", f"M {len(b)}", *(f"LC {n + k}" for k in range(m)), *(f"LR {i}" for i in range(len(b)))]
        says += [*(f"LO {-cost}" for cost in d), "OS -1"]
    (folder / "case.aux").write_text("\n".join(map(str, says)))
    return bilevel.read_mibs(folder / "case.mps")


@pytest.mark.parametrize("name", INSTANCES)
def test_both_front_ends_meet_the_enumerated_optimum(name, tmp_path):
    given = INSTANCES[name]
    best = enumerated(**given)
    assert given["value"] is None or best == pytest.approx(given["value"])
    read = in_files(tmp_path, "numbers" if name == "two_rows" else "names", **given)
    assert read.y_names == tuple(f"y{k}" for k in range(len(given["e"])))
    for problem in (in_cvxpy(**given), read.problem):
        found = bilevel.diagnostics.certify(problem)
        assert found.status == bilevel.Status.CONVERGED
        assert found.value == pytest.approx(best, abs=1e-8)


def test_a_file_that_was_written_is_read_as_the_same_problem(tmp_path):
    given = INSTANCES["candler_townsley"]
    first = in_files(tmp_path, "names", **given).problem
    bilevel.write_mibs(in_cvxpy(**given), tmp_path / "again.mps")
    again = bilevel.read_mibs(tmp_path / "again.mps")
    assert again.x_names == ("x_0", "x_1")
    jax.tree.map(np.testing.assert_array_equal, again.problem.coupling, first.coupling)
    jax.tree.map(np.testing.assert_array_equal, again.problem.upper_data, first.upper_data)
    jax.tree.map(np.testing.assert_array_equal, again.problem.y_set, first.y_set)


def test_rows_bounds_and_ranges_go_to_the_level_that_the_file_says(tmp_path):
    """Leader's row with y, a row with two ends, bounds of either level, and an objective that is maximised."""
    (tmp_path / "case.mps").write_text(
        "NAME case\nOBJSENSE\n MAX\nROWS\n N cost\n L both\n G own\nCOLUMNS\n a cost 4\n a both 1\n a own 1\n"
        " b cost 3\n b both 1\n b own 1\nRHS\n RHS both 4\n RHS own 1\nRANGES\n RNG own 5\nBOUNDS\n UP BND a 3\n"
        " LO BND b -1\n UP BND b 9\nENDATA\n"
    )
    (tmp_path / "other.aux").write_text("@VARSBEGIN\nb 1\n@VARSEND\n@CONSTRBEGIN\nown\n@CONSTREND\n")
    problem = bilevel.read_mibs(tmp_path / "case.mps", tmp_path / "other.aux").problem
    assert (problem.x_set.lo, problem.x_set.hi, problem.y_set.lo, problem.y_set.hi) == (0, 3, -1, 9)
    np.testing.assert_allclose(problem.coupling.b, [6, -1])
    x, y = jnp.array([1.0]), jnp.array([2.0])
    assert float(problem.upper(x, y, problem.upper_data.full())) == -10
    np.testing.assert_allclose(problem.upper_constraints.values(x, y)[0], [-1])
    found = bilevel.diagnostics.certify(problem)  # -4 a - 3 max(-1, 1 - a): a = 3
    assert (found.value, float(found.x[0]), float(found.y[0])) == pytest.approx((-9, 3, -1))


def test_a_follower_with_absolute_values_and_a_leader_who_curves():
    """y = soft threshold of (x, 2 x), by hand; the auxiliary variables of |y| and |x| are leaves of their own."""
    x, y = cp.Variable(name="x"), cp.Variable(2, name="y")
    lower = cp.Problem(cp.Minimize(cp.sum_squares(y - cp.hstack([x, 2 * x])) + cp.norm1(y)))
    upper = cp.Problem(cp.Minimize(cp.sum_squares(y - np.array([1.0, 3.0])) + cp.abs(x)), [x <= 5, x >= -5])
    problem = bilevel.from_cvxpy(upper, lower, follower=[y])
    assert {*problem.init(jax.random.key(0))[1]} == {"auxiliary", "y"}
    found = bilevel.diagnostics.certify(problem)
    grid = np.linspace(-5, 5, 100_001)
    points = np.stack([grid, 2 * grid])
    answers = np.sign(points) * np.maximum(np.abs(points) - 0.5, 0)
    F = ((answers - np.array([[1.0], [3.0]])) ** 2).sum(axis=0) + np.abs(grid)
    assert found.status == bilevel.Status.CONVERGED
    assert found.value == pytest.approx(F.min(), abs=1e-7)
    assert float(found.x["x"]) == pytest.approx(grid[F.argmin()], abs=1e-4)


def test_matrices_scalars_and_products_have_cvxpys_values():
    """f and, up to terms of x alone, g at random points; the variables' names in an order that is not theirs."""
    T, s = cp.Variable((2, 3), name="toll", nonneg=True), cp.Variable(name="a")
    Y, w = cp.Variable((3, 2), name="flow"), cp.Variable(name="b")
    rng = np.random.default_rng(0)
    C, D = rng.normal(size=(2, 3)), rng.normal(size=(3, 2))
    g = cp.sum(cp.multiply(D + T.T, Y)) + cp.sum_squares(Y) + s * w + (w - 1) ** 2
    f = cp.sum(cp.multiply(T.T, Y)) + cp.sum(cp.multiply(C, T)) * 2 - s * w + cp.square(s)
    lower = cp.Problem(cp.Minimize(g), [Y @ np.array([1.0, 2.0]) + T[0] <= 3, w >= s])
    upper = cp.Problem(cp.Maximize(f), [cp.sum(Y) + s <= 4])
    problem = bilevel.from_cvxpy(upper, lower, follower=[Y, w])
    values = []
    for _ in range(3):
        for v in (T, s, Y, w):
            v.value = np.abs(rng.normal(size=v.shape))
        x, y = {"toll": jnp.asarray(T.value), "a": jnp.asarray(s.value)}, {}
        y = {"flow": jnp.asarray(Y.value), "b": jnp.asarray(w.value)}
        assert float(problem.upper(x, y, problem.upper_data.full())) == pytest.approx(-f.value)
        inside, _ = bilevel.oracles.coupling_values(problem, x, y)
        held = np.append(Y.value @ [1.0, 2.0] + T.value[0] - 3, s.value - w.value)
        np.testing.assert_allclose(sorted(inside), sorted(held))
        zero = jax.tree.map(jnp.zeros_like, y)
        ours = [float(problem.lower.g(x, at, problem.lower_data.full())) for at in (y, zero)]
        values.append((ours[0] - ours[1], g.value - 1))
        np.testing.assert_allclose(problem.upper_constraints.values(x, y)[0], np.sum(Y.value) + s.value - 4)
    np.testing.assert_allclose(*zip(*values, strict=True), rtol=1e-12, atol=1e-12)


def _levels(**how):
    x, y = cp.Variable(2, name="x"), cp.Variable(2, name="y", **how.get("y", {}))
    g, rows = how.get("g", lambda x, y: cp.sum_squares(y - x))(x, y), how.get("rows", lambda x, y: [y >= 0])(x, y)
    upper = cp.Problem(cp.Minimize(how.get("f", lambda x, y: cp.sum_squares(x + y))(x, y)))
    return upper, cp.Problem(cp.Minimize(g), rows), how.get("follower", lambda x, y: [y])(x, y)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"y": {"integer": True}}, r"variable y .*integer=True"),
        ({"y": {"boolean": [(0,)]}}, r"variable y .*boolean=True"),
        ({"g": lambda x, y: cp.norm2(y - x)}, r"lower .*cones \(soc\)"),
        ({"g": lambda x, y: -cp.sum_squares(y)}, r"lower .*convex"),
        ({"g": lambda x, y: x[0] * cp.sum(y) + cp.sum(cp.multiply(cp.square(x), y))}, r"lower .*not affine in x"),
        ({"rows": lambda x, y: [x[0] * y[0] <= 1]}, r"lower .*move with x"),
        ({"f": lambda x, y: -cp.norm1(y)}, r"upper .*another kind"),
        ({"follower": lambda x, y: [x, y]}, r"upper .*no variable"),
        ({"follower": lambda x, y: []}, r"follower .*0 of kinds"),
        ({"g": lambda x, y: cp.sum_squares(y - x - cp.Variable(2, name="x"))}, r"variables .*differ"),
    ],
)
def test_cvxpy_levels_of_other_kinds_are_refused_by_name(how, says):
    with pytest.raises(InvalidInput, match=says):
        bilevel.from_cvxpy(*_levels(**how))


def test_files_of_other_kinds_are_refused_by_name(tmp_path):
    given = INSTANCES["two_rows"]
    in_files(tmp_path, "names", **given)
    mps, aux = tmp_path / "case.mps", tmp_path / "case.aux"
    with pytest.raises(InvalidInput, match="no file"):
        bilevel.read_mibs(mps, tmp_path / "none.aux")
    aux.write_text(aux.read_text().replace("y0", "z0"))
    with pytest.raises(InvalidInput, match=r"case\.aux.*z0, not in the MPS file"):
        bilevel.read_mibs(mps)
    text = mps.read_text()
    mps.write_text(text.replace("RHS\n", " x0 r1 2\nRHS\n", 1))
    with pytest.raises(InvalidInput, match=r"a name stands twice"):
        bilevel.read_mibs(mps)
    mps.write_text(text.replace("ENDATA", "BOUNDS\n LI BND y0 0\nENDATA"))
    with pytest.raises(InvalidInput, match=r"case\.mps.*1 whole or semi-continuous variables: y0"):
        bilevel.read_mibs(mps)
    with pytest.raises(InvalidInput, match=r"write_mibs.*products of variables"):
        bilevel.write_mibs(bilevel.from_cvxpy(*_levels()), tmp_path / "new.mps")
    curved = BilevelProblem(
        lambda x, y, batch: jnp.sum(x) + jnp.sum(y), Minimize(lambda x, y, batch: jnp.sum(y)),
        bilevel.Ball(1.0), Box(0.0, 1.0), init=lambda key: (jnp.zeros(1), jnp.zeros(1)),
    )  # fmt: skip
    with pytest.raises(InvalidInput, match=r"write_mibs.*Ball"):
        bilevel.write_mibs(curved, tmp_path / "new.mps")


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "bilevax\[reference\]"'):
        bilevel.from_cvxpy(*_levels())
