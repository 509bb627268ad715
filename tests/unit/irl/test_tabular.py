"""Tabular inverse reinforcement learning against NumPy, SciPy and closed forms."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from scipy.special import logsumexp

import bilevel
import irl
import problems
from bilevel import InvalidInput
from irl.tabular import soft
from irl.tabular.diagnostics import epic_distance
from irl.tabular.spec import lower_map, upper_of_trajectories

S, A, K, F = 6, 3, 2, 3
tables = hnp.arrays(np.float64, (S, A), elements=st.floats(-50, 50))
bellman = jax.jit(soft.bellman)
hypergradient = jax.jit(lambda problem, x, method=None: bilevel.hypergradient(problem, x, method=method))


@functools.cache
def sparse(seed, discount=0.9, sizes=(S, A, K)):
    rng = np.random.default_rng(seed)
    next_states = rng.integers(sizes[0], size=sizes)
    probabilities, start = rng.dirichlet(np.ones(sizes[2]), sizes[:2]), rng.dirichlet(np.ones(sizes[0]))
    return irl.MDP.sparse(next_states, probabilities, start, discount)


@functools.cache
def dense(seed, discount=0.9):
    rng = np.random.default_rng(seed)
    return irl.MDP.dense(rng.dirichlet(np.ones(S), (S, A)), rng.dirichlet(np.ones(S)), discount)


@functools.cache
def linear(seed):
    return irl.LinearReward.of(np.random.default_rng(100 + seed).normal(size=(S, A, F)))


def random_demonstrations(seed, num_trajectories, length):
    rng = np.random.default_rng(seed)
    states, actions = (rng.integers(size, size=(num_trajectories, length)) for size in (S, A))
    return irl.Demonstrations.of(states, actions)


@functools.cache
def expert(seed):
    """(true x, its policy, that policy's occupancy) on dense(seed)."""
    x = jnp.asarray(np.random.default_rng(200 + seed).normal(size=F))
    pi = irl.policy(irl.value_iteration(dense(seed), linear(seed).table(x)).Q)
    return x, pi, irl.occupancy(dense(seed), pi)


def matrices(mdp):
    """(P [S, A, S], rho, gamma) in NumPy; successor lists are summed up one by one."""
    rho, gamma = np.asarray(mdp.start), float(mdp.discount)
    if not mdp.is_sparse:
        return np.asarray(mdp.transitions), rho, gamma
    P = np.zeros((mdp.num_states, mdp.num_actions, mdp.num_states))
    for index, probability in np.ndenumerate(np.asarray(mdp.transitions.probabilities)):
        P[index[0], index[1], mdp.transitions.next_states[index]] += probability
    return P, rho, gamma


def brute_force_Q(mdp, r):
    P, _, gamma = matrices(mdp)
    Q = np.zeros_like(r)
    for _ in range(600):  # 0.9^600 = 3e-28
        Q = r + gamma * P @ logsumexp(Q, axis=1)
    return Q


def series(mdp, pi, start):
    """The sum over t < 600 of gamma^t times the law of (s_t, a_t)."""
    P, _, gamma = matrices(mdp)
    law, d = np.asarray(start), np.zeros(pi.shape)
    for t in range(600):
        d += gamma**t * law[:, None] * pi
        law = np.einsum("sa,sat->t", law[:, None] * pi, P)
    return d


class TestSoftDynamicProgramming:
    @example(np.zeros((S, A)), np.ones((S, A)), 0.99)  # a shift: the contraction is tight
    @given(tables, tables, st.floats(0, 0.999))
    def test_operator_contracts(self, Q1, Q2, discount):
        mdp, r = sparse(0), jnp.ones((S, A))
        mdp = irl.MDP(mdp.transitions, mdp.start, jnp.asarray(discount))
        moved = np.abs(bellman(mdp, r, jnp.asarray(Q1)) - bellman(mdp, r, jnp.asarray(Q2))).max()
        assert moved <= discount * np.abs(Q1 - Q2).max() + 1e-13 * 100

    @pytest.mark.parametrize("mdp", [dense(0), sparse(1)], ids=["dense", "sparse"])
    def test_value_iteration_is_brute_force(self, mdp):
        r = np.random.default_rng(0).normal(size=(S, A)) * 3
        exact, found = brute_force_Q(mdp, r), irl.value_iteration(mdp, jnp.asarray(r))
        np.testing.assert_allclose(found.Q, exact, atol=1e-11)
        rough = irl.value_iteration(mdp, jnp.asarray(r), tol=1e-3)
        assert np.abs(rough.iterate - exact).max() <= rough.error + 1e-12  # attained, up to rounding
        assert rough.sweeps < found.sweeps
        for count in range(13):  # looked at every ten
            few, Q = irl.value_iteration(mdp, jnp.asarray(r), max_sweeps=count), np.zeros((S, A))
            for _ in range(count):
                Q = np.asarray(bellman(mdp, jnp.asarray(r), jnp.asarray(Q)))
            np.testing.assert_allclose(few.iterate, Q, atol=1e-12)
            assert few.sweeps == count
            assert np.abs(few.iterate - exact).max() <= few.error + 1e-12

    def test_soft_optimal_policy_is_best(self):
        """Its value by policy evaluation, entropy included, is V, and no other policy's is above."""
        mdp, rng = dense(3), np.random.default_rng(0)
        P, _, gamma = matrices(mdp)
        r = rng.normal(size=(S, A))
        Q = irl.value_iteration(mdp, jnp.asarray(r)).Q

        def evaluate(pi):
            gain = np.sum(pi * (r - np.log(pi)), axis=1)
            return np.linalg.solve(np.eye(S) - gamma * np.einsum("sa,sat->st", pi, P), gain)

        pi, V = np.asarray(irl.policy(Q)), np.asarray(soft.value(Q))
        np.testing.assert_allclose(evaluate(pi), V, atol=1e-11)
        for size in (1e-2, 1.0):
            other = pi * np.exp(size * rng.normal(size=pi.shape))
            assert (evaluate(other / other.sum(axis=1, keepdims=True)) < V).all()

    @pytest.mark.parametrize("mdp", [dense(0), sparse(1)], ids=["dense", "sparse"])
    def test_occupancy(self, mdp):
        rng = np.random.default_rng(4)
        pi = rng.dirichlet(np.ones(A), S)
        P, rho, gamma = matrices(mdp)
        d = np.asarray(irl.occupancy(mdp, jnp.asarray(pi)))
        np.testing.assert_allclose(d, series(mdp, pi, rho), atol=1e-12)
        np.testing.assert_allclose(d.sum(), 1 / (1 - gamma), rtol=1e-12)
        np.testing.assert_allclose(d.sum(axis=1), rho + gamma * np.einsum("sa,sat->t", d, P), atol=1e-12)
        signed = rng.normal(size=S)
        d = irl.occupancy(mdp, jnp.asarray(pi), jnp.asarray(signed))
        np.testing.assert_allclose(d, series(mdp, pi, signed), atol=1e-11)

    def test_sparse_and_dense_agree(self):
        mdp, full = sparse(5), sparse(5).to_dense()
        np.testing.assert_allclose(full.transitions, matrices(mdp)[0], atol=1e-15)
        rng = np.random.default_rng(0)
        V, d = jnp.asarray(rng.normal(size=S)), jnp.asarray(rng.normal(size=(S, A)))
        np.testing.assert_allclose(mdp.expect(V), full.expect(V), atol=1e-14)
        np.testing.assert_allclose(mdp.flow(d), full.flow(d), atol=1e-14)
        np.testing.assert_allclose(jnp.vdot(d, mdp.expect(V)), jnp.vdot(mdp.flow(d), V), atol=1e-13)
        found = [irl.value_iteration(m, d).Q for m in (mdp, full)]
        np.testing.assert_allclose(*found, atol=1e-12)
        pi = irl.policy(found[0])
        np.testing.assert_allclose(irl.occupancy(mdp, pi), irl.occupancy(full, pi), atol=1e-12)

    def test_ten_thousand_states_without_a_square_matrix(self, key):
        """What XLA allocates for value iteration and for a step of SOBA; an S x S matrix would take 800 MB."""
        mdp = sparse(0, sizes=(10_000, 2, 3))
        problem = irl.to_bilevel(mdp, np.ones((10_000, 2)), irl.TableReward(10_000, 2))
        solver = bilevel.SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=0.1)
        state = solver.init(problem, key)
        for function, arguments in ((irl.value_iteration, (mdp, state.y)), (solver.step, (problem, state, key))):
            memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
            assert 0 < memory.temp_size_in_bytes + memory.output_size_in_bytes < 20e6


