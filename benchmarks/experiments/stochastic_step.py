"""The price of a stochastic step: `python -m benchmarks.experiments.stochastic_step [--dims 22 2000] [--most 1.3]`.

Steps of solvers on batches, by `bilevel.advance`, over the same step written by hand in one `lax.scan` of plain JAX,
whose batches are consecutive samples in blocks that are shuffled once an epoch. The problem is logistic regression with
a penalty per feature: float32, batches of 64, constant steps. Microseconds a step, the least of interleaved runs, which
a busy machine distorts least; then the ratio to the scan for each `Minibatch.order`. SABA draws blocks by itself,
whatever the order is. That the scans are the same methods is checked first, where one batch is all of the data.

With --most the exit status is 1 where a ratio with order="blocks" is larger than that.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from rich.console import Console
from rich.table import Table

import bilevel
from benchmarks.peers.timing import interleaved

PyTree = Any
SIZE, INNER = 0.02, 10  # every step size; steps of the loops that nest
ORDERS = ("shuffled", "blocks", "independent")


def f(x: Array, y: Array, batch: tuple[Array, Array]) -> Array:
    """The logistic loss of y on (features [b, d], labels in {-1, 1} [b])."""
    return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ y)))


def g(x: Array, y: Array, batch: tuple[Array, Array]) -> Array:
    """The same with the penalty exp(x_i) y_i^2/2 on each feature."""
    return f(x, y, batch) + 0.5 * jnp.sum(jnp.exp(x) * y**2)


def data(num: int, dim: int, seed: int) -> tuple[Array, Array]:
    """`num` normal samples with noisy labels."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((num, dim), dtype=np.float32)
    labels = np.sign(features.sum(axis=1) / dim**0.5 + rng.standard_normal(num, dtype=np.float32))
    return jnp.asarray(features), jnp.asarray(labels.astype(np.float32))


class Blocks(NamedTuple):
    """Where a hand-written sampler stands."""

    order: Array
    """Of the blocks in this epoch, shape [blocks]."""
    position: Array
    key: Array


class Sampler:
    """Blocks of consecutive samples by hand, shuffled once an epoch."""

    def __init__(self, arrays: tuple[Array, Array], size: int, seed: int) -> None:
        self.arrays, self.size, self.num = arrays, size, len(arrays[1]) // size
        self.start = Blocks(jnp.arange(self.num), jnp.zeros((), int), jax.random.key(seed))

    def block(self, index: Array) -> tuple[Array, Array]:
        features, labels = (lax.dynamic_slice_in_dim(part, index * self.size, self.size) for part in self.arrays)
        return features, labels

    def next(self, state: Blocks) -> tuple[Array, Blocks]:
        """(the next block's number, state)."""

        def shuffled(state: Blocks) -> Blocks:
            key, now = jax.random.split(state.key)
            return Blocks(jax.random.permutation(now, state.order), jnp.zeros_like(state.position), key)

        state = lax.cond(state.position % self.num == 0, shuffled, lambda state: state, state)
        return state.order[state.position], state._replace(position=state.position + 1)

    def draw(self, state: Blocks) -> tuple[tuple[Array, Array], Blocks]:
        index, state = self.next(state)
        return self.block(index), state


grad_y, grad_x = jax.grad(g, argnums=1), jax.grad(g)
upper_y = jax.grad(f, argnums=1)


def lower_directions(x: Array, y: Array, v: Array, batch: PyTree) -> tuple[Array, Array, Array]:
    """(g_y, g_yy v, g_xy v)."""
    value, pull = jax.vjp(lambda x, y: grad_y(x, y, batch), x, y)
    cross, product = pull(v)
    return value, product, cross


def hessian(x: Array, y: Array, v: Array, batch: PyTree) -> Array:
    """g_yy v."""
    return jax.jvp(lambda y: grad_y(x, y, batch), (y,), (v,))[1]


def soba(upper: Sampler, lower: Sampler, x: Array, y: Array) -> tuple[Callable, PyTree]:
    """(step, start) of SOBA; the first entries of a carry are x and y, here and below."""

    def step(carry: PyTree) -> PyTree:
        x, y, v, of_f, of_g = carry
        batch_f, of_f = upper.draw(of_f)
        batch_g, of_g = lower.draw(of_g)
        R, Hv, cross = lower_directions(x, y, v, batch_g)
        direction = Hv - upper_y(x, y, batch_f)
        return x + SIZE * cross, y - SIZE * R, v - SIZE * direction, of_f, of_g

    return step, (x, y, jnp.zeros_like(y), upper.start, lower.start)


