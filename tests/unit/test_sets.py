"""Sets: projections against CLARABEL and closed forms, samples against their stated distributions, named errors."""

import cvxpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, nnls
from scipy.stats import beta, kstest

from bilevel import Ball, Box, InvalidInput, Polyhedron, Product, Reals, Simplex
from bilevel.qp.least_distance import least_distance

N = 5  # one size: each set compiles once
TOL = 1e-10
seeds = st.integers(0, 2**32 - 1)
project = jax.jit(lambda chosen, z: chosen.project(z))
nearest = jax.jit(least_distance)


def draw_box(rng):
    lo, width = rng.normal(size=N), rng.exponential(size=N) * rng.integers(0, 2, N)  # half of the intervals are points
    hi = np.where(rng.random(N) < 0.2, np.inf, lo + width)
    return Box(jnp.asarray(np.where(rng.random(N) < 0.2, -np.inf, lo)), jnp.asarray(hi))


def draw_ball(rng):
    return Ball(jnp.asarray(rng.choice([0.0, 1e-9, 0.7, 50.0])), jnp.asarray(rng.normal(size=N)))


def draw_simplex(rng):
    return Simplex(jnp.asarray(rng.choice([1e-6, 1.0, 30.0])))


def draw_polyhedron(rng):
    """Non-empty, 12 rows: tight rows, repeated ones, an equality as two rows, nearly parallel ones, zero rows."""
    A, inside = rng.normal(size=(12, N)), rng.normal(size=N) * rng.choice([1.0, 100.0])
    A[1], A[2] = -A[0], A[0] + 1e-4 * rng.normal(size=N)
    A[3], A[4] = 2 * A[5], rng.integers(-1, 2, N)
    A[6] *= rng.integers(0, 2)
    slack = rng.exponential(size=12) * rng.integers(0, 2, 12)
    slack[0] = slack[1] = 0
    return Polyhedron(jnp.asarray(A), jnp.asarray(A @ inside + slack))


SETS = {"box": draw_box, "ball": draw_ball, "simplex": draw_simplex, "polyhedron": draw_polyhedron}


def constraints(chosen, z):
    """The set for cvxpy."""
    if isinstance(chosen, Box):
        lo, hi = np.asarray(chosen.lo), np.asarray(chosen.hi)
        low, high = np.isfinite(lo), np.isfinite(hi)
        return [z[low] >= lo[low], z[high] <= hi[high]]
    if isinstance(chosen, Ball):
        return [cvxpy.norm(z - np.asarray(chosen.center)) <= float(chosen.radius)]
    if isinstance(chosen, Simplex):
        return [z >= 0, cvxpy.sum(z) == float(chosen.scale)]
    return [np.asarray(chosen.A) @ z <= np.asarray(chosen.b)]


@pytest.mark.parametrize("kind", SETS)
@given(seed=seeds, distance=st.sampled_from([1e-3, 1.0, 1e4]))
@settings(max_examples=40)
def test_projection_properties(kind, seed, distance):
    rng = np.random.default_rng(seed)
    chosen = SETS[kind](rng)
    a, b = (jnp.asarray(distance * rng.normal(size=N)) for _ in range(2))
    pa, pb = project(chosen, a), project(chosen, b)
    size = 1 + max(jnp.linalg.norm(a), jnp.linalg.norm(b), jnp.linalg.norm(pa))
    assert jnp.linalg.norm(project(chosen, pa) - pa) <= 1e-9 * size  # idempotent; 1e-4 between rows costs four digits
    assert jnp.linalg.norm(pa - pb) <= jnp.linalg.norm(a - b) + 1e-9 * size  # non-expansive
    assert chosen.violation(pa) <= 1e-9 * size
    # Characterisation of the projection: (a - pa)'(c - pa) <= 0 for all c of the set.
    assert jnp.vdot(a - pa, pb - pa) <= 1e-9 * size**2