class TestDemonstrations:
    def test_occupancy_by_hand(self):
        """With gamma = 0.9; the padding points nowhere, and a weight of 2 is a trajectory twice."""
        mdp, states, actions = dense(0), [[0, 1, 0], [2, 99, -1]], [[1, 0, 1], [2, 7, 7]]
        c = irl.Demonstrations.of(states, actions, [3, 1], [1.0, 2.0]).validate(mdp).occupancy(mdp)
        expected = np.zeros((S, A))
        expected[0, 1], expected[1, 0], expected[2, 2] = (1 + 0.81) / 3, 0.9 / 3, 2 / 3
        np.testing.assert_allclose(c, expected, atol=1e-15)

    def test_files(self, tmp_path):
        given = irl.Demonstrations.of([[0, 1], [2, 0]], [[1, 0], [2, 2]], [2, 1], [0.5, 3.0])
        given.save(tmp_path / "all.npz")
        again = irl.Demonstrations.load(tmp_path / "all.npz")
        for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)
        np.savez(tmp_path / "two.npz", states=[[0, 1]], actions=[[1, 1]])
        two = irl.Demonstrations.load(tmp_path / "two.npz")
        assert (two.lengths.tolist(), two.weights.tolist()) == ([2], [1.0])
        np.savez(tmp_path / "one.npz", states=[[0, 1]])
        with pytest.raises(InvalidInput, match=r"actions .*got arrays \['states'\]"):
            irl.Demonstrations.load(tmp_path / "one.npz")

    @pytest.mark.parametrize("mdp", [dense(0), sparse(0)], ids=["dense", "sparse"])
    def test_samples_follow_the_policy_and_the_dynamics(self, mdp, key):
        """Given the visits each count is binomial: all within Bernstein's bound at 5 standard deviations."""
        pi = 0.7 * np.random.default_rng(0).dirichlet(np.ones(A), S) + 0.1
        drawn = irl.sample(mdp, jnp.asarray(pi), key, num_trajectories=2000, length=20).validate(mdp)
        s, a = np.asarray(drawn.states), np.asarray(drawn.actions)
        assert s.shape == a.shape == (2000, 20)
        P, rho, _ = matrices(mdp)

        def check(counts, probabilities):
            visits = counts.sum(axis=-1, keepdims=True)
            deviation = np.sqrt(visits * probabilities * np.maximum(1 - probabilities, 0))
            assert (np.abs(counts - visits * probabilities) <= 5 * deviation + 25 / 3).all()
            assert visits.min() > 100

        check(np.bincount(s[:, 0], minlength=S).astype(float), rho)
        moves = np.zeros((S, A, S))
        np.add.at(moves, (s[:, :-1], a[:, :-1], s[:, 1:]), 1)
        check(moves, P)
        check(moves.sum(axis=-1), pi)


