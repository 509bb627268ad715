"""Hypothesis strategies that draw problems with known answers, for testing your own solver.

    from hypothesis import given, settings
    from problems import strategies

    @settings(max_examples=20, deadline=None)
    @given(strategies.quadratics(max_dim=4))
    def test_my_solver(instance):
        solution = bilevel.solve(instance.problem, MySolver(), key=jax.random.key(0), max_steps=500)
        assert jnp.linalg.norm(solution.x - instance.truth.x) < 1e-4

Everything is drawn from small whole numbers, seeds and powers of ten, so that a failing test shrinks to something like
`make(seed=0, dim_x=1, dim_y=1, condition_x=1.0, …)`. Shapes are few, because each new one compiles anew.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import irl
from bilevel import BilevelProblem, Box, Full, LinearCoupling, Minimize
from bilevel.guarantees import Recipe
from bilevel.struct import invalid
from problems import quadratic
from problems.instance import Instance, Truth

booleans = st.booleans()
just = st.just
switches = st.sampled_from([0.0, 1.0])


def seeds() -> SearchStrategy[int]:
    """Seeds of everything else."""
    return st.integers(0, 2**20)


def dims(largest: int) -> SearchStrategy[int]:
    """1 to `largest`."""
    return st.integers(1, largest)


def conditions(decades: int = 4) -> SearchStrategy[float]:
    """Condition numbers 10^(k/4), from 1 to 10^decades."""
    return st.integers(0, 4 * decades).map(lambda k: 10.0 ** (k / 4))


def sizes(largest: float = 3.0) -> SearchStrategy[float]:
    """Sizes of terms: 0, 1, some fractions, and `largest`."""
    return st.sampled_from([0.0, 1.0, 0.1, 0.3, 0.01, largest])


def terms() -> SearchStrategy[float]:
    """Sizes of terms that are often absent, so that another one can be alone."""
    return st.sampled_from([0.0, 1.0, 0.0, 0.1, 3.0])


def scales() -> SearchStrategy[float]:
    """Units, from 1e-4 to 1e4."""
    return st.sampled_from([1.0, 0.01, 100.0, 1e-4, 1e4])


def fractions(low: float, high: float) -> SearchStrategy[float]:
    """65 numbers from low to high, ends included."""
    return st.integers(0, 64).map(lambda k: low + (high - low) * k / 64)


def recipes(build: Callable[..., Any], **numbers: SearchStrategy) -> SearchStrategy[Recipe]:
    """What a `Guarantee` draws: build(key, **numbers), traced, with the numbers drawn from their strategies."""
    return st.builds(Recipe, st.just(build), seeds(), st.fixed_dictionaries(numbers))


def _spd(seed: int, eigenvalues: Sequence[float]) -> np.ndarray:
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))[0]
    matrix = basis @ np.diag(np.asarray(eigenvalues, float)) @ basis.T
    return (matrix + matrix.T) / 2


def spd_matrices(eigenvalues: Sequence[float] | SearchStrategy[Sequence[float]]) -> SearchStrategy[np.ndarray]:
    """Symmetric matrices [n, n] with the given eigenvalues, all > 0, in a random orthogonal basis.

    `eigenvalues` is a sequence, or a strategy of sequences such as `spectra(4)`.
    """
    given = eigenvalues if isinstance(eigenvalues, SearchStrategy) else st.just(tuple(eigenvalues))
    if not isinstance(eigenvalues, SearchStrategy) and not all(value > 0 for value in eigenvalues):
        invalid("eigenvalues (spd_matrices)", eigenvalues, "numbers > 0", "The matrices are positive definite.")
    return st.builds(_spd, seeds(), given)


def spectra(max_dim: int = 4, decades: int = 4) -> SearchStrategy[list[float]]:
    """1 to max_dim eigenvalues, powers 10^(k/4) from 10^-decades to 1."""
    return st.lists(conditions(decades).map(lambda c: 1 / c), min_size=1, max_size=max_dim)


def quadratics(
    max_dim: int = 4, decades: int = 2, couplings: Sequence[float] = (0.5, 0.1, 1.0)
) -> SearchStrategy[Instance]:
    """Strongly convex quadratics with optimum and constants in closed form: `problems.quadratic.make`.

    Args:
        max_dim: the largest number of unknowns of either level.
        decades: condition numbers of H and of grad^2 F go up to 10^decades.
        couplings: values of |dy/dx|.
    """
    return st.builds(
        quadratic.make, seed=seeds(), dim_x=dims(max_dim), dim_y=dims(max_dim), condition_x=conditions(decades),
        condition_y=conditions(decades), coupling=st.sampled_from(list(couplings)),
    )  # fmt: skip


class Constrained(NamedTuple):
    """A quadratic problem with coupling A y + B x <= b, and its lower solution at x.

    y [n], multipliers [k] (>= margin on the active rows, else 0), active [k]; gradient [m] of F at x, where strict
    complementarity and independent active rows make F differentiable.
    """

    problem: BilevelProblem
    x: np.ndarray
    y: np.ndarray
    multipliers: np.ndarray
    active: np.ndarray
    gradient: np.ndarray


class _Rows(NamedTuple):
    H: Any
    G: Any
    h: Any


def _upper(x: Any, y: Any, batch: Any) -> Any:
    return (y - batch) @ (y - batch) / 2 + x @ x / 2


def _lower(x: Any, y: Any, batch: _Rows) -> Any:
    return y @ batch.H @ y / 2 + x @ batch.G @ y + batch.h @ y


def constrained_quadratic(
    seed: int, dim: int, rows: int, num_active: int, condition: float = 4.0, margin: float = 0.5
) -> Constrained:
    """One instance: the first `num_active` rows are active at (x, y) with multipliers in [margin, 2 margin], and the
    others have slacks in that range; h is set so that the KKT conditions hold.

    Args:
        seed: fixes everything.
        dim: unknowns of x and of y, each.
        rows: k >= num_active.
        num_active: at most dim; random active rows are then linearly independent.
        condition: of H, >= 1.
        margin: > 0, of strict complementarity.
    """
    if not 0 <= num_active <= min(rows, dim):
        do = "More active rows than unknowns of y cannot be independent."
        invalid("num_active (constrained_quadratic)", num_active, f"a number in [0, {min(rows, dim)}]", do)
    rng = np.random.default_rng(seed)
    H = _spd(seed, np.geomspace(1 / condition, 1, dim).tolist() if dim > 1 else [1.0])
    G, target = rng.normal(size=(dim, dim)), rng.normal(size=dim)
    A, B = rng.normal(size=(rows, dim)), rng.normal(size=(rows, dim))
    x, y = rng.normal(size=dim), rng.normal(size=dim)
    active = np.arange(rows) < num_active
    multipliers = np.where(active, margin * (1 + rng.random(rows)), 0.0)
    slacks = np.where(active, 0.0, margin * (1 + rng.random(rows)))
    b = A @ y + B @ x + slacks
    h = -(H @ y + G.T @ x + A.T @ multipliers)
    # d/dx of H y + G'x + h + A_a' lam = 0 and A_a y + B_a x = b_a
    A_a, B_a = A[active], B[active]
    k = num_active
    kkt = np.block([[H, A_a.T], [A_a, np.zeros((k, k))]])
    dy = np.linalg.solve(kkt, -np.vstack([G.T, B_a]))[:dim]
    gradient = x + dy.T @ (y - target)
    start = jnp.asarray(x), jnp.zeros(dim)
    problem = BilevelProblem(
        _upper, Minimize(_lower), coupling=LinearCoupling(*map(jnp.asarray, (A, B, b))),
        upper_data=Full(jnp.asarray(target)), lower_data=Full(_Rows(*map(jnp.asarray, (H, G, h)))),
        init=lambda key: start,
    )  # fmt: skip
    return Constrained(problem, x, y, multipliers, active, gradient)


def constrained_quadratics(max_dim: int = 3, max_rows: int = 4) -> SearchStrategy[Constrained]:
    """Linearly constrained strongly convex quadratics with a chosen active set: `constrained_quadratic`."""

    def of_shape(shape: tuple[int, int]) -> SearchStrategy[Constrained]:
        dim, rows = shape
        return st.builds(
            constrained_quadratic, seed=seeds(), dim=st.just(dim), rows=st.just(rows),
            num_active=st.integers(0, min(dim, rows)), condition=conditions(2),
        )  # fmt: skip

    return st.tuples(dims(max_dim), dims(max_rows)).flatmap(of_shape)


class Waves(NamedTuple):
    """Coefficients of sin(j (y + shift_j x)), j = 1, 2, …, [terms]."""

    weights: Any
    shifts: Any


def waves_upper(x: Any, y: Any, batch: Waves) -> Any:
    """The upper objective (y - x)^2/2 + a wave."""
    return jnp.sum((y - x) ** 2) / 2 + _wave(x, y, batch)


def waves_lower(x: Any, y: Any, batch: Waves) -> Any:
    """The lower objective, a wave: smooth, with several local minima in y."""
    return _wave(x, y, batch)


def _wave(x: Any, y: Any, batch: Waves, module: Any = jnp) -> Any:
    terms = [w * module.sin((j + 1) * 2 * (y + s * x)) for j, (w, s) in enumerate(zip(*batch, strict=True))]
    return module.sum(sum(terms)) if module is jnp else sum(terms)


def _interval_start(key: Any) -> tuple[Any, Any]:
    return jnp.zeros(1), jnp.zeros(1)


def nonconvex(seed: int, num_terms: int = 2, points: int = 401, gap: float = 1e-6) -> Instance:
    """One unknown a level in [-1, 1], both levels sums of waves; the truth by brute force.

    truth.value is the least f over a grid of `points` x and the y whose g is within `gap` of the least, refined three
    times around the best x; it is good to about 1e-3, and F may jump where the lower minimiser does.
    """
    rng = np.random.default_rng(seed)
    f, g = (Waves(*np.round(rng.uniform(-1, 1, size=(2, num_terms)), 2)) for _ in range(2))
    centre, width = 0.0, 1.0
    best = (np.inf, 0.0, 0.0)
    for _ in range(3):
        xs = np.clip(np.linspace(centre - width, centre + width, points), -1, 1)[:, None]
        ys = np.linspace(-1, 1, 20 * points)[None, :]
        lower = _wave(xs, ys, g, np)
        allowed = lower <= lower.min(axis=1, keepdims=True) + gap
        upper = np.where(allowed, (ys - xs) ** 2 / 2 + _wave(xs, ys, f, np), np.inf)
        i, j = np.unravel_index(np.argmin(upper), upper.shape)
        best = min(best, (float(upper[i, j]), float(xs[i, 0]), float(ys[0, j])))
        centre, width = best[1], 4 * width / points
    problem = BilevelProblem(
        waves_upper, Minimize(waves_lower), x_set=Box(-1.0, 1.0), y_set=Box(-1.0, 1.0),
        upper_data=Full(Waves(*map(jnp.asarray, f))), lower_data=Full(Waves(*map(jnp.asarray, g))),
        init=_interval_start,
    )  # fmt: skip
    truth = Truth(best[0], jnp.array([best[1]]), jnp.array([best[2]]))
    return Instance(problem, truth, tags=frozenset({"nonconvex-lower", "known-optimum"}))


def nonconvex_problems(max_terms: int = 2) -> SearchStrategy[Instance]:
    """Smooth one-dimensional problems with non-convex lower level and a brute-forced optimum: `nonconvex`."""
    return st.builds(nonconvex, seed=seeds(), num_terms=dims(max_terms))


class Task(NamedTuple):
    """An MDP and a reward table [S, A] with entries in [0, 1]."""

    mdp: irl.MDP
    reward: np.ndarray


def _task(seed: int, num_states: int, num_actions: int, discount: float, sharp: float, floor: float) -> Task:
    rng = np.random.default_rng(seed)
    P = np.exp(sharp * rng.normal(size=(num_states, num_actions, num_states)))
    P = floor / num_states + (1 - floor) * P / P.sum(axis=-1, keepdims=True)
    start = np.full(num_states, 1 / num_states)
    return Task(irl.MDP.dense(P, start, discount), rng.random((num_states, num_actions)))


def mdps(
    max_states: int = 4, max_actions: int = 3, discounts: Sequence[float] = (0.5, 0.0, 0.9)
) -> SearchStrategy[Task]:
    """Ergodic MDPs (each transition has probability >= 0.05/S) with rewards in [0, 1]."""
    return st.builds(
        _task, seed=seeds(), num_states=dims(max_states), num_actions=dims(max_actions),
        discount=st.sampled_from(list(discounts)), sharp=sizes(), floor=st.just(0.05),
    )  # fmt: skip


def demonstrations(
    num_states: int, num_actions: int, max_trajectories: int = 3, max_length: int = 5
) -> SearchStrategy[irl.Demonstrations]:
    """Any demonstrations of a finite MDP, lengths and weights included; `irl.sample` draws likely ones of a policy."""

    def of_shape(shape: tuple[int, int]) -> SearchStrategy[irl.Demonstrations]:
        n, T = shape

        def table(size: int) -> SearchStrategy[Any]:
            return st.lists(st.integers(0, size - 1), min_size=n * T, max_size=n * T).map(
                lambda flat: np.array(flat).reshape(n, T)
            )

        lengths = st.lists(st.integers(1, T), min_size=n, max_size=n).map(np.array)
        weights = st.lists(st.integers(1, 3), min_size=n, max_size=n).map(lambda w: np.array(w, float))
        return st.builds(irl.Demonstrations.of, table(num_states), table(num_actions), lengths, weights)

    return st.tuples(dims(max_trajectories), dims(max_length)).flatmap(of_shape)


def dtypes() -> SearchStrategy[Any]:
    """float32, and float64 where jax is set to it."""
    known = [np.float32, np.float64] if jax.config.jax_enable_x64 else [np.float32]  # pyright: ignore[reportAttributeAccessIssue]
    return st.sampled_from(known)


def pytrees(max_leaves: int = 3, max_side: int = 3, dtype: Any = None) -> SearchStrategy[Any]:
    """Nested dicts and tuples of float arrays with small whole entries, of at most two axes; one dtype a tree."""

    def of_dtype(dtype: Any) -> SearchStrategy[Any]:
        shapes = st.lists(dims(max_side), max_size=2)
        leaf = st.builds(_leaf, shapes, st.integers(0, 100), st.just(dtype))
        return st.recursive(
            leaf,
            lambda inner: st.one_of(
                st.tuples(inner), st.tuples(inner, inner), st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
            ),
            max_leaves=max_leaves,
        )

    return dtypes().flatmap(of_dtype) if dtype is None else of_dtype(dtype)


def _leaf(shape: list[int], seed: int, dtype: Any) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).integers(-3, 4, size=shape), dtype)
