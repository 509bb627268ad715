"""Quadratic models against Clarabel and dense KKT systems: any start, dependent and contradictory rows."""

import clarabel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from bilevel.qp.active_set import Point, Rows, factorize, kkt_solve, solve_model

N, M = 8, 7


@jax.jit
def solve(H, limits, y, gradient, lam, active):
    """The model at y, where grad g is `gradient` and the multipliers are lam."""
    factor = factorize(H, limits.C)
    at = Point(y, factor.down(gradient + limits.C.T @ lam), lam)
    return solve_model(factor, limits, at, active)


def instance(seed):
    """A strictly convex model with upper, lower, two-sided, missing and equal bounds; y need not be feasible."""
    rng = np.random.default_rng(seed)
    Z, C = rng.normal(size=(N, N)), rng.normal(size=(M, N))
    inside = C @ rng.normal(size=N)  # so that a feasible point exists
    lo, hi = inside - rng.uniform(0.1, 1, M), inside + rng.uniform(0.1, 1, M)
    kind = rng.integers(0, 4, M)
    lo, hi = np.where(kind == 1, -np.inf, lo), np.where(kind == 2, np.inf, hi)
    lo[0] = hi[0] = inside[0]
    limits = Rows(*map(jnp.asarray, (C, lo, hi)), jnp.zeros((M, 0)))
    H, y, gradient = Z @ Z.T + 0.1 * np.eye(N), rng.normal(size=N), 10.0 ** rng.uniform(-1, 1) * rng.normal(size=N)
    return jnp.asarray(H), limits, jnp.asarray(y), jnp.asarray(gradient), rng


