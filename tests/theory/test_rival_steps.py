"""Two steps of each single-loop rival against a transcription of its paper's update in NumPy, written apart."""

import dataclasses

import cvxpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

import bilevel

KEY = jax.random.key(0)
a, b = 0.03, 0.05
rng = np.random.default_rng(5)
S, Q, P, s, p = (rng.normal(size=shape) for shape in ((3, 3), (3, 4), (4, 4), (3,), (4,)))
H, G, h = (rng.normal(size=shape) for shape in ((4, 4), (3, 4), (4,)))
S, P, H = (matrix @ matrix.T for matrix in (S, P, H))
A, B, c = (rng.normal(size=shape) for shape in ((3, 4), (3, 3), (3,)))  # two inequalities, then an equality


def upper(x, y, batch):
    return x @ S @ x / 2 + x @ Q @ y + y @ P @ y / 2 + s @ x + p @ y


def lower(x, y, batch):
    return y @ H @ y / 2 + x @ G @ y + h @ y + jnp.sum(y**4) / 4 + jnp.sum(x**2 * y[:3])


def init(key):
    return jnp.array([0.3, -0.2, 0.5]), jnp.array([0.4, -0.6, 0.1, 0.7])


class f:
    x = staticmethod(lambda x, y: S @ x + Q @ y + s)
    y = staticmethod(lambda x, y: Q.T @ x + P @ y + p)


class g:
    x = staticmethod(lambda x, y: G @ y + 2 * x * y[:3])
    y = staticmethod(lambda x, y: H @ y + G.T @ x + h + y**3 + np.concatenate([x**2, [0]]))


def in_x(x):
    return np.clip(x, -0.5, 0.5)


def in_y(y):
    return np.clip(y, -0.7, 0.7)


def rows(x, y):
    return A @ y + B @ x - c


def multipliers(m, most=np.inf):
    """Onto [0, most] for the inequalities, [-most, most] for the equality."""
    return np.concatenate([np.clip(m[:2], 0, most), np.clip(m[2:], -most, most)])


X, Y = bilevel.Box(-0.5, 0.5), bilevel.Box(-0.7, 0.7)
SIMPLE = bilevel.BilevelProblem(upper, bilevel.Minimize(lower), x_set=X, y_set=Y, init=init)
COUPLING = bilevel.LinearCoupling(*map(jnp.asarray, (A[:2], B[:2], c[:2], A[2:], B[2:], c[2:])))
COUPLED = bilevel.BilevelProblem(upper, bilevel.Minimize(lower), coupling=COUPLING, x_set=X, y_set=Y, init=init)


def compare(problem, solver, by_hand, tol=1e-12, **start):
    """Two steps of `solver` from init's (x, y) and `start`, and `by_hand`: (k, values by name) -> the next values."""
    state = solver.init(problem, KEY)
    state = state._replace(**{name: jnp.asarray(value) for name, value in start.items()})
    names = ("x", "y", *start)
    values = {name: np.asarray(getattr(state, name)) for name in names}
    step = jax.jit(solver.step)
    for k in range(2):
        state, _ = step(problem, state, KEY)
        values = by_hand(k, **values)
        for name in names:
            np.testing.assert_allclose(getattr(state, name), values[name], rtol=tol, atol=tol, err_msg=name)


def test_meha():
    gamma, w = 0.4, np.array([0.2, 0.1, -0.3, 0.5])

    def by_hand(k, x, y, w):
        ck = 3.0 + k
        w = in_y(w - a * (g.y(x, w) + (w - y) / gamma))
        new = in_x(x - b * (f.x(x, y) / ck + g.x(x, y) - g.x(x, w)))
        y = in_y(y - b * (f.y(new, y) / ck + g.y(new, y) - (y - w) / gamma))
        return {"x": new, "y": y, "w": w}

    solver = bilevel.MEHA(lower_step_size=a, upper_step_size=b, penalty=optax.linear_schedule(3.0, 5.0, 2), gamma=gamma)
    compare(SIMPLE, solver, by_hand, w=w)