class TestBilevel:
    def test_upper_is_the_likelihood(self):
        """-(1/n) sum of gamma^t log pi by loops; a batch of one trajectory averages to it."""
        demonstrations = random_demonstrations(0, 4, 5)
        y = np.random.default_rng(0).normal(size=(S, A))
        log_pi = y - logsumexp(y, axis=1, keepdims=True)
        s, a = np.asarray(demonstrations.states), np.asarray(demonstrations.actions)
        exact = -np.mean([sum(0.9**t * log_pi[s[i, t], a[i, t]] for t in range(5)) for i in range(4)])
        x = jnp.zeros(F)
        full = irl.to_bilevel(dense(0), demonstrations, linear(0)).validate()
        np.testing.assert_allclose(full.upper(x, jnp.asarray(y), full.upper_data.full()), exact, rtol=1e-13)
        small = irl.to_bilevel(dense(0), demonstrations, linear(0), batch_size=1).validate()
        each = [small.upper(x, jnp.asarray(y), small.upper_data.block(jnp.array(i))) for i in range(4)]
        assert small.upper is upper_of_trajectories
        np.testing.assert_allclose(np.mean(each), exact, rtol=1e-13)
        assert np.ptp(each) > 0.1

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("method", [None, bilevel.GMRES()], ids=["dense", "GMRES"])
    def test_hypergradient_is_the_closed_form(self, seed, method):
        """From a population of demonstrations: E_pi - E_expert of sum gamma^t grad r, both started from rho."""
        mdp, reward, (_, _, c) = dense(seed), linear(seed), expert(seed)
        x = np.random.default_rng(seed).normal(size=F)
        features = np.asarray(reward.features)
        Q = brute_force_Q(mdp, features @ x)
        pi = np.exp(Q - logsumexp(Q, axis=1, keepdims=True))
        gap = series(mdp, pi, mdp.start) - np.asarray(c)
        h = hypergradient(irl.to_bilevel(mdp, c, reward), jnp.asarray(x), method)
        np.testing.assert_allclose(h.gradient, np.einsum("sa,saf->f", gap, features), atol=1e-10)
        textbook = irl.likelihood_gradient(mdp, c, reward, jnp.asarray(x), mdp.start)
        np.testing.assert_allclose(h.gradient, textbook, atol=1e-10)
        np.testing.assert_allclose(irl.start_measure(mdp, c), mdp.start, atol=1e-12)

    @pytest.mark.parametrize("seed", range(3))
    def test_identity_for_any_demonstrations(self, seed):
        """Started from the demonstrations' own measure the closed form is exact; started from rho it is not."""
        mdp, reward, drawn = dense(seed), linear(seed), random_demonstrations(seed, 3, 4)
        c, x = drawn.occupancy(mdp), jnp.asarray(np.random.default_rng(seed).normal(size=F))
        P, _, gamma = matrices(mdp)
        mu = np.asarray(c).sum(axis=1) - gamma * np.einsum("sa,sat->t", c, P)
        h = hypergradient(irl.to_bilevel(mdp, drawn, reward), x)
        features = np.asarray(reward.features)
        Q = brute_force_Q(mdp, features @ np.asarray(x))
        gap = series(mdp, np.exp(Q - logsumexp(Q, axis=1, keepdims=True)), mu) - np.asarray(c)
        np.testing.assert_allclose(h.gradient, np.einsum("sa,saf->f", gap, features), atol=1e-10)
        np.testing.assert_allclose(h.gradient, irl.likelihood_gradient(mdp, c, reward, x), atol=1e-10)
        assert np.abs(h.gradient - irl.likelihood_gradient(mdp, c, reward, x, mdp.start)).max() > 1e-2

    def test_hypergradient_by_finite_differences(self):
        """A reward that is not linear in x, successor lists, and a NumPy objective."""
        mdp, base = sparse(2), np.random.default_rng(5).normal(size=(S, A))
        c = np.random.default_rng(6).uniform(size=(S, A))
        problem = irl.to_bilevel(mdp, c, Bent(jnp.asarray(base)))

        def objective(x):
            Q = brute_force_Q(mdp, np.tanh(x[0] * base) + x[1] ** 2 * base)
            return -np.sum(c * (Q - logsumexp(Q, axis=1, keepdims=True)))

        x, steps = np.array([0.7, -0.4]), 1e-5 * np.eye(2)
        h = hypergradient(problem, jnp.asarray(x))
        slopes = [(objective(x + e) - objective(x - e)) / 2e-5 for e in steps]
        np.testing.assert_allclose(h.value, objective(x), rtol=1e-12)
        np.testing.assert_allclose(h.gradient, slopes, rtol=1e-7)

    @pytest.mark.parametrize("seed", range(2))
    def test_certified_errors(self, seed):
        """|computed - closed form| is within the bound where the lower level is solved and where it is rough."""
        mdp, reward, (_, _, c) = dense(seed), linear(seed), expert(seed)
        known = irl.constants(mdp, c, reward)
        problem = irl.to_bilevel(mdp, c, reward)
        x = jnp.asarray(np.random.default_rng(seed).normal(size=F))
        exact = irl.likelihood_gradient(mdp, c, reward, x)
        for tol, limit in ((None, 1e-4), (1e-6, 1e4)):
            y = irl.value_iteration(mdp, reward.table(x), tol=tol).iterate
            h = bilevel.hypergradient(problem, x, y, lower=bilevel.AsGiven(), constants=known)
            assert np.linalg.norm(h.gradient - exact) <= h.error_bound < limit
        # the constants themselves, at random points
        T = functools.partial(lower_map, batch=problem.lower_data.full())
        for k in range(3):
            y, z = jax.random.normal(jax.random.key(k), (2, S, A)) * 3
            by_y = [np.asarray(jax.jacobian(T, 1)(x, at)).reshape(S * A, S * A) for at in (y, z)]
            by_x = np.asarray(jax.jacobian(T)(x, y)).reshape(S * A, F)
            curvature = np.asarray(jax.hessian(lambda y: problem.upper(x, y, c))(y)).reshape(S * A, S * A)
            apart = np.linalg.norm(y - z)
            assert np.linalg.norm(by_y[0] - by_y[1], 2) <= known.L_gyy * apart
            assert np.linalg.svd(np.eye(S * A) - by_y[0])[1].min() >= known.mu
            assert np.linalg.norm(np.eye(S * A) - by_y[0], 2) <= known.L_g
            assert np.linalg.norm(curvature, 2) <= known.L_fy
            np.testing.assert_allclose(np.linalg.norm(by_x, 2), known.C_gxy, rtol=1e-12)


