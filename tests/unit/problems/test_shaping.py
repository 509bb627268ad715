"""The family `shaping`: attributions by enumeration, what no weights change, and the trained policy by loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import bilevel
import problems
from benchmarks.experiments.shaping import log_improvement
from bilevel import InvalidInput, oracles
from problems import shaping

SMALL = {"vocab": 2, "length": 3, "steps": 3}


def brute(problem, x, y, discount, to_go=True):
    """One step of policy gradient by a loop over sequences and places, from logits y [prefixes, vocab]."""
    data = problem.lower_data.full()
    tokens, size = np.einsum("j,jnt->nt", x, np.asarray(data["tokens"])), float(data["size"])
    rows = [prefix for t in range(3) for prefix in itertools.product(range(2), repeat=t)]
    log_p = np.asarray(jax.nn.log_softmax(y))
    step = np.zeros_like(log_p)
    for n, s in enumerate(itertools.product(range(2), repeat=3)):
        p = np.exp(sum(log_p[rows.index(s[:t]), s[t]] for t in range(3)))
        for t in range(3):
            gain = sum(discount ** (u - t) * tokens[n, u] for u in range(t, 3)) if to_go else tokens[n].sum()
            row = rows.index(s[:t])
            step[row] += p * gain * (np.eye(2)[s[t]] - np.exp(log_p[row]))
    return y + size * step


@pytest.mark.parametrize(("seed", "vocab", "length"), [(0, 2, 3), (1, 3, 4)])
def test_attributions_add_up(seed, vocab, length):
    """To r(s) - r(empty), each of them; Shapley values also by all orders in which tokens may come."""
    world = shaping.draw(seed, vocab, length)
    total = world.reward - world.reward[0]
    np.testing.assert_allclose(world.tokens.sum(axis=2), np.broadcast_to(total, (4, len(total))), atol=1e-12)
    orders, found = list(itertools.permutations(range(length))), np.zeros(world.sequences.shape)
    for order in orders:
        s = np.zeros_like(world.sequences)
        for t in order:
            before = world.reward[shaping.number(s, vocab)]
            s[:, t] = world.sequences[:, t]
            found[:, t] += (world.reward[shaping.number(s, vocab)] - before) / len(orders)
    np.testing.assert_allclose(world.tokens[0], found, atol=1e-12)
    silent = world.sequences == 0  # a token that is not there gets nothing
    np.testing.assert_allclose(world.tokens[0][silent], 0, atol=1e-12)


def test_left_out_is_gradient_times_input():
    """Of the reward as a polynomial, linear in each token's one-hot vector; before the shares are added."""
    world, vocab = shaping.draw(0, 3, 3), 3

    def extended(p):
        total = jnp.asarray(world.reward)
        for t in reversed(range(3)):
            total = total.reshape(*(vocab,) * (t + 1)) @ p[t] if t else total.reshape(vocab) @ p[0]
        return total

    for s, e in zip(world.sequences[::5], world.tokens[1][::5], strict=True):
        p = jnp.eye(vocab)[s]
        slope = np.asarray(jax.grad(extended)(p))
        by_gradient = np.sum(slope * (np.asarray(p) - np.eye(vocab)[np.zeros(3, int)]), axis=1)
        missing = extended(p) - world.reward[0] - by_gradient.sum()
        np.testing.assert_allclose(e, by_gradient + missing / 3, atol=1e-10)


def test_steps_are_those_of_a_loop():
    x = np.array([0.4, 0.3, 0.2, 0.1])
    for credit, to_go in (("to-go", True), ("return", False)):
        problem = problems.make("shaping", credit=credit, **SMALL).problem.validate()
        y, path = np.zeros((7, 2)), np.asarray(jax.jit(shaping.trained)(problem, jnp.asarray(x)))
        for k in range(3):
            y = brute(problem, x, y, 0.7, to_go)
            np.testing.assert_allclose(path[k], y, atol=1e-12)
    p = shaping.probabilities(jnp.asarray(y), 2, 3)
    assert p.sum() == pytest.approx(1)