def saba(upper: Sampler, lower: Sampler, x: Array, y: Array) -> tuple[Callable, PyTree]:
    """(step, start) of SABA, its tables written as one would."""

    def reduced(table: PyTree, mean: PyTree, index: Array, new: PyTree, num: int) -> tuple[PyTree, PyTree, PyTree]:
        old = jax.tree.map(lambda part: part[index], table)
        estimate = jax.tree.map(lambda a, b, c: a - b + c, new, old, mean)
        table = jax.tree.map(lambda part, a: part.at[index].set(a), table, new)
        return estimate, table, jax.tree.map(lambda c, a, b: c + (a - b) / num, mean, new, old)

    def step(carry: PyTree) -> PyTree:
        x, y, v, (table_f, mean_f, of_f), (table_g, mean_g, of_g) = carry
        j, of_f = upper.next(of_f)
        i, of_g = lower.next(of_g)
        new = upper_y(x, y, upper.block(j))
        fy, table_f, mean_f = reduced(table_f, mean_f, j, new, upper.num)
        new = lower_directions(x, y, v, lower.block(i))
        (R, Hv, cross), table_g, mean_g = reduced(table_g, mean_g, i, new, lower.num)
        states = (table_f, mean_f, of_f), (table_g, mean_g, of_g)
        return x + SIZE * cross, y - SIZE * R, v - SIZE * (Hv - fy), *states

    v = jnp.zeros_like(y)
    table_f = lax.map(lambda j: upper_y(x, y, upper.block(j)), jnp.arange(upper.num))
    table_g = lax.map(lambda i: lower_directions(x, y, v, lower.block(i)), jnp.arange(lower.num))
    mean = lambda table: jax.tree.map(lambda part: part.mean(axis=0), table)  # noqa: E731
    return step, (x, y, v, (table_f, mean(table_f), upper.start), (table_g, mean(table_g), lower.start))


def nested(upper: Sampler, lower: Sampler, x: Array, y: Array, adjoint: Callable) -> tuple[Callable, PyTree]:
    """(step, start) of lower steps, `adjoint` and a step in x. adjoint: (x, y, v, f_y, of_g) -> (v, of_g)."""

    def step(carry: PyTree) -> PyTree:
        x, y, v, of_f, of_g = carry

        def descend(_: Array, at: PyTree) -> PyTree:
            batch, of_g = lower.draw(at[1])
            return at[0] - SIZE * grad_y(x, at[0], batch), of_g

        y, of_g = lax.fori_loop(0, INNER, descend, (y, of_g))
        batch_f, of_f = upper.draw(of_f)
        v, of_g = adjoint(x, y, v, upper_y(x, y, batch_f), of_g)
        batch_g, of_g = lower.draw(of_g)
        cross = jax.vjp(lambda x: grad_y(x, y, batch_g), x)[1](v)[0]
        return x + SIZE * cross, y, v, of_f, of_g

    return step, (x, y, jnp.zeros_like(y), upper.start, lower.start)


def stocbio(upper: Sampler, lower: Sampler, x: Array, y: Array) -> tuple[Callable, PyTree]:
    """(step, start) of stocBiO: the Neumann series."""

    def adjoint(x: Array, y: Array, v: Array, fy: Array, of_g: Blocks) -> tuple[Array, Blocks]:
        def term(_: Array, at: PyTree) -> PyTree:
            batch, of_g = lower.draw(at[2])
            power = at[0] - SIZE * hessian(x, y, at[0], batch)
            return power, at[1] + power, of_g

        _, total, of_g = lax.fori_loop(0, INNER, term, (fy, fy, of_g))
        return SIZE * total, of_g

    return nested(upper, lower, x, y, adjoint)


def amigo(upper: Sampler, lower: Sampler, x: Array, y: Array) -> tuple[Callable, PyTree]:
    """(step, start) of AmIGO: steps on the adjoint from the last one."""

    def adjoint(x: Array, y: Array, v: Array, fy: Array, of_g: Blocks) -> tuple[Array, Blocks]:
        def linear(_: Array, at: PyTree) -> PyTree:
            batch, of_g = lower.draw(at[1])
            return at[0] - SIZE * (hessian(x, y, at[0], batch) - fy), of_g

        return lax.fori_loop(0, INNER, linear, (v, of_g))

    return nested(upper, lower, x, y, adjoint)


def f2sa(upper: Sampler, lower: Sampler, x: Array, y: Array) -> tuple[Callable, PyTree]:
    """(step, start) of F2SA with a constant multiplier."""
    penalty = 10.0

    def step(carry: PyTree) -> PyTree:
        x, y, z, of_f, of_g = carry

        def descend(_: Array, at: PyTree) -> PyTree:
            y, z, of_f, of_g = at
            batch_f, of_f = upper.draw(of_f)
            batch_g, of_g = lower.draw(of_g)
            direction = upper_y(x, y, batch_f) / penalty + grad_y(x, y, batch_g)
            return y - SIZE * direction, z - SIZE * grad_y(x, z, batch_g), of_f, of_g

        y, z, of_f, of_g = lax.fori_loop(0, INNER, descend, (y, z, of_f, of_g))
        _, of_f = upper.draw(of_f)
        batch_g, of_g = lower.draw(of_g)
        gap = grad_x(x, y, batch_g) - grad_x(x, z, batch_g)
        return x - SIZE * penalty * gap, y, z, of_f, of_g

    return step, (x, y, y, upper.start, lower.start)