def test_meha_with_a_non_smooth_part():
    """The part weights_i |y_i| of g leaves the gradient in y, stays in that of x, and acts through its prox."""

    def nonsmooth(x, y):
        return jnp.sum((1 + x**2) * jnp.abs(y[:3]))

    def soft(x, y, t):
        shrunk = np.sign(y[:3]) * np.maximum(np.abs(y[:3]) - t * (1 + x**2), 0)
        return np.concatenate([shrunk, y[3:]])

    def prox(x, y, t):
        shrunk = jnp.sign(y[:3]) * jnp.maximum(jnp.abs(y[:3]) - t * (1 + x**2), 0)
        return jnp.concatenate([shrunk, y[3:]])

    def by_hand(k, x, y, w):
        w = soft(x, w - a * (g.y(x, w) + (w - y) / 0.4), a)
        dx = f.x(x, y) / 3 + g.x(x, y) - g.x(x, w) + 2 * x * (np.abs(y[:3]) - np.abs(w[:3]))
        new = in_x(x - b * dx)
        y = soft(new, y - b * (f.y(new, y) / 3 + g.y(new, y) - (y - w) / 0.4), b)
        return {"x": new, "y": y, "w": w}

    problem = bilevel.BilevelProblem(
        upper, bilevel.Minimize(lambda x, y, batch: lower(x, y, batch) + nonsmooth(x, y)),
        x_set=X, init=init,
    )  # fmt: skip
    solver = bilevel.MEHA(lower_step_size=a, upper_step_size=b, penalty=3.0, gamma=0.4, nonsmooth=nonsmooth, prox=prox)
    compare(problem, solver, by_hand, w=np.array([0.2, 0.1, -0.3, 0.5]))


def test_proxf2sa():
    def by_hand(k, x, y, z):
        sigma = 1 / (4.0 + k)
        for _ in range(3):
            z = in_y(z - a * g.y(x, z))
            y = in_y(y - a * (sigma * f.y(x, y) + g.y(x, y)))
        return {"x": in_x(x - b * (f.x(x, y) + (g.x(x, y) - g.x(x, z)) / sigma)), "y": y, "z": z}

    solver = bilevel.ProxF2SA(
        lower_step_size=a, upper_step_size=b, penalty=optax.linear_schedule(4.0, 6.0, 2), num_lower_steps=3
    )
    compare(SIMPLE, solver, by_hand, z=np.array([0.2, 0.1, -0.3, 0.5]))


def test_bvfsm():
    """SciPy minimises over y instead; the solver gets enough steps to reach the same point."""
    mu, theta, s0 = 0.5, 0.1, 0.3

    def by_hand(k, x, y, z):
        m, t, s = (weight / (1 + k) for weight in (mu, theta, s0))
        for _ in range(3):
            z = in_y(z - a * (g.y(x, z) + m * z))
        v = float(lower(x, z, None)) + m * z @ z / 2 + m

        def penalised(y):
            slack = v - float(lower(x, y, None))
            if slack <= 0:  # outside of the barrier: the line search turns back
                return 1e6, f.y(x, y)
            slope = f.y(x, y) + t * y + s / slack * g.y(x, y)
            return float(upper(x, y, None)) + t * y @ y / 2 - s * np.log(slack), slope

        found = optimize.minimize(penalised, z, jac=True, method="L-BFGS-B", bounds=[(-0.7, 0.7)] * 4, tol=1e-14)
        y = found.x
        dx = f.x(x, y) + s / (v - float(lower(x, y, None))) * (g.x(x, y) - g.x(x, z))
        return {"x": in_x(x - b * dx), "y": y, "z": z}

    solver = bilevel.BVFSM(
        lower_step_size=a,
        upper_step_size=b,
        regularisation=mu,
        penalty_regularisation=theta,
        barrier=s0,
        decay=lambda k: 1 / (1 + k),
        num_lower_steps=3,
        num_penalty_steps=300,
    )
    compare(SIMPLE, solver, by_hand, tol=1e-5, z=np.array([0.2, 0.1, -0.3, 0.5]))