@bilevel.struct.struct
class Bent(irl.Reward):
    """tanh(x_0 b) + x_1^2 b."""

    base: jax.Array

    def table(self, x):
        return jnp.tanh(x[0] * self.base) + x[1] ** 2 * self.base

    @property
    def init(self):
        return start_at_one


def start_at_one(key):
    return jnp.ones(2)


def test_rewards():
    features = np.random.default_rng(0).normal(size=(S, F))
    of_states = irl.LinearReward.of(features, num_actions=A)
    x = np.arange(1.0, 1 + F)
    np.testing.assert_allclose(of_states.table(jnp.asarray(x)), np.tile((features @ x)[:, None], A), rtol=1e-13)
    table = irl.TableReward(S, A)
    assert table.init is irl.TableReward(S, A).init
    problem = irl.to_bilevel(dense(0), expert(0)[2], table, x_set=bilevel.Ball(2.0)).validate()
    assert problem.init(jax.random.key(0))[0].shape == (S, A)
    assert problem.x_set.radius == 2.0


PAIR = ([[0, 1]], [[0, 1]])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: irl.MDP.dense(np.ones((2, 1, 3)) / 3, [1, 0], 0.9), r"transitions .*\(2, 1, 3\)"),
        (lambda: irl.MDP.dense([[[0.5, 0.4]], [[1, 0]]], [1, 0], 0.9), r"transitions .*row \(0, 0\) has the sum 0.9"),
        (lambda: irl.MDP.dense([[[1, 0]], [[2, -1]]], [1, 0], 0.9), r"transitions .*row \(1, 0\)"),
        (lambda: irl.MDP.dense([[[1, 0]], [[1, 0]]], [1, 0, 0], 0.9), r"start .*\(3,\)"),
        (lambda: irl.MDP.dense([[[1, 0]], [[1, 0]]], [1, 1], 0.9), r"start .*sum 2"),
        (lambda: irl.MDP.dense([[[1, 0]], [[1, np.nan]]], [1, 0], 0.9), r"transitions .*row \(1, 0\)"),
        (lambda: irl.MDP.dense([[[1, 0]], [[1, 0]]], [1, 0], 1.0), "discount"),
        (lambda: irl.MDP.sparse([[[0]], [[2]]], [[[1]], [[1]]], [1, 0], 0.9), r"next_states .*2 at index \(1, 0, 0\)"),
        (lambda: irl.MDP.sparse([[[0.0]], [[1.0]]], [[[1]], [[1]]], [1, 0], 0.9), r"next_states .*float64"),
        (lambda: irl.MDP.sparse([[0], [1]], [[[1]], [[1]]], [1, 0], 0.9), r"next_states .*\(2, 1\)"),
        (lambda: irl.Demonstrations.of([0, 1], [0, 1]), r"states .*\(2,\)"),
        (lambda: irl.Demonstrations.of([[0, 1]], [[0.0, 1.0]]), r"actions .*float64"),
        (lambda: irl.Demonstrations.of([[0, 1]], [[0]]), r"actions .*\(1, 1\)"),
        (lambda: irl.Demonstrations.of(*PAIR, [3]), r"lengths .*3"),
        (lambda: irl.Demonstrations.of(*PAIR, [1, 1]), r"lengths .*\(2,\)"),
        (lambda: irl.Demonstrations.of(*PAIR, None, [0.0]), "weights"),
        (lambda: irl.Demonstrations.of([[0, S]], [[0, 1]]).validate(dense(0)), rf"states .*{S} at index \(0, 1\)"),
        (lambda: irl.LinearReward.of(np.ones((S, F))), r"features .*num_actions"),
        (lambda: irl.LinearReward.of(np.full((S, A, F), np.nan)), r"features .*non-finite"),
        (lambda: irl.to_bilevel(dense(0), expert(0)[2], irl.TableReward(S, A + 1)), r"reward .*\(6, 4\)"),
        (lambda: irl.to_bilevel(dense(0), np.ones((S, A + 1)), linear(0)), r"demonstrations .*\(6, 4\)"),
        (lambda: irl.to_bilevel(dense(0), -np.ones((S, A)), linear(0)), r"demonstrations .*-1"),
        (lambda: irl.to_bilevel(dense(0), None, linear(0)), r"demonstrations .*NoneType"),
        (lambda: irl.to_bilevel(dense(0), np.ones((S, A)), linear(0), batch_size=2), "batch_size"),
        (lambda: irl.to_bilevel(dense(0), np.ones((S, A)), linear(0), objective="map"), r"objective .*'map'"),
        (lambda: irl.to_bilevel(dense(0), irl.Demonstrations.of([[S]], [[0]]), linear(0)), "states"),
        (lambda: problems.make("gridworld", size=1), "size"),
        (lambda: problems.make("gridworld", slip=1.5), "slip"),
        (lambda: problems.make("gridworld", discount=1.0), "discount"),
        (lambda: problems.make("gridworld", trajectories=0, batch_size=3), "batch_size"),
    ],
)
def test_bad_input_is_named(build, words):
    with pytest.raises(InvalidInput, match=words):
        build()


