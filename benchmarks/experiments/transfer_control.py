"""Reward transfer with networks.

    python -m benchmarks.experiments.transfer_control --demonstrations experts [--mass 1.5]

A reward is recovered from one episode of Pendulum-v1's expert (mass 1), frozen, and optimised by a fresh agent with SAC
where the pendulum has another mass. Rows:

    true reward      the same fresh agent on the true reward: what could be reached
    … policy         the method's own policy, played in the new world without learning anything there
    … reward         the fresh agent on the frozen reward: r(s; x) or r(s, a; x); for IQLearn Q(s, a) - gamma V(s'),
                     with Q and V of the old world. x is the mean over the second half of the method's steps: the last
                     one was learnt against one policy, and a fresh agent finds what that one never tried

scaled: 0 is uniformly random actions in the new world, 1 the agent on the true reward, mean over seeds. 100 episodes of
the last policy's mode; means over seeds, the lowest and the highest in brackets. A cell keeps one JSON file in --out;
one of other settings runs again.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import bilevel
import irl
from benchmarks.experiments.control import ADVERSARIAL, described, load, random_episodes
from benchmarks.study.compilation import use_quick_compilation
from benchmarks.study.files import BROKEN, read_json, write_json
from bilevel.struct import struct
from irl.deep import expert
from irl.deep.imitation import Imitation
from problems.control import learner_of

NAME = "Pendulum-v1"
METHODS: dict[str, tuple[Any, bool]] = {  # the solver, and whether its reward is of the state alone
    "MLIRL(s)": (irl.DeepMLIRL(), True),
    "MLIRL(s,a)": (irl.DeepMLIRL(), False),
    "AIRL(s)": (irl.AIRL(**ADVERSARIAL), True),
    "AIRL(s,a)": (irl.AIRL(**ADVERSARIAL), False),
    "IQLearn": (irl.IQLearn(), False),
}


@struct
class Frozen(Imitation):
    """The loop of `Imitation` on a reward that stays: of `solver` at its state `source`; without them the true one."""

    solver: Any = None
    source: Any = None

    def reward(self, problem: irl.ControlImitation, state: Any, steps: Any) -> jax.Array:
        if self.solver is None:
            return steps.reward
        if isinstance(self.solver, irl.AIRL):  # without its shaping term, as its authors transfer it
            return problem.rewards(self.source.x, steps)
        return self.solver.reward(problem, self.source, steps)


def in_world(problem: irl.ControlImitation, world: Any) -> irl.ControlImitation:
    """The same task, rewards and standardised observations included, in another environment."""
    return dataclasses.replace(problem, environment=world)


def failed(solution: bilevel.Solution) -> bool:
    """Whether a run ended without an answer.

    Raises:
        KeyboardInterrupt: where it was interrupted.
    """
    if solution.status == bilevel.Status.INTERRUPTED:
        raise KeyboardInterrupt
    return solution.status in BROKEN


def run(name: str, seed: int, demonstrations: Any, mass: float, steps: int) -> dict[str, float]:
    """Mean returns in the new world: {"policy", "reward"} of a method, or {"true"} for the true reward.

    NaN for what failed, and for what was learnt from it.

    Raises:
        KeyboardInterrupt: where a run was interrupted.
    """
    agent, here, there = learner_of(NAME), irl.make(NAME), irl.make(NAME, m=mass)
    solver, state_only = METHODS.get(name, (None, False))
    problem = irl.to_control(here, demonstrations, irl.DeepReward(state_only=state_only), agent=agent)

    def played(y: Any) -> float:
        seen = expert.play(there, agent, y, jax.random.key(1000 + seed), num=100)
        return float(jnp.mean(seen.returns))

    key, found, source = jax.random.key(seed), {}, None
    if solver is not None:
        path: list[Any] = []
        keep = lambda step, state, row: path.append(state.x)  # noqa: E731
        recovered = bilevel.solve(problem, solver, key=key, max_steps=steps, every=1, callback=keep)
        if failed(recovered):
            return {"policy": float("nan"), "reward": float("nan")}
        half = path[len(path) // 2 :]
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *half)
        found["policy"], source = played(recovered.y), recovered.state._replace(x=mean)
    frozen = Frozen(num_rollouts=1, solver=solver, source=source)
    again = bilevel.solve(in_world(problem, there), frozen, key=jax.random.fold_in(key, 1), max_steps=steps)
    return found | {"true" if solver is None else "reward": float("nan") if failed(again) else played(again.y)}


def table(found: dict[tuple[str, int], dict[str, Any]], mass: float, floor: float, seeds: int) -> Table:
    """Returns and scaled returns of all rows."""
    shown = Table(title=f"{NAME}, recovered at mass 1, optimised at mass {mass}; random actions {floor:.0f}")
    for heading in ("row", "return", "scaled", "seeds"):
        shown.add_column(heading, justify="left" if heading == "row" else "right")
    goals = [row["true"] for (name, _), row in found.items() if name == "true"]
    goal = float(np.mean(np.array(goals, float))) if goals else float("nan")
    for name in ("true", *METHODS):
        for kind in ("true",) if name == "true" else ("policy", "reward"):
            values = [row[kind] for (other, _), row in found.items() if other == name]
            label = "true reward" if name == "true" else f"{name} {kind}"
            if not values:
                shown.add_row(label, "unfinished", "", f"0 of {seeds}")
                continue
            lost = sum(v is None or np.isnan(v) for v in values)  # a file has null for NaN
            if lost:
                shown.add_row(label, f"{lost} of {len(values)} failed", "", f"{len(values)} of {seeds}")
                continue
            scaled = [(v - floor) / (goal - floor) for v in values]
            cells = f"{np.mean(values):.0f}", f"{np.mean(scaled):.2f} ({min(scaled):.2f}, {max(scaled):.2f})"
            shown.add_row(label, *cells, f"{len(values)} of {seeds}")
    return shown


def main() -> None:
    """Run what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", type=Path, required=True, help="The folder of .npz files.")
    parser.add_argument("--mass", type=float, default=1.5, help="Of the new world.")
    parser.add_argument("--steps", type=int, default=40, help="Of the loop, in each world: 1000 environment steps.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["true", *METHODS], choices=["true", *METHODS])
    parser.add_argument("--out", type=Path, default=Path("results/transfer-control"))
    args = parser.parse_args()
    use_quick_compilation()
    args.out.mkdir(parents=True, exist_ok=True)
    demonstrations = load(args.demonstrations, NAME)
    if demonstrations is None:
        parser.error(f"no file for {NAME} in {args.demonstrations}; make one: bilevax expert {NAME}")
    first = jax.tree.map(lambda leaf: leaf[:1], demonstrations)
    found = {}
    for seed in range(args.seeds):
        for name in args.methods:
            path = args.out / f"{name}-{args.mass}-{args.steps}-{seed}.json"
            solver = METHODS.get(name, (None, False))[0]
            settings = described(*([] if solver is None else [solver]), learner_of(NAME))
            result = read_json(path)
            if result is None or result.get("settings") != settings:
                result = run(name, seed, first, args.mass, args.steps) | {"settings": settings}
                write_json(path, result)
            found[name, seed] = result
    floor = float(jnp.mean(random_episodes(irl.make(NAME, m=args.mass), jax.random.key(0)).returns))
    Console(width=100).print(table(found, args.mass, floor, args.seeds))


if __name__ == "__main__":
    main()
