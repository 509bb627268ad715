"""One step of each solver against NumPy with explicit matrices, and convergence to the closed-form optimum."""

import jax
import numpy as np
import pytest

import bilevel
import problems


@pytest.fixture(scope="module")
def instance():
    return problems.make("quadratic", seed=4, dim_x=3, dim_y=4, condition_y=4.0)


class Matrices:
    """f and g of the quadratic family as NumPy matrices: gradients by hand."""

    def __init__(self, problem):
        self.P, self.Q, self.S, self.p, self.s = (np.asarray(leaf)[0] for leaf in problem.upper_data.arrays)
        self.H, self.G, self.h = (np.asarray(leaf)[0] for leaf in problem.lower_data.arrays)

    def fx(self, x, y):
        return self.Q @ y + self.S @ x + self.s

    def fy(self, x, y):
        return self.P @ y + self.Q.T @ x + self.p

    def gy(self, x, y):
        return self.H @ y + self.G.T @ x + self.h


def start(problem, solver):
    """A state with random y and v, so that no term vanishes."""
    state = solver.init(problem, jax.random.key(1))
    y, v = (jax.random.normal(jax.random.key(k), (4,)) for k in (2, 3))
    return state._replace(y=y, v=v), *(np.asarray(part) for part in (state.x, y, v))


a, b, c = 0.11, 0.07, 0.05


def test_soba_step(instance):
    solver = bilevel.SOBA(lower_step_size=a, linear_step_size=b, upper_step_size=c)
    state, x, y, v = start(instance.problem, solver)
    new, _ = solver.step(instance.problem, state, jax.random.key(0))
    m = Matrices(instance.problem)
    np.testing.assert_allclose(new.y, y - a * m.gy(x, y), rtol=1e-13)
    np.testing.assert_allclose(new.v, v - b * (m.H @ v - m.fy(x, y)), rtol=1e-13)
    np.testing.assert_allclose(new.x, x - c * (m.fx(x, y) - m.G @ v), rtol=1e-13)


def test_aid_step_with_neumann_and_exact_cg(instance):
    m = Matrices(instance.problem)
    for linear in (bilevel.Neumann(step_size=b, tol=0.0, max_iterations=3), bilevel.CG(tol=0.0, max_iterations=4)):
        solver = bilevel.AID(lower_step_size=a, upper_step_size=c, num_lower_steps=2, linear=linear)
        state, x, y, v = start(instance.problem, solver)
        new, _ = solver.step(instance.problem, state, jax.random.key(0))
        for _ in range(2):
            y = y - a * m.gy(x, y)
        if isinstance(linear, bilevel.CG):  # as many iterations as unknowns: exact
            v = np.linalg.solve(m.H, m.fy(x, y))
        else:
            for _ in range(3):
                v = v + b * (m.fy(x, y) - m.H @ v)
        np.testing.assert_allclose(new.v, v, rtol=1e-9)
        np.testing.assert_allclose(new.x, x - c * (m.fx(x, y) - m.G @ v), rtol=1e-9)


def test_itd_step_is_the_derivative_of_the_unrolled_map(instance):
    T = 5
    solver = bilevel.ITD(lower_step_size=a, upper_step_size=c, num_lower_steps=T)
    state, x, y, _ = start(instance.problem, solver)
    new, info = solver.step(instance.problem, state, jax.random.key(0))
    m, I = Matrices(instance.problem), np.eye(4)
    dy = np.zeros((4, 3))  # forward mode by hand: dy_{t+1} = (I - a H) dy_t - a G'
    for _ in range(T):
        y, dy = y - a * m.gy(x, y), (I - a * m.H) @ dy - a * m.G.T
    np.testing.assert_allclose(new.y, y, rtol=1e-12)
    np.testing.assert_allclose(new.x, x - c * (m.fx(x, y) + dy.T @ m.fy(x, y)), rtol=1e-12)
    np.testing.assert_allclose(info.value, instance.problem.upper(x, y, instance.problem.upper_data.full()), rtol=1e-12)


def test_stocbio_step_is_the_truncated_series(instance):
    T, Q = 3, 4
    solver = bilevel.StocBiO(
        lower_step_size=a, linear_step_size=b, upper_step_size=c, num_lower_steps=T, num_linear_steps=Q
    )
    state, x, y, _ = start(instance.problem, solver)
    new, _ = solver.step(instance.problem, state, jax.random.key(0))
    m = Matrices(instance.problem)
    for _ in range(T):
        y = y - a * m.gy(x, y)
    series = sum(np.linalg.matrix_power(np.eye(4) - b * m.H, q) for q in range(Q + 1))
    v = b * series @ m.fy(x, y)
    np.testing.assert_allclose(new.x, x - c * (m.fx(x, y) - m.G @ v), rtol=1e-12)


def test_amigo_step(instance):
    T, Q = 3, 4
    solver = bilevel.AmIGO(
        lower_step_size=a, linear_step_size=b, upper_step_size=c, num_lower_steps=T, num_linear_steps=Q
    )
    state, x, y, v = start(instance.problem, solver)
    new, _ = solver.step(instance.problem, state, jax.random.key(0))
    m = Matrices(instance.problem)
    for _ in range(T):
        y = y - a * m.gy(x, y)
    for _ in range(Q):
        v = v - b * (m.H @ v - m.fy(x, y))
    np.testing.assert_allclose(new.x, x - c * (m.fx(x, y) - m.G @ v), rtol=1e-12)


