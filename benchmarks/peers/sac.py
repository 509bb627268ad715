"""The SAC update against stable-baselines3's: `python -m benchmarks.peers.sac [--updates 20] [--repeats 9]`.

One update is critics, actor, tuned temperature and slow copies at 2 x 256 units and batches of 256, Hopper-v5's sizes,
with the sampling of the batch from 10,000 transitions on both sides; Adam 3e-4. Float32, CPU, one process; torch with
one thread and with the machine's cores, ours with what XLA takes. Medians of interleaved calls of `updates` updates
each, quartiles, and the fastest, which a busy machine distorts least. Both agents must have the same number of
parameters, and the same Q values when they share the critics' weights.

The last rows are torch's time for an update's products of 256 x 256 matrices and nothing else, what no update of this
size does without: three forwards for the target, six for the critics' loss and seven for the actor's, sixteen in all.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import irl
from bilevel.backend.precision import full_precision
from irl.deep.control import Sizes
from irl.deep.networks import Layer
from irl.deep.sac import Batch, Learner

ROWS, D, K = 10_000, 11, 3
PRODUCTS = 16


def transitions() -> np.ndarray:
    """Rows (s, a, s', r) of normal numbers, actions in (-1, 1)."""
    data = np.random.default_rng(0).normal(size=(ROWS, 2 * D + K + 1)).astype(np.float32)
    data[:, D : D + K] = np.tanh(data[:, D : D + K])
    return data


def ours(data: np.ndarray, batch_size: int = 256) -> tuple[Callable[[int], Learner], irl.SAC, Learner]:
    """(n -> the learner after n updates in one loop, the agent, its learner at the start)."""
    agent = irl.SAC(tuned=True, learning_rate=3e-4, hidden=(256, 256), batch_size=batch_size)
    sizes: Any = Sizes(D, K, None)
    learner, rows = agent.init(sizes, jax.random.key(0)), jnp.asarray(data, float)

    @jax.jit
    @full_precision  # as `solve` does
    def run(learner: Learner, rows: jax.Array, n: int) -> Learner:
        def update(k: jax.Array, learner: Learner) -> Learner:
            key_draw, key_update = jax.random.split(jax.random.fold_in(jax.random.key(1), k))
            at = rows[jax.random.randint(key_draw, (batch_size,), 0, ROWS)]
            ended = jnp.zeros(batch_size, bool)
            batch = Batch(at[:, :D], at[:, D : D + K], at[:, D + K : 2 * D + K], at[:, -1], ended)
            return agent.update(learner, batch, key_update)[0]

        return jax.lax.fori_loop(0, n, update, learner)

    return lambda n: run(learner, rows, n), agent, learner


def theirs(data: np.ndarray) -> Any:
    """stable-baselines3's SAC with the same transitions in its memory."""
    import gymnasium
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import configure

    sizes = {"batch_size": 256, "buffer_size": ROWS, "learning_rate": 3e-4}
    model = SAC("MlpPolicy", gymnasium.make("Hopper-v5"), device="cpu", seed=0, **sizes)
    model.set_logger(configure(None, []))
    for row in data:
        model.replay_buffer.add(row[:D], row[D + K : 2 * D + K], row[D : D + K], row[-1], np.zeros(1), [{}])
    return model


def check(agent: irl.SAC, learner: Learner, model: Any, data: np.ndarray) -> None:
    """Both agents are the same network, or AssertionError."""
    import torch

    count = sum(leaf.size for leaf in jax.tree.leaves((learner.weights.actor, learner.weights.critics)))
    other = sum(p.numel() for part in (model.actor, model.critic) for p in part.parameters())
    assert count == other, (count, other)
    linear = [
        [layer for layer in net if isinstance(layer, torch.nn.Linear)] for net in model.critic.q_networks
    ]  # fmt: skip
    nets = [
        tuple(Layer(*(jnp.asarray(p.detach().numpy().T) for p in (layer.weight, layer.bias))) for layer in net)
        for net in linear
    ]
    s, a = data[:50, :D], data[:50, D : D + K]
    mine = agent.values((nets[0], nets[1]), jnp.asarray(s), jnp.asarray(a))
    with torch.no_grad():
        want = torch.cat(model.critic(torch.tensor(s), torch.tensor(a)), dim=1).numpy().T
    np.testing.assert_allclose(mine, want, atol=1e-4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20, help="Updates a call.")
    parser.add_argument("--repeats", type=int, default=9, help="Interleaved calls.")
    args = parser.parse_args()
    import torch

    data = transitions()
    run, agent, learner = ours(data)
    model = theirs(data)
    check(agent, learner, model, data)

    square = torch.tensor(data[:256, :1]) * torch.ones(256, 256)

    def products() -> None:
        for _ in range(PRODUCTS * args.updates):
            torch.mm(square, square)

    def with_threads(count: int, work: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            torch.set_num_threads(count)
            work()

        return call

    threads = sorted({1, os.cpu_count() or 1})
    calls: dict[str, Callable[[], Any]] = {"bilevax": lambda: jax.block_until_ready(run(args.updates))}
    for name, work in (
        ("stable-baselines3", lambda: model.train(args.updates, 256)),
        ("its products alone", products),
    ):
        calls |= {f"{name}, {n} threads": with_threads(n, work) for n in threads}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(args.repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) / args.updates * 1e3)
    table = Table(title="One SAC update, 2 x 256 units, batch 256 (ms)")
    for heading in ("", "median", "quartiles", "fastest", "median / ours", "fastest / ours"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    first = times["bilevax"]
    for name, ms in times.items():
        low, middle, high = np.percentile(ms, [25, 50, 75])
        ratios = middle / np.median(first), min(ms) / min(first)
        cells = f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{min(ms):.2f}", *(f"{ratio:.1f}" for ratio in ratios)
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
