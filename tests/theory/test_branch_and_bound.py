"""BranchAndBound and `certify`: answers by hand, other optima by a mixed-integer program, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from bilevel import Status
from bilevel.diagnostics import certify


def upper(x, y, batch):
    return batch["c"] @ x + batch["e"] @ y


def lower(x, y, batch):
    return y @ (batch["Q"] @ y) / 2 + (batch["P"] @ x + batch["d"]) @ y


def budget(x, y, data):
    return data["G"] @ x + data["K"] @ y - data["b"]


def begin(key):
    return jnp.zeros(1), jnp.zeros(2)


EASY = {  # min -x - y0 - y1, the follower minimises |y - (x, 1)|^2/2 in [0, 2]^2 with y0 + y1 <= 2 + x/2
    "c": [-1.0], "e": [-1.0, -1.0], "Q": np.eye(2), "P": [[-1.0], [0.0]], "d": [0.0, -1.0], "hi": 3.0,
    "A": [[1.0, 1.0]], "B": [[-0.5]], "b": [2.0], "G": [[0.0]], "K": [[0.0, 0.0]], "most": [1.0], "top": 2.0,
}  # fmt: skip


def make(**changed):
    """The problem with other numbers."""
    p = jax.tree.map(jnp.asarray, {name: np.asarray(value, float) for name, value in {**EASY, **changed}.items()})
    return bilevel.BilevelProblem(
        upper,
        bilevel.Minimize(lower),
        x_set=bilevel.Box(0.0, p["hi"]),
        y_set=bilevel.Box(0.0, p["top"]),
        coupling=bilevel.LinearCoupling(p["A"], p["B"], p["b"]),
        upper_data=bilevel.Full({name: p[name] for name in ("c", "e")}),
        lower_data=bilevel.Full({name: p[name] for name in ("Q", "P", "d")}),
        init=begin,
        upper_constraints=bilevel.UpperConstraints(inequality=budget, data={"G": p["G"], "K": p["K"], "b": p["most"]}),
    )


def test_answers_by_hand():
    """At x = 3 the follower of EASY wants (3, 1): it takes (2, 1). With y0 <= 1 for the leader x is at most 1. A linear
    follower, -y0 with y0 + y1 <= 2 + x/2, does not mind y1: the leader takes all that is left of the row.
    """
    found = certify(make())
    assert (found.status, found.nodes > 0) == (Status.CONVERGED, True)
    np.testing.assert_allclose([found.value, found.lower_bound, *found.x, *found.y], [-6, -6, 3, 2, 1], atol=1e-7)
    np.testing.assert_allclose(found.multipliers, [0, 1, 0], atol=1e-7)  # of y0 <= 2: g falls by 1 there
    assert "CONVERGED" in str(found)
    held = certify(make(K=[[1.0, 0.0]]))
    np.testing.assert_allclose([held.value, *held.x, *held.y], [-3, 1, 1, 1], atol=1e-7)
    tie = certify(make(Q=np.zeros((2, 2)), P=np.zeros((2, 1)), d=[-1.0, 0.0], hi=1.0))
    np.testing.assert_allclose([tie.value, *tie.x, *tie.y], [-3.5, 1, 2, 0.5], atol=1e-7)


def test_runs_end_with_the_words_of_the_certificate(key):
    """y0 = min(x, 2) >= 0 cannot be below -1, and without an upper end x falls for ever."""
    solver = bilevel.BranchAndBound()
    solution = bilevel.solve(make(), solver, key=key)
    assert solution.status == Status.CONVERGED
    np.testing.assert_allclose([*solution.x, *solution.y, solution.info.lower_bound], [3, 2, 1, -6], atol=1e-7)
    for changed, status in (
        ({"K": [[1.0, 0.0]], "most": [-1.0]}, Status.INFEASIBLE),
        ({"hi": np.inf}, Status.UNBOUNDED),
    ):
        assert certify(make(**changed)).status == status
        solution = bilevel.solve(make(**changed), solver, key=key, max_steps=20)
        assert solution.status == status
        assert np.isfinite(np.asarray(solution.x)).all()


def test_too_few_nodes_are_no_optimum(key):
    problem = problems.make("coupled", kind="qp", dim_x=5, dim_y=6, seed=1).problem
    found = certify(problem, max_nodes=3)
    assert found.status == Status.MAX_STEPS
    assert found.lower_bound <= -64.35244648318043 <= found.value  # its optimum


@pytest.mark.parametrize("kind", ["lp", "qp"])
def test_optima_of_a_mixed_integer_program(kind):
    for seed in range(3):
        instance = problems.make("coupled", kind=kind, dim_x=2, dim_y=3, seed=seed)
        found = certify(instance.problem)
        assert found.status == Status.CONVERGED
        np.testing.assert_allclose([found.value, found.lower_bound], instance.truth.value, rtol=1e-7, atol=1e-7)


def quadratic_upper(x, y, batch):
    return jnp.sum((y - 1) ** 2) + jnp.sum((x - 3) ** 2)


def two(key):
    return jnp.zeros(1, jnp.float32), jnp.zeros(2, jnp.float32)


def test_a_quadratic_leader_in_float32():
    """y = min(x, 2): F = 2 (x - 1)^2 + (x - 3)^2 has a local minimum of 8/3 at x = 5/3, but beyond 2 it is
    2 + (x - 3)^2, and 2 at x = 3.
    """
    problem = bilevel.BilevelProblem(
        quadratic_upper, bilevel.Minimize(follows), y_set=bilevel.Box(jnp.float32(0), jnp.float32(2)), init=two
    )
    found = certify(problem)
    assert found.status == Status.CONVERGED
    assert found.x.dtype == jnp.float32
    np.testing.assert_allclose([found.value, *found.x, *found.y], [2, 3, 2, 2], rtol=1e-6)


def revenue(x, y, batch):
    return -x @ y


def buyers(x, y, batch):
    return jnp.sum(y**2) / 2 + (x - batch) @ y


def prices(key):
    return jnp.zeros(2), jnp.zeros(2)


def test_a_sellers_revenue_is_convex_in_the_multipliers():
    """y = max(min(b - x, 1), 0), b = (3, 1.5): x y is largest at the kink x = 2, where it is 2, and at b/2, where it is
    (3/4)^2. Where the buyer's rows move with the price that is not known, and refused.
    """
    problem = bilevel.BilevelProblem(
        revenue, bilevel.Minimize(buyers), x_set=bilevel.Box(0.0, 5.0), y_set=bilevel.Box(0.0, 1.0),
        lower_data=bilevel.Full(jnp.array([3.0, 1.5])), init=prices,
    )  # fmt: skip
    found = certify(problem)
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose([found.value, found.lower_bound], -2.5625, atol=1e-8)
    np.testing.assert_allclose([*found.x, *found.y], [2, 0.75, 1, 0.75], atol=1e-7)
    moving = bilevel.LinearCoupling(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(1))
    with pytest.raises(bilevel.InvalidInput, match="f convex"):
        certify(dataclasses.replace(problem, coupling=moving))


def follows(x, y, batch):
    return jnp.sum((y - x) ** 2) / 2


def product(x, y, batch):
    return -jnp.sum(x * y)


def bent(x, y, batch):
    return jnp.sum(jnp.abs(y - 20))


def hill(x, y, batch):
    return -jnp.sum(y**2)


def quartic(x, y, batch):
    return jnp.sum(y**4) + jnp.sum(y * x)


def disc(x, y):
    return jnp.sum(y**2) - 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"upper": product}, "f convex in .* eigenvalue of -1"),
        ({"upper": bent}, "f quadratic"),
        ({"lower": bilevel.Minimize(hill)}, r"convex g\(x, .\) .* eigenvalue of -2"),
        ({"lower": bilevel.Minimize(quartic)}, r"g\(x, .\) quadratic"),
        ({"lower": bilevel.FixedPoint(lambda x, y, batch: y / 2)}, "Minimize.* got FixedPoint"),
        ({"coupling": bilevel.SmoothCoupling(disc)}, "SmoothCoupling.h affine"),
        ({"upper_constraints": bilevel.UpperConstraints(equality=disc)}, "upper_constraints.equality affine"),
        ({"y_set": bilevel.Ball(1.0)}, "y_set described by linear rows; got Ball"),
    ],
)
def test_what_is_not_of_the_kind_is_refused_by_name(changed, words, key):
    problem = bilevel.BilevelProblem(upper=quadratic_upper, lower=bilevel.Minimize(follows),
                                     y_set=bilevel.Box(0.0, 1.0), init=begin)  # fmt: skip
    with pytest.raises(bilevel.Unsupported, match=f"BranchAndBound needs .*{words}"):
        bilevel.solve(dataclasses.replace(problem, **changed), bilevel.BranchAndBound(), key=key)


def test_bad_counts_are_named():
    for bad in (0, 2.5, True):
        with pytest.raises(bilevel.InvalidInput, match=r"BranchAndBound\.max_nodes"):
            bilevel.BranchAndBound(max_nodes=bad)
