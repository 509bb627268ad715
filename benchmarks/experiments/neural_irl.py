"""The claims about two-timescale neural IRL, measured.

    python -m benchmarks.experiments.neural_irl [--quick] [--out DIR]

On the 5 x 5 gridworld (gamma 0.9, slip 0.2, the expert soft-optimal), rewards and soft Q are `TwoLayer` networks, and
everything is measured by exact dynamic programming: L(x), the expert's population likelihood, Lhat(x), that of the
demonstrations, and the tracking error max |log pi_k - log pi_{x_k}|.

    rates        gap L* - L and tracking error against k with fitted powers; exact and sampled steps
    widths       gap and tracking error at the end for networks of growing width
    timescales   steps eta of Q and alpha of the reward in several ratios, the wrong one included
    overfitting  64 trajectories: L beside Lhat, without and with ball, weight decay and early stopping

A PNG each and figures.json are written to DIR. Runs of one size are one jitted scan, vmapped over seeds and settings.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import bilevel
import irl
from bilevel.diagnostics import fit_rate
from bilevel.report import save_figure
from irl.rewards import one_hot_pairs
from irl.tabular.diagnostics import objective, tracking_error
from problems import gridworld

ETA, ALPHA = 0.2, 0.6  # steps of Q and of the reward; about 1/lambda and 0.3/curvature of F
SAMPLED = 0.02, 0.06  # eta |grad Q|^2 = 1 at a single pair: a chain that stays where it is does not overshoot
LARGE = 1e3  # a ball that is never reached
PyTree = Any


class World(NamedTuple):
    """The process, the expert's occupancy [S, A] and policy, and L* = L of the expert."""

    mdp: irl.MDP
    occupancy: Array
    policy: Array
    best: float


class Run(NamedTuple):
    """Problems of one reward network: what is solved, the expert's population, held-out demonstrations."""

    train: irl.TabularImitation
    population: irl.TabularImitation
    held_out: irl.TabularImitation


class Trace(NamedTuple):
    """At each recorded step: of the last x L, Lhat and the likelihood of held-out demonstrations (given their states:
    less noisy than their Lhat); L of the averaged x; tracking error, |x|.
    """

    L: Array
    Lhat: Array
    held_out: Array
    L_average: Array
    tracking: Array
    length: Array


@functools.cache
def world() -> World:
    """The gridworld of seed 0."""
    instance = gridworld.make(trajectories=0)
    problem = instance.problem
    assert isinstance(problem, irl.TabularImitation)
    assert instance.truth is not None
    Q = irl.value_iteration(problem.mdp, problem.reward.table(instance.truth.x)).Q
    return World(problem.mdp, problem.occupancy(), irl.policy(Q), -instance.truth.value)


def make_run(
    at: World, seed: int, width: int, trajectories: int = 0, radius: float = LARGE, pairs: bool = False
) -> Run:
    """A reward network of the state, or of the pair; demonstrations: the population's, or sampled; all with `seed`."""
    mdp, key = at.mdp, jax.random.key(seed)
    inputs = one_hot_pairs(mdp.num_states, mdp.num_actions) if pairs else np.eye(mdp.num_states)
    reward = irl.TwoLayerReward.of(inputs, width, key, mdp.num_actions)
    c = held_out = at.occupancy
    if trajectories:
        sizes = {"num_trajectories": trajectories, "length": 50}
        c, held_out = (irl.sample(mdp, at.policy, jax.random.fold_in(key, k), **sizes).occupancy(mdp) for k in range(2))
    of = functools.partial(irl.to_bilevel, mdp, reward=reward, x_set=bilevel.Ball(radius))
    return Run(of(c, objective="surrogate"), of(at.occupancy, objective="surrogate"), of(held_out))


