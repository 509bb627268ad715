"""SOBA and SABA on finite sums: one step in exact expectation, over every pair of blocks; `rates` has more steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import SABA, SOBA, BilevelProblem, Minimize, theory
from bilevel.data import Source
from bilevel.guarantees import Guarantee
from bilevel.struct import struct
from bilevel.theory import Noise, Tables, assumptions
from problems import strategies
from problems.guarantees.instances import DIM, EPS, REGULAR, Known, Quadratic, normal, origin_of, quadratic
from problems.quadratic import Lower, Upper, lower, upper

BLOCKS = 3


@struct
class Chosen(Source):
    """Samples of `arrays` in blocks of one; the next batch is block `index`: an expectation is a sum over indices."""

    arrays: Any
    index: Any

    @property
    def fraction(self) -> float:
        return 1 / self.num_blocks

    @property
    def num_blocks(self) -> int:
        return jax.tree.leaves(self.arrays)[0].shape[0]

    def block(self, index: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[index][None], self.arrays)

    def next(self, state: Any, key: Array, x: Any, y: Any) -> tuple[Any, Any]:
        return self.block(self.index), state

    def full(self) -> Any:
        return self.arrays


class KnownSum(NamedTuple):
    """The mean's constants, the blocks' noise, and the distances of SABA's tables, made at the origin."""

    mean: Known
    noise: Noise
    tables: Tables


class FiniteSum(NamedTuple):
    """The mean, samples of f and of g."""

    mean: Quadratic
    f: Upper
    g: Lower
    constants: KnownSum

    def problem(self, i: Array | int, j: Array | int) -> BilevelProblem:
        """With block j of f and block i of g as the next batches."""
        return BilevelProblem(
            upper,
            Minimize(lower),
            upper_data=Chosen(self.f, j),
            lower_data=Chosen(self.g, i),
            init=origin_of(self.mean.x.size),
        )


def _around(key: Array, mean: Array, noise: Array, blocks: int) -> Array:
    """Copies of mean [1, …] plus deviations of mean zero."""
    spread = normal(key, blocks, *mean.shape[1:])
    return mean + noise * (spread - spread.mean(axis=0, keepdims=True))


def _symmetric(matrices: Array) -> Array:
    return (matrices + matrices.transpose(0, 2, 1)) / 2


def _rms(parts: list[Array]) -> Array:
    """Root mean square over axis 0 of the length of all parts together."""
    flat = jnp.concatenate([part.reshape(part.shape[0], -1) for part in parts], axis=1)
    return jnp.sqrt(jnp.mean(jnp.sum(flat**2, axis=1)))


def _norms(matrices: Array) -> Array:
    """Root mean square over blocks of the 2-norm."""
    return jnp.sqrt(jnp.mean(jnp.linalg.norm(matrices, 2, axis=(1, 2)) ** 2))


def _pieces(f: Upper, g: Lower, x: Array, y: Array, v: Array) -> tuple[list[Array], list[Array]]:
    """([f_x, f_y], [R, R_y' v, R_x' v]) of each block, by hand."""
    fx, fy = f.Q @ y + f.S @ x + f.s, f.P @ y + jnp.einsum("nij,i->nj", f.Q, x) + f.p
    return [fx, fy], [g.H @ y + jnp.einsum("nij,i->nj", g.G, x) + g.h, g.H @ v, g.G @ v]


def finite_sum(key: Array, noise: Array, size: int = DIM, blocks: int = BLOCKS, **numbers: Array) -> FiniteSum:
    """A quadratic with blocks around it; single blocks of g need not be convex."""
    keys = iter(jax.random.split(jax.random.fold_in(key, 1), 16))
    mean = quadratic(key, size=size, **numbers)
    f, g = mean.f, mean.g
    P, S, H = (_symmetric(_around(next(keys), part, noise, blocks)) for part in (f.P, f.S, g.H))
    Q, p, s, G, h = (_around(next(keys), part, noise, blocks) for part in (f.Q, f.p, f.s, g.G, g.h))
    f, g = Upper(P, Q, S, p, s), Lower(H, G, h)
    x_star, y_star = mean.x_star, mean.lower_solution(mean.x_star)
    v_star = mean.adjoint(x_star)

    def hessians(f: Upper, g: Lower) -> tuple[Array, Array]:
        both = jnp.concatenate([f.S, f.Q], axis=2), jnp.concatenate([f.Q.transpose(0, 2, 1), f.P], axis=2)
        return jnp.concatenate(both, axis=1), jnp.concatenate([g.H, g.G.transpose(0, 2, 1)], axis=2)

    hess_f, hess_g = hessians(f, g)
    away = lambda part: part - part.mean(axis=0, keepdims=True)  # noqa: E731
    at_f, at_g = _pieces(f, g, x_star, y_star, v_star)
    count = jnp.asarray(float(blocks))
    known = Noise(
        _norms(hess_f), _norms(hess_g), _norms(away(hess_f)), _norms(away(hess_g)),
        _rms([away(part) for part in at_f]), _rms([away(part) for part in at_g]), count, count,
    )  # fmt: skip
    old_f, old_g = _pieces(f, g, *(jnp.zeros(size) for _ in range(3)))
    tables = Tables(
        _rms([a - b for a, b in zip(old_f, at_f, strict=True)]), _rms([a - b for a, b in zip(old_g, at_g, strict=True)])
    )
    return FiniteSum(mean, f, g, KnownSum(mean.constants, known, tables))


