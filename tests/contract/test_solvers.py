"""The contract: every discovered solver, on small problems. A new solver file is picked up without an edit here."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from benchmarks.judge import contract
from bilevel.run import lanes

SOLVERS = bilevel.solvers.ALL


# Renewing samples compiles four times as much: tests/theory/test_sampled_penalty.py has that half of its contract.
QUICK = {"SampledPenalty": {"refresh": False, "num_starts": 2}}


def make(kind, size=0.05):
    """A solver with all steps of one size, and with loops of at most three passes, where it has settings for them."""
    loops = [field.name for field in dataclasses.fields(kind) if re.fullmatch(r"num_\w+_steps", field.name)]
    short = {name: min(3, getattr(kind(), name)) for name in loops}
    return kind(**dict.fromkeys(contract.step_sizes(kind), size), **{**short, **QUICK.get(kind.__name__, {})})


def quadratic(seed=0, bound=3.0):
    drawn = problems.make("quadratic", seed=seed, dim_x=3, dim_y=12, num_samples=8, batch_size=2).problem
    return dataclasses.replace(drawn, x_set=bilevel.Box(-bound, bound))


def tanh_map(x, y, batch):
    return 0.5 * jnp.tanh(batch @ y) + jnp.sum(x) * jnp.ones_like(y)


def distance(x, y, batch):
    return jnp.sum((y - 1) ** 2) + jnp.sum(x**2)


def fixed_point():
    matrix = jax.random.orthogonal(jax.random.key(3), 12)
    start = (jnp.full(3, 0.1), jnp.zeros(12))
    return bilevel.BilevelProblem(
        distance, bilevel.FixedPoint(tanh_map), lower_data=bilevel.Full(matrix), init=lambda key: start
    )


def waves(x, y, batch):
    return jnp.sum(jnp.sin(3 * (y - batch @ x))) + 0.1 * jnp.sum(y**2)


def small_start(key):
    return jnp.full(3, 0.1), jnp.zeros(2)


def boxed(seed=0, bound=3.0):
    """Several lower-level minima in a box: for solvers that sample it."""
    matrix = bilevel.Full(jax.random.normal(jax.random.key(seed), (2, 3)))
    x_set, y_set = bilevel.Box(-bound, bound), bilevel.Box(-2.0, 2.0)
    return bilevel.BilevelProblem(
        distance, bilevel.Minimize(waves), x_set=x_set, y_set=y_set, lower_data=matrix, init=small_start
    )


def coupled(inequalities, seed=0):
    """The quadratic with three rows between x and y, so many of them inequalities: for solvers of coupled levels."""
    A, B, b = (jax.random.normal(jax.random.key(seed), shape) for shape in ((3, 12), (3, 3), (3,)))
    unequal, equal = ([part[rows] for part in (A, B, b)] for rows in np.split(np.arange(3), [inequalities]))
    return dataclasses.replace(quadratic(seed), coupling=bilevel.LinearCoupling(*unequal, *equal))


@functools.cache
def small():
    """The problems by their names, the most constrained last; made when a test asks, not where tests are collected."""
    return {
        "fixed_point": fixed_point(),
        "quadratic": quadratic(),
        "boxed": boxed(),
        "equal": coupled(0),
        "coupled": coupled(2),
    }


# A solver's tests run one after the other: what one of them has compiled serves the next.
each_solver = pytest.mark.parametrize("kind", SOLVERS.values(), ids=SOLVERS, scope="module")


@pytest.fixture(params=["fixed_point", "most_constrained"])
def problem(request, kind):
    """The fixed point, and the most constrained problem that the solver takes; `suited` is the least."""
    if request.param == "fixed_point":
        reason = make(kind).unsupported(small()["fixed_point"])
        if reason is not None:
            pytest.skip(reason)
        return small()["fixed_point"]
    return [problem for problem in small().values() if make(kind).unsupported(problem) is None][-1]


def suited(kind, seed=0, bound=3.0):
    """The quadratic with a lower level in R^12, or for solvers that need a bounded one the problem in a box."""
    problem = quadratic(seed, bound)
    return problem if make(kind).unsupported(problem) is None else boxed(seed, bound)


def test_discovery_finds_the_solvers_of_the_foundation():
    assert {"AID", "ITD", "SOBA", "SABA", "StocBiO", "AmIGO"} <= set(SOLVERS)
    assert all(getattr(bilevel, name) is kind for name, kind in SOLVERS.items())


def refused(kind, problem):
    """Whether the solver says why it cannot take the problem; then the reason names both: it, and what excludes it."""
    reason = make(kind).unsupported(problem)
    if reason is not None:
        assert kind.__name__ in reason
        excluding = problem.lower, problem.y_set
        assert any(type(part).__name__ in reason for part in excluding)
        with pytest.raises(bilevel.Unsupported, match=kind.__name__):
            bilevel.solve(problem, make(kind), key=jax.random.key(0))
    return reason is not None


def test_only_methods_that_compare_values_refuse_fixed_points():
    refusing = {name for name, kind in SOLVERS.items() if refused(kind, small()["fixed_point"])}
    assert {"F2SA", "BOME", "VPBGD"} <= refusing
    assert not refusing & {"AID", "ITD", "SOBA", "SABA", "StocBiO", "AmIGO", "GPBGD"}
    for name, kind in SOLVERS.items():  # who refuses the quadratic needs a bounded set
        assert not (refused(kind, small()["quadratic"]) and refused(kind, small()["boxed"])), name


@each_solver
def test_only_numeric_leaves(kind):
    contract.numbers_are_leaves(make(kind))
    numbers = [field.name for field in dataclasses.fields(kind) if isinstance(field.default, float)]
    assert len(jax.tree.leaves(make(kind))) == len(contract.step_sizes(kind)) + len(numbers)


@each_solver
def test_documented(kind):
    contract.documented(kind)


@each_solver
def test_jit_equals_eager_and_counted_cost_equals_declared(kind, problem, key):
    contract.jit_and_cost(problem, make(kind), key)


@each_solver
def test_output_is_shaped_like_init_and_finite(kind, problem, key):
    contract.output_like_init(problem, make(kind), key)


@each_solver
def test_chunks_and_resume_are_exact_to_the_bit(kind, key, tmp_path):
    resumed = contract.chunks_and_resume(suited(kind), make(kind), key, tmp_path)
    assert list(resumed.record["step"]) == [0, 3, 6, 9, 12, 16, 20, 23]


@each_solver
def test_vmap_over_keys_and_step_sizes_equals_a_loop(kind):
    contract.vmap_equals_loop(suited(kind), functools.partial(make, kind), [0.01, 0.03, 0.05])


@pytest.mark.parametrize("kind", [bilevel.SOBA, bilevel.SampledPenalty], ids=lambda kind: kind.__name__)
def test_many_keys_solved_together_equal_a_loop(kind):
    """What `solve_many` adds to a vmap is the driver's and the same for all: one for each of the two measures."""
    problem, solver = suited(kind), make(kind)
    keys = jax.random.split(jax.random.key(7), 3)
    together = contract.solve(problem, solver, many=True, keys=keys, max_steps=12, every=6, tol=0.0)
    for key, solution in zip(keys, together, strict=True):
        alone = contract.solve(problem, solver, key=key, max_steps=12, every=6, tol=0.0)
        contract.same("alone and together", alone.state, solution.state, rtol=1e-10)
        np.testing.assert_allclose(alone.record["value"], solution.record["value"], rtol=1e-8)