@pytest.mark.parametrize("kind", SETS)
def test_projection_equals_cvxpy(kind):
    compared = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        chosen, point = SETS[kind](rng), 3 * rng.normal(size=N)
        z = cvxpy.Variable(N)
        program = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(z - point)), constraints(chosen, z))
        try:
            program.solve(cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        except (cvxpy.SolverError, UserWarning):
            continue  # it says itself that it failed, or that its answer may be inaccurate
        if program.status != cvxpy.OPTIMAL:
            continue
        compared += 1
        want = z.value
        got = np.asarray(project(chosen, jnp.asarray(point)))
        # A gap of 1e-10 in the squared distance leaves about 1e-5 of distance; where the reference is looser than our
        # answer is feasible, the nearer of the two is right.
        assert np.linalg.norm(got - point) <= np.linalg.norm(want - point) + 1e-6
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * (1 + np.linalg.norm(want)))
    assert compared >= 6


def draw_rows(rng, kind, m, n):
    A, z = rng.normal(size=(m, n)), rng.normal(size=n)
    if kind == "any":
        return A, rng.normal(size=m)
    if kind == "lattice":  # many ties, repeated and contradicting rows
        return rng.integers(-2, 3, (m, n)).astype(float), rng.integers(-2, 3, m).astype(float)
    if kind == "scaled":
        return A * 10.0 ** rng.uniform(-4, 4, (m, 1)), rng.normal(size=m)
    if kind == "equalities":
        k = n // 2
        A[k : 2 * k] = -A[:k]
        return A, A @ z + np.where(np.arange(m) < 2 * k, 0, rng.random(m))
    A[1] = -A[0] + 1e-6 * rng.normal(size=n)  # a wedge, 1e-6 wide
    return A, A @ z + 1e-3 * rng.random(m)


@pytest.mark.parametrize(("m", "n"), [(3, 2), (12, 5), (40, 10)])
def test_least_distance_against_linear_programming_and_multipliers(m, n):
    """HiGHS decides whether the set is empty; d is right where d = -A' u with u >= 0 on the active rows (NNLS)."""
    empty = 0
    for seed in range(60):
        rng = np.random.default_rng([seed, m])
        kind = ("any", "lattice", "scaled", "equalities", "wedge")[seed % 5]
        A, slack = draw_rows(rng, kind, m, n)
        d = np.asarray(nearest(jnp.asarray(A), jnp.asarray(slack)))
        program = linprog(np.zeros(n), A_ub=A, b_ub=slack, bounds=(None, None), method="highs")
        if program.status not in (0, 2):
            continue  # HiGHS had numerical trouble: no reference
        empty += program.status == 2
        assert np.isfinite(d).all() == (program.status == 0), (seed, kind)
        if program.status == 2:
            continue
        length, size = np.maximum(np.linalg.norm(A, axis=1), 1e-300), 1 + np.linalg.norm(d)
        assert np.max((A @ d - slack) / length) <= TOL * size, (seed, kind)
        active = A @ d - slack > -1e-8 * length * size
        error = nnls((A[active] / length[active, None]).T, -d)[1] if active.any() else np.linalg.norm(d)
        assert error <= 1e-8 * size, (seed, kind)
    assert 3 <= empty <= 55  # both answers were asked for


@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-9])
def test_least_distance_sees_a_small_contradiction(gap):
    """z1 <= 1 and z1 >= 1 + gap: a former version answered a finite d here."""
    d = nearest(jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, -1 - gap, -3.0]))
    assert jnp.isnan(d).all()


@pytest.mark.parametrize("width", [1e-2, 1e-5, 1e-8])
def test_least_distance_finds_the_far_end_of_a_wedge(width):
    d = nearest(jnp.array([[1.0, width], [-1.0, width]]), jnp.array([-1.0, -1.0]))
    np.testing.assert_allclose(d, [0, -1 / width], rtol=1e-7, atol=1e-7)


def test_polyhedra_with_one_point_far_away():
    """Thirty rows through one point far from the origin: rounding of A z must not make the set empty."""
    many = jax.jit(jax.vmap(lambda A, b, z: Polyhedron(A, b).project(z)))
    for scale in (1.0, 1e3, 1e6):
        rng = np.random.default_rng(0)
        A, inside = rng.normal(size=(200, 30, N)), scale * rng.normal(size=(200, N))
        b, z = np.einsum("kij,kj->ki", A, inside), inside + rng.normal(size=(200, N))
        got = many(jnp.asarray(A), jnp.asarray(b), jnp.asarray(z))
        np.testing.assert_allclose(got, inside, rtol=0, atol=1e-10 * scale)


