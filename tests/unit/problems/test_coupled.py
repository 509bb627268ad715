"""Drawn followers under rows that move with x: their optima, against points that the conditions did not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from bilevel import Polyhedron
from problems import coupled
from problems.coupled import TOP_X, TOP_Y


def follower(kind, data, x):
    """Best value of f among the follower's minimisers at x, infinite where there is none: by HiGHS, and by vertices."""
    m, box = len(data.e), [(0, TOP_Y)] * len(data.e)
    bound = data.b - data.B @ x
    if kind == "concave":
        return coupled._optimistic(data, coupled._vertices(data), x[None])[0][0]
    first = linprog(data.d, A_ub=data.A, b_ub=bound, bounds=box)
    if first.x is None:
        return np.inf
    rows, ends = np.concatenate([data.A, data.d[None]]), np.append(bound, first.fun + 1e-9)
    return data.c @ x + linprog(data.e, A_ub=rows, b_ub=ends, bounds=[(0, TOP_Y)] * m).fun


@pytest.mark.parametrize(("kind", "n", "m"), [("lp", 1, 2), ("lp", 2, 3), ("concave", 1, 2)])
@pytest.mark.parametrize("seed", [0, 2])
def test_no_x_is_better_and_the_optimum_is_one(kind, n, m, seed):
    data, value, x, y = coupled._drawn(kind, n, m, seed)
    assert (coupled.inner_radius(data, x) <= 1e-7) == (seed == 2)
    np.testing.assert_allclose(data.c @ x + data.e @ y, value, atol=1e-7)
    others = np.random.default_rng(seed).uniform(0, TOP_X, (40, n))
    near = np.clip(x + 1e-3 * np.random.default_rng(seed).normal(size=(20, n)), 0, TOP_X)
    assert min(follower(kind, data, other) for other in np.concatenate([others, near])) >= value - 1e-6
    assert coupled.least_near(kind, n, m, seed, x, 1e-3) == pytest.approx(value, abs=1e-6)


def test_a_convex_follower_s_optimum_fulfils_its_conditions():
    """At x* the quadratic program has y* as solution (projected gradient), and at other x the leader is worse off."""
    data, value, x, y = coupled._drawn("qp", 2, 2, 0)

    @jax.jit
    def solution(x):
        root = np.sqrt(data.H)  # in root * y it is a projection
        rows = np.concatenate([data.A, np.eye(2), -np.eye(2)]) / root
        ends = jnp.concatenate([data.b - data.B @ x, np.full(2, TOP_Y), np.zeros(2)])
        return Polyhedron(rows, ends).project((data.G @ x + data.d) / root) / root

    np.testing.assert_allclose(solution(x), y, atol=1e-7)
    for other in np.random.default_rng(0).uniform(0, TOP_X, (40, 2)):
        found = solution(other)
        assert not data.c @ other + data.e @ found < value - 1e-6  # NaN where Y(x) is empty


def test_the_suite_has_sixty_instances_of_which_a_third_is_on_an_edge():
    sizes = [
        (kind, *size, seed) for kind, all_sizes in coupled.SUITE.items() for size in all_sizes for seed in range(3)
    ]
    assert len(sizes) == 60
    assert sum(seed % 3 == 2 for *_, seed in sizes) == 20
    instance = coupled.make("lp", 1, 2, 2)
    assert {"edge", "coupled", "known-optimum"} <= instance.tags