def test_whole_returns_do_not_see_the_weights():
    """The return of a sequence is r up to a constant: one path for all x, and a gradient of 0."""
    problem = problems.make("shaping", credit="return", **SMALL).problem
    run = jax.jit(shaping.trained)
    ends = [run(problem, jnp.asarray(x)) for x in (*np.eye(4), np.full(4, 0.25))]
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=1e-12)
    assert np.abs(ends[0]).max() > 0.1
    gradient = slope(problem, jnp.full(4, 0.25))
    np.testing.assert_allclose(gradient - gradient.mean(), 0, atol=1e-12)  # along the simplex


def test_potentials_do_not_change_undiscounted_rewards_to_go():
    """In expectation prefix and sparse are one; shapley and left-out know the end, and are biased."""
    problem, run = problems.make("shaping", discount=1.0, **SMALL).problem, jax.jit(shaping.trained)
    shapley, left_out, prefix, sparse = (run(problem, jnp.asarray(x)) for x in np.eye(4))
    np.testing.assert_allclose(prefix, sparse, atol=1e-12)
    whole = run(problems.make("shaping", credit="return", **SMALL).problem, jnp.eye(4)[0])
    np.testing.assert_allclose(sparse, whole, atol=1e-12)
    for biased in (shapley, left_out):
        assert np.abs(biased - whole).max() > 1e-3


def slope(problem, x):
    """The derivative of F along x, through the steps."""
    y, batches = problem.init(jax.random.key(0))[1], (problem.upper_data.full(), problem.lower_data.full())
    return jax.jit(lambda x: oracles.unrolled_objective(problem, x, y, len(y), 1.0, *batches)[1])(x)


def test_gradients_are_differences():
    problem, x = problems.make("shaping", **SMALL).problem, jnp.array([0.4, 0.3, 0.2, 0.1])
    run = jax.jit(shaping.trained)
    F = lambda x: problem.upper(x, run(problem, x), problem.upper_data.full())  # noqa: E731
    differences = [(F(x + 1e-6 * e) - F(x - 1e-6 * e)) / 2e-6 for e in jnp.eye(4)]
    np.testing.assert_allclose(slope(problem, x), differences, atol=1e-8)


def test_expected_improvement():
    z = np.array([-40.0, -12.0, -5.0, -1.0, 0.0, 0.3, 4.0])
    np.testing.assert_allclose(log_improvement(z[2:]), np.log(norm.pdf(z[2:]) + z[2:] * norm.cdf(z[2:])), rtol=1e-9)
    assert np.all(np.diff(log_improvement(z)) > 0)
    np.testing.assert_allclose(log_improvement(z[:2]), norm.logpdf(z[:2]) - 2 * np.log(-z[:2]), rtol=1e-3)


def test_a_run_keeps_to_the_simplex():
    instance = problems.make("shaping", **SMALL)
    solver = bilevel.ITD(lower_step_size=1.0, num_lower_steps=3, upper_step_size=0.3)
    state, F = solver.init(instance.problem, jax.random.key(0)), []
    step = jax.jit(solver.step)
    for _ in range(20):
        state, info = step(instance.problem, state, jax.random.key(0))
        F.append(float(info.value))
    assert F[-1] < F[0] - 1e-3
    assert instance.problem.x_set.violation(state.x) < 1e-12
    assert instance.metrics(state.x, state.y)["reward"] > instance.metrics(None, jnp.zeros((1, 7, 2)))["reward"]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"vocab": 1}, r"vocab \(shaping\)"),
        ({"length": 1}, r"length \(shaping\)"),
        ({"length": 9}, "at most 5000 sequences"),
        ({"steps": 0}, r"steps \(shaping\)"),
        ({"size": 0.0}, r"size \(shaping\)"),
        ({"discount": 1.1}, r"discount \(shaping\)"),
        ({"credit": "none"}, r"credit \(shaping\)"),
    ],
)
def test_bad_parameters_are_named(params, words):
    with pytest.raises(InvalidInput, match=words):
        problems.make("shaping", **params)