def test_zero_rows_and_no_rows():
    zero = jnp.zeros((1, 2))
    assert jnp.isnan(nearest(zero, jnp.array([-1.0]))).all()
    np.testing.assert_array_equal(nearest(zero, jnp.array([0.0])), [0, 0])
    np.testing.assert_array_equal(Polyhedron(jnp.zeros((0, 2)), jnp.zeros(0)).project(jnp.array([3.0, 4.0])), [3, 4])


def test_float32_projection():
    rng = np.random.default_rng(0)
    for kind in SETS:
        for _ in range(5):
            chosen = SETS[kind](rng)
            small = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), chosen)
            point = 3 * rng.normal(size=N)
            got = project(small, jnp.asarray(point, jnp.float32))
            assert got.dtype == jnp.float32
            if kind != "polyhedron":
                np.testing.assert_allclose(got, project(chosen, jnp.asarray(point)), rtol=1e-4, atol=1e-4)
            else:  # rows 1e-4 apart: in float32 only feasibility is certain
                assert small.violation(got) <= 1e-3 * (1 + jnp.max(jnp.abs(small.b)))


TREE = {"a": jnp.zeros((2, 3)), "b": (jnp.zeros(()), jnp.zeros(4))}


def random_tree(seed, scale=2.0):
    flat, unravel = jax.flatten_util.ravel_pytree(TREE)
    return unravel(scale * jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype))


ON_TREE = {
    "reals": Reals(),
    "box": Box({"a": -0.5, "b": (0.0, jnp.full(4, -1.0))}, 0.5),
    "ball": Ball(1.5, {"a": 0.25, "b": 0.0}),
    "simplex": Simplex(2.0),
    "polyhedron": Polyhedron(np.random.default_rng(3).normal(size=(6, 11)), np.full(6, 0.3)),
    "product": Product({"a": Box(-1.0, 0.0), "b": (Reals(), Simplex())}),
}


@pytest.mark.parametrize("name", ON_TREE)
def test_pytrees(name):
    chosen, z = ON_TREE[name], random_tree(0)
    chosen.validate("x_set", TREE)
    moved = project(chosen, z)
    assert jax.tree.structure(moved) == jax.tree.structure(z)
    if name != "polyhedron":  # compiling its loop once more would be slow
        eager = chosen.project(z)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-14), moved, eager)
    assert [leaf.shape for leaf in jax.tree.leaves(moved)] == [leaf.shape for leaf in jax.tree.leaves(z)]
    assert chosen.violation(moved) <= 1e-14
    assert (chosen.violation(z) > 0.1) == (name != "reals")
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(random_tree(k) for k in range(3)))
    together = jax.jit(jax.vmap(chosen.project))(batch)
    for k in range(3):
        one = project(chosen, random_tree(k))
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=0, atol=1e-13), together, one)
    sample = jax.jit(chosen.sample)(jax.random.key(1), TREE)
    assert jax.tree.structure(sample) == jax.tree.structure(TREE)
    assert chosen.violation(sample) <= 1e-12


def test_flattening_does_not_change_the_ball_and_the_simplex():
    z = random_tree(5)
    flat, _ = jax.flatten_util.ravel_pytree(z)
    for chosen in (Ball(1.5), Simplex(2.0)):
        whole = jax.flatten_util.ravel_pytree(chosen.project(z))[0]
        np.testing.assert_allclose(whole, chosen.project(flat), atol=1e-14)


@jax.jit
def _draw(chosen, keys, like):
    return jax.vmap(lambda key: chosen.sample(key, like))(keys)


def samples(chosen, like, count=2000):
    return np.asarray(_draw(chosen, jax.random.split(jax.random.key(7), count), like))


# Kolmogorov-Smirnov on 2,000 draws with a fixed key, level 1e-3 for each statistic.
def test_box_samples():
    drawn = samples(Box(jnp.array([-1.0, 2.0, -jnp.inf, 0.0]), jnp.array([3.0, 2.0, 1.0, jnp.inf])), jnp.zeros(4))
    assert kstest(drawn[:, 0], "uniform", (-1, 4)).pvalue > 1e-3
    assert np.all(drawn[:, 1] == 2)
    assert kstest(1 - drawn[:, 2], "expon").pvalue > 1e-3
    assert kstest(drawn[:, 3], "expon").pvalue > 1e-3
    assert kstest(samples(Box(-jnp.inf, jnp.inf), jnp.zeros(1))[:, 0], "norm").pvalue > 1e-3


