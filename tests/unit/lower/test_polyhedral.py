"""Polyhedral lower levels against Clarabel with dense KKT systems, against closed forms and finite differences."""

import dataclasses
import functools

import clarabel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import bilevel
from bilevel import constraints, oracles
from bilevel.backend.precision import full_precision
from bilevel.lower import ActiveSet, Warm, polyhedral

N, ROWS, DIM_X = 50, 30, 6
Status = bilevel.Status


def upper(x, y, batch):
    return batch["t"] @ y + 0.5 * jnp.sum(y**2) + x @ batch["Q"] @ y + 0.5 * jnp.sum(x**2)


def lower(x, y, batch):
    return 0.5 * y @ batch["H"] @ y + (batch["G"] @ x + batch["c"]) @ y


def cosh(x, y, batch):
    return lower(x, y, batch) + jnp.sum(jnp.cosh(y - jnp.sum(x)))


def instance(seed, dtype=np.float64):
    """Random sizes up to (50, 30), padded; chosen y*, active set, multipliers and slacks in [0.1, 1] at x = 0."""
    rng = np.random.default_rng(seed)
    n, k = rng.integers(2, N + 1), rng.integers(1, ROWS + 1)
    active = rng.permutation(k) < rng.integers(0, min(n, k) + 1)
    Z = rng.normal(size=(n, n)) / np.sqrt(n)
    H, C = Z @ Z.T + 0.05 * np.eye(n), rng.normal(size=(k, n))
    y, lam = rng.normal(size=n), np.where(active, rng.uniform(0.1, 1, k), 0)
    b = C @ y + np.where(active, 0, rng.uniform(0.1, 1, k) * np.linalg.norm(C, axis=1))
    pad = lambda array, *shape: np.pad(array, [(0, s - a) for s, a in zip(shape, array.shape, strict=True)])  # noqa: E731
    data = {
        "H": pad(H, N, N) + np.diag(np.arange(N) >= n), "G": pad(rng.normal(size=(n, DIM_X)), N, DIM_X),
        "c": pad(-H @ y - C.T @ lam, N), "t": pad(rng.normal(size=n), N),
        "Q": pad(rng.normal(size=(DIM_X, n)), DIM_X, N),
    }  # fmt: skip
    rows = (pad(C, ROWS, N), pad(rng.normal(size=(k, DIM_X)), ROWS, DIM_X), pad(b, ROWS) + (np.arange(ROWS) >= k))
    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)  # noqa: E731
    return cast(data), cast(rows), pad(y, N), pad(active, ROWS)


@functools.cache
def start(dtype):
    """The same function for the same dtype, so that another instance compiles nothing."""
    return lambda key: (jnp.zeros(DIM_X, dtype), jnp.zeros(N, dtype))


def make(data, rows, g=lower, dtype=np.float64, **more):
    full = bilevel.Full(data)
    coupling = None if rows is None else bilevel.LinearCoupling(*rows)
    return bilevel.BilevelProblem(
        upper, bilevel.Minimize(g), coupling=coupling, upper_data=full, lower_data=full, init=start(dtype), **more
    )


@jax.jit
def solve(problem, x, y, start=None):
    return polyhedral.solve(problem, x, y, problem.lower_data.full(), warm=Warm(start))


def gradient(problem, x, y, start=None):
    """(F, grad F, solution) by the adjoint system."""
    data, found = problem.lower_data.full(), solve(problem, x, y, start)
    value, (fx, fy) = oracles.upper_value_and_gradients(problem, x, found.y, data)
    u, v = polyhedral.adjoint(found, fy)
    by_rows = constraints.rows(problem, x, y).B.T @ v
    return value, fx - oracles.cross(problem, x, found.y, u, data) - by_rows, found


jitted_gradient = jax.jit(gradient)


def dense_gradient(data, rows, x, y, active):
    """The solution y and grad F from the dense KKT system on the rows `active`, in NumPy."""
    H, G, c, t, Q = (np.asarray(data[name], float) for name in ("H", "G", "c", "t", "Q"))
    A, B, b = (np.asarray(part, float) for part in rows)
    A, B, b = A[active], B[active], b[active]
    M = np.block([[H, A.T], [A, np.zeros((len(A), len(A)))]])
    y = np.linalg.solve(M, np.concatenate([-G @ x - c, b - B @ x]))[: len(c)]
    uv = np.linalg.solve(M, np.concatenate([t + y + Q.T @ x, np.zeros(len(A))]))
    return y, x + Q @ y - G.T @ uv[: len(c)] - B.T @ uv[len(c) :]


