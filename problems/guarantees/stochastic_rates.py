"""SOBA and SABA on finite sums: many steps in exact expectation.

On quadratics a step with given blocks is an affine map z+ = A_p z + b_p of z = (x, y, v), and of SABA's tables as well.
With ~z = (z, 1) and ~A_p = [[A_p, b_p], [0, 1]], the second moment S = E ~z ~z' follows

    S+ = (1/#p) sum over pairs p of blocks of ~A_p S ~A_p',

exactly, and each E|affine function of z|^2 is a trace with S: no sampling, no error but rounding. ~A_p is read off the
solver's own step. The bound is `theory.expected_step` iterated (`theory.after_steps`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import SABA, SOBA, theory
from bilevel.backend.draws import numbers_below
from bilevel.guarantees import Guarantee
from bilevel.parts.estimators import saga_init
from problems import strategies
from problems.guarantees import stochastic
from problems.guarantees.stochastic import ASSUMPTIONS, FiniteSum, KnownSum, finite_sum, rounding

SIZE, BLOCKS, LANES = 2, 2, 16
PAIRS = [(i, j) for i in range(BLOCKS) for j in range(BLOCKS)]


class Moving(NamedTuple):
    """What a step moves: x, y, v [SIZE]; entries of SABA's tables of f and g, or ()."""

    x: Array
    y: Array
    v: Array
    f: Any = ()
    g: Any = ()


def small_sum(key: Array, **numbers: Array) -> FiniteSum:
    """Two unknowns a level, two blocks a function."""
    return finite_sum(key, size=SIZE, blocks=BLOCKS, **numbers)


def pair_keys() -> Array:
    """Keys with which SABA draws the blocks (i of g, j of f) of PAIRS, [4]; a test looks at what a step replaces."""
    with jax.ensure_compile_time_eval():
        keys = jax.vmap(jax.random.key)(jnp.arange(64))
        drawn = [
            (int(i), int(j))
            for j, i in zip(*jax.vmap(lambda key: numbers_below(key, BLOCKS, BLOCKS))(keys), strict=True)
        ]
        return keys[jnp.array([drawn.index(pair) for pair in PAIRS])]


def second_moments(
    step: Callable[[Any, Moving], Moving], pairs: Any, start: Moving, center: Moving, ks: tuple[int, ...]
) -> Array:
    """E ~z ~z' of z - center after each k of `ks`, shape [len(ks), n + 1, n + 1]; `step(pair, .)` is affine.

    Around the solution, or else small errors would be lost in the rounding of large squares.
    """
    middle, unravel = ravel_pytree(center)
    n = middle.size

    def affine(pair: Any) -> Array:
        move = lambda z: ravel_pytree(step(pair, unravel(middle + z)))[0] - middle  # noqa: E731
        zero = jnp.zeros(n)
        A, b = jax.jacfwd(move)(zero), move(zero)
        return jnp.concatenate([jnp.concatenate([A, b[:, None]], axis=1), jnp.eye(n + 1)[-1:]])

    maps = jax.vmap(affine)(pairs)
    stacked = maps.reshape(-1, n + 1)

    def moved(S: Array) -> Array:
        right = (stacked @ S).reshape(-1, n + 1, n + 1)
        return jnp.einsum("pij,pkj->ik", right, maps) / len(maps)

    def segment(S: Array, count: Array) -> tuple[Array, Array]:
        S = jax.lax.fori_loop(0, count, lambda _, S: moved(S), S)
        return S, S

    one = jnp.append(ravel_pytree(start)[0] - middle, 1.0)
    return jax.lax.scan(segment, jnp.outer(one, one), jnp.diff(jnp.array((0, *ks))))[1]


def root_mean_squares(look: Callable[[Moving], Any], center: Moving, moments: Array) -> Array:
    """(E|part|^2)^(1/2) of each part of look(z), affine and zero at the center, shape [len(moments), parts]."""
    middle, unravel = ravel_pytree(center)
    parts = []
    for k in range(len(jax.eval_shape(look, center))):
        part = lambda z, k=k: ravel_pytree(look(unravel(z))[k])[0]  # noqa: E731
        M = jax.jacfwd(part)(middle)
        parts.append(jnp.sqrt(jnp.maximum(jnp.einsum("ai,kij,aj->k", M, moments[:, :-1, :-1], M), 0)))
    return jnp.stack(parts, axis=1)


def _solution(instance: FiniteSum) -> tuple[Array, Array, Array]:
    """(x*, y*, v*)."""
    mean = instance.mean
    return mean.x_star, mean.lower_solution(mean.x_star), mean.adjoint(mean.x_star)