def test_epic_distance_sees_no_shaping_and_is_the_definition():
    """Against loops over all (s, a, s'); 0 under shaping and scale, 1 for the opposite."""
    rng = np.random.default_rng(0)
    first, second, phi, gamma = rng.normal(size=(3, 2)), rng.normal(size=(3, 2, 3)), rng.normal(size=3), 0.9

    def canonical(R):
        r = (lambda s, a, t: R[s, a]) if R.ndim == 2 else (lambda s, a, t: R[s, a, t])
        mean = [np.mean([r(s, a, t) for a in range(2) for t in range(3)]) for s in range(3)]
        every = [(s, a, t) for s in range(3) for a in range(2) for t in range(3)]
        return [r(s, a, t) + gamma * mean[t] - mean[s] - gamma * np.mean(mean) for s, a, t in every]

    rho = np.corrcoef(canonical(first), canonical(second))[0, 1]
    np.testing.assert_allclose(epic_distance(first, second, gamma), np.sqrt((1 - rho) / 2), rtol=1e-12)
    shaped = 3 * (second + gamma * phi[None, None, :] - phi[:, None, None]) + 7
    assert epic_distance(second, shaped, gamma) < 1e-7
    np.testing.assert_allclose(epic_distance(second, -shaped, gamma), 1, rtol=1e-7)
