"""Optima of the problems with non-convex lower levels: recomputed by brute force, or checked against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from bilevel import oracles
from bilevel.diagnostics.gap import lower_gap
from problems import nonconvex, nonconvex_scaled


def brute_force(f, g, x, y, feasible, slack):
    """(F*, x*, y*) on a grid: the least f over the y whose g is within `slack` of the least of the column."""
    X, Y = np.meshgrid(x, y, indexing="ij")
    allowed = feasible(X, Y)
    values = np.where(allowed, g(X, Y), np.inf)
    least = values.min(axis=1, keepdims=True)
    best = np.where(values <= least + slack, f(X, Y) + 0 * X, np.inf)
    k = np.unravel_index(best.argmin(), best.shape)
    return best[k], X[k], Y[k]


@pytest.mark.parametrize("name", nonconvex.CASES)
def test_optimum_by_brute_force(name):
    """Grids hold x = 0 and x = 1, where F jumps. y is off by 1e-3, g by about its square times the curvature."""
    case = nonconvex.CASES[name]
    grids = [
        np.linspace(*ends, round((ends[1] - ends[0]) / step) + 1) for ends, step in ((case.x, 5e-3), (case.y, 2e-3))
    ]
    numpy = lambda function: lambda x, y: np.asarray(function(x, y))  # noqa: E731
    feasible = lambda x, y: np.ones_like(x, bool)  # noqa: E731
    if case.linear is not None:
        A, B, b = case.linear
        feasible = lambda x, y: A * y + B * x <= b + 1e-9  # noqa: E731
    if case.smooth is not None:
        feasible = lambda x, y: case.smooth(x, y) <= 0  # noqa: E731
    value, x, y = brute_force(numpy(case.f), numpy(case.g), *grids, feasible, slack=1e-6)
    assert abs(value - case.value) <= 0.01 * (1 + abs(case.value)), (x, y)
    if case.point is not None:
        assert abs(numpy(case.f)(*case.point) - case.value) <= 2e-4
        np.testing.assert_allclose([x, y], case.point, atol=0.03)


SCALED = {
    "bvfsm": {"n": 5},
    "bvfsm_constrained": {"n": 3, "c": 1.0},
    "lvhba_llc": {"n": 2},
    "bicgaffa": {"n": 2, "power": 3},
    "bome_degenerate": {},
    "meha_lasso": {"n": 4},
    "rastrigin": {"n": 3},
    "ring": {"n": 3},
}


@pytest.mark.parametrize("case", nonconvex_scaled.CASES)
def test_closed_form_optimum_is_attained_and_a_lower_solution(case):
    instance = problems.make("nonconvex_scaled", case=case, **SCALED[case])
    problem, truth = instance.problem.validate(), instance.truth
    x = jnp.array([0.5, 0.5, 0.0, 0.0]) if case == "meha_lasso" else truth.x
    value = oracles.upper_value(problem, x, truth.y, problem.upper_data.full())
    np.testing.assert_allclose(value, truth.value, atol=1e-12)
    found = lower_gap(problem, x, truth.y, num_points=512)
    assert abs(found.gap) <= 1e-7
    assert found.violation <= 1e-12


def test_bvfsm_and_rastrigin_by_brute_force():
    """One lower unknown. n of them with the same y give n times the terms in y."""
    x, y = np.linspace(-1, 4, 1001), np.linspace(-10, 10, 8001)
    everywhere = lambda x, y: np.ones_like(x, bool)  # noqa: E731
    for n in (1, 2, 50):
        f = lambda x, y, n=n: (x - 2) ** 2 + n * (y - 4) ** 2  # noqa: E731
        value = brute_force(f, lambda x, y: np.sin(x + y - 2), x, y, everywhere, slack=4e-6)[0]
        assert abs(value - problems.make("nonconvex_scaled", n=n).truth.value) <= 0.02
    x = np.linspace(-1, 1, 401)
    for n in (1, 6):
        F = (x - 0.5) ** 2 + n * (x + 0.3) ** 2  # y = x 1 is the only zero of g >= 0
        assert abs(F.min() - problems.make("nonconvex_scaled", case="rastrigin", n=n).truth.value) <= 1e-3


def test_quoted_values():
    make = lambda **params: problems.make("nonconvex_scaled", **params).truth.value  # noqa: E731
    np.testing.assert_allclose([make(n=1), make(n=2)], [0.25375, 0.33833], atol=5e-6)
    values = [make(case="bvfsm_constrained", c=c) for c in (1.0, 2.0)]
    np.testing.assert_allclose(values, [8, 6.3753], atol=5e-5)


def test_another_seed_is_the_same_problem_and_starts_differ():
    one, other = (problems.make("nonconvex", seed=seed, case="mb_3_19").problem for seed in (0, 1))
    assert (one.upper, one.lower, one.init) == (other.upper, other.lower, other.init) or one.init is other.init
    starts = [float(one.init(jax.random.key(seed))[0][0]) for seed in range(5)]
    assert len(set(starts)) == 5
    assert all(-1 <= x <= 1 for x in starts)


@pytest.mark.parametrize(
    ("family", "params", "words"),
    [
        ("nonconvex", {"case": "mb_3_99"}, "case"),
        ("nonconvex_scaled", {"case": "bvfs"}, "case"),
        ("nonconvex_scaled", {"case": "meha_lasso", "n": 3}, "n "),
        ("nonconvex_scaled", {"n": 0}, "n "),
        ("nonconvex_scaled", {"a": 30.0}, "a "),
        ("nonconvex_scaled", {"case": "bicgaffa", "power": 2}, "power"),
    ],
)
def test_bad_input_is_named(family, params, words):
    with pytest.raises(bilevel.InvalidInput, match=words):
        problems.make(family, **params)


def least_on_grids(f, g, xs, ys, slack=1e-9):
    """Min over x of the least f among the y with g within slack of the least; f and g [len(y), …] at each x."""
    values = []
    for x in xs:
        below, above = np.broadcast_arrays(g(x, *ys), f(x, *ys))
        values.append(np.where(below <= below.min() + slack, above, np.inf).min())
    return np.min(values)


def test_the_other_optima_by_brute_force():
    """One block; z follows from the equality; the ring is taken in polar coordinates."""
    make = lambda case, **params: problems.make("nonconvex_scaled", case=case, **params).truth.value  # noqa: E731
    y = np.linspace(-8, 8, 16001)
    linear = lambda x, y, z: y**2 / 2 - x * y + z  # noqa: E731
    value = least_on_grids(
        lambda x, y: (x - (-x - y)) ** 2 / 2 + (y - 1) ** 2 / 2, lambda x, y: linear(x, y, -x - y),
        np.linspace(-3, 3, 1201), [y],
    )  # fmt: skip
    np.testing.assert_allclose(value, make("lvhba_llc"), atol=2e-3)
    for power in (1, 3):
        value = least_on_grids(
            lambda x, y, p=power: (y - 2) * (x - 1) + (-(x**p) - y + 3) ** 2,
            lambda x, y, p=power: linear(x, y, -(x**p) - y), np.linspace(-2, 2, 801), [y],
        )  # fmt: skip
        np.testing.assert_allclose(value, make("bicgaffa", power=power), atol=5e-3)
    for c in (1.0, 2.0):
        value = least_on_grids(
            lambda x, t: (x - 2) ** 2 + (t - x - 2) ** 2, lambda x, t, c=c: np.sin(t - c) + 0 * x,
            np.linspace(-9, 9, 3601), [np.linspace(0, 1, 1001)],
        )  # fmt: skip
        np.testing.assert_allclose(value, make("bvfsm_constrained", c=c), atol=2e-2)
    value = least_on_grids(
        lambda x, y, z: (x - z) ** 2 / 2 + (y - 1) ** 2 / 2, lambda x, y, z: y**2 / 2 - x * y + 0 * z,
        np.linspace(-3, 3, 121), [np.linspace(-3, 3, 241)[:, None], np.linspace(-3, 3, 121)[None, :]],
    )  # fmt: skip
    np.testing.assert_allclose(value, make("bome_degenerate"), atol=1e-3)
    value = least_on_grids(
        lambda x, r, a: (x - 1) ** 2 + r**2 - 4 * r * np.cos(a) + 4, lambda x, r, a: (r**2 - x**2) ** 2 + 0 * a,
        np.linspace(0.5, 2, 151), [np.linspace(0, 3, 601)[:, None], np.linspace(0, np.pi, 101)[None, :]],
    )  # fmt: skip
    np.testing.assert_allclose(value, make("ring", n=2), atol=2e-2)
    grid, b = np.linspace(-1, 1, 2001), 0.5  # meha_lasso with n = 2: each y_i by itself
    lower = lambda x, b: grid[np.argmin((grid - b) ** 2 / 2 + x * np.abs(grid))]  # noqa: E731
    xs = np.linspace(0, 1, 101)
    value = min(lower(x, b) for x in xs) + min(lower(x, -b) for x in xs)
    np.testing.assert_allclose(value, make("meha_lasso", n=2), atol=1e-3)