def _away(instance: FiniteSum) -> Callable[[Moving], tuple[Array, ...]]:
    """(x - x*, y - y(x), v - v(x)) of z."""
    mean = instance.mean
    return lambda z: (z.x - mean.x_star, z.y - mean.lower_solution(z.x), z.v - mean.adjoint(z.x))


def soba(make: Callable[..., Any] = SOBA.from_theory) -> Guarantee:
    """SOBA with single blocks as batches, step sizes made for each number of steps."""

    def measure(instance: FiniteSum, horizon: tuple[int, ...]) -> Array:
        known, mean, key, rows = instance.constants.mean, instance.mean, jax.random.key(0), []
        start, center = Moving(mean.x, mean.y, mean.v), Moving(*_solution(instance))
        for K in horizon:
            solver = make(known.base, known.mu_F, known.L_F, 0.0, (instance.constants.noise, known.start, K))
            state = solver.init(instance.problem(0, 0), key)

            def step(pair: Any, z: Moving, solver: Any = solver, state: Any = state) -> Moving:
                after = solver.step(instance.problem(*pair), state._replace(x=z.x, y=z.y, v=z.v), key)[0]
                return Moving(after.x, after.y, after.v)

            moments = second_moments(step, jnp.array(PAIRS), start, center, (K,))
            rows.append(root_mean_squares(_away(instance), center, moments)[0])
        return jnp.stack(rows)

    def bound(known: KnownSum, K: int) -> Array:
        mean = known.mean
        steps = theory.soba_steps(mean.base, mean.mu_F, mean.L_F, known.noise, mean.start, K)
        after, _ = theory.after_steps(mean.base, mean.mu_F, mean.L_F, steps, known.noise, mean.start, None, K)
        return jnp.stack(after)

    return Guarantee(
        "soba-batches-rate", "ours, bilevel.theory", ASSUMPTIONS, sums, measure, bound, (8, 64, 512), rounding,
        "root mean squares of |x - x*|, |y - y(x)|, |v - v(x)| after K steps with step sizes made for K", "power",
        LANES,
    )  # fmt: skip


def saba(make: Callable[..., Any] = SABA.from_theory) -> Guarantee:
    """SABA, iterates and tables."""

    def measure(instance: FiniteSum, horizon: tuple[int, ...]) -> Array:
        known, mean, problem = instance.constants.mean, instance.mean, instance.problem(0, 0)
        solver = make(known.base, known.mu_F, known.L_F, instance.constants.noise)
        state = solver.init(problem, jax.random.key(0))  # the tables are those of the origin
        start = Moving(mean.x, mean.y, mean.v, state.upper_table.entries, state.lower_table.entries)

        def step(key: Array, z: Moving) -> Moving:
            iterates = state.iterates._replace(x=z.x, y=z.y, v=z.v)
            moved = state._replace(iterates=iterates, upper_table=saga_init(z.f), lower_table=saga_init(z.g))
            after = solver.step(problem, moved, key)[0]
            return Moving(
                after.x, after.y, after.iterates.v, after.upper_table.entries, after.lower_table.entries
            )  # fmt: skip

        at = stochastic.pieces_at_optimum(instance)
        center = Moving(*_solution(instance), *map(tuple, at))

        def look(z: Moving) -> tuple[Any, ...]:
            return *_away(instance)(z), z.f, z.g

        found = root_mean_squares(look, center, second_moments(step, pair_keys(), start, center, horizon))
        return found / jnp.array([[1.0, 1.0, 1.0, BLOCKS**0.5, BLOCKS**0.5]])  # tables: a mean over blocks

    def bound(known: KnownSum, k: int) -> Array:
        mean = known.mean
        steps, _ = theory.saba_steps(mean.base, mean.mu_F, mean.L_F, known.noise)
        errors, tables = theory.after_steps(
            mean.base, mean.mu_F, mean.L_F, steps, known.noise, mean.start, known.tables, k
        )
        assert tables is not None
        return jnp.stack([*errors, *tables])

    return Guarantee(
        "saba-rate", "ours, bilevel.theory", ASSUMPTIONS, sums, measure, bound, (1, 4, 16, 64, 256), rounding,
        "root mean squares of |x - x*|, |y - y(x)|, |v - v(x)| and of the tables' distances after k steps",
        "geometric", LANES,
    )  # fmt: skip


MILD = {"dim": strategies.dims(SIZE), "condition_x": strategies.conditions(1), "condition_y": strategies.conditions(1)}
sums = strategies.recipes(small_sum, **(stochastic.NUMBERS | MILD))
SOBA_BATCHES_RATE = soba()
SABA_RATE = saba()