def test_sflcb():
    delta, rho, e = 0.2, 0.7, 0.06

    def slacks(s):
        return np.concatenate([np.minimum(s[:2], 0), [0]])

    def by_hand(k, x, y, z, u, v, alpha, beta):
        u, v = u + e * (rows(x, y) - alpha), v + e * (rows(x, z) - beta)
        p, q = u + rho * (rows(x, y) - alpha), v + rho * (rows(x, z) - beta)
        dx = delta * f.x(x, y) + g.x(x, y) + B.T @ p - g.x(x, z) - B.T @ q
        dy, dz = delta * f.y(x, y) + g.y(x, y) + A.T @ p, -g.y(x, z) - A.T @ q
        alpha, beta = slacks(alpha - a * -p), slacks(beta + a * q)
        return {"x": in_x(x - b * dx), "y": y - a * dy, "z": z + a * dz, "u": u, "v": v, "alpha": alpha, "beta": beta}

    solver = bilevel.SFLCB(lower_step_size=a, dual_step_size=e, upper_step_size=b, delta=delta, rho=rho)
    start = {"z": np.array([0.2, 0.1, -0.3, 0.5]), "u": np.array([0.3, -0.1, -0.2]), "v": np.array([0.0, 0.5, 0.4])}
    start |= {"alpha": np.array([-0.2, 0.0, 0.0]), "beta": np.array([0.0, -0.7, 0.0])}
    compare(dataclasses.replace(COUPLED, y_set=bilevel.Reals()), solver, by_hand, **start)


@pytest.mark.parametrize("primal", [1, 2])
def test_blocc(primal):
    """With several primal steps the dual ones extrapolate, from the third on."""
    ck, r = 4.0, 0.07

    def max_min(x, y, m, gradient):
        last = m
        for t in range(3):
            n = m + (max(t - 1, 0) / (t + 2) * (m - last) if primal > 1 else 0)
            for _ in range(primal):
                y = in_y(y - a * (gradient(y) + A.T @ n))
            last, m = m, multipliers(n + r * rows(x, y))
        return y, m

    def by_hand(k, x, y, m, z, n):
        z, n = max_min(x, z, n, lambda z: g.y(x, z))
        y, m = max_min(x, y, m, lambda y: f.y(x, y) / ck + g.y(x, y))
        x = in_x(x - b * (f.x(x, y) + ck * (g.x(x, y) + B.T @ m - g.x(x, z) - B.T @ n)))
        return {"x": x, "y": y, "m": m, "z": z, "n": n}

    solver = bilevel.BLOCC(
        lower_step_size=a, dual_step_size=r, upper_step_size=b, penalty=ck, num_lower_steps=3, num_primal_steps=primal
    )
    start = {"m": np.array([0.3, 0.0, -0.2]), "z": np.array([0.2, 0.1, -0.3, 0.5]), "n": np.array([0.0, 0.5, 0.4])}
    compare(COUPLED, solver, by_hand, **start)


def test_bicgaffa():
    g1, g2, e, most, ck = 0.8, 0.6, 0.04, 0.45, 4.0

    def by_hand(k, x, y, w, z):
        w = in_y(w - a * (g.y(x, w) + A.T @ z + (w - y) / g1))
        lam = multipliers(z + g2 * rows(x, y))
        dx = f.x(x, y) / ck + g.x(x, y) + B.T @ lam - g.x(x, w) - B.T @ z
        dy = f.y(x, y) / ck + g.y(x, y) + A.T @ lam - (y - w) / g1
        z = multipliers(z - e * (-(z - lam) / g2 - rows(x, w)), most)
        return {"x": in_x(x - b * dx), "y": in_y(y - b * dy), "w": w, "z": z}

    solver = bilevel.BiCGAFFA(
        lower_step_size=a, upper_step_size=b, dual_step_size=e, penalty=ck, gamma_1=g1, gamma_2=g2, bound=most
    )
    compare(COUPLED, solver, by_hand, w=np.array([0.2, 0.1, -0.3, 0.5]), z=np.array([0.3, 0.1, -0.44]))


