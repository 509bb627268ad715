"""What `bilevax expert` does: train an expert by SAC, save demonstrations of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import irl
from benchmarks.errors import UsageError
from bilevel.struct import InvalidInput
from irl.deep import expert
from irl.deep.expert import agent_of, steps_of


def make(
    name: str, steps: int | None, num: int, seed: int, sampled: bool, out: Path | None,
    on_chunk: Callable[[int, Any], Any],
) -> dict[str, Any]:  # fmt: skip
    """Train, demonstrate, save; what `bilevax expert` prints.

    Raises:
        UsageError: for an unknown environment, a missing package or a file that cannot be written.
    """
    try:
        environment = irl.make(name)
    except InvalidInput as error:
        raise UsageError(str(error)) from error
    chunk = 1000
    steps = steps_of(name) if steps is None else steps
    if steps % chunk:
        raise UsageError(f"--steps: got {steps}; expected a multiple of {chunk}.")
    out = Path("experts") / f"{name}.npz" if out is None else out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot write {out}: {error}") from error
    agent, keys = agent_of(environment, name), jax.random.split(jax.random.key(seed))
    heard: list[tuple[int, float]] = []

    def listen(done: int, value: float) -> None:
        heard.append((done, value))
        on_chunk(done // chunk, f"{name}: {done} steps, return {value:.1f}")

    trained = expert.train(environment, keys[0], agent=agent, num_steps=steps, chunk=chunk, callback=listen)
    shown = expert.demonstrate(environment, agent, trained.weights, keys[1], num=num, best=not sampled)
    shown.save(out)
    returns = np.asarray(shown.returns)
    return {
        "environment": name, "file": str(out), "steps": steps, "trajectories": num,
        "return_mean": float(returns.mean()), "return_std": float(returns.std()),
        "length_mean": float(np.mean(shown.lengths)),
        "training": [{"steps": done, "return": value} for done, value in heard],
    }  # fmt: skip