def test_saba_against_tables_kept_by_hand():
    problem = problems.make("quadratic", seed=5, dim_x=2, dim_y=3, num_samples=6, batch_size=2).problem
    solver = bilevel.SABA(lower_step_size=a, linear_step_size=b, upper_step_size=c)
    state = solver.init(problem, jax.random.key(1))
    x, y, v = (np.asarray(part) for part in (state.x, state.y, state.iterates.v))

    def blocks(arrays):
        return [[np.asarray(leaf)[2 * k : 2 * k + 2].mean(axis=0) for leaf in arrays] for k in range(3)]

    def upper(k):
        P, Q, S, p, s = blocks(problem.upper_data.arrays)[k]
        return Q @ y + S @ x + s, P @ y + Q.T @ x + p

    def lower(k):
        H, G, h = blocks(problem.lower_data.arrays)[k]
        return H @ y + G.T @ x + h, H @ v, G @ v

    tables = [[list(row) for row in map(part, range(3))] for part in (upper, lower)]
    for step in range(6):
        key = jax.random.fold_in(jax.random.key(8), step)
        state, _ = solver.step(problem, state, key)
        chosen = [int(table.index) for table in (state.upper_table, state.lower_table)]
        estimates = []
        for part, table, k in zip((upper, lower), tables, chosen, strict=True):
            new = part(k)
            estimates.append(
                [new[i] - table[k][i] + np.mean([row[i] for row in table], axis=0) for i in range(len(new))]
            )
            table[k] = list(new)
        (fx, fy), (gy, Hv, Gv) = estimates
        x, y, v = x - c * (fx - Gv), y - a * gy, v - b * (Hv - fy)
        np.testing.assert_allclose(state.x, x, rtol=1e-10)
        np.testing.assert_allclose(state.y, y, rtol=1e-10)
        np.testing.assert_allclose(state.iterates.v, v, rtol=1e-10)


# Solvers with a bias get enough lower and linear steps for it to vanish: (1 - mu/L)^200 < 1e-9 at condition 10.
EXACT = {
    "AID": {}, "SOBA": {}, "SABA": {}, "AmIGO": {},
    "ITD": {"num_lower_steps": 250}, "StocBiO": {"num_lower_steps": 20, "num_linear_steps": 250},
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_defaults_converge_to_the_closed_form_optimum(name):
    """No step size is given: the defaults must work. The referee's CONVERGED is held against the closed form."""
    for seed in (0, 1):
        instance = problems.make("quadratic", seed=seed, dim_x=5, dim_y=6)
        solver = getattr(bilevel, name)(**EXACT[name])
        solution = bilevel.solve(
            instance.problem, solver, key=jax.random.key(seed), max_steps=20_000, every=1000, tol=1e-7
        )
        assert solution.status == bilevel.Status.CONVERGED
        # F is M/2-quadratic with mu(M) = 1/10: |x - x*| <= 10 |grad F|, and |y - y*| <= |A| |x - x*| + 10 |R|.
        np.testing.assert_allclose(solution.x, instance.truth.x, atol=2e-6)
        np.testing.assert_allclose(solution.y, instance.truth.y, atol=3e-5)
        assert solution.record["value"][-1] == pytest.approx(instance.truth.value, abs=1e-10)


@pytest.mark.parametrize("name", ["ITD", "StocBiO"])
def test_the_bias_of_truncation_shrinks_with_its_length(name):
    """|grad F| at the limit falls geometrically with the number of linear/unrolled steps, as the docstrings state."""
    instance = problems.make("quadratic", seed=2, dim_x=4, dim_y=5, condition_y=5.0)
    key, norms = jax.random.key(0), []
    for length in (5, 15, 45):
        lengths = {"num_lower_steps": length if name == "ITD" else 20}
        if name == "StocBiO":
            lengths["num_linear_steps"] = length
        solution = bilevel.solve(
            instance.problem, getattr(bilevel, name)(**lengths), key=key, max_steps=2000, every=2000, tol=0.0
        )
        norms.append(solution.record["hypergradient"][-1])
    assert norms[1] < 0.3 * norms[0]
    assert norms[2] < 0.05 * norms[1]


def test_variance_reduction_beats_plain_sampling_at_constant_steps():
    """On a finite sum SABA reaches the optimum with constant steps, where SOBA stays at its noise floor."""
    instance = problems.make("quadratic", seed=3, dim_x=4, dim_y=4, num_samples=16, batch_size=2, noise=0.3)
    steps = {"lower_step_size": 0.2, "linear_step_size": 0.2, "upper_step_size": 0.05}
    ends = {}
    for name in ("SABA", "SOBA"):
        solver = getattr(bilevel, name)(**steps)
        solution = bilevel.solve(instance.problem, solver, key=jax.random.key(0), max_steps=8000, every=4000, tol=0.0)
        ends[name] = solution.record["hypergradient"][-1]
    assert ends["SABA"] < 1e-7
    assert ends["SOBA"] > 1e-3