def nearest(x, y):
    """The point of X x Y with h <= 0, by cvxpy."""
    u, v = cvxpy.Variable(3), cvxpy.Variable(4)
    h = A @ v + B @ u - c
    inside = [h[:2] <= 0, h[2] == 0, cvxpy.abs(u) <= 0.5, cvxpy.abs(v) <= 0.7]
    distance = cvxpy.sum_squares(u - x) + cvxpy.sum_squares(v - y)
    cvxpy.Problem(cvxpy.Minimize(distance), inside).solve(solver="CLARABEL", tol_gap_abs=1e-14, tol_feas=1e-14)
    return u.value, v.value


def test_lvhba():
    g1, g2, e, most, ck = 0.8, 0.6, 0.04, 0.25, 4.0

    def by_hand(k, x, y, w, lam, z):
        old = w
        w = in_y(w - a * (g.y(x, w) + A.T @ lam + (w - y) / g1))
        lam = multipliers(lam - a * ((lam - z) / g2 - rows(x, old)))
        dx = f.x(x, y) / ck + g.x(x, y) - g.x(x, w) - B.T @ lam
        dy = f.y(x, y) / ck + g.y(x, y) - (y - w) / g1
        x, y = nearest(x - b * dx, y - b * dy)
        return {"x": x, "y": y, "w": w, "lam": lam, "z": multipliers(z + e * (lam - z) / g2, most)}

    solver = bilevel.LVHBA(
        lower_step_size=a, upper_step_size=b, dual_step_size=e, penalty=ck, gamma_1=g1, gamma_2=g2, bound=most
    )
    w, lam, z = np.array([0.2, 0.1, -0.3, 0.5]), np.array([0.4, 0.0, -0.5]), np.array([0.2, 0.1, -0.24])
    compare(COUPLED, solver, by_hand, tol=1e-7, w=w, lam=lam, z=z)  # the tolerance is cvxpy's


def test_lvhba_without_a_coupling_projects_on_each_set():
    """And forms no dense matrix: nothing of 1,000 x 1,000 is in its program."""

    def by_hand(k, x, y, w, lam, z):
        w = in_y(w - a * (g.y(x, w) + (w - y) / 0.8))
        dx, dy = f.x(x, y) / 4 + g.x(x, y) - g.x(x, w), f.y(x, y) / 4 + g.y(x, y) - (y - w) / 0.8
        return {"x": in_x(x - b * dx), "y": in_y(y - b * dy), "w": w, "lam": lam, "z": z}

    solver, nothing = (
        bilevel.LVHBA(lower_step_size=a, upper_step_size=b, dual_step_size=0.04, penalty=4.0, gamma_1=0.8),
        np.zeros(0),
    )
    compare(SIMPLE, solver, by_hand, w=np.array([0.2, 0.1, -0.3, 0.5]), lam=nothing, z=nothing)

    def many(x, y, batch):
        return jnp.sum((y - x) ** 2)

    problem = bilevel.BilevelProblem(
        many, bilevel.Minimize(many), init=lambda key: (jnp.zeros(1000), jnp.zeros(1000)), y_set=Y
    )
    state = jax.eval_shape(solver.init, problem, KEY)
    largest = [v.aval.size for e in jax.make_jaxpr(solver.step)(problem, state, KEY).eqns for v in e.outvars]
    assert max(largest) <= 2000


FREE = dataclasses.replace(COUPLED, y_set=bilevel.Reals())
NONE = jnp.zeros((0, 4)), jnp.zeros((0, 3)), jnp.zeros(0)
EQUAL = dataclasses.replace(FREE, coupling=bilevel.LinearCoupling(*NONE, *map(jnp.asarray, (A[1:], B[1:], c[1:]))))


def test_aipod():
    """With a basis V of A's kernel and dense matrices, where the solver has a projection and products."""
    C, D, e = A[1:], B[1:], 0.06
    inverse, V = C.T @ np.linalg.inv(C @ C.T), np.linalg.svd(C)[2][2:].T

    def by_hand(k, x, y):
        for _ in range(3):
            y = y - a * g.y(x, y)
            y = y - inverse @ (C @ y + D @ x - c[1:])
        hessian, mixed = H + 3 * np.diag(y**2), G + np.vstack([2 * np.diag(x), np.zeros(3)]).T
        term, total = V.T @ f.y(x, y), V.T @ f.y(x, y)
        for _ in range(4):
            term = term - e * V.T @ hessian @ V @ term
            total = total + term
        v = e * V @ total
        slope = f.x(x, y) - mixed @ v - D.T @ inverse.T @ (f.y(x, y) - hessian @ v)
        return {"x": in_x(x - b * slope), "y": y}

    compare(
        EQUAL,
        bilevel.AiPOD(lower_step_size=a, linear_step_size=e, upper_step_size=b, num_lower_steps=3, num_linear_steps=4),
        by_hand,
    )


