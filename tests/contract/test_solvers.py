"""The contract: every discovered solver, on small problems. A new solver file is picked up without an edit here."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from bilevel import oracles
from bilevel.backend.bounded import Flat
from bilevel.diagnostics import BY_VALUE, IMPLICIT
from bilevel.run import lanes

SOLVERS = bilevel.solvers.ALL


def step_fields(kind):
    return [field.name for field in dataclasses.fields(kind) if field.name.endswith("step_size")]


# Renewing samples compiles four times as much: tests/theory/test_sampled_penalty.py has that half of its contract.
QUICK = {"SampledPenalty": {"refresh": False, "num_starts": 2}}


def make(kind, size=0.05):
    """A solver with all steps of one size, and with loops of at most three passes, where it has settings for them."""
    loops = [field.name for field in dataclasses.fields(kind) if re.fullmatch(r"num_\w+_steps", field.name)]
    short = {name: min(3, getattr(kind(), name)) for name in loops}
    return kind(**dict.fromkeys(step_fields(kind), size), **{**short, **QUICK.get(kind.__name__, {})})


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


def start(problem, solver, key):
    """The first state, as `solve` makes it."""
    return lanes.init(Flat(problem), Flat(solver), key, False)


def advance(problem, solver, state, key, num_steps):
    """(state, info) by the compiled function of `solve`: one compilation serves most tests of a solver."""
    return lanes.advance_lanes(Flat(problem), Flat(solver), state, key, 0, num_steps, False)[:2]


def solve(problem, *args, many=False, **kwargs):
    """`bilevel.solve`, measured by the true lower gap where the lower level is constrained."""
    measure = BY_VALUE if problem.constrained_lower else IMPLICIT
    return (bilevel.solve_many if many else bilevel.solve)(problem, *args, measure=measure, **kwargs)


def assert_same(a, b, rtol=0.0):
    """Equal leaf by leaf; to the bit where rtol is 0."""
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)


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
    assert all(isinstance(leaf, float) for leaf in jax.tree.leaves(make(kind)))
    numbers = [field.name for field in dataclasses.fields(kind) if isinstance(field.default, float)]
    assert len(jax.tree.leaves(make(kind))) == len(step_fields(kind)) + len(numbers)


@each_solver
def test_documented(kind):
    text = kind.__doc__
    for part in ("Assumptions:", "Cost per step:", "Args:", "Reference:", "Differs from the paper"):
        assert part in text, f"{kind.__name__} lacks {part}"


@each_solver
def test_jit_equals_eager_and_counted_cost_equals_declared(kind, problem, key):
    solver = make(kind)
    state = start(problem, solver, key)
    compiled, first = advance(problem, solver, state, key, 1), jax.random.fold_in(key, 0)
    with jax.disable_jit(), oracles.counting() as count:
        eager = solver.step(problem, state, first)
    assert_same(compiled, eager, rtol=1e-12)
    counted, declared = count().as_dict(), solver.cost(problem).as_dict()
    if solver.adaptive:
        assert all(counted[name] >= least for name, least in declared.items())
    else:
        assert counted == declared


@each_solver
def test_output_is_shaped_like_init_and_finite(kind, problem, key):
    solver = make(kind)
    state, _ = advance(problem, solver, start(problem, solver, key), key, 3)
    for out, like in zip(solver.output(problem, state), problem.init(key), strict=True):
        assert jax.tree.structure(out) == jax.tree.structure(like)
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(like), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert np.isfinite(a).all()


@each_solver
def test_chunks_and_resume_are_exact_to_the_bit(kind, key, tmp_path):
    problem, solver = suited(kind), make(kind)
    whole = solve(problem, solver, key=key, max_steps=23, every=23, tol=0.0)
    chunked = solve(problem, solver, key=key, max_steps=23, every=4, tol=0.0)
    assert_same(whole.state, chunked.state)
    path = tmp_path / "run.checkpoint"
    solve(problem, solver, key=key, max_steps=9, every=3, tol=0.0, checkpoint=path)
    resumed = solve(problem, solver, key=key, max_steps=23, every=4, tol=0.0, checkpoint=path)
    assert_same(whole.state, resumed.state)
    assert list(resumed.record["step"]) == [0, 3, 6, 9, 12, 16, 20, 23]
    assert resumed.record["value"][-1] == whole.record["value"][-1]


@each_solver
def test_vmap_over_keys_and_step_sizes_equals_a_loop(kind):
    problem, sizes, keys = suited(kind), [0.01, 0.03, 0.05], jax.random.split(jax.random.key(7), 3)

    def final(size, key):
        solver = make(kind, size)
        return advance(problem, solver, start(problem, solver, key), key, 12)[0]

    together = jax.vmap(final)(jnp.array(sizes), keys)
    for lane, (size, key) in enumerate(zip(sizes, keys, strict=True)):
        assert_same(final(size, key), jax.tree.map(lambda leaf, lane=lane: leaf[lane], together), rtol=1e-10)


@pytest.mark.parametrize("kind", [bilevel.SOBA, bilevel.SampledPenalty], ids=lambda kind: kind.__name__)
def test_many_keys_solved_together_equal_a_loop(kind):
    """What `solve_many` adds to a vmap is the driver's and the same for all: one for each of the two measures."""
    problem, solver = suited(kind), make(kind)
    keys = jax.random.split(jax.random.key(7), 3)
    together = solve(problem, solver, many=True, keys=keys, max_steps=12, every=6, tol=0.0)
    for key, solution in zip(keys, together, strict=True):
        alone = solve(problem, solver, key=key, max_steps=12, every=6, tol=0.0)
        assert_same(alone.state, solution.state, rtol=1e-10)
        np.testing.assert_allclose(alone.record["value"], solution.record["value"], rtol=1e-8)


@each_solver
def test_a_second_instance_and_other_step_sizes_compile_nothing(kind, key):
    solve(suited(kind, 1), make(kind, 0.05), key=key, max_steps=5, every=2)
    compiled = (lanes.init, lanes.advance_lanes, lanes.measure_lanes)
    before = [function.count() for function in compiled]
    solve(suited(kind, 2), make(kind, 0.04), key=jax.random.key(9), max_steps=7, every=3)
    assert [function.count() for function in compiled] == before


@each_solver
def test_other_data_and_step_sizes_are_traced_once(kind, key):
    """Also outside of `solve`: in a loop of one's own."""

    def step(problem, solver, state, key):
        return solver.step(problem, state, key)

    chex.clear_trace_counter()  # it knows functions by their hash, which a later one may have again
    step = jax.jit(chex.assert_max_traces(step, n=1))
    for seed, size in ((1, 0.05), (2, 0.04)):
        problem, solver = suited(kind, seed), make(kind, size)
        state = start(problem, solver, key)
        after, _ = jax.eval_shape(step, problem, solver, state, key)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@each_solver
def test_bad_input_is_named(kind):
    for field in step_fields(kind):
        for bad in (-1.0, 0.0, float("nan"), float("inf")):
            with pytest.raises(bilevel.InvalidInput, match=f"{kind.__name__}.{field}: got"):
                kind(**{field: bad})


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
    problem, solver = suited(kind, bound=0.1), make(kind, 0.3)
    state, _ = advance(problem, solver, start(problem, solver, key), key, 4)
    assert np.abs(state.x).max() <= 0.1