def by_clarabel(H, limits, y, gradient):
    """The p that minimises gradient'p + p'H p/2 with lo <= C (y + p) <= hi."""
    C, lo, hi, _ = (np.asarray(part) for part in limits)
    at = C @ np.asarray(y)
    A, b = np.concatenate([C, -C]), np.concatenate([hi - at, at - lo])
    A, b = A[np.isfinite(b)], b[np.isfinite(b)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
        setattr(settings, name, 1e-12)
    program = sparse.csc_matrix(np.triu(H)), np.asarray(gradient), sparse.csc_matrix(A), b
    out = clarabel.DefaultSolver(*program, [clarabel.NonnegativeConeT(len(b))], settings).solve()
    return str(out.status), np.array(out.x)


def check_kkt(H, limits, y, gradient, found, tol=1e-9):
    """Stationary, feasible, complementary, multipliers of the right sign: recomputed in NumPy."""
    C, lo, hi, _ = (np.asarray(part) for part in limits)
    p, multipliers, active = (np.asarray(part) for part in (found.p, found.multipliers, found.active))
    rows, scale = C @ (np.asarray(y) + p), 1 + np.abs(gradient).max() + np.abs(multipliers).max()
    np.testing.assert_allclose(gradient + H @ p + C.T @ multipliers, 0, atol=tol * scale)
    assert (rows <= hi + tol * scale).all()
    assert (rows >= lo - tol * scale).all()
    np.testing.assert_allclose(rows[active > 0], np.where(lo == hi, lo, hi)[active > 0], atol=tol * scale)
    np.testing.assert_allclose(rows[active < 0], lo[active < 0], atol=tol * scale)
    assert (multipliers[active == 0] == 0).all()
    assert ((active * multipliers)[lo != hi] >= -tol * scale).all()


def test_models_against_clarabel_from_any_active_set_and_any_multipliers():
    sizes = []
    for seed in range(60):
        H, limits, y, gradient, rng = instance(seed)
        fixed = np.asarray(limits.lo == limits.hi)
        start = np.where(fixed, 1, rng.integers(-1, 2, M))
        start = np.where(np.isfinite(np.where(start > 0, limits.hi, limits.lo)), start, 0).astype(float)
        found = solve(H, limits, y, gradient, jnp.asarray(rng.normal(size=M)), jnp.asarray(start))
        status, p = by_clarabel(H, limits, y, gradient)
        assert status == "Solved"
        np.testing.assert_allclose(found.p, p, atol=1e-6 * (1 + np.abs(p).max()))
        check_kkt(np.asarray(H), limits, y, np.asarray(gradient), found)
        assert not (found.empty | found.unsolved | found.dependent)
        sizes.append(int((np.asarray(found.active) != 0).sum()))
    assert min(sizes) <= 2
    assert max(sizes) >= 5


def test_the_right_active_set_is_kept_and_its_room_is_the_slack_or_multiplier():
    H, limits, y, gradient, _ = instance(3)
    zero = jnp.zeros(M)
    found = solve(H, limits, y, gradient, zero, (limits.lo == limits.hi).astype(float))
    again = solve(H, limits, y + found.p, gradient + H @ found.p, found.multipliers, found.active)
    np.testing.assert_array_equal(again.active, found.active)
    np.testing.assert_allclose(again.p, 0, atol=1e-12)
    np.testing.assert_allclose(again.multipliers, found.multipliers, atol=1e-11)
    C, rows = np.asarray(limits.C), np.asarray(limits.C @ (y + found.p))
    lengths = np.sqrt(np.diag(C @ np.linalg.solve(np.asarray(H), C.T)))  # of the rows in the norm of H^-1
    slack = np.minimum(np.asarray(limits.hi) - rows, rows - np.asarray(limits.lo)) / lengths
    room = np.where(np.asarray(found.active) != 0, np.abs(np.asarray(found.multipliers)) * lengths, slack)
    room[np.asarray(limits.lo == limits.hi)] = np.inf
    np.testing.assert_allclose(found.room, room, rtol=1e-9)


@pytest.mark.parametrize("copies", [2, 5])
def test_dependent_rows_are_solved_by_an_independent_set(copies):
    """Every row several times over: the start takes all of them for active."""
    H, limits, y, gradient, _ = instance(5)
    many = Rows(*(jnp.concatenate([part] * copies) for part in limits))
    start = jnp.where(jnp.isfinite(many.hi), 1.0, jnp.where(jnp.isfinite(many.lo), -1.0, 0.0))
    found = solve(H, many, y, gradient, jnp.zeros(copies * M), start)
    np.testing.assert_allclose(found.p, by_clarabel(H, limits, y, gradient)[1], atol=1e-6)
    assert not found.unsolved
    check_kkt(np.asarray(H), many, y, np.asarray(gradient), found)


@pytest.mark.parametrize("gap", [1.0, 1e-6])
def test_rows_that_contradict_each_other_are_empty(gap):
    H, limits, y, gradient, _ = instance(7)
    row = limits.C[1]
    C = limits.C.at[2].set(-row)  # row'y <= 0 and -row'y <= -gap
    lo, hi = limits.lo.at[1:3].set(-jnp.inf), limits.hi.at[1].set(0.0).at[2].set(-gap)
    assert by_clarabel(H, Rows(C, lo, hi, limits.B), y, gradient)[0] != "Solved"
    found = solve(H, Rows(C, lo, hi, limits.B), y, gradient, jnp.zeros(M), (lo == hi).astype(float))
    assert found.empty


def test_no_hessian_no_answer():
    H, limits, y, gradient, _ = instance(9)
    found = solve(-H, limits, y, gradient, jnp.zeros(M), jnp.zeros(M))
    assert found.unsolved
    assert not np.isfinite(found.p).any()


def test_kkt_solve_against_the_dense_system():
    H, limits, _, _, rng = instance(11)
    active = jnp.asarray(np.array([1.0, 0, -1, 0, 1, 0, 0]))
    r, s = rng.normal(size=N), rng.normal(size=M)
    factor = factorize(H, limits.C)
    found = solve_model(factor, limits, Point(jnp.zeros(N), jnp.zeros(N), jnp.zeros(M)), active)
    a = np.asarray(found.active) != 0
    C = np.asarray(limits.C)[a]
    K = np.block([[np.asarray(H), C.T], [C, np.zeros((len(C), len(C)))]])
    compiled = jax.jit(kkt_solve)
    for kept in (factor, factor.for_many_calls()):
        for right, given in ((s, s), (np.zeros(M), None)):
            u, v = compiled(kept, found.inverse, found.active, jnp.asarray(r), given)
            exact = np.linalg.solve(K, np.concatenate([r, right[a]]))
            np.testing.assert_allclose(u, exact[:N], rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(np.asarray(v)[a], exact[N:], rtol=1e-9, atol=1e-11)
            np.testing.assert_array_equal(np.asarray(v)[~a], right[~a])


def test_lanes_of_one_vmap_do_not_disturb_each_other():
    """One lane is done at once, one searches, one has contradictory rows and needs the dual method."""
    H, limits, y, gradient, _ = instance(13)
    limits = limits._replace(C=limits.C.at[4].set(-limits.C[3]), lo=limits.lo.at[3:5].set(-jnp.inf))
    open_, crossed = (limits._replace(hi=limits.hi.at[3:5].set(bound)) for bound in (1.0, -1.0))
    start, zero = (limits.lo == limits.hi).astype(float), jnp.zeros(M)
    alone = [solve(H, open_, y, gradient, zero, start)]
    alone.append(solve(H, open_, y, gradient, zero, alone[0].active))
    alone.append(solve(H, crossed, y, gradient, zero, start))
    all_limits = limits._replace(hi=jnp.stack([open_.hi, open_.hi, crossed.hi]))
    lanes = jax.vmap(solve, in_axes=(None, Rows(None, None, 0, None), None, None, None, 0))
    together = lanes(H, all_limits, y, gradient, zero, jnp.stack([start, alone[0].active, start]))
    assert (np.asarray(alone[0].active) != np.asarray(start)).any()
    for k, one in enumerate(alone):
        assert bool(one.empty) == bool(together.empty[k]) == (k == 2)
        if k < 2:
            np.testing.assert_allclose(together.p[k], one.p, rtol=1e-10, atol=1e-12)
            np.testing.assert_array_equal(together.active[k], one.active)
