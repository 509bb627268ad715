"""AT and PerSamplePenalty: against closed forms, NumPy's loops and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import oracles, run
from bilevel.oracles import per_sample
from bilevel.sampled import smooth_min

C = np.array([2.0, 0.3, -1.5])
ENDS = np.array([0.3, -0.2, 0.1, 0.4])  # b_i: the other end is the lower one


def saddle(x, y, batch):
    return jnp.sum((x - batch) ** 2) / 2 + x @ y


def against(x, y, batch):
    return -saddle(x, y, batch)


def test_at_finds_the_saddle_point_of_a_soft_threshold(key):
    """Min over x of max over |y|_inf <= 1 of |x - c|^2/2 + x'y = |x - c|^2/2 + |x|_1: x = sign(c) max(|c| - 1, 0)."""
    data = bilevel.Full(jnp.asarray(C))
    problem = bilevel.BilevelProblem(
        saddle, bilevel.Minimize(against), y_set=bilevel.Box(-1.0, 1.0), upper_data=data, lower_data=data,
        init=lambda key: (jnp.ones(3), jnp.zeros(3)),
    )  # fmt: skip
    solver = bilevel.AT(upper_step_size=0.01, num_lower_steps=2)
    state = jax.jit(run.advance)(problem, solver, solver.init(problem, key), key, 0, 1000)[0]
    np.testing.assert_allclose(state.x, np.sign(C) * np.maximum(np.abs(C) - 1, 0), atol=0.02)  # two steps


def target(x, y, batch):
    """The mean of |y_i - x|^2/2."""
    index, _ = batch
    return jnp.mean((y[index, 0] - x[0]) ** 2) / 2


def two_ends(x, y, batch):
    """Sum of -(y_i - b_i)^2, y_i in [-1, 1]: a local minimum at either end, the global one at -sign b_i."""
    index, b = batch
    return -jnp.sum((y[index, 0] - b) ** 2)


def start(key):
    return jnp.full(1, 0.7), jnp.asarray(np.sign(ENDS))[:, None]  # at the wrong ends


def make():
    source = bilevel.PerSample(jnp.asarray(ENDS), 2)
    return bilevel.BilevelProblem(
        target, bilevel.Minimize(two_ends), y_set=bilevel.Box(-1.0, 1.0), upper_data=source, lower_data=source,
        init=start,
    )  # fmt: skip


def test_penalty_finds_the_lower_of_two_ends_for_each_sample(key):
    """x* is the mean of -sign b_i = -1/2, with y_i at these ends; batches of two wander around it by their own mean."""
    problem = make().validate()
    solver = bilevel.PerSamplePenalty(upper_step_size=0.02, num_samples=16, max_penalty=100.0, num_ladder_steps=500)
    state = jax.jit(run.advance)(problem, solver, solver.init(problem, key), key, 0, 1500)[0]
    np.testing.assert_allclose(state.y[:, 0], -np.sign(ENDS), atol=0.1)
    np.testing.assert_allclose(state.x[0], -0.5, atol=0.1)


def test_worst_of_several_is_chosen_for_each_sample(key):
    """AT on the same problem: of 30 points of [-1, 1] the least of each sample's own g."""
    problem = make()
    solver = bilevel.AT(upper_step_size=0.01, num_lower_steps=0, num_starts=30)
    state = jax.jit(run.advance)(problem, solver, solver.init(problem, key), key, 0, 2)[0]
    assert np.all(np.sign(state.y[:, 0]) == -np.sign(ENDS))
    assert np.all(np.abs(state.y[:, 0]) > 0.6)


def bent(x, y, batch):
    """A g that depends on x."""
    index, b = batch
    return jnp.sum(jnp.sin(3 * y[index, 0] + x[0] * b) + x[0] * y[index, 0] ** 2)


def test_gradient_of_the_penalty_over_candidates_is_that_of_finite_differences(key):
    """P = mean_i M[f_ik + rho g_ik] - rho M[g_ik], its values by a double loop over samples and candidates."""
    rho, t = 3.0, 0.2
    problem = bilevel.BilevelProblem(target, bilevel.Minimize(bent), upper_data=make().upper_data, init=start)
    batch = problem.upper_data.take(jnp.array([2, 0]))
    here = per_sample.view(problem, start(key)[1], batch)
    ys = np.random.default_rng(0).uniform(-1, 1, (5, 2, 1))

    def penalty(f, g):
        return smooth_min(f + rho * g, t, True)[0] - rho * smooth_min(g, t / rho, True)[0]

    def P(x):
        total = 0.0
        for i, b in enumerate(ENDS[[2, 0]]):
            f = (ys[:, i, 0] - x) ** 2 / 2
            g = np.sin(3 * ys[:, i, 0] + x * b) + x * ys[:, i, 0] ** 2
            low, high = f + rho * g, g
            total += -t * np.log(np.sum(np.exp(-low / t))) + rho * t / rho * np.log(np.sum(np.exp(-high * rho / t)))
        return total / 2

    look = jax.jit(
        lambda x: oracles.penalty_by_sample(here.problem, x, jnp.asarray(ys), here.upper, here.lower, penalty)
    )
    value, gradient = look(jnp.array([0.4]))
    np.testing.assert_allclose(value, P(0.4), rtol=1e-12)
    np.testing.assert_allclose(gradient[0], (P(0.4 + 1e-6) - P(0.4 - 1e-6)) / 2e-6, rtol=1e-7)