STEPS = {"lower_step_size": SIZE, "upper_step_size": SIZE}
METHODS: dict[str, tuple[bilevel.Solver, Callable]] = {
    "SOBA": (bilevel.SOBA(**STEPS, linear_step_size=SIZE), soba),
    "SABA": (bilevel.SABA(**STEPS, linear_step_size=SIZE), saba),
    "StocBiO": (
        bilevel.StocBiO(**STEPS, linear_step_size=SIZE, num_lower_steps=INNER, num_linear_steps=INNER),
        stocbio,
    ),
    "AmIGO": (bilevel.AmIGO(**STEPS, linear_step_size=SIZE, num_lower_steps=INNER, num_linear_steps=INNER), amigo),
    "F2SA": (bilevel.F2SA(**STEPS, penalty=10.0, num_lower_steps=INNER), f2sa),
}


def start(dim: int) -> tuple[Array, Array]:
    """(x0, y0)."""
    return jnp.full(dim, -2.0, jnp.float32), jnp.zeros(dim, jnp.float32)


def ours(solver: bilevel.Solver, parts: list, size: int, order: str, num_steps: int) -> Callable[[], PyTree]:
    """A call that makes `num_steps` steps of `solver`, returning its state."""
    train, held = (bilevel.Minibatch(part, size, order) for part in parts)
    dim, key = parts[0][0].shape[1], jax.random.key(0)
    init = lambda _: start(dim)  # noqa: E731
    problem = bilevel.BilevelProblem(f, bilevel.Minimize(g), upper_data=held, lower_data=train, init=init)
    state = jax.jit(lambda problem: solver.init(problem, key))(problem)
    steps = jax.jit(lambda problem, state: bilevel.advance(problem, solver, state, key, 0, num_steps)[0])
    return lambda: steps(problem, state)


def by_hand(make: Callable, parts: list, size: int, num_steps: int) -> Callable[[], PyTree]:
    """A call that makes `num_steps` of the hand-written scan, returning its carry."""
    arrays = jax.tree.map(jnp.asarray, parts)
    point = start(arrays[0][0].shape[1])

    def made(arrays: PyTree) -> tuple[Callable, PyTree]:
        lower, upper = (Sampler(part, size, seed) for seed, part in enumerate(arrays))
        return make(upper, lower, *point)

    begin = jax.jit(lambda arrays: made(arrays)[1])(arrays)
    steps = jax.jit(lambda arrays, carry: lax.scan(lambda c, _: (made(arrays)[0](c), None), carry, length=num_steps)[0])
    return lambda: steps(arrays, begin)


def check(name: str) -> None:
    """Where a batch is all of the data, both make the same steps."""
    solver, make = METHODS[name]
    parts = [data(64, 5, seed) for seed in (0, 1)]
    x, y = by_hand(make, parts, 64, 20)()[:2]
    state = ours(solver, parts, 64, "blocks", 20)()
    for mine, theirs in ((x, state.x), (y, state.y)):
        np.testing.assert_allclose(theirs, mine, rtol=1e-4, atol=1e-6, err_msg=name)


def measure(name: str, dim: int, num: int, size: int, num_steps: int, repeats: int) -> dict[str, float]:
    """Microseconds of a step, of the scan and of `advance` by order."""
    solver, make = METHODS[name]
    parts = [data(num, dim, 0), data(num // 4, dim, 1)]
    calls = {"hand-written": by_hand(make, parts, size, num_steps)}
    calls |= {order: ours(solver, parts, size, order, num_steps) for order in ORDERS}
    found = interleaved(calls, [()] * repeats)
    return {label: 1e6 * one.least / num_steps for label, one in found.items()}


def main() -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(description="stochastic steps over hand-written ones")
    parser.add_argument("--dims", type=int, nargs="*", default=[22, 2000])
    parser.add_argument("--solvers", nargs="*", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each call of a row, about")
    parser.add_argument("--most", type=float, help="exit status 1 where a ratio with blocks is larger")
    options = parser.parse_args()
    table = Table(title="Microseconds a step (ratio to the hand-written scan)")
    for column in ("d", "solver", "hand-written", *ORDERS):
        table.add_column(column, justify="right")
    worst = 0.0
    for dim in options.dims:
        num, guess = (32768, 5e-6) if dim < 200 else (8192, 200e-6)
        for name in options.solvers:
            check(name)
            step = guess * (1 if name in ("SOBA", "SABA") else 2 * INNER)
            num_steps = max(4, round(3e-3 / step))
            repeats = max(10, round(options.seconds / (num_steps * step)))
            times = measure(name, dim, num, 64, num_steps, repeats)
            base = times.pop("hand-written")
            worst = max(worst, times["blocks"] / base)
            row = (f"{time:.1f} ({time / base:.2f})" for time in times.values())
            table.add_row(str(dim), name, f"{base:.1f}", *row)
    Console(width=110).print(table)
    if options.most is not None and worst > options.most:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