def by_clarabel(data, rows, x):
    """(status, y, multipliers) of the lower level."""
    H, G, c = (np.asarray(data[name], float) for name in ("H", "G", "c"))
    A, B, b = (np.asarray(part, float) for part in rows)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
        setattr(settings, name, 1e-11)
    cones = [clarabel.NonnegativeConeT(len(b))]
    parts = sparse.csc_matrix(np.triu(H)), G @ x + c, sparse.csc_matrix(A), b - B @ x
    out = clarabel.DefaultSolver(*parts, cones, settings).solve()
    return str(out.status), np.array(out.x), np.array(out.z)


@jax.jit
def one_by_one(data, rows, points):
    """`gradient` of every instance at every point."""
    one = lambda parts, x: gradient(make(*parts), x, jnp.zeros_like(parts[0]["c"]))  # noqa: E731
    return jax.lax.map(lambda parts: jax.lax.map(lambda x: one(parts, x), points), (data, rows))


def stacked(seeds, dtype=np.float64):
    instances = [instance(seed, dtype) for seed in seeds]
    return instances, jax.tree.map(lambda *leaves: jnp.stack(leaves), *[parts[:2] for parts in instances])


def relative(a, b):
    return np.linalg.norm(np.asarray(a, float) - b) / np.linalg.norm(b)


def test_200_instances_against_clarabel_dense_kkt_and_finite_differences():
    instances, (data, rows) = stacked(range(200))
    rng = np.random.default_rng(0)
    direction = rng.normal(size=DIM_X)
    direction = jnp.asarray(direction / np.linalg.norm(direction))
    x = jnp.asarray(1e-3 * rng.normal(size=DIM_X))

    # F is quadratic on a face: central differences are exact, up to rounding, while the face does not change.
    points = x[None] + 2e-3 * jnp.array([0.0, 1.0, -1.0])[:, None] * direction[None]
    values, slopes, found = one_by_one(data, rows, points)
    differences, slopes = (values[:, 1] - values[:, 2]) / 4e-3, slopes[:, 0]
    same = jnp.all(found.active == found.active[:, :1], axis=(1, 2))
    found = jax.tree.map(lambda leaf: leaf[:, 0], found)
    compared = 0
    for i, (data, rows, y_zero, _) in enumerate(instances):
        status, y_clarabel, multipliers = by_clarabel(data, rows, x)
        slack = np.asarray(rows[2] - rows[1] @ x) - np.asarray(rows[0]) @ y_clarabel
        active = multipliers > slack
        assert status == "Solved"
        np.testing.assert_array_equal(np.asarray(found.active[i]) == 1, active)
        y_exact, exact = dense_gradient(data, rows, np.asarray(x), y_zero, active)
        assert relative(found.y[i], y_exact) <= 1e-10
        assert relative(slopes[i], exact) <= 1e-9
        assert Status(int(found.status[i])) == Status.CONVERGED
        assert found.residual[i] <= 1e-11 * (1 + np.linalg.norm(data["c"]))
        if same[i]:
            compared += 1
            scale = np.linalg.norm(slopes[i])
            assert abs(differences[i] - slopes[i] @ direction) <= 1e-9 * scale
    assert compared >= 150
    assert sum(chosen.any() for *_, chosen in instances) >= 150