def test_ball_samples():
    center = np.array([1.0, -2.0, 0.5])
    drawn = samples(Ball(2.0, jnp.asarray(center)), jnp.zeros(3)) - center
    assert kstest((np.linalg.norm(drawn, axis=1) / 2) ** 3, "uniform").pvalue > 1e-3  # volume inside r: (r/2)^3
    for k in range(3):  # a coordinate of the uniform ball in three dimensions is Beta(2, 2) on [-2, 2]
        assert kstest(drawn[:, k] / 4 + 0.5, beta(2, 2).cdf).pvalue > 1e-3


def test_simplex_samples():
    drawn = samples(Simplex(3.0), jnp.zeros(4)) / 3
    np.testing.assert_allclose(drawn.sum(axis=1), 1, atol=1e-12)
    for k in range(4):
        assert kstest(drawn[:, k], beta(1, 3).cdf).pvalue > 1e-3


def test_polyhedron_samples_are_inside_and_spread():
    A, b = np.vstack([np.eye(2), -np.eye(2)]), np.ones(4)  # the square [-1, 1]^2
    drawn = samples(Polyhedron(jnp.asarray(A), jnp.asarray(b)), jnp.zeros(2), 500)
    assert np.abs(drawn).max() <= 1 + 1e-12
    assert kstest(drawn[:, 0], "uniform", (-1, 2)).pvalue > 1e-3
    A[2:] = [1, 1], [-1, -1]  # an equality
    line = Polyhedron(jnp.asarray(A), jnp.array([9.0, 9.0, 1.0, -1.0]))
    np.testing.assert_allclose(samples(line, jnp.zeros(2), 500).sum(axis=1), 1, atol=1e-9)


def test_violation_is_zero_exactly_inside():
    inside, outside = jnp.array([0.25, 0.75]), jnp.array([3.0, 4.0])
    assert Box(0.0, 1.0).violation(inside) == 0
    np.testing.assert_allclose(Box(0.0, 1.0).violation(outside), np.hypot(2, 3), rtol=1e-15)
    assert Ball(1.0).violation(inside) == 0
    np.testing.assert_allclose(Ball(1.0).violation(outside), 4.0, rtol=1e-15)
    np.testing.assert_allclose(Simplex().violation(inside), 0, atol=1e-16)
    np.testing.assert_allclose(Simplex().violation(jnp.array([1.0, 1.0])), np.sqrt(0.5), rtol=1e-15)
    half = Polyhedron(jnp.array([[1.0, 0.0]]), jnp.array([1.0]))
    assert (half.violation(inside), half.violation(outside)) == (0, 2)
    both = Product((Box(0.0, 1.0), Ball(1.0)))
    np.testing.assert_allclose(both.violation((outside, outside)), np.sqrt(13 + 16), rtol=1e-15)