NUMBERS = {
    "noise": strategies.sizes(),
    "dim": strategies.dims(DIM),
    "condition_x": strategies.conditions(2),
    "condition_y": strategies.conditions(2),
    "coupling": strategies.sizes(),
    "pull": strategies.sizes(),
    "bend": strategies.sizes(),
    "spread": strategies.sizes(),
    "flip_x": strategies.booleans,
    "flip_y": strategies.booleans,
    "offset": strategies.switches,
    "e": strategies.sizes(),
    "d": strategies.sizes(),
    "u": strategies.sizes(),
}
sums = strategies.recipes(finite_sum, **NUMBERS)


def pieces_at_optimum(instance: FiniteSum) -> tuple[list[Array], list[Array]]:
    """([f_x, f_y], [R, R_y' v, R_x' v]) of each block at (x*, y*, v*)."""
    mean = instance.mean
    x = mean.x_star
    return _pieces(instance.f, instance.g, x, mean.lower_solution(x), mean.adjoint(x))


def f_varies_little(instance: FiniteSum) -> Array:
    """Assumption: the variance of (f_x, f_y) over blocks at the optimum is at most optimum_f^2."""
    return assumptions.bounded_variance(pieces_at_optimum(instance)[0], instance.constants.noise.optimum_f)


def g_varies_little(instance: FiniteSum) -> Array:
    """Assumption: the variance of (R, R_y' v, R_x' v) over blocks at the optimum is at most optimum_g^2."""
    return assumptions.bounded_variance(pieces_at_optimum(instance)[1], instance.constants.noise.optimum_g)


def rounding(known: KnownSum) -> Array:
    """As for the mean."""
    return 1e3 * EPS * known.mean.size * (1 + known.noise.lipschitz_f + known.noise.lipschitz_g) / known.mean.base.mu


PAIRS = [(i, j) for i in range(BLOCKS) for j in range(BLOCKS)]
NUM_KEYS = 96  # enough for SABA to draw each pair of blocks; a test counts


def _of_mean(check: Callable[[Quadratic], Array]) -> Callable[[FiniteSum], Array]:
    def checked(instance: FiniteSum) -> Array:
        return check(instance.mean)

    checked.__name__ = check.__name__
    return checked


ASSUMPTIONS = (*map(_of_mean, REGULAR), f_varies_little, g_varies_little)


def _root_mean(weights: Array, *lengths: Array) -> Array:
    """(E length^2)^(1/2) of each."""
    return jnp.stack([jnp.sqrt(jnp.sum(weights * part**2)) for part in lengths])


def _lengths(instance: FiniteSum, x: Array, y: Array, v: Array) -> tuple[Array, ...]:
    """Errors and lengths of the step for x, y, v [states, DIM]."""
    mean, row = instance.mean, lambda part: jnp.linalg.norm(part, axis=1)
    moved = row(x - mean.x[None, :]), row(y - mean.y[None, :]), row(v - mean.v[None, :])
    return *jax.vmap(mean.errors)(x, y, v), *moved


def soba(make: Callable[..., Any] = SOBA.from_theory) -> Guarantee:
    """SOBA with single blocks as batches."""

    def measure(instance: FiniteSum, horizon: tuple[int, ...]) -> Array:
        known, mean = instance.constants.mean, instance.mean
        solver = make(known.base, known.mu_F, known.L_F)
        state = solver.init(instance.problem(0, 0), jax.random.key(0))._replace(x=mean.x, y=mean.y, v=mean.v)
        step = lambda pair: solver.step(instance.problem(*pair), state, jax.random.key(0))[0]  # noqa: E731
        after = jax.vmap(step)(jnp.array(PAIRS))
        weights = jnp.full(len(PAIRS), 1 / len(PAIRS))
        return _root_mean(weights, *_lengths(instance, after.x, after.y, after.v))[None, :]

    def bound(known: KnownSum, k: int) -> Array:
        mean = known.mean
        steps = theory.single_loop_steps(mean.base, mean.mu_F, mean.L_F)
        after = theory.expected_step(mean.base, mean.mu_F, mean.L_F, steps, known.noise, mean.start, None)
        return jnp.stack([*after.errors, *after.moved])

    return Guarantee(
        "soba-batches", "ours, bilevel.theory", ASSUMPTIONS, sums, measure, bound, (1,), rounding,
        "root mean square errors and step lengths after a step, over all pairs of blocks; the tower rule gives k steps",
    )  # fmt: skip


