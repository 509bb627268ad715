"""Soft value iteration against plain NumPy and SciPy: `python -m benchmarks.peers.soft_values [--states 10000]`.

One sweep Q <- r + gamma P V, V = log sum_a exp Q, on successor lists: random ones (every pair has its own successors),
and a grid (all actions lead to the same five cells). Rivals: a SciPy CSR matrix [S A, S] times V with
`scipy.special.logsumexp`; the same with the log-sum-exp written out in NumPy, in the layouts [S, A] and [A, S].
Float64, one process; the sweeps of one call share its fixed cost. Medians of interleaved repetitions after compiling,
quartiles, and the fastest, which a busy machine distorts least. Results are held against each other first.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from rich.console import Console
from rich.table import Table
from scipy.special import logsumexp

import irl
from benchmarks.peers.timing import interleaved
from problems.gridworld import grid


def random_process(num_states: int, num_actions: int = 5, successors: int = 5) -> irl.MDP:
    """Every pair has successors of its own, anywhere."""
    rng = np.random.default_rng(0)
    shape = num_states, num_actions, successors
    start = np.full(num_states, 1 / num_states)
    return irl.MDP.sparse(
        rng.integers(num_states, size=shape), rng.dirichlet(np.ones(successors), shape[:2]), start, 0.95
    )


def rivals(mdp: irl.MDP, r: np.ndarray, sweeps: int) -> dict[str, Callable]:
    """Functions without arguments that return Q [S, A] after `sweeps` sweeps from 0."""
    S, A = r.shape
    gamma, lists = float(mdp.discount), mdp.transitions
    following, p = np.asarray(lists.next_states, np.int32), np.asarray(lists.probabilities)

    def matrix(following: np.ndarray, p: np.ndarray) -> scipy.sparse.csr_matrix:
        rows = np.arange(0, p.size + 1, p.shape[-1])
        return scipy.sparse.csr_matrix((p.ravel(), following.ravel(), rows), shape=(S * A, S))

    P, PT, rT = matrix(following, p), matrix(following.swapaxes(0, 1), p.swapaxes(0, 1)), np.ascontiguousarray(r.T)

    def scipy_logsumexp() -> np.ndarray:
        Q = np.zeros((S, A))
        for _ in range(sweeps):
            Q = r + gamma * (P @ logsumexp(Q, axis=1)).reshape(S, A)
        return Q

    def numpy_written_out() -> np.ndarray:
        Q = np.zeros((S, A))
        for _ in range(sweeps):
            top = Q.max(axis=1)
            V = top + np.log(np.exp(Q - top[:, None]).sum(axis=1))
            Q = r + gamma * (P @ V).reshape(S, A)
        return Q

    def numpy_by_action() -> np.ndarray:
        Q = np.zeros((A, S))
        for _ in range(sweeps):
            top = Q.max(axis=0)
            V = top + np.log(np.exp(Q - top).sum(axis=0))
            Q = rT + gamma * (PT @ V).reshape(A, S)
        return Q.T

    return {
        "SciPy logsumexp": scipy_logsumexp,
        "NumPy, [S, A]": numpy_written_out,
        "NumPy, [A, S]": numpy_by_action,
    }


def measure(mdp: irl.MDP, sweeps: int, repeats: int) -> dict[str, np.ndarray]:
    """Microseconds a sweep, one for each repetition."""
    r = np.random.default_rng(1).normal(size=(mdp.num_states, mdp.num_actions))
    ours = functools.partial(irl.value_iteration, mdp, jnp.asarray(r), tol=0.0, max_sweeps=sweeps)
    calls: dict[str, Callable] = {"irl.value_iteration": lambda: jax.block_until_ready(ours().Q)}
    calls |= rivals(mdp, r, sweeps)
    first = [np.asarray(call()) for call in calls.values()]
    for other in first[1:]:
        np.testing.assert_allclose(first[0], other, rtol=1e-11, atol=1e-11)
    found = interleaved(calls, [()] * repeats)
    return {name: 1e6 * np.array(each.seconds) / sweeps for name, each in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="soft value iteration against NumPy and SciPy")
    parser.add_argument("--states", type=int, default=10_000, help="a square number for the grid")
    parser.add_argument("--sweeps", type=int, default=1000, help="of a call; to convergence it takes some 700")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    cases = {
        "random successors": random_process(options.states),
        "grid": grid(round(options.states**0.5), 0.2, 0.95),
    }
    for label, mdp in cases.items():
        times = measure(mdp, options.sweeps, options.repeats)
        own = {take: float(take(times["irl.value_iteration"])) for take in (np.median, np.min)}
        table = Table(title=f"{label}: {mdp.num_states} states, 5 actions, 5 successors; microseconds a sweep")
        for column in ("", "median", "quartiles", "ratio to ours", "fastest", "ratio to our fastest"):
            table.add_column(column, justify="right" if column else "left")
        for name, each in times.items():
            low, middle, high = np.quantile(each, [0.25, 0.5, 0.75])
            ratios = [f"{take(each) / number:.2f}" for take, number in own.items()]
            quartiles = f"{low:.0f} to {high:.0f}"
            table.add_row(name, f"{middle:.0f}", quartiles, ratios[0], f"{each.min():.0f}", ratios[1])
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