def test_kept_factors_serve_another_x_and_stale_ones_are_noticed():
    data, rows, _, _ = instance(3)
    problem, x, y = make(data, rows), jnp.full(DIM_X, 1e-3), jnp.zeros(N)
    begin = solve(problem, jnp.zeros(DIM_X), y)
    again = jax.jit(
        lambda problem, y, found: polyhedral.solve(problem, x, y, problem.lower_data.full(), warm=found.warm())
    )
    kept, exact = again(problem, begin.y, begin), solve(problem, x, y)
    assert Status(int(kept.status)) == Status.CONVERGED
    np.testing.assert_allclose(kept.y, exact.y, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(kept.active, exact.active)
    at_rest = again(problem, exact.y, exact)
    assert Status(int(at_rest.status)) == Status.CONVERGED
    assert at_rest.steps == 2  # nothing to refine
    stale = again(make(data | {"H": 5 * data["H"]}, rows), y, begin)
    assert Status(int(stale.status)) == Status.STALLED


def test_where_a_warm_start_goes_and_where_it_went():
    """As an argument; in the settings with a warning; and not to a method that knows no active set."""
    data, rows, _, _ = instance(3)
    problem, x, y = make(data, rows), jnp.full(DIM_X, 1e-3), jnp.zeros(N)
    found = solve(problem, jnp.zeros(DIM_X), y)
    new = bilevel.hypergradient(problem, x, found.y, warm=found.warm())
    with pytest.warns(DeprecationWarning, match="warm=Warm"):
        settings = ActiveSet(start=found.active, factor=found.warm().factor, inverse=found.inverse)
    old = bilevel.hypergradient(problem, x, found.y, lower=settings)
    np.testing.assert_array_equal(old.gradient, new.gradient)
    exact = jax.jit(ActiveSet().solve)(problem, x, y, problem.lower_data.full(), Warm(found.active))
    np.testing.assert_allclose(exact.y, new.y, atol=1e-12)
    free = dataclasses.replace(problem, coupling=None)
    with pytest.raises(NotImplementedError, match="warm is for ActiveSet"):
        bilevel.hypergradient(free, x, warm=found.warm())


def test_kept_factors_of_a_nearby_problem_are_made_up_for_by_refinement_or_refused():
    data, rows, y_zero, active = instance(3)
    x, begin = jnp.full(DIM_X, 1e-3), solve(make(data, rows), jnp.zeros(DIM_X), jnp.zeros(N))
    gradient = jax.jit(
        lambda problem, found: bilevel.hypergradient(problem, x, found.y, warm=found.warm(), estimate=False)
    )
    for factor, C in ((1.02, rows[0]), (1.0, 1.001 * rows[0] + 1e-3)):
        near, moved = data | {"H": factor * data["H"]}, (C, *rows[1:])
        found = gradient(make(near, moved), begin)
        _, exact = dense_gradient(near, moved, np.asarray(x), y_zero, active)
        assert Status(int(found.status)) == Status.UNCHECKED
        assert relative(found.gradient, exact) <= 1e-9
    # Other normals, under which a row that was inactive is violated at the point that the old factors find.
    i = np.flatnonzero(~active)[0]
    turned = gradient(make(data, with_rows(rows, (i, -rows[0][i], rows[1][i], -9.0))), begin)
    assert turned.status == Status.STALLED
    assert np.isnan(turned.value)


def test_float32_under_vmap():
    """The error in float32 that docs/design.md states."""
    instances, (data, rows) = stacked(range(24), np.float32)
    one = lambda data, rows: gradient(make(data, rows, dtype=np.float32), *start(np.float32)(None))[1:]  # noqa: E731
    slopes, found = jax.jit(full_precision(jax.vmap(one)))(data, rows)
    errors = []
    for i, (data, rows, y, active) in enumerate(instances):
        assert Status(int(found.status[i])) == Status.CONVERGED
        np.testing.assert_array_equal(found.active[i] == 1, active)
        errors.append(relative(slopes[i], dense_gradient(data, rows, np.zeros(DIM_X), y, active)[1]))
    assert np.median(errors) <= 2e-6
    assert max(errors) <= 2e-4


def with_rows(rows, *changes):
    """The rows with (index, C, B, b) replaced."""
    C, B, b = rows
    for i, c, beta, bound in changes:
        C, B, b = C.at[i].set(c), B.at[i].set(beta), b.at[i].set(bound)
    return C, B, b


def test_infeasible_rows_are_found_and_named():
    data, rows, y, _ = instance(0)
    x, contradiction = jnp.zeros(DIM_X), jnp.ones(N)
    none = with_rows(rows, (28, contradiction, 0.0, -1.0), (29, -contradiction, 0.0, 0.99))
    found = solve(make(data, none), x, y)
    assert Status(int(found.status)) == Status.INFEASIBLE_LOWER
    assert np.isnan(found.y).all()
    assert np.isnan(found.margin)
    impossible = solve(make(data, with_rows(rows, (29, 0.0, 0.0, -0.1))), x, y)  # 0 <= -0.1
    assert Status(int(impossible.status)) == Status.INFEASIBLE_LOWER
    narrow = solve(make(data, with_rows(rows, (28, contradiction, 0.0, -1.0), (29, -contradiction, 0.0, 1.0))), x, y)
    assert int(narrow.status) in (Status.CONVERGED, Status.WEAKLY_ACTIVE)  # an equality in two rows
    np.testing.assert_allclose(narrow.y.sum(), -1, atol=1e-12)


@pytest.mark.parametrize("kind", ["zero multiplier", "touching", "duplicate", "combination"])
def test_weakly_active_and_dependent_rows(kind):
    """The y is right, the status says WEAKLY_ACTIVE, and nothing is NaN."""
    seed = next(s for s in range(100) if 3 <= instance(s)[3].sum() <= 8 and instance(s)[3][28:].sum() == 0)
    data, rows, y, active = instance(seed)
    i, j = np.flatnonzero(active)[:2]
    C, B, b = rows
    if kind == "zero multiplier":  # the gradient of g moves so that row i's multiplier is zero
        x = jnp.zeros(DIM_X)
        multipliers = solve(make(data, rows), x, y).multipliers
        data = data | {"c": data["c"] + multipliers[i] * C[i]}
    elif kind == "touching":  # a new row through y with a normal that y does not press on
        rows = with_rows(rows, (29, C[i] + 1.0, 0.0, (C[i] + 1.0) @ y))
    elif kind == "duplicate":
        rows = with_rows(rows, (29, 3 * C[i], 3 * B[i], 3 * b[i]))
    else:
        rows = with_rows(rows, (29, C[i] + C[j], B[i] + B[j], b[i] + b[j]))
    found = solve(make(data, rows), jnp.zeros(DIM_X), jnp.zeros(N))
    assert Status(int(found.status)) == Status.WEAKLY_ACTIVE
    np.testing.assert_allclose(found.y, y, atol=1e-9)
    assert found.margin <= 1e-9
    assert found.residual <= 1e-10
    _, slope, _ = jitted_gradient(make(data, rows), jnp.zeros(DIM_X), jnp.zeros(N))
    assert np.isfinite(slope).all()
    if kind in ("duplicate", "combination"):  # the feasible set is the old one: F is differentiable all the same
        assert relative(slope, dense_gradient(*instance(seed)[:2], np.zeros(DIM_X), y, active)[1]) <= 1e-9


def plain_primal_dual(S, q, a, passes):
    """The unsafeguarded method for lam >= 0, S lam + q >= 0; the active sets visited."""
    seen = []
    for _ in range(passes):
        seen.append(tuple(a))
        lam = np.zeros(len(q))
        lam[a] = np.linalg.solve(S[np.ix_(a, a)], -q[a])
        a = np.where(a, lam > 0, S @ lam + q < 0)
    return seen


def test_where_the_plain_primal_dual_method_cycles():
    """The matrix is the example of Curtis, Han and Robinson (2015) for cycling in bound-constrained programs."""
    S, q = np.array([[4.0, 5, -5], [5, 9, -5], [-5, -5, 7]]), np.array([2.0, 1, -3])
    starts = [np.array([k & 1, k & 2, k & 4], bool) for k in range(8)]
    cycles = [len(set(plain_primal_dual(S, q, a, 40)[20:])) > 1 for a in starts]
    assert any(cycles)
    data, (C, B, b), _, _ = instance(0)
    H = np.eye(N)
    H[:3, :3] = np.linalg.inv(S)
    data = data | {"H": jnp.asarray(H), "c": jnp.zeros(N).at[:3].set(H[:3, :3] @ q)}
    problem = make(
        data, (jnp.zeros_like(C).at[:3, :3].set(jnp.eye(3)), jnp.zeros_like(B), jnp.ones_like(b).at[:3].set(0.0))
    )
    for a in starts:
        found = solve(problem, jnp.zeros(DIM_X), jnp.zeros(N), jnp.zeros(ROWS).at[:3].set(a.astype(float)))
        lam, slack = found.multipliers[:3], -found.y[:3]
        assert Status(int(found.status)) == Status.CONVERGED
        assert (lam >= 0).all()
        assert (slack >= -1e-15).all()
        np.testing.assert_allclose(slack, S @ lam + q, atol=1e-12)
        np.testing.assert_allclose(lam * slack, 0, atol=1e-12)