def saba(make: Callable[..., Any] = SABA.from_theory) -> Guarantee:
    """SABA: the same, its tables, and that it is unbiased: the mean of x, y, v is SOBA's step on all of the data."""

    def measure(instance: FiniteSum, horizon: tuple[int, ...]) -> Array:
        known, mean = instance.constants.mean, instance.mean
        problem = instance.problem(0, 0)
        solver = make(known.base, known.mu_F, known.L_F, instance.constants.noise)
        state = solver.init(problem, jax.random.key(0))  # the tables are those of the origin
        state = state._replace(iterates=state.iterates._replace(x=mean.x, y=mean.y, v=mean.v))
        keys = jax.random.split(jax.random.key(0), NUM_KEYS)
        after, *entries = jax.vmap(lambda key: _with_entries(solver.step(problem, state, key)[0]))(keys)

        changed = [_changed(new, old) for new, old in zip(entries, _with_entries(state)[1:], strict=True)]
        pair = BLOCKS * changed[0] + changed[1]
        weights = 1 / (BLOCKS**2 * jnp.bincount(pair, length=BLOCKS**2).astype(float)[pair])
        lengths = _root_mean(weights, *_lengths(instance, after.x, after.y, after.iterates.v))

        a, b, c = solver.lower_step_size.value, solver.linear_step_size.value, solver.upper_step_size.value
        fx, fy = (part.mean(axis=0) for part in _pieces(instance.f, instance.g, mean.x, mean.y, mean.v)[0])
        R, Hv, Jv = (part.mean(axis=0) for part in _pieces(instance.f, instance.g, mean.x, mean.y, mean.v)[1])
        exact = mean.x - c * (fx - Jv), mean.y - a * R, mean.v - b * (Hv - fy)
        means = (weights @ part for part in (after.x, after.y, after.iterates.v))
        bias = jnp.stack([jnp.linalg.norm(m - e) for m, e in zip(means, exact, strict=True)])

        at = pieces_at_optimum(instance)
        tables = [
            jnp.sqrt(weights @ _away(table, best) ** 2) for table, best in zip(reversed(entries), at, strict=True)
        ]
        return jnp.concatenate([lengths, bias, jnp.stack(tables)])[None, :]

    def bound(known: KnownSum, k: int) -> Array:
        mean = known.mean
        steps, _ = theory.saba_steps(mean.base, mean.mu_F, mean.L_F, known.noise)
        after = theory.expected_step(mean.base, mean.mu_F, mean.L_F, steps, known.noise, mean.start, known.tables)
        assert after.tables is not None
        return jnp.concatenate([jnp.stack([*after.errors, *after.moved]), jnp.zeros(3), jnp.stack(after.tables)])

    return Guarantee(
        "saba", "ours, bilevel.theory", ASSUMPTIONS, sums, measure, bound, (1,), rounding,
        "as SOBA with batches; unbiased; the tables' distance to the optimum's values",
    )  # fmt: skip


def _with_entries(state: Any) -> tuple[Any, Any, Any]:
    """(SABA's state, the entries of the table of g, and of f)."""
    return state, state.lower_table.entries, state.upper_table.entries


def _changed(after: Any, before: Any) -> Array:
    """Which block's entry a step replaced, for each state."""
    change = [jnp.abs(a - b[None]).reshape(*a.shape[:2], -1).max(axis=-1)
              for a, b in zip(after, before, strict=True)]  # fmt: skip
    return jnp.argmax(sum(change), axis=1)


def _away(entries: Any, best: list[Array]) -> Array:
    """Root mean square over blocks of the distance of the entries [states, BLOCKS, …] to `best`, shape [states]."""
    squares = [jnp.sum((a - b[None]) ** 2, axis=-1) for a, b in zip(entries, best, strict=True)]
    return jnp.sqrt(jnp.mean(sum(squares), axis=1))


SOBA_STEP = soba()
SABA_STEP = saba()
