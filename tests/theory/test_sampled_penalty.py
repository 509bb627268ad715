"""SampledPenalty: the lemma, brackets, gradients, rate and invariances behind it, and its answers on known problems."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
import problems
from bilevel import oracles, run
from bilevel.diagnostics.gap import measure_global
from bilevel.sampled import Blocks, Smoothness, cover, smooth_min
from bilevel.sampled.nets import sobol
from bilevel.sampled.penalised import Form, Penalised
from bilevel.sampled.renewal import Samples

KEY = jax.random.key(0)
FORMS = [(form, smoothing) for form in ("lifted", "joint") for smoothing in ("entropic", "quadratic")]
numbers = st.floats(-3, 3, allow_subnormal=False)


def waves(x, y, w):
    """Sum of sin(p_k x + q_k y + r_k), w = (p, q, r) of shape [3, 2]."""
    p, q, r = w
    return jnp.sum(jnp.sin(p * x[0] + q * y[0] + r))


def corner(key):
    return jnp.array([-0.6]), jnp.array([0.4])


def wave_problem(seed):
    f, g = np.random.default_rng(seed).uniform(-3, 3, (2, 3, 2))
    box = bilevel.Box(-1.0, 1.0)
    data = {"upper_data": bilevel.Full(jnp.asarray(f)), "lower_data": bilevel.Full(jnp.asarray(g))}
    return bilevel.BilevelProblem(waves, bilevel.Minimize(waves), box, box, init=corner, **data), f, g


def smoothness(f, g):
    """Of sums of sines: |Hessian| <= sum p^2 + q^2, and grad_x moves by at most 2 sum |p|."""
    L = lambda w: float(np.sum(w[0] ** 2 + w[1] ** 2))  # noqa: E731
    return Smoothness(L(f), L(g), float(2 * np.abs(f[0]).sum()), float(2 * np.abs(g[0]).sum()))


@given(st.integers(0, 2**20), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.5, 50), st.floats(0, 0.2))
@settings(max_examples=60)
def test_lemma(seed, below, above, rho, slack):
    """With v - a <= v^ <= v + b, near-minimisers of f + rho (g - v^) have f <= F* + rho (a + b) + e and a small gap."""
    rng = np.random.default_rng(seed)
    f, g = rng.normal(size=(2, 30, 40))
    v = g.min(axis=1, keepdims=True)
    wrong = v + rng.uniform(-below, above, v.shape)
    P = f + rho * (g - wrong)
    near = P - P.min() <= slack
    best = np.where(g == v, f, np.inf).min()
    assert (f[near] <= best + rho * (below + above) + slack + 1e-9).all()
    assert ((g - v)[near] <= (best - f.min() + slack) / rho + below + above + 1e-9).all()


@given(st.lists(numbers, min_size=16, max_size=16), st.floats(1e-3, 10), st.integers(0, 2**20))
@settings(max_examples=40)
def test_smooth_minimum_bracket_weights_and_order(values, t, seed):
    values = jnp.asarray(values)
    order = np.random.default_rng(seed).permutation(16)
    for entropic, low, high in ((True, -t * np.log(16), 0.0), (False, 0.0, t / 2)):
        value, weights = smooth_min(values, t, entropic)
        assert low - 1e-12 <= value - values.min() <= high + 1e-12
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
        other, permuted = smooth_min(values[order], t, entropic)
        np.testing.assert_allclose(other, value, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(permuted, weights[order], rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**20), st.integers(3, 60))
@settings(max_examples=40)
def test_sampled_value_is_above_the_true_one_by_at_most_the_covering_radius(seed, num):
    """Against a grid of 4001 points, whose own error is below L_y 3e-4."""
    rng = np.random.default_rng(seed)
    p, q, r = rng.uniform(-3, 3, (3, 2))
    grid, x, samples = np.linspace(-1, 1, 4001), rng.uniform(-1, 1), np.sort(rng.uniform(-1, 1, num))
    g = lambda y: np.sin(p * x + q * y[:, None] + r).sum(axis=1)  # noqa: E731
    radius = max(samples[0] + 1, 1 - samples[-1], np.diff(samples).max() / 2)
    lipschitz = np.abs(q).sum()
    error = g(samples).min() - g(grid).min()
    assert -lipschitz * 3e-4 <= error <= lipschitz * radius + 1e-12


@given(st.integers(0, 2**10), st.sampled_from([1, 2, 5]))
@settings(max_examples=15)
def test_scrambled_points_stay_a_net(seed, dim):
    """Every interval [k/64, (k+1)/64) of every coordinate holds exactly one of 64 points."""
    points = np.asarray(jax.jit(sobol, static_argnums=(1, 2, 3))(jax.random.key(seed), 64, dim, jnp.float64))
    assert (np.sort(np.floor(points * 64), axis=0) == np.arange(64)[:, None]).all()


def test_more_dimensions_than_scipy_has_a_net_for():
    points = np.asarray(sobol(jax.random.key(3), 8, 30_000, jnp.float64))
    assert ((points > 0) & (points < 1)).all()
    np.testing.assert_allclose(points.mean(axis=1), 0.5, atol=0.01)  # six standard deviations
    np.testing.assert_allclose(np.cov(points) * 12, np.eye(8), atol=0.04)


@functools.cache
def penalised(form, smoothing):
    """(x, y, problem, samples, rho, t) -> (P, its gradients in x and y), jitted."""

    @jax.jit
    def look(x, y, problem, samples, rho, t):
        view = Blocks.of(problem, y)
        P = Penalised(view, Form(form == "joint", smoothing == "entropic", frozen=False), rho, rho * t, chunk=8)
        ys = (samples.at[-1].set(y) if form == "joint" else samples)[:, None]
        f, g = view.values(x, ys, 8)
        found = P.at(f, g)
        direction = P.gradient(x, Samples(ys, f, g, ys[..., :0]), ys[:0], found)
        return found.value, direction.x, direction.last[0]

    return look


@pytest.mark.parametrize(("form", "smoothing"), FORMS)
@given(st.integers(0, 2**20), st.floats(0.1, 20), st.floats(0.05, 1))
@settings(max_examples=8)
def test_danskin_gradient_is_that_of_finite_differences_in_any_order(form, smoothing, seed, rho, t):
    problem, _, _ = wave_problem(seed)
    rng = np.random.default_rng(seed)
    x, y, samples = rng.uniform(-1, 1, 1), rng.uniform(-1, 1, 1), rng.uniform(-1, 1, (16, 1))
    look, h = penalised(form, smoothing), 1e-6
    value, by_x, by_y = look(x, y, problem, samples, rho, t)
    for derivative, dx, dy in ((by_x, h, 0), (by_y, 0, h)):
        up, down = (look(x + s * dx, y + s * dy, problem, samples, rho, t)[0] for s in (1, -1))
        np.testing.assert_allclose(derivative[0], (up - down) / (2 * h), rtol=2e-3, atol=2e-3 * rho)
    samples[:-1] = samples[rng.permutation(15)]
    np.testing.assert_allclose(look(x, y, problem, samples, rho, t)[0], value, rtol=1e-10, atol=1e-10)


@functools.cache
def path(form):
    @jax.jit
    def run_all(problem, solver):
        def body(state, k):
            new, info = solver.step(problem, state, jax.random.fold_in(KEY, k))
            return new, (state.x[0], state.y[0], info.objective[0])

        state = solver.init(problem, KEY)
        return jax.lax.scan(body, state, jnp.arange(200))[1]

    return run_all


@pytest.mark.parametrize("form", ["lifted", "joint"])
@given(st.integers(0, 2**20))
@settings(max_examples=15)
def test_gradient_mapping_bound_descent_and_feasibility(form, seed):
    """With 1/L by theory: P falls at every step by |G|^2/(2 L), so that min |G|^2 <= 2 L (P_0 - P_K)/K."""
    problem, f, g = wave_problem(seed)
    solver = bilevel.SampledPenalty.from_theory(smoothness(f, g), 0.4, form=form, num_samples=32)
    x, y, P = path(form)(problem, solver)
    L = 1 / solver.upper_step_size.value
    moves = np.sum(np.diff(x, axis=0) ** 2, axis=1)
    if form == "joint":
        moves = moves + np.sum(np.diff(y, axis=0) ** 2, axis=1)
    G = L**2 * moves
    assert (np.abs(x) <= 1).all()
    assert (np.abs(y) <= 1).all()
    assert (P[1:] <= P[:-1] - G / (2 * L) + 1e-10 * np.abs(P[:-1])).all()
    assert G.min() <= 2 * L * (P[0] - P[-1]) / len(G) + 1e-9


def ring(x, y, batch):
    return (y @ y - x @ x) ** 2


def aim(x, y, batch):
    return jnp.sum((y - 1) ** 2) + jnp.sum((x - 1) ** 2)


def inside(key):
    return jnp.array([0.1, -0.2]), jnp.zeros(2)


@pytest.mark.parametrize("form", ["lifted", "joint"])
def test_counted_cost_equals_declared_with_renewed_samples(form):
    """Traced without jit, where loops run in Python: nothing is computed, and every call is counted."""
    problem, _, _ = wave_problem(0)
    for size in (None, 0.1):
        solver = bilevel.SampledPenalty(
            upper_step_size=size, form=form, num_samples=16, num_slots=2, num_starts=2, num_ladders=1
        )
        state = jax.eval_shape(solver.init, problem, KEY)
        with jax.disable_jit(), oracles.counting() as count:
            jax.eval_shape(solver.step, problem, state, KEY)
        assert count().as_dict() == solver.cost(problem).as_dict()


def test_iterates_and_renewed_samples_stay_in_their_sets():
    problem = bilevel.BilevelProblem(
        aim, bilevel.Minimize(ring), bilevel.Ball(0.9), bilevel.Ball(1.2), init=inside
    )  # fmt: skip
    solver = bilevel.SampledPenalty(form="joint", num_samples=16, num_slots=2, num_starts=2, num_ladders=1)

    @jax.jit
    def farthest(key):
        def body(state, k):
            state, _ = solver.step(problem, state, jax.random.fold_in(key, k))
            return state, (jnp.linalg.norm(state.x, axis=-1).max(), jnp.linalg.norm(state.samples, axis=-1).max())

        return jax.lax.scan(body, solver.init(problem, key), jnp.arange(40))[1]

    x, samples = farthest(KEY)
    assert x.max() <= 0.9 + 1e-12
    assert samples.max() <= 1.2 + 1e-12


def success(instance, x, y):
    F, measured = instance.truth.value, measure_global(instance.problem, x, y)
    close = abs(measured.value - F) <= 0.02 * (1 + abs(F))
    return close & (measured.lower_residual <= 1e-3) & (measured.violation <= 1e-6)


def test_defaults_find_an_isolated_optimum():
    instance = problems.make("nonconvex", case="mb_3_11")
    problem, solver = instance.problem, bilevel.SampledPenalty(num_starts=4)

    @jax.jit
    def solve(key):
        state, _ = run.advance(problem, solver, solver.init(problem, key), key, 0, 250)
        return success(instance, *solver.output(problem, state))

    assert all(bool(solve(key)) for key in jax.random.split(KEY, 3))


def steep(x, y, batch):
    return 4 * (1 + (x[0] / 5 - 1) ** 3) + 0.2 * x[0] + 6 * y[0]


def farther_end(x, y, batch):
    return -((y[0] - 0.2 - 0.06 * x[0]) ** 2)


def test_an_optimum_at_a_jump_is_found_and_kept():
    """y(x) is the farther end of [0, 1]: 1 up to x = 5, where F is at least F(0) = 6, and from there on 0, with F = 5
    at the jump. Low penalties draw x to 0; and on the left of the jump F is low to whoever does not see that end of Y.
    """
    box, start = bilevel.Box(0.0, 10.0), lambda key: (10 * jax.random.uniform(key, (1,)), jnp.zeros(1))
    problem = bilevel.BilevelProblem(
        steep, bilevel.Minimize(farther_end), x_set=box, y_set=bilevel.Box(0.0, 1.0), init=start
    )
    solver = bilevel.SampledPenalty(num_starts=4, num_samples=16, num_slots=2)
    for seed in range(3):
        solution = bilevel.solve(problem, solver, key=jax.random.key(seed))
        assert solution.status == bilevel.Status.CONVERGED
        np.testing.assert_allclose(solution.record["value"][-1], 5, atol=1e-6)


def test_a_separable_problem_ends_converged_at_its_optimum():
    """20 lower unknowns with three wells each, a block each; before the ladder's end nothing is called converged.

    One start alone ends within 1e-5 of the optimum, not within the tolerance, for three of eight keys.
    """
    instance = problems.make("nonconvex_scaled", case="bvfsm", n=20)
    solver = bilevel.SampledPenalty(num_starts=2, num_ladders=1, num_samples=16, num_slots=4)
    solution = bilevel.solve(instance.problem, solver, key=KEY, max_steps=600, every=100)
    assert solution.status == bilevel.Status.CONVERGED
    assert solution.stats["steps"] >= solver.num_ladder_steps
    assert jax.jit(functools.partial(success, instance))(solution.x, solution.y)
    np.testing.assert_allclose(solution.record["value"][-1], instance.truth.value, rtol=1e-3)


def disc(x, y):
    return jnp.stack([y @ y + x[0] - jnp.sum(x[1:])])


def first(x, y, batch):
    return (x[0] + 0.5) ** 2 + jnp.sum(y**2)


def bowl(x, y, batch):
    return jnp.sum((y - 0.2) ** 2)


def outside(key):
    return jnp.array([0.9, 0.0]), jnp.zeros(2)


@jax.jit
def seen_on_the_way(problem, solver):
    """(the end's measurement, the coupling's residual after each step, x after each step)."""

    def body(state, k):
        state, _ = solver.step(problem, state, jax.random.fold_in(KEY, k))
        above = jax.vmap(lambda x, y: jnp.max(oracles.coupling_residual(problem, x, y)))(state.x, state.y)
        return state, (above, state.x)

    state, (above, xs) = jax.lax.scan(body, solver.init(problem, KEY), jnp.arange(250))
    return measure_global(problem, *solver.output(problem, state)), above, xs


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("end", [0.0, -2.0])
def test_a_lower_set_that_is_empty_for_some_or_all_x(end):
    """|y|^2 <= x_2 - x_1 is empty at the start, x = (0.9, 0), and with x_2 <= -2 everywhere: then it is a status."""
    problem = bilevel.BilevelProblem(
        first, bilevel.Minimize(bowl), bilevel.Box(jnp.array([-1.0, -2.0]), jnp.array([1.0, end])),
        bilevel.Box(-1.0, 1.0), bilevel.SmoothCoupling(disc), init=outside,
    )  # fmt: skip

    measured, above, xs = seen_on_the_way(problem, bilevel.SampledPenalty())
    assert (jnp.abs(xs) <= 2).all()
    roomy = np.asarray(xs[..., 1] >= xs[..., 0] + 0.25)  # radius 1/2 at least; near 0, Newton's steps only halve |y|
    assert (np.asarray(above)[roomy] <= 1e-6).all()
    if end == 0.0:  # F* = 0 at x = (-1/2, -1/2), where Y(x) = {0} is about to be empty
        assert measured.status == bilevel.Status.ESTIMATED
        assert -1e-6 <= measured.value <= 0.02
        assert measured.violation <= 1e-6
    else:
        assert measured.status == bilevel.Status.INFEASIBLE_LOWER
        assert np.isnan(measured.value)


def test_an_eighth_of_the_points_is_pushed_to_the_boundary():
    """Three times as far from their mean: a coordinate misses the boundary with probability 1/3."""
    points = np.asarray(cover(bilevel.Box(-1.0, 1.0), KEY, 64, jnp.zeros(3)))
    on_boundary = (np.abs(points) == 1).any(axis=1)
    assert not on_boundary[:56].any()
    assert on_boundary[56:].sum() >= 6


def test_bad_input_is_named():
    for name, bad in (
        ("form", "both"), ("smoothing", "none"), ("num_starts", 0), ("num_samples", 4), ("penalty", -1.0),
        ("temperature", 0.0), ("lower_tol", float("nan")), ("chunk", 0),
    ):  # fmt: skip
        with pytest.raises(bilevel.InvalidInput, match=f"SampledPenalty.{name}"):
            bilevel.SampledPenalty(**{name: bad})
    with pytest.raises(bilevel.InvalidInput, match="epsilon"):
        bilevel.SampledPenalty.from_theory(Smoothness(1.0, 1.0, 1.0, 1.0), 0.0)
    problem, _, _ = wave_problem(0)
    both = bilevel.Separable(waves)  # returns a number, not a term for each row of y
    with pytest.raises(bilevel.InvalidInput, match="Separable"):
        dataclasses.replace(problem, upper=both).validate()
    for y_set in (bilevel.Reals(), bilevel.Box(0.0, jnp.inf)):
        with pytest.raises(bilevel.Unsupported, match="bounded"):
            bilevel.solve(dataclasses.replace(problem, y_set=y_set), bilevel.SampledPenalty(), key=KEY)