def multiplier_steps(x, y, m, gradient, project):
    for _ in range(3):
        y = y - a * (gradient(y) + A.T @ m)
        m = project(m + 0.07 * rows(x, y))
    return y, m


def test_f2cba_with_equalities_alone():
    d = 0.3**2
    only = lambda m: np.concatenate([[0], m[1:]])  # noqa: E731  (the first row is not there)

    def by_hand(k, x, y, z, m, n):
        z, n = multiplier_steps(x, z, np.concatenate([[0], n]), lambda z: g.y(x, z), only)
        y, m = multiplier_steps(x, y, np.concatenate([[0], m]), lambda y: d * f.y(x, y) + g.y(x, y), only)
        slope = f.x(x, y) + (g.x(x, y) + B.T @ m - g.x(x, z) - B.T @ n) / d
        return {"x": in_x(x - b * slope), "y": y, "z": z, "m": m[1:], "n": n[1:]}

    solver = bilevel.F2CBA(lower_step_size=a, dual_step_size=0.07, upper_step_size=b, alpha=0.3, num_lower_steps=3)
    start = {"z": np.array([0.2, 0.1, -0.3, 0.5]), "m": np.array([0.3, -0.2]), "n": np.array([0.0, 0.4])}
    compare(EQUAL, solver, by_hand, **start)


@pytest.mark.parametrize("radius", [None, 0.02])
def test_f2cba_with_inequalities(radius):
    """The penalised minimiser by SciPy; the second inequality is inactive, n = 0 there."""
    d = 0.5**2

    def by_hand(k, x, y, z, n, move):
        old, x = x, x if radius is None else x + float(jax.random.uniform(KEY, ())) * move
        z, n = multiplier_steps(x, z, n, lambda z: g.y(x, z), multipliers)
        held = (n > 0) | np.array([False, False, True])

        def penalised(y):
            off = held * rows(x, y)
            value = d * upper(x, y, None) + lower(x, y, None) + n @ rows(x, y) + off @ off / (2 * d)
            return float(value), d * f.y(x, y) + g.y(x, y) + A.T @ (n + off / d)

        y = optimize.minimize(penalised, y, jac=True, method="BFGS", options={"gtol": 1e-9}).x
        slope = f.x(x, y) + (g.x(x, y) - g.x(x, z)) / d + B.T @ (held * rows(x, y)) / d**2
        if radius is None:
            return {"x": in_x(x - b * slope), "y": y, "z": z, "n": n, "move": move}
        ahead = move - b * slope
        ahead = ahead * min(1, radius / np.linalg.norm(ahead))
        return {"x": in_x(old + move), "y": y, "z": z, "n": n, "move": ahead}

    solver = bilevel.F2CBA(
        lower_step_size=a,
        dual_step_size=0.07,
        upper_step_size=b,
        alpha=0.5,
        radius=radius,
        num_lower_steps=3,
        num_penalty_steps=200,
    )
    start = {
        "z": np.array([0.2, 0.1, -0.3, 0.5]),
        "n": np.array([0.3, 0.0, -0.2]),
        "move": np.array([0.01, 0.0, -0.01]),
    }
    compare(FREE, solver, by_hand, tol=1e-5, **start)


@pytest.mark.parametrize("name", ["BiCGAFFA", "LVHBA", "MEHA", "ProxF2SA"])
def test_settings_are_checked(name):
    kind = getattr(bilevel, name)
    with pytest.raises(bilevel.InvalidInput, match=rf"{name}\.penalty: got an optax transformation"):
        kind(penalty=optax.sgd(1.0))
    with pytest.raises(bilevel.InvalidInput, match=rf"{name}\.penalty: got -1\.0"):
        kind(penalty=-1.0)
