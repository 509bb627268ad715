"""No number without its verdict: what was not solved for is NaN for whoever does not read the status."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
import irl
from bilevel import CG, Newton, Status, lower
from bilevel.backend.tree import poisoned
from irl.tabular.diagnostics import objective
from problems import datasets, gridworld

ROOT = pathlib.Path(__file__).parents[2]
N = 20
STIFF = np.geomspace(1, 1e12, N)
Q = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]


def hilltop(x, y, batch):
    return jnp.sum(-0.5 * y**2 + 0.25 * y**4) + x[0] * 0


def steep(x, y, batch):
    return jnp.sum(jnp.exp(y) + jnp.exp(-y)) - 1e3 * jnp.sum(y) * (1 + 0 * x[0])


def hopeless(x, y, batch):
    M = jnp.asarray((Q * STIFF) @ Q.T)
    return 0.5 * y @ M @ y - jnp.sum(y) * (1 + x[0])


def unused(x, y, batch):
    return jnp.sum(x**2)


def used(x, y, batch):
    return jnp.sum(x**2) + jnp.sum(y**2)


def start(key):
    return jnp.ones(1), jnp.zeros(N)


def problem_of(g, f=used):
    return bilevel.BilevelProblem(f, bilevel.Minimize(g), init=start)


CASES = {  # what the lower level ends as: (g, its method)
    Status.SADDLE: (hilltop, Newton()),
    Status.MAX_STEPS: (steep, Newton(max_steps=2)),
    Status.STALLED: (hopeless, Newton()),
}


@pytest.mark.parametrize("status", CASES, ids=lambda status: status.name)
def test_where_the_lower_level_is_not_solved_everything_taken_from_it_is_nan(status):
    g, method = CASES[status]
    problem, x = problem_of(g), jnp.ones(1)
    found = lower.solve(problem, x, jnp.zeros(N), None, method)
    assert found.status == status
    assert np.isfinite(found.iterate).all()
    assert np.isnan(found.y).all()
    h = bilevel.hypergradient(problem, x, lower=method)
    assert h.status == status
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves((h.checked().value, h.checked().gradient)))
    for f in (used, unused):  # f that does not look at y has no NaN of its own
        F, dF = jax.value_and_grad(bilevel.implicit_objective(problem_of(g, f), lower=method))(x)
        assert np.isnan(F)
        assert np.isnan(dF).all()


def test_what_is_solved_is_as_it_was():
    problem, x = problem_of(steep), jnp.ones(1)
    found = lower.solve(problem, x, jnp.zeros(N), None)
    assert found.status == Status.CONVERGED
    np.testing.assert_array_equal(found.y, found.iterate)
    h = bilevel.hypergradient(problem, x)
    jax.tree.map(np.testing.assert_array_equal, h.checked(), h)
    F, dF = jax.value_and_grad(bilevel.implicit_objective(problem))(x)
    np.testing.assert_allclose(F, h.value, rtol=1e-14)
    np.testing.assert_allclose(dF, h.gradient, atol=1e-12)


def test_a_derivative_whose_linear_system_is_not_solved_is_nan():
    """One step of CG at condition 1e4 is no adjoint: `hypergradient` says so, and `implicit_objective` shows it."""

    def g(x, y, batch):
        return 0.5 * jnp.sum(jnp.asarray(np.geomspace(1, 1e4, N)) * (y - x[0]) ** 2)

    problem, x, method = problem_of(g), jnp.ones(1), CG(max_iterations=1)
    for estimate in (True, False):
        h = bilevel.hypergradient(problem, x, method=method, estimate=estimate)
        assert h.status == Status.UNSOLVED_LINEAR
    F, dF = jax.value_and_grad(bilevel.implicit_objective(problem, method=method))(x)
    np.testing.assert_allclose(F, 1 + N)
    assert np.isnan(dF).all()


def test_poison_follows_the_axes_of_vmap():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    found = poisoned(tree, jnp.array([True, False]))
    np.testing.assert_array_equal(np.isnan(found["a"]), [[False] * 3, [True] * 3])
    np.testing.assert_array_equal(np.isnan(found["b"]), [False, True])


@functools.cache
def far_sighted(discount, dtype):
    """A chain of three states, of which the second action leads on."""
    P = np.zeros((3, 2, 3))
    P[[0, 1, 2], 0, [0, 1, 2]], P[[0, 1, 2], 1, [1, 2, 0]] = 1, 1
    mdp = irl.MDP.dense(P, np.array([1.0, 0, 0]), discount)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), mdp)


def test_soft_values_that_rounding_hides_are_nan():
    """At discount 1 - 1e-7 float32 bounds the error by 1e7, and float64 knows eight digits."""
    r = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    near, far = (far_sighted(discount, jnp.float32) for discount in (0.9, 1 - 1e-7))
    good, bad = (irl.value_iteration(mdp, jnp.asarray(r, jnp.float32)) for mdp in (near, far))
    assert good.solved
    np.testing.assert_array_equal(good.Q, good.iterate)
    assert not bad.solved
    assert np.isfinite(bad.iterate).all()
    assert np.isnan(bad.Q).all()
    uniform = jnp.full((3, 2), 0.5, jnp.float32)
    assert np.isfinite(irl.occupancy(near, uniform)).all()
    assert np.isnan(irl.occupancy(far, bad.Q)).all()
    drawn = irl.sample(far, irl.policy(bad.Q), jax.random.key(0), num_trajectories=2, length=3)
    assert np.isnan(drawn.weights).all()
    batch = jax.vmap(lambda r: irl.value_iteration(near, r))(jnp.stack([jnp.asarray(r, jnp.float32)] * 2))
    assert batch.Q.shape == (2, 3, 2)


def test_an_objective_of_soft_values_that_were_not_found_is_nan():
    c = np.full((3, 2), 1 / 6)
    for discount, known in ((0.9, True), (1 - 1e-9, False)):  # float64; 100 000 sweeps are too few for the second
        problem = irl.to_bilevel(far_sighted(discount, jnp.float64), c, irl.TableReward(3, 2))
        assert np.isfinite(objective(problem, jnp.ones((3, 2)))) == known


def test_weights_that_were_not_solved_for_classify_nothing():
    targets = np.eye(3)
    assert datasets.accuracy(np.eye(3), targets) == 1
    assert np.isnan(datasets.accuracy(np.full((3, 3), np.nan), targets))


def test_an_expert_that_is_not_known_is_refused():
    with pytest.raises(bilevel.InvalidInput, match="discount"):
        gridworld.make(size=2, discount=1 - 1e-9)


STOPPED = {  # who may look at where a search stopped, whatever its verdict
    "irl/tabular/soft.py": "is where Q is made of it",
    "irl/solvers/mceirl.py": "a step may cut its sweeps off; their error is shown, the referee judges the end",
    "problems/guarantees/soft.py": "the error is what is measured there",
}
UNREAD = {  # who calls hypergradient without a look at its status
    "benchmarks/judge/platform_probe.py": "compares the bits of two runs",
    "benchmarks/experiments/mutants.py": "a faulty hypergradient keeps the true one's status",
}


def test_nobody_takes_a_number_without_its_verdict():
    """Iterates stay in `lower`; who calls `hypergradient` reads a status, or takes `checked()`: so says the source."""
    iterates, unread = set(), set()
    for path in (path for top in ("bilevel", "irl", "problems", "benchmarks") for path in (ROOT / top).rglob("*.py")):
        name, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf8"))
        called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        read = {node for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - set(called)  # not CG().iterate(…)
        if any(node.attr == "iterate" for node in read) and not name.startswith("bilevel/lower/"):
            iterates.add(name)
        unread |= {name for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) and _blind(function)}
    assert iterates == set(STOPPED)
    assert unread == set(UNREAD)


def _blind(function):
    """Whether it calls bilevel's hypergradient and reads no status."""
    inside = list(ast.walk(function))
    calls = {ast.unparse(node.func) for node in inside if isinstance(node, ast.Call)}
    read = {node.attr for node in inside if isinstance(node, ast.Attribute)}
    return bool(calls & {"hypergradient", "bilevel.hypergradient"}) and not read & {"status", "checked"}
