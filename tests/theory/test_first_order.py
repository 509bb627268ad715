"""First-order penalty solvers: one step against NumPy, limits against penalised optima in closed form, papers' toys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
import problems

a, c = 0.11, 0.05
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def instance():
    return problems.make("quadratic", seed=4, dim_x=3, dim_y=4, condition_y=4.0)


class Matrices:
    """f and g of the quadratic family as NumPy matrices: gradients and penalised optima by hand."""

    def __init__(self, problem):
        self.P, self.Q, self.S, self.p, self.s = (np.asarray(leaf).mean(axis=0) for leaf in problem.upper_data.arrays)
        self.H, self.G, self.h = (np.asarray(leaf).mean(axis=0) for leaf in problem.lower_data.arrays)

    def fx(self, x, y):
        return self.Q @ y + self.S @ x + self.s

    def fy(self, x, y):
        return self.P @ y + self.Q.T @ x + self.p

    def gx(self, x, y):
        return self.G @ y

    def gy(self, x, y):
        return self.H @ y + self.G.T @ x + self.h

    def descend(self, x, y, num_steps):
        for _ in range(num_steps):
            y = y - a * self.gy(x, y)
        return y

    def optimum(self, penalty, squared_residual=False):
        """(x, y) where the gradient of f + penalty (g - min g), or of f + penalty |g_y|^2/2, vanishes: linear."""
        H, G, h = self.H, self.G, self.h
        if squared_residual:
            J = np.hstack([G.T, H])  # R = J (x, y) + h
            matrix, vector = J.T @ J, J.T @ h
        else:
            A, b = -np.linalg.solve(H, G.T), -np.linalg.solve(H, h)  # y(x) = A x + b
            matrix = np.block([[-G @ A, G], [G.T, H]])
            vector = np.concatenate([-G @ b, h])
        matrix = np.block([[self.S, self.Q], [self.Q.T, self.P]]) + penalty * matrix
        assert np.linalg.eigvalsh(matrix)[0] > 0.01  # or there is no minimum to converge to
        point = -np.linalg.solve(matrix, np.concatenate([self.s, self.p]) + penalty * vector)
        return point[: len(self.s)], point[len(self.s) :]


def begin(problem, solver):
    """A state with random y, so that no term vanishes; z or w is another random point."""
    state = solver.init(problem, jax.random.key(1))
    y, z = (jax.random.normal(jax.random.key(k), (4,)) for k in (2, 3))
    state = state._replace(y=y, **{name: z for name in ("z", "w") if name in state._fields})
    return state, *(np.asarray(part) for part in (state.x, y, z))


def test_f2sa_step(instance):
    solver = bilevel.F2SA(
        lower_step_size=a, upper_step_size=c, penalty=optax.linear_schedule(7.0, 9.0, 2), num_lower_steps=3
    )
    state, x, y, z = begin(instance.problem, solver)
    m = Matrices(instance.problem)
    for lam in (7.0, 8.0):
        state, info = solver.step(instance.problem, state, KEY)
        z = m.descend(x, z, 3)
        for _ in range(3):
            y = y - a * (m.fy(x, y) / lam + m.gy(x, y))
        direction = m.fx(x, y) + lam * (m.gx(x, y) - m.gx(x, z))
        x = x - c * direction
        for have, want in zip((state.y, state.z, state.x), (y, z, x), strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-12)
        np.testing.assert_allclose(info, (np.linalg.norm(direction), lam), rtol=1e-12)


def test_f2sa_default_penalty_grows_without_bound(instance):
    solver, problem = bilevel.F2SA(lower_step_size=a, upper_step_size=c), instance.problem
    state = solver.init(problem, KEY)
    for lam in (10.0, 11.0, 12.0):
        state, info = solver.step(problem, state, KEY)
        assert info.penalty == lam


def test_vpbgd_step(instance):
    lam = 7.0
    solver = bilevel.VPBGD(lower_step_size=a, upper_step_size=c, penalty=lam, num_lower_steps=3)
    state, x, y, w = begin(instance.problem, solver)
    new, info = solver.step(instance.problem, state, KEY)
    m = Matrices(instance.problem)
    w = m.descend(x, w, 3)
    dx, dy = m.fx(x, y) + lam * (m.gx(x, y) - m.gx(x, w)), m.fy(x, y) + lam * m.gy(x, y)
    for have, want in zip((new.w, new.x, new.y), (w, x - c * dx, y - c * dy), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-12)
    np.testing.assert_allclose(info, (np.linalg.norm(dx), np.linalg.norm(dy)), rtol=1e-12)


def test_gpbgd_step(instance):
    lam = 7.0
    solver = bilevel.GPBGD(upper_step_size=c, penalty=lam)
    state, x, y, _ = begin(instance.problem, solver)
    new, info = solver.step(instance.problem, state, KEY)
    m = Matrices(instance.problem)
    R = m.gy(x, y)
    dx, dy = m.fx(x, y) + lam * m.G @ R, m.fy(x, y) + lam * m.H @ R
    np.testing.assert_allclose(new.x, x - c * dx, rtol=1e-12)
    np.testing.assert_allclose(new.y, y - c * dy, rtol=1e-12)
    np.testing.assert_allclose(info, [np.linalg.norm(part) for part in (dx, dy, R)], rtol=1e-12)


def test_bome_step_with_and_without_correction(instance):
    """Descent on f alone lets the gap fall fast enough or not, depending on eta: both branches are met."""
    m, multipliers = Matrices(instance.problem), []
    for eta in (0.01, 5.0):
        solver = bilevel.BOME(lower_step_size=a, upper_step_size=c, decrease=eta, num_lower_steps=3)
        state, x, y, _ = begin(instance.problem, solver)
        new, info = solver.step(instance.problem, state, KEY)
        w = m.descend(x, y, 3)
        dq = np.concatenate([m.gx(x, y) - m.gx(x, w), m.gy(x, y)])
        df = np.concatenate([m.fx(x, y), m.fy(x, y)])
        lam = max(0.0, eta - df @ dq / (dq @ dq))
        step = c * (df + lam * dq)
        np.testing.assert_allclose(new.x, x - step[:3], rtol=1e-12)
        np.testing.assert_allclose(new.y, y - step[3:], rtol=1e-12)
        np.testing.assert_allclose(info.multiplier, lam, rtol=1e-12, atol=1e-14)
        multipliers.append(lam)
    assert min(multipliers) == 0.0
    assert max(multipliers) > 0.1


def test_bome_at_a_solved_lower_level_is_finite():
    """Where dq = 0 exactly the multiplier is 0, not 0/0."""
    problem = bilevel.BilevelProblem(
        lambda x, y, batch: jnp.sum(x * y), bilevel.Minimize(lambda x, y, batch: jnp.sum(y**2)),
        init=lambda key: (jnp.ones(2), jnp.zeros(2)),
    )  # fmt: skip
    solver = bilevel.BOME(lower_step_size=0.1, upper_step_size=0.1)
    state, info = solver.step(problem, solver.init(problem, KEY), KEY)
    assert (info.multiplier, info.gap_gradient) == (0.0, 0.0)
    np.testing.assert_allclose(state.y, -0.1 * np.ones(2), rtol=1e-14)


# Constant penalties with the default lower steps: at the limit w and z are y(x), because x no longer moves.
PENALISED = {
    "F2SA": (lambda lam: bilevel.F2SA(penalty=lam), (20.0, 40.0, 80.0), 3000),
    "VPBGD": (lambda lam: bilevel.VPBGD(penalty=lam), (20.0, 40.0, 80.0), 150_000),
    "GPBGD": (lambda lam: bilevel.GPBGD(penalty=lam), (50.0, 100.0, 200.0), 100_000),
}


@pytest.mark.parametrize("name", PENALISED)
def test_limit_is_the_penalised_optimum_and_its_bias_is_inverse_to_the_penalty(name, instance):
    """Default steps. The limit is known in closed form at each penalty; |x - x*| halves as the penalty doubles."""
    make, penalties, max_steps = PENALISED[name]
    m, errors = Matrices(instance.problem), []
    for lam in penalties:
        solution = bilevel.solve(instance.problem, make(lam), key=KEY, max_steps=max_steps, every=max_steps, tol=0.0)
        x, y = m.optimum(lam, squared_residual=name == "GPBGD")
        np.testing.assert_allclose(solution.x, x, atol=1e-8)
        np.testing.assert_allclose(solution.state.y, y, atol=1e-8)
        errors.append(np.linalg.norm(solution.x - instance.truth.x))
    ratios = np.array(errors[:-1]) / errors[1:]
    assert ((ratios > 1.6) & (ratios < 2.4)).all(), errors


@pytest.mark.parametrize("seed", [0, 1])
def test_f2sa_defaults_approach_the_optimum(seed):
    instance = problems.make("quadratic", seed=seed, dim_x=5, dim_y=6)
    solution = bilevel.solve(
        instance.problem, bilevel.F2SA(), key=jax.random.key(seed), max_steps=20_000, every=20_000, tol=0.0
    )
    # The penalty is 20,000 at the end, the constant of the bias about |grad^2| / mu ~ 100.
    np.testing.assert_allclose(solution.x, instance.truth.x, atol=5e-3)
    np.testing.assert_allclose(solution.y, instance.truth.y, atol=5e-3)
    assert solution.record["value"][-1] == pytest.approx(instance.truth.value, abs=1e-5)


def test_f2sa_noise_does_not_grow_with_the_penalty():
    """Since y and z see the same batches, at a penalty 100 times larger the noise floor is the same."""
    instance = problems.make("quadratic", seed=3, dim_x=4, dim_y=4, num_samples=16, batch_size=2, noise=0.3)
    ends = []
    for lam in (1e3, 1e5):
        solver = bilevel.F2SA(lower_step_size=0.2, upper_step_size=0.02, penalty=lam, num_lower_steps=5)
        solution = bilevel.solve(instance.problem, solver, key=KEY, max_steps=4000, every=100, tol=0.0)
        ends.append(np.mean(solution.record["hypergradient"][-20:]))
    assert max(ends) < 0.3
    assert ends[1] < 1.5 * ends[0]


def test_bome_neighbourhood_shrinks_with_its_step(instance):
    """A constant step a ends within O(a) of the optimum; the gap is measured by the closed-form F."""
    distances = []
    for step in (0.1, 0.025):
        solver = bilevel.BOME(lower_step_size=1.0, upper_step_size=step, num_lower_steps=60)
        solution = bilevel.solve(instance.problem, solver, key=KEY, max_steps=8000, every=8000, tol=0.0)
        distances.append(np.linalg.norm(solution.x - instance.truth.x))
    assert distances[1] < 0.45 * distances[0]
    solution = bilevel.solve(instance.problem, bilevel.BOME(), key=KEY, max_steps=4000, every=4000, tol=0.0)
    assert solution.record["value"][-1] == pytest.approx(instance.truth.value, abs=1e-2)


def degenerate_upper(x, y, batch):
    return 0.5 * jnp.sum((x - y[1]) ** 2) + 0.5 * (y[0] - 1) ** 2


def degenerate_lower(x, y, batch):
    return 0.5 * y[0] ** 2 - jnp.sum(x) * y[0]


@pytest.mark.parametrize("start", [(0.0, 0.0, 0.0), (3.0, -2.0, 2.0), (-1.5, 1.0, -3.0)])
def test_bome_on_a_lower_level_with_a_line_of_minimisers(start):
    """y_2 is free below: F* = 0 at x = y_1 = y_2 = 1, where methods that invert g_yy have nothing to invert."""
    x, *y = start
    problem = bilevel.BilevelProblem(
        degenerate_upper, bilevel.Minimize(degenerate_lower), init=lambda key: (jnp.array([x]), jnp.array(y))
    )
    solver = bilevel.BOME(lower_step_size=0.5, upper_step_size=0.1, num_lower_steps=30)
    state, _ = bilevel.advance(problem, solver, solver.init(problem, KEY), KEY, 0, 2000)
    assert degenerate_upper(state.x, state.y, None) < 1e-6
    np.testing.assert_allclose([state.x[0], *state.y], 1.0, atol=2e-3)


def toy_upper(x, y, batch):
    return jnp.sum(jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x)) + 0.5 * jnp.log((4 * x - 2) ** 2 + 1))


def toy_lower(x, y, batch):
    return jnp.sum((x + y) ** 2 + x * jnp.sin(x + y) ** 2)


def toy_runs(solver):
    """(x, y), shape [40] each, after 20,000 steps from random starts."""
    starts = np.random.default_rng(0).uniform([0, -3], [3, 3], (40, 2))

    def run(start):
        problem = bilevel.BilevelProblem(
            toy_upper, bilevel.Minimize(toy_lower), x_set=bilevel.Box(0.0, 3.0),
            init=lambda key: (start[:1], start[1:]),
        )  # fmt: skip
        state, _ = bilevel.advance(problem, solver, solver.init(problem, KEY), KEY, 0, 20_000)
        return state.x[0], state.y[0]

    return (np.asarray(part) for part in jax.jit(jax.vmap(run))(jnp.asarray(starts)))


def toy_minima():
    """The three local minima of F over X = [0, 3], where y(x) = -x, by a grid."""
    grid = np.linspace(0, 3, 30_001)
    F = np.cos(2 - 4 * grid) / (1 + np.exp(2 - 4 * grid)) + 0.5 * np.log((4 * grid - 2) ** 2 + 1)
    minima = grid[1:-1][(F[1:-1] < F[:-2]) & (F[1:-1] < F[2:])]
    assert len(minima) == 3
    return minima


def test_vpbgd_on_the_papers_toy():
    """With g not convex in y every start ends near a local minimum of F, and each minimum is found."""
    x, y = toy_runs(bilevel.VPBGD(lower_step_size=0.1, upper_step_size=0.005, penalty=20.0))
    reached = np.abs(x[:, None] - toy_minima()).argmin(axis=1)
    np.testing.assert_allclose(x, toy_minima()[reached], atol=0.05)
    np.testing.assert_allclose(y, -x, atol=0.05)
    assert len(set(reached)) == 3


def test_gpbgd_on_the_papers_toy():
    """Ends are local minima of F, or stationary points of |g_y|^2 with g_y != 0, which its assumptions exclude."""
    x, y = toy_runs(bilevel.GPBGD(upper_step_size=0.0005, penalty=10.0))
    residual = np.abs(2 * (x + y) + x * np.sin(2 * (x + y)))
    curvature = 2 + 2 * x * np.cos(2 * (x + y))
    solved = residual < 0.1
    assert solved.sum() >= 20
    gap = np.abs(x[:, None] - toy_minima()).min(axis=1)
    assert gap[solved].max() < 0.05
    assert np.abs(x + y)[solved].max() < 0.05
    assert np.abs(curvature)[~solved].max() < 0.5  # against 2 + 2 x at y(x)


@pytest.mark.parametrize(("name", "setting"), [("VPBGD", "penalty"), ("GPBGD", "penalty"), ("BOME", "decrease")])
def test_settings_that_must_be_positive_numbers(name, setting):
    kind = getattr(bilevel, name)
    for bad in (0.0, -1.0, float("nan"), float("inf"), "10"):
        with pytest.raises(bilevel.InvalidInput, match=f"{name}.{setting}: got"):
            kind(**{setting: bad})
    with pytest.raises(bilevel.InvalidInput, match="an optax schedule"):
        kind(**{setting: optax.constant_schedule(1.0)})


def test_f2sa_penalty_is_a_positive_number_or_a_schedule():
    with pytest.raises(bilevel.InvalidInput, match=r"F2SA\.penalty: got an optax transformation"):
        bilevel.F2SA(penalty=optax.sgd(1.0))
    with pytest.raises(bilevel.InvalidInput, match=r"F2SA\.penalty: got -1\.0"):
        bilevel.F2SA(penalty=-1.0)
