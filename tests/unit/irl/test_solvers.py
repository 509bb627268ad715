"""IRL solvers: one optimum, against SciPy on NumPy objectives; gradients, reasons, the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from scipy.special import logsumexp
from typer.testing import CliRunner

import bilevel
import irl
import problems
from benchmarks.cli import main as cli
from benchmarks.experiments import irl_defaults
from bilevel import oracles
from irl.tabular import soft
from irl.tabular.diagnostics import objective
from problems import gridworld

SIZES = {"size": 3, "trajectories": 20, "length": 12}
hypergradient = jax.jit(lambda problem, x: bilevel.hypergradient(problem, x))
advance = jax.jit(bilevel.advance)


def transitions(mdp):
    """P [S, A, S] in NumPy."""
    P = np.zeros((mdp.num_states, mdp.num_actions, mdp.num_states))
    for index, probability in np.ndenumerate(np.asarray(mdp.transitions.probabilities)):
        P[index[0], index[1], mdp.transitions.next_states[index]] += probability
    return P


def surrogate(problem):
    """The function x -> (-Lhat, its gradient) in NumPy: value iteration, feature matching."""
    mdp, reward = problem.mdp, problem.reward
    P, rho, gamma = transitions(mdp), np.asarray(mdp.start), float(mdp.discount)
    c, features = np.asarray(problem.occupancy()), np.asarray(reward.features)

    def objective(x):
        r, V = features @ x, np.zeros(len(rho))
        for _ in range(400):  # 0.9^400 = 5e-19
            V = logsumexp(r + gamma * P @ V, axis=1)
        pi = np.exp(r + gamma * P @ V - V[:, None])
        m = np.linalg.solve(np.eye(len(rho)) - gamma * np.einsum("sa,sat->ts", pi, P), rho)
        return rho @ V - np.sum(c * r), np.einsum("sa,saf->f", m[:, None] * pi - c, features)

    return objective


class TestOptimum:
    def test_four_solvers_and_scipy(self, key):
        """Sampled demonstrations, -Lhat convex: SOBA, AID, MLIRL and MCEIRL end at SciPy's minimum."""
        problem = gridworld.make(objective="surrogate", **SIZES).problem
        best = scipy.optimize.minimize(surrogate(problem), np.zeros(4), jac=True, method="BFGS", tol=1e-9)
        assert np.abs(best.jac).max() < 1e-7
        for solver, steps in (
            (bilevel.SOBA(lower_step_size=1.0, linear_step_size=1.0, upper_step_size=0.05), 20_000),
            (bilevel.AID(lower_step_size=1.0, upper_step_size=0.5, num_lower_steps=30), 3000),
            (irl.MLIRL(upper_step_size=0.4), 20_000),
            (irl.MCEIRL(upper_step_size=0.4), 5000),
        ):
            found = bilevel.solve(problem, solver, key=key, max_steps=steps, every=steps // 2, tol=1e-7)
            assert found.status == bilevel.Status.CONVERGED, found
            np.testing.assert_allclose(found.x, best.x, atol=1e-5)
            np.testing.assert_allclose(found.record["value"][-1], best.fun, rtol=1e-10)

    def test_causal_entropy_is_maximum_likelihood_with_a_horizon(self, key):
        """A NumPy MCE-IRL (backward pass, forward pass, feature matching) against MLIRL and MCEIRL on T = 6 steps."""
        instance = gridworld.make(objective="surrogate", horizon=6, discount=1.0, **SIZES)
        mdp, reward = instance.problem.mdp, instance.problem.reward
        P, rho, features = transitions(mdp), np.asarray(mdp.start), np.asarray(reward.features)
        drawn = instance.problem.occupancy()
        mu_E = drawn.sum(axis=0).ravel() @ features.reshape(-1, 4)

        def match(x):
            Q, V = [], np.zeros(9)
            for _ in range(6):
                Q.insert(0, features @ x + P @ V)
                V = logsumexp(Q[0], axis=1)
            law, mu = rho, 0.0
            for q in Q:
                d = law[:, None] * np.exp(q - logsumexp(q, axis=1, keepdims=True))
                mu, law = mu + d.ravel() @ features.reshape(-1, 4), np.einsum("sa,sat->t", d, P)
            return rho @ V - mu_E @ x, mu - mu_E

        best = scipy.optimize.minimize(match, np.zeros(4), jac=True, method="BFGS", tol=1e-9)
        for solver in (irl.MLIRL(upper_step_size=0.8), irl.MCEIRL(upper_step_size=0.8)):
            start = solver.init(instance.problem, key)
            found = advance(instance.problem, solver, start, key, 0, 8000)[0]
            np.testing.assert_allclose(found.x, best.x, atol=1e-5)

    def test_sampled_agents_come_near(self, key):
        """One demonstration against five rollouts a step, steps like k^-1/2, averaged over half of the path."""
        problem = gridworld.make(objective="surrogate", batch_size=1, **{**SIZES, "length": 40}).problem
        solver = irl.MLIRL(upper_step_size=lambda k: 0.1 / jnp.sqrt(k + 1.0), num_rollouts=5, rollout_length=40)
        exact = surrogate(problem)
        best = scipy.optimize.minimize(exact, np.zeros(4), jac=True, method="BFGS").fun

        @jax.jit
        def run(state):
            def step(state, k):
                state = solver.step(problem, state, jax.random.fold_in(key, k))[0]
                return state, state.x

            return jax.lax.scan(step, state, jnp.arange(2000))[1]

        path = run(solver.init(problem, key))
        near = exact(np.asarray(path)[1000:].mean(axis=0))[0]
        assert near - best < 0.05 * (exact(np.zeros(4))[0] - best)


class TestSteps:
    @pytest.mark.parametrize(
        "sizes",
        [{}, {"horizon": 5, "discount": 1.0}],
        ids=["discounted", "horizon"],
    )
    def test_a_step_of_mceirl_follows_the_gradient(self, sizes, key):
        """Implicit differentiation, to 1e-10, or central differences of F, for finitely many demonstrations."""
        problem = gridworld.make(**SIZES, **sizes).problem
        x = jnp.asarray(np.random.default_rng(0).normal(size=4))
        solver = irl.MCEIRL(upper_step_size=1.0)
        state = solver.init(problem, key)._replace(x=x)
        after, info = jax.jit(solver.step)(problem, state, key)
        if "horizon" in sizes:
            steps = 1e-5 * jnp.eye(4)
            exact = [(objective(problem, x + e) - objective(problem, x - e)) / 2e-5 for e in steps]
        else:
            exact = hypergradient(problem, x).gradient
        np.testing.assert_allclose(x - after.x, exact, atol=1e-8 if "horizon" in sizes else 1e-10)
        np.testing.assert_allclose(info.direction, jnp.linalg.norm(x - after.x), rtol=1e-12)

    def test_policy_evaluation(self, key):
        """T sweeps of NumPy with the policy held; one sweep is the soft Bellman operator."""
        problem = gridworld.make(**SIZES).problem
        mdp, reward = problem.mdp, problem.reward
        P, x = transitions(mdp), jnp.ones(4)
        start = irl.MLIRL(upper_step_size=0.1).init(problem, key)._replace(x=x, y=jax.random.normal(key, mdp.shape))
        Q = np.asarray(start.y)
        pi = np.exp(Q - logsumexp(Q, axis=1, keepdims=True))
        for _ in range(3):
            Q = np.asarray(reward.table(x)) + 0.9 * P @ np.sum(pi * (Q - np.log(pi)), axis=1)
        held = irl.MLIRL(upper_step_size=0.1, num_lower_steps=3, policy_evaluation=True).step(problem, start, key)[0]
        np.testing.assert_allclose(held.y, Q, atol=1e-12)
        np.testing.assert_allclose(
            soft.evaluate(mdp, reward.table(x), start.y, soft.log_policy(start.y)),
            soft.bellman(mdp, reward.table(x), start.y), atol=1e-12,
        )  # fmt: skip

    def test_jit_equals_eager_at_the_declared_cost(self, key):
        problem, solver = gridworld.make(**SIZES).problem, irl.MLIRL(upper_step_size=0.1, num_lower_steps=3)
        state = jax.jit(solver.init)(problem, key)
        compiled = jax.jit(solver.step)(problem, state, key)
        with jax.disable_jit(), oracles.counting() as count:
            eager = solver.step(problem, state, key)
        for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
        cost = solver.cost(problem)
        assert cost.lower_gradients == count().lower_gradients
        assert cost.upper_gradients == 1  # the closed form is no call of the problem's functions

    def test_a_second_instance_compiles_nothing(self, key):
        step = jax.jit(lambda problem, solver: solver.step(problem, solver.init(problem, key), key)[0].x)
        found = [step(gridworld.make(seed=k, **SIZES).problem, irl.MLIRL(upper_step_size=0.1 + k)) for k in range(3)]
        assert step._cache_size() == 1
        assert not np.array_equal(found[0], found[1])


class TestDefaults:
    """More of the same, and the figures of `irl.tabular.steps`: `python -m benchmarks.experiments.irl_defaults`."""

    def test_a_single_sweep_does_not_outrun_itself(self, key):
        """Ten drawn MDPs: F comes within 1e-2 of its least. With 1/(curvature at x0) it rose in four of six."""
        for seed in range(10):
            drawn = irl_defaults.draw(seed, (8, 3), 0.9)
            problem = irl.to_bilevel(drawn.mdp, drawn.c, drawn.reward)
            start, end = irl_defaults.gaps(problem, irl.MLIRL(), drawn.x, key, 3000)
            assert end <= 1e-2, (seed, start, end)

    @pytest.mark.parametrize(("solver", "share"), [(irl.MLIRL(), 0.5), (irl.MCEIRL(), 1.0)])
    def test_the_step_follows_the_curvature(self, solver, share, key):
        """The next step is at most the share of |dx|/|dh|, grows by 5 % at most, and is what x moved by."""
        drawn = irl_defaults.draw(1, (8, 3), 0.9)
        problem = irl.to_bilevel(drawn.mdp, drawn.c, drawn.reward)
        step = jax.jit(lambda state: solver.step(problem, state, key)[0])
        states = [jax.jit(solver.init)(problem, key)]
        for _ in range(3):
            states.append(step(states[-1]))
        seen = [state.step_x.state for state in states]
        for k in (2, 3):
            moved, turned = (
                np.linalg.norm(getattr(seen[k], of) - getattr(seen[k - 1], of)) for of in ("x", "direction")
            )
            size = min(seen[0].most, 1.05 * seen[k - 1].size, share * moved / turned)
            np.testing.assert_allclose(seen[k].size, size, rtol=1e-10)
            np.testing.assert_allclose(states[k].x, states[k - 1].x - size * seen[k].direction, atol=1e-12)

    def test_sampled_directions_have_falling_steps(self, key):
        drawn = irl_defaults.draw(1, (8, 3), 0.9)
        problem = irl.to_bilevel(drawn.mdp, drawn.c, drawn.reward, objective="surrogate")
        solver = irl.MLIRL(num_rollouts=1, rollout_length=5)
        state = jax.jit(solver.init)(problem, key)
        last = state._replace(step_x=state.step_x._replace(state=state.step_x.state._replace(count=jnp.array(99.0))))
        step = jax.jit(lambda state: solver.step(problem, state, key)[0].x - state.x)
        np.testing.assert_allclose(step(last), step(state) / 10, rtol=1e-10)


class TestReasons:
    def test_other_problems_are_refused(self):
        other = problems.make("quadratic", dim_x=2, dim_y=3).problem
        for solver in irl.solvers.ALL.values():
            with pytest.raises(
                bilevel.Unsupported, match=rf"{solver.__name__} needs .*irl.to_(bilevel|control).*Minimize"
            ):
                bilevel.solve(other, solver(), key=jax.random.key(0))

    @pytest.mark.parametrize(
        ("sizes", "settings", "words"),
        [
            ({}, {"num_rollouts": 1}, "objective='surrogate'"),
            ({"horizon": 5}, {"policy_evaluation": True}, "discounted MDP"),
            ({"horizon": 5, "objective": "surrogate"}, {"num_rollouts": 1}, "got 50; expected at most the horizon 5"),
        ],
    )
    def test_settings_that_do_not_fit(self, sizes, settings, words):
        assert words in irl.MLIRL(**settings).unsupported(gridworld.make(**SIZES, **sizes).problem)

    def test_documented(self):
        for kind in irl.solvers.ALL.values():
            for part in ("Assumptions:", "Cost per step:", "Args:", "Reference:", "Differs from the paper"):
                assert part in kind.__doc__
            assert all(isinstance(leaf, float) for leaf in jax.tree.leaves(kind()))
            for bad in (-1.0, float("nan")):
                with pytest.raises(bilevel.InvalidInput, match=f"{kind.__name__}.upper_step_size: got"):
                    kind(upper_step_size=bad)

    def test_the_command_runs_them(self, tmp_path):
        problem = "gridworld[length=12,size=3,trajectories=20]"
        arguments = ["-p", problem, "-s", "MLIRL[upper_step_size=0.2]", "--max-steps", "20", "--json"]
        done = CliRunner().invoke(cli.app, ["run", *arguments, "--no-plot", "--out", str(tmp_path / "run")])
        assert done.exit_code == 0, done.output
        for result in json.loads(done.stdout)["results"]:
            assert (result["status"], result["referee"]["verdict"]) == ("MAX_STEPS", "agrees")


def test_adam_on_a_network_reward(key):
    """Objectworld: the network comes nearer to the expert than the best linear reward, which SciPy finds."""
    sizes = {"size": 4, "objects": 4, "seed": 1}
    linear, network = (problems.make("objectworld", model=model, **sizes) for model in ("linear", "network"))
    unable = scipy.optimize.minimize(surrogate(linear.problem), np.zeros(4), jac=True, method="BFGS").fun
    solver = irl.MLIRL(upper_step_size=optax.adam(3e-3))
    found = advance(network.problem, solver, solver.init(network.problem, key), key, 0, 2000)[0]
    expert = problems.make("objectworld", model="table", **sizes).truth.value  # the least that any reward can reach
    assert objective(network.problem, found.x) - expert < 0.2 * (unable - expert)