def test_active():
    z = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_array_equal(Box(0.0, 1.0).active(z), [True, False, True])
    np.testing.assert_array_equal(Box(-0.1, 1.1).active(z, 0.15), [True, False, True])
    np.testing.assert_array_equal(Simplex().active(z), [True, False, False])
    assert Ball(np.sqrt(1.25)).active(z, 1e-12)
    assert not Ball(2.0).active(z)
    rows = Polyhedron(jnp.array([[1.0, 0, 0], [0, 0, 1.0]]), jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(rows.active(z), [False, True])
    assert not Reals().active(z).any()
    inside, on = Product((Box(0.0, 1.0), Ball(1.0))).active((z, jnp.array([1.0, 0.0])))
    np.testing.assert_array_equal(inside, [True, False, True])
    assert on


POINT = jnp.zeros(3)
BAD = {
    "lo > hi": (Box(1.0, -1.0), "x_set", "lo <= hi"),
    "lo > hi in one entry": (Box(jnp.zeros(3), jnp.array([1.0, -1.0, 1.0])), "index 1", "lo <= hi"),
    "lo = inf": (Box(jnp.inf, jnp.inf), "lo = inf", "lo <= hi"),
    "a word for a bound": (Box("low", 1.0), "x_set.lo", "numbers"),
    "NaN bound": (Box(jnp.nan, 1.0), "x_set.lo", "NaN"),
    "NaN upper bound": (Box(0.0, jnp.array([1.0, jnp.nan, 1.0])), "x_set.hi", "NaN"),
    "bound's shape": (Box(jnp.zeros(2), 1.0), "x_set.lo", "broadcasts to shapes (3,)"),
    "bound's structure": (Box({"a": 0.0}, 1.0), "x_set.lo", "broadcasts to shapes (3,)"),
    "negative radius": (Ball(-1.0), "x_set.radius", "finite number >= 0"),
    "NaN radius": (Ball(jnp.nan), "x_set.radius", "finite number >= 0"),
    "two radii": (Ball(jnp.ones(2)), "x_set.radius", "one finite number"),
    "centre's shape": (Ball(1.0, jnp.zeros(2)), "x_set.center", "broadcasts to shapes (3,)"),
    "NaN centre": (Ball(1.0, jnp.array([0, jnp.nan, 0])), "x_set.center", "NaN"),
    "empty simplex": (Simplex(0.0), "x_set.scale", "finite number > 0"),
    "infinite simplex": (Simplex(jnp.inf), "x_set.scale", "finite number > 0"),
    "columns": (Polyhedron(jnp.ones((2, 4)), jnp.ones(2)), "x_set.A", "[rows, 3]"),
    "rows": (Polyhedron(jnp.ones((2, 3)), jnp.ones(3)), "x_set.b", "[2]"),
    "NaN row": (Polyhedron(jnp.full((1, 3), jnp.nan), jnp.ones(1)), "x_set.A", "finite numbers"),
    "infinite bound": (Polyhedron(jnp.ones((1, 3)), jnp.array([jnp.inf])), "x_set.b", "finite numbers"),
    "empty polyhedron": (Polyhedron(np.array([[1.0, 0, 0], [-1.0, 0, 0]]), -np.ones(2)), "empty set", "A z <= b"),
    "product's structure": (Product((Reals(), Reals())), "x_set (Product)", "prefix"),
    "product's factor": (Product(Box(1.0, 0.0)), "x_set", "lo <= hi"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_named_errors(name):
    chosen, argument, expected = BAD[name]
    with pytest.raises(InvalidInput) as caught:
        chosen.validate("x_set", POINT)
    message = str(caught.value)
    assert argument in message
    assert expected in message
    assert "got" in message
    assert "expected" in message
    assert message.endswith(".")


def test_good_sets_pass():
    good = (Box(-jnp.inf, jnp.inf), Box(0, 1), Box(jnp.zeros(3), 1.0), Ball(0.0), Ball(1, jnp.ones(3)), Simplex(2),
            Polyhedron(np.ones((1, 3), int), np.zeros(1, int)), Polyhedron(np.zeros((0, 3)), np.zeros(0)))  # fmt: skip
    for chosen in good:
        chosen.validate("x_set", POINT)
    np.testing.assert_array_equal(Ball(0.0).project(jnp.array([2.0, -1.0, 0.5])), 0)


def test_bounds_can_be_traced():
    width = jax.jit(lambda hi: Box(0.0, hi).project(jnp.array([5.0])))(2.0)
    np.testing.assert_array_equal(width, [2.0])
    slope = jax.grad(lambda r: Ball(r).project(jnp.array([3.0, 4.0])).sum())(1.0)
    np.testing.assert_allclose(slope, 1.4, rtol=1e-12)


def test_ball_keeps_the_direction_of_points_whose_square_overflows():
    for dtype, far in ((jnp.float32, 1e20), (jnp.float64, 1e160)):
        np.testing.assert_allclose(Ball(1.0).project(jnp.full(2, far, dtype)), 0.5**0.5, rtol=1e-6)


def test_violation_of_a_polyhedron_is_a_distance():
    assert float(Polyhedron(jnp.array([[1e-10]]), jnp.zeros(1)).violation(jnp.ones(1))) == pytest.approx(1.0)