def stack(trees: list) -> Any:
    """Equal pytrees with their leaves stacked."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


@jax.jit
def trace(runs: Run, solvers: irl.NeuralIRL, keys: Array, ends: Array) -> Trace:
    """Every run with its solver, measured after ends[0], ends[1], … steps; entries [runs, points]."""

    def one(run: Run, solver: irl.NeuralIRL, key: Array) -> Trace:
        def piece(state: Any, span: tuple[Array, Array]) -> tuple[Any, Trace]:
            begin, end = span
            state, _ = bilevel.advance(run.train, solver, state, key, begin, end - begin)
            F, average = functools.partial(objective, run.population), solver.output(run.train, state)[0]
            likelihoods = -F(state.x), -objective(run.train, state.x), -objective(run.held_out, state.x), -F(average)
            tracking = tracking_error(run.train, state.x, state.y)
            return state, Trace(*likelihoods, tracking, jnp.linalg.norm(state.x))

        begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        return jax.lax.scan(piece, solver.init(run.train, key), (begins, ends))[1]

    return jax.vmap(one)(runs, solvers, keys)


def follow(pairs: list[tuple[Run, irl.NeuralIRL]], steps: int, points: int = 30) -> tuple[np.ndarray, Trace]:
    """(recorded steps, their traces), one for each pair."""
    ends = np.unique(np.geomspace(1, steps, points).astype(int))
    runs, solvers = zip(*pairs, strict=True)
    keys = jax.random.split(jax.random.key(1), len(pairs))
    return ends, jax.device_get(trace(stack(list(runs)), stack(list(solvers)), keys, jnp.asarray(ends)))


def solver(width: int, eta: float = ETA, alpha: float = ALPHA, decay: float = 0.5, **settings: Any) -> irl.NeuralIRL:
    """With every number an array, so that runs with other numbers stack."""
    numbers = {"upper_decay": decay, "weight_decay": settings.pop("weight_decay", 0.0), "averaging": 3.0}
    numbers["upper_delay"] = 1.0
    arrays = {name: jnp.asarray(number) for name, number in numbers.items()}
    return irl.NeuralIRL(
        lower_step_size=jnp.asarray(eta),
        upper_step_size=jnp.asarray(alpha),
        radius=jnp.asarray(50.0),
        inputs=one_hot_pairs(*world().mdp.shape),
        width=width,
        **arrays,
        **settings,
    )


def rates(at: World, sizes: argparse.Namespace, axes: Any) -> dict:
    """Gap and tracking error against k, geometric means over seeds, with powers fitted to the last tenth-fold of k."""
    found = {}
    for label, settings in (
        ("exact", solver(sizes.width)),
        ("sampled, 25 chains", solver(sizes.width, *SAMPLED, num_transitions=25)),
    ):
        ends, seen = follow([(make_run(at, s, sizes.width), settings) for s in range(sizes.seeds)], sizes.steps)
        late = ends >= sizes.steps / 10
        for ax, name, series in ((axes[0], "gap", at.best - seen.L), (axes[1], "tracking", seen.tracking)):
            mean = np.exp(np.log(np.maximum(series, 1e-12)).mean(axis=0))
            power, width = fit_rate(ends[late], mean[late])
            found[f"{label}: {name} at the end: mean, worst seed"] = [float(mean[-1]), float(series[:, -1].max())]
            found[f"{label}: {name} like k^p: p, half-width of its 95% interval"] = [power, width]
            (line,) = ax.loglog(ends, mean, label=f"{label}: k^{power:.2f}")
            ax.loglog(ends, series.T, color=line.get_color(), alpha=0.2)
    axes[0].set(xlabel="step k", ylabel="L* - L(x_k)", title=f"optimality gap, width {sizes.width}")
    axes[1].set(xlabel="step k", ylabel="max |log pi_k - log pi_{x_k}|", title="policy tracking error")
    return found


def widths(at: World, sizes: argparse.Namespace, axes: Any) -> dict:
    """Gap and tracking error at the end, median and range over seeds."""
    found, columns = {}, []
    for width in sizes.widths:
        _, seen = follow([(make_run(at, s, width), solver(width)) for s in range(sizes.seeds)], sizes.width_steps, 8)
        columns.append((at.best - seen.L[:, -1], seen.tracking[:, -1]))
        found[f"width {width}: gap, tracking (median over seeds)"] = [float(np.median(c)) for c in columns[-1]]
        found[f"width {width}: gap, tracking (worst seed)"] = [float(np.max(c)) for c in columns[-1]]
    for ax, k, label in ((axes[0], 0, "L* - L"), (axes[1], 1, "tracking error")):
        values = np.array([column[k] for column in columns])
        ax.loglog(sizes.widths, np.median(values, axis=1), "o-", label="median")
        ax.loglog(sizes.widths, values, "k.", alpha=0.4)
        ax.set(xlabel="width m", ylabel=f"{label} after {sizes.width_steps} steps", title=f"{label} by width")
    return found


RATIOS = {
    "two timescales": (ETA, ALPHA, 0.5),
    "reward 10x slower": (ETA, ALPHA / 10, 0.5),
    "no decay (one timescale)": (ETA, ALPHA, 0.0),
    "Q 10x slower": (ETA / 10, ALPHA, 0.5),
    "wrong: Q 100x slower, no decay": (ETA / 100, ALPHA, 0.0),
}


def timescales(at: World, sizes: argparse.Namespace, axes: Any) -> dict:
    """The same run with other (eta, alpha, s)."""
    pairs = [(make_run(at, 0, 64, radius=50.0), solver(64, *steps)) for steps in RATIOS.values()]
    ends, seen = follow(pairs, sizes.width_steps)
    for k, name in enumerate(RATIOS):
        axes[0].loglog(ends, np.maximum(at.best - seen.L[k], 1e-12), label=name)
        axes[1].loglog(ends, seen.tracking[k], label=name)
    axes[0].set(xlabel="step k", ylabel="L* - L(x_k)", title="optimality gap by timescales, width 64")
    axes[1].set(xlabel="step k", ylabel="tracking error", title="policy tracking error")
    last = zip(RATIOS, at.best - seen.L[:, -1], seen.tracking[:, -1], strict=True)
    return {f"{name}: gap, tracking": [float(gap), float(error)] for name, gap, error in last}


DEFENCES = {"none": (LARGE, 0.0), "ball 3": (3.0, 0.0), "ball 7": (7.0, 0.0), "weight decay 0.03": (LARGE, 0.03)}


def overfitting(at: World, sizes: argparse.Namespace, axes: Any) -> dict:
    """64 trajectories of 50 steps: mean over seeds of L and Lhat; early stopping on 64 held-out ones."""
    pairs = [
        (make_run(at, seed, 64, 64, radius, pairs=True), solver(64, weight_decay=weight_decay, decay=0.25))
        for radius, weight_decay in DEFENCES.values()
        for seed in range(sizes.seeds)
    ]
    ends, seen = follow(pairs, sizes.steps, 40)
    by_defence = Trace(*(part.reshape(len(DEFENCES), sizes.seeds, -1) for part in seen))
    found: dict = {"L of the expert, L*": at.best}
    for k, name in enumerate(DEFENCES):
        L, Lhat = by_defence.L[k].mean(axis=0), by_defence.Lhat[k].mean(axis=0)
        axes[0].semilogx(ends, L, label=name)
        axes[1].semilogx(ends, Lhat, label=name)
        best, last = float(by_defence.L[k].max(axis=1).mean()), float(L[-1])
        found[f"{name}: L* - L at the end, L* - L at its best, Lhat at the end"] = [
            at.best - last, at.best - best, float(Lhat[-1]),
        ]  # fmt: skip
    chosen = by_defence.held_out[0].argmax(axis=1)
    stopped = by_defence.L[0][np.arange(sizes.seeds), chosen]
    found["early stopping: L* - L, mean step"] = [at.best - float(stopped.mean()), float(ends[chosen].mean())]
    axes[0].semilogx(ends[chosen], stopped, "k*", label="early stopping (each seed)")
    low = at.best - 4 * (at.best - by_defence.L[1:, :, -1].mean())
    axes[0].set(xlabel="step k", ylabel="L (population)", title="L of 64 trajectories", ylim=(low, at.best + 0.1))
    axes[0].axhline(at.best, color="k", lw=0.5)
    axes[1].set(xlabel="step k", ylabel="Lhat (the 64 trajectories)", title="Lhat beside it")
    return found


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description="the claims about two-timescale neural IRL, measured")
    parser.add_argument("--quick", action="store_true", help="two seeds, fewer steps, widths up to 256: a minute")
    parser.add_argument("--out", type=Path, default=Path("results") / "neural_irl")
    parser.add_argument("--only", nargs="*", help="some of: rates widths timescales overfitting")
    options = parser.parse_args()
    quick = options.quick
    sizes = argparse.Namespace(
        seeds=2 if quick else 4, steps=1000 if quick else 10_000, width=64 if quick else 256,
        widths=[4, 16, 64, 256] if quick else [4, 16, 64, 256, 1024], width_steps=1000 if quick else 3000,
    )  # fmt: skip
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.table import Table

    jax.config.update("jax_enable_x64", True)
    options.out.mkdir(parents=True, exist_ok=True)
    at, figures = world(), {}
    parts: tuple[Callable, ...] = (rates, widths, timescales, overfitting)
    for part in parts:
        if options.only and part.__name__ not in options.only:
            continue
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
        begin = time.perf_counter()
        found = part(at, sizes, axes)
        table = Table(title=f"{part.__name__} ({time.perf_counter() - begin:.0f} s)")
        table.add_column("what")
        table.add_column("figure", justify="right")
        for name, value in found.items():
            table.add_row(name, "  ".join(f"{number:.4g}" for number in np.atleast_1d(value)))
        Console(width=110).print(table)
        for ax in axes:
            ax.legend(fontsize="small")
            ax.grid(alpha=0.3)
        save_figure(figure, options.out / f"{part.__name__}.png")
        figures[part.__name__] = found
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", "utf8")
    Console().print(f"Plots and figures.json: {options.out}")


if __name__ == "__main__":
    main()
