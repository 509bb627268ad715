"""The family `admm` against loops in NumPy, closed forms and enumeration, none of which shares a line with it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import problems
from benchmarks.experiments.admm import grown, mutated, rule_of, text
from bilevel import InvalidInput, oracles
from problems import admm, admm_rules

SMALL = {"dim": 5, "instances": 3, "condition": 30.0}
POINTS = {"constant": [0.7], "schedule": [0.3, 1.0, 2.0, -0.5, 1.5, 0.1], "rule": [0.4, 0.3, -0.5, 0.2]}


def numbers_of(kind, seed=0):
    drawn = admm.draw(kind, np.random.default_rng([admm.KINDS.index(kind), seed]), 5, 30.0, 6)
    return {**drawn, "q": drawn["q"][:3]}


@pytest.mark.parametrize(
    ("kind", "tuned"), [("eigen", "rule"), ("qp", "constant"), ("qp", "schedule"), ("qp", "rule"), ("lasso", "rule")]
)
def test_trajectories_and_gradients_are_those_of_a_loop(kind, tuned):
    """F and the path to rounding; the derivative through the steps against differences of the loop's F."""
    problem = problems.make("admm", kind=kind, tuned=tuned, steps=6, **SMALL).problem.validate()
    x, (_, y) = np.array(POINTS[tuned]), problem.init(jax.random.key(0))
    rules, numbers = (lambda at: admm_rules.learnt(tuned, at, admm.WIDEST)), numbers_of(kind)
    F = lambda at: admm_rules.progress(kind, numbers, rules(at), 6).mean()  # noqa: E731

    batches = problem.upper_data.full(), problem.lower_data.full()
    (value, path), gradient = jax.jit(lambda x: oracles.unrolled_objective(problem, x, y, 6, 1.0, *batches))(x)
    looks = admm_rules.run(kind, {**numbers, "q": numbers["q"][1]}, rules(x), 6)
    np.testing.assert_allclose(path["z"][1], [look.z for look in looks], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(path["lam"][1], [look.lam for look in looks], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(value, F(x), rtol=1e-9)
    differences = [(F(x + 1e-6 * e) - F(x - 1e-6 * e)) / 2e-6 for e in np.eye(len(x))]
    np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-8)


def test_the_implicit_gradient_of_the_trajectory_is_that_of_the_closed_form():
    """And from any trajectory: the map depends on its last K values alone."""
    problem, numbers = problems.make("admm", kind="eigen", steps=6, **SMALL).problem, numbers_of("eigen")
    x, y = problem.init(jax.random.key(0))
    h = bilevel.hypergradient(problem, x + 0.7, jax.tree.map(jnp.ones_like, y))
    F = lambda log_rho: admm_rules.of_eigen(numbers, 6, np.asarray(log_rho))  # noqa: E731
    np.testing.assert_allclose(h.value, F(0.7), rtol=1e-12)
    np.testing.assert_allclose(h.gradient[0], (F(0.7 + 1e-6) - F(0.7 - 1e-6)) / 2e-6, rtol=1e-7)
    assert h.error_bound < 1e-10


def test_at_the_limit_the_implicit_gradient_is_zero():
    instance = problems.make("admm", kind="lasso", steps=0, **SMALL)
    for x in (-1.0, 2.0):
        h = bilevel.hypergradient(instance.problem, jnp.array([x]))
        np.testing.assert_allclose(h.value, instance.truth.value, rtol=1e-9)
        assert abs(h.gradient[0]) < 1e-9


@pytest.mark.parametrize("kind", admm.KINDS)
def test_solutions_are_planted(kind):
    """Q z - q + lam = 0 with lam a subgradient of h at z: z is where the proximal step stays, for any rho."""
    drawn = admm.draw(kind, np.random.default_rng(3), 6, 50.0, 4)
    Q = (drawn["U"] * drawn["l"]) @ drawn["U"].T
    np.testing.assert_allclose(drawn["z"] @ Q + drawn["lam"], drawn["q"], atol=1e-12)
    for z, lam, rho in itertools.product(drawn["z"], drawn["lam"], (0.1, 1.0, 10.0)):
        if not np.any(np.all(np.isclose(drawn["z"] @ Q + lam, drawn["q"]), axis=1) & np.all(drawn["z"] == z, axis=1)):
            continue  # of another instance
        np.testing.assert_allclose(admm_rules.shrunk(kind, drawn, z + lam / rho, rho), z, atol=1e-12)


def test_the_best_constant_of_many_steps():
    """sqrt(lambda_min lambda_max) in the limit; with few steps, and the instances' own q, another one is better."""
    numbers = numbers_of("eigen")
    apart = [
        admm_rules.best_of_eigen(numbers, steps, admm.WIDEST, 0.0)[0] - np.log(30) / 2 for steps in (5, 50, 500, 5000)
    ]
    assert abs(apart[0]) > 0.1
    assert abs(apart[-1]) < 1e-3
    assert all(abs(late) < abs(early) for early, late in itertools.pairwise(apart))
    few = admm_rules.of_eigen(numbers, 5, np.array([np.log(30) / 2, np.log(30) / 2 + apart[0]]))
    assert few[1] < few[0]


def test_the_best_constant_with_a_matrix():
    """A w = z, h the indicator of a subspace of coordinates: the worst of all 2^m attains the factor q(rho), which is
    least at 1/sqrt(l_min l_max) of A Q^-1 A'. The step's matrix is built from the problem in w.
    """
    rng = np.random.default_rng(1)
    A, slopes = rng.normal(size=(3, 3)), np.array([0.2, 1.0, 7.0])
    for turn in (np.eye(3), np.linalg.qr(rng.normal(size=(3, 3)))[0]):
        Q = A.T @ np.linalg.inv((turn / slopes) @ turn.T) @ A
        best = 1 / np.sqrt(np.prod(np.linalg.eigvalsh(A @ np.linalg.inv(Q) @ A.T)[[0, -1]]))
        worst, bound = [], []
        for rho in best * np.exp(np.linspace(-1, 1, 21)):
            factors = []
            for free in itertools.product((0.0, 1.0), repeat=3):
                P = np.diag(free)  # z = P v, lam = rho (v - P v), v = A w + lam/rho
                to_w = np.linalg.solve(Q + rho * A.T @ A, A.T) * rho
                M = A @ to_w @ (2 * P - np.eye(3)) + np.eye(3) - P
                factors.append(max(abs(np.linalg.eigvals(M))))
            worst.append(max(factors))
            bound.append(0.5 + max(abs(rho - slopes) / (rho + slopes)) / 2)
        np.testing.assert_allclose(worst, bound, rtol=1e-10)
        assert int(np.argmin(worst)) == 10
    assert best == pytest.approx(np.sqrt(0.2 * 7))


def test_rules_do_what_their_papers_say():
    numbers = {**numbers_of("qp"), "q": numbers_of("qp")["q"][0]}
    z, zero = np.ones(5), np.zeros(5)
    look = admm_rules.Look(4, 1.0, z + 20, z, 2 * z, z - 1, zero, numbers)  # |r| = 20 |s|
    assert admm_rules.balancing(numbers)(look) == 2.0
    assert admm_rules.balancing(numbers)(look._replace(w=z + 0.01)) == 0.5
    assert admm_rules.balancing(numbers)(look._replace(w=z + 1)) == 1.0
    point, _, q = look.scales
    expected = np.sqrt(look.primal / point / (look.dual / max(q, np.linalg.norm(look.lam))))
    assert admm_rules.osqp(numbers)(look._replace(k=3)) == 1.0
    assert admm_rules.osqp(numbers)(look) == (pytest.approx(expected) if not 0.2 <= expected <= 5 else 1.0)
    assert admm_rules.slope(np.ones(3), 7 * np.ones(3)) == pytest.approx(7.0)
    assert admm_rules.slope(np.array([1.0, 0]), np.array([0.1, 1.0])) is None


def test_the_spectral_rule_finds_the_slopes_of_a_quadratic():
    """With h = 0 there is no second slope, and f's is between its least and largest curvature."""
    numbers = {**numbers_of("lasso"), "weight": 0.0}
    looks = admm_rules.run("lasso", {**numbers, "q": numbers["q"][0]}, admm_rules.spectral, 8)
    assert all(1 <= look.rho <= 30 for look in looks)
    assert len({look.rho for look in looks}) > 1


def test_formulas_are_rules():
    rng, numbers = np.random.default_rng(0), numbers_of("qp")
    osqp_like = admm_rules.progress("qp", numbers, rule_of(("half", "ratio")), 4)
    learnt = admm_rules.learnt("rule", np.array([0.0, 0.5, 0.0, 0.0]), admm.WIDEST)
    np.testing.assert_allclose(osqp_like, admm_rules.progress("qp", numbers, learnt, 4), rtol=1e-9)
    assert text(("half", ("+", "time", 0.5))) == "half(+(time, 0.5))"
    formula = grown(rng, 3)
    for _ in range(20):
        formula = mutated(rng, formula)
        assert np.isfinite(admm_rules.progress("qp", numbers, rule_of(formula), 3)).all()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"kind": "cone"}, r"kind \(admm\)"),
        ({"tuned": "law"}, r"tuned \(admm\)"),
        ({"steps": -1}, r"steps \(admm\)"),
        ({"steps": 0, "tuned": "rule"}, "The limit has one penalty"),
        ({"dim": 1}, r"dim \(admm\)"),
        ({"instances": 0}, r"instances \(admm\)"),
        ({"condition": 1.0}, r"condition \(admm\)"),
        ({"condition": float("nan")}, r"condition \(admm\)"),
    ],
)
def test_bad_parameters_are_named(params, words):
    with pytest.raises(InvalidInput, match=words):
        problems.make("admm", **params)