@each_solver
def test_a_second_instance_and_other_step_sizes_compile_nothing(kind, key):
    contract.solve(suited(kind, 1), make(kind, 0.05), key=key, max_steps=5, every=2)
    compiled = (lanes.init, lanes.advance_lanes, lanes.measure_lanes)
    before = [function.count() for function in compiled]
    contract.solve(suited(kind, 2), make(kind, 0.04), key=jax.random.key(9), max_steps=7, every=3)
    assert [function.count() for function in compiled] == before


@each_solver
def test_other_data_and_step_sizes_are_traced_once(kind, key):
    """Also outside of `solve`: in a loop of one's own."""
    contract.traced_once([(suited(kind, 1), make(kind, 0.05)), (suited(kind, 2), make(kind, 0.04))], key)


@each_solver
def test_bad_input_is_named(kind):
    contract.refuses_bad_steps(kind)


def in_a_box():
    return dataclasses.replace(small()["quadratic"], y_set=bilevel.Box(-1.0, 1.0))


def under_a_row():
    coupling = bilevel.LinearCoupling(jnp.ones((1, 12)), jnp.ones((1, 3)), jnp.ones(1))
    return dataclasses.replace(small()["quadratic"], coupling=coupling)


def refusing(problem):
    found = [kind for kind in SOLVERS.values() if make(kind).unsupported(problem) is not None]
    assert found
    return found


def test_a_set_that_the_theory_excludes_is_named(key):
    problem = in_a_box()
    for kind in refusing(problem):
        needs = "an unconstrained lower level; got", "an f convex in .* got its Hessian with .*,"  # f is not, in a box
        reason = f"{kind.__name__} needs ({'|'.join(needs)}) y_set = Box"
        with pytest.raises(bilevel.Unsupported, match=reason):
            bilevel.solve(problem, make(kind), key=key)


def test_a_coupling_that_the_theory_excludes_is_named(key):
    problem = under_a_row()
    for kind in refusing(problem):
        reason = make(kind).unsupported(problem)
        assert "LinearCoupling" in reason or make(kind).unsupported(small()["quadratic"]) == reason
        with pytest.raises(bilevel.Unsupported, match=kind.__name__):
            bilevel.solve(problem, make(kind), key=key)


@each_solver
def test_upper_set_is_respected(kind, key):
    contract.respects_the_upper_set(suited(kind, bound=0.1), make(kind, 0.3), key)
