"""Deep inverse RL against its rivals: `python -m benchmarks.experiments.control --demonstrations experts`.

Every environment x number of demonstrated episodes x method x seed is a cell: networks and budgets are the same for all
methods. A cell writes one JSON file into --out when it is done; the same command runs only what is missing, from where
it was interrupted, and --table prints what there is, unfinished cells named; returns.png has the returns on the way.
The folder of demonstrations holds one .npz file for each environment, named after it as `bilevax expert` does.

return: mean of 100 episodes (MuJoCo: 10) of the last policy's mode, never the best on the way. ratio: to the expert's
mean return in the file, where that is positive. scaled: 0 is uniformly random actions, 1 the expert. rank: Spearman's
correlation of the learned with the true reward over transitions of random episodes and of the last policy's.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from rich.console import Console
from rich.table import Table

import bilevel
import irl
from benchmarks.study.compilation import use_quick_compilation
from benchmarks.study.files import FAILED, read_json, write_json
from bilevel.report import save_figure
from irl.deep import expert, rollouts
from irl.deep.environments import GYMNAX, Environment
from irl.deep.imitation import Imitation
from irl.deep.rollouts import Steps
from problems.control import learner_of

ADVERSARIAL = {"num_upper_steps": 10, "learning_rate": 3e-4, "gradient_penalty": 10.0}
METHODS: dict[str, tuple[Any, dict[str, Any], bool]] = {  # solver, its settings, whether its reward is r(s)
    "MLIRL(s,a)": (irl.DeepMLIRL, {}, False),
    "MLIRL(s)": (irl.DeepMLIRL, {}, True),
    "BC": (irl.BC, {}, False),
    "GAIL": (irl.GAIL, ADVERSARIAL, False),
    "AIRL": (irl.AIRL, ADVERSARIAL, False),
    "IQLearn": (irl.IQLearn, {}, False),
    "IQLearn(memory)": (irl.IQLearn, {"use_memory": True}, False),
} | {
    f"f-IRL({name},{sees})": (irl.FIRL, {"divergence": name.lower()}, sees == "s")
    for name in ("FKL", "RKL", "JS")
    for sees in ("s", "s,a")
}

# MuJoCo's long runs: a reward that moves about as slowly per environment step as its authors' (1e-4 each 5000), in
# smaller steps; one episode each, since it takes as long as a third of the updates
LONG: dict[str, Any] = {"num_rollouts": 1, "capacity": 500_000}
TUNED = (irl.GAIL,)  # beside the temperature 0.2 of the others, its rewards of bounded slope count for little
RATES = {"HalfCheetah-v5": 1e-4}  # of moving rewards; else 5e-5. Nothing falls there, and twice as fast does as well


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run."""

    environment: str
    trajectories: int
    method: str
    seed: int
    steps: int

    @property
    def file(self) -> str:
        """The name of its file in the folder of results."""
        name = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in self.method)
        return f"{self.environment}-{self.trajectories}-{name}-{self.seed}-{self.steps}.json"


def solver_of(method: str, name: str) -> Imitation:
    """A method with its settings in an environment."""
    kind, settings, _ = METHODS[method]
    if name in GYMNAX:
        return kind(**settings)
    slow = {"learning_rate": RATES.get(name, 5e-5)} if kind in (irl.DeepMLIRL, irl.FIRL) else {}
    pair = {"num_rollouts": 2} if kind is irl.FIRL else {}  # a covariance needs two
    chosen: dict[str, Any] = settings | LONG | slow | pair
    return kind(**chosen)


def agent_of(method: str, name: str) -> irl.SAC:
    """The agent that a method trains in an environment: the same for all, but for the temperature of `TUNED`."""
    tuned = name not in GYMNAX and METHODS[method][0] in TUNED
    return dataclasses.replace(learner_of(name), tuned=tuned)


def described(*parts: Any) -> str:
    """The settings of solvers and agents, kept in a result: one of other settings is not this cell's."""
    numbers = (  # a step rule is functions; its learning_rate is beside it
        f"{field.name}={getattr(part, field.name)}"
        for part in parts
        for field in dataclasses.fields(part)
        if field.name != "upper_step_size"
    )
    return " ".join(numbers)


def settings_of(cell: Cell) -> str:
    """The settings of a cell's solver and agent, as text."""
    return described(solver_of(cell.method, cell.environment), agent_of(cell.method, cell.environment))


def finished(cell: Cell, out: Path) -> dict[str, Any] | None:
    """The cell's result, if there is one of its settings."""
    result = read_json(out / cell.file)
    return result if result is not None and result.get("settings") == settings_of(cell) else None


def load(folder: Path, name: str) -> irl.Demonstrations | None:
    """The demonstrations of an environment in a folder: a file that starts with its name, whatever its version."""
    stem = name.lower().split("-v")[0]
    found = sorted(path for path in folder.glob("*.npz") if path.stem.lower().replace("_", "-").split("-v")[0] == stem)
    return irl.Demonstrations.load(found[0]) if found else None


@jax.jit
def random_episodes(environment: Environment, key: jax.Array) -> Steps:
    """A hundred episodes of random actions."""
    return rollouts.episodes(environment, rollouts.uniform(environment), key, 100)


def rank(problem: irl.ControlImitation, solver: Imitation, state: Any, sides: list[Steps]) -> float | None:
    """Spearman's correlation of the method's reward with the true one, the sides counting the same; None for BC, and
    where the true reward is constant.
    """
    if isinstance(solver, irl.BC):
        return None
    learned, true = [], []
    for steps in sides:
        flat = steps.flat
        at = np.flatnonzero(np.asarray(flat.inside))
        at = np.random.default_rng(0).choice(at, 1000)
        few: Any = jax.tree.map(lambda leaf, at=at: leaf[at], flat)
        learned.append(np.asarray(solver.reward(problem, state, few)))
        true.append(np.asarray(few.reward))
    if np.ptp(np.concatenate(true)) == 0:
        return None
    found: Any = scipy.stats.spearmanr(np.concatenate(learned), np.concatenate(true))
    return float(found.statistic)


def run(cell: Cell, demonstrations: irl.Demonstrations, checkpoint: Path) -> dict[str, Any]:
    """The result of a cell; one that was interrupted goes on from its checkpoint.

    Raises:
        KeyboardInterrupt: where the run was interrupted, after saving.
    """
    environment, agent = irl.make(cell.environment), agent_of(cell.method, cell.environment)
    first = jax.tree.map(lambda leaf: leaf[: cell.trajectories], demonstrations)
    reward = irl.DeepReward(state_only=METHODS[cell.method][2])
    problem = irl.to_control(environment, first, reward, agent=agent)
    solver = solver_of(cell.method, cell.environment)

    key = jax.random.key(cell.seed)
    begin = time.perf_counter()
    every = max(1, cell.steps // 100)  # the memory is in the checkpoint, tens of megabytes
    solution = bilevel.solve(problem, solver, key=key, max_steps=cell.steps, every=every, checkpoint=checkpoint)
    if solution.status == bilevel.Status.INTERRUPTED:
        raise KeyboardInterrupt
    key_random, key_final = jax.random.split(jax.random.key(1000 + cell.seed))
    shuffled = random_episodes(environment, key_random)
    final = expert.play(environment, agent, solution.y, key_final, num=100 if cell.environment in GYMNAX else 10)
    goal, floor = float(np.mean(demonstrations.returns)), float(jnp.mean(shuffled.returns))
    reached = float(jnp.mean(final.returns))
    rows: list[Any] = list(solution.record.rows)
    return {
        **dataclasses.asdict(cell), "settings": settings_of(cell),
        "return": reached, "return_std": float(jnp.std(final.returns)), "expert": goal,
        "random": floor, "ratio": reached / goal if goal > 0 else None, "scaled": (reached - floor) / (goal - floor),
        "rank": rank(problem, solver, solution.state, [shuffled, final]),
        "env_steps": int(solution.state.env_steps), "solve_minutes": solution.stats["solve_time"] / 60,
        "setup_minutes": solution.stats["setup_time"] / 60, "minutes": (time.perf_counter() - begin) / 60,
        "status": solution.status.name, "device": jax.devices()[0].platform, "load": os.getloadavg()[0],
        "record": [{name: float(value) for name, value in row.items()} for row in rows],
    }  # fmt: skip


Groups = dict[tuple[str, int, str], list[dict[str, Any] | None]]


def groups(cells: list[Cell], out: Path) -> Groups:
    """The results of each environment, number of episodes and method, in the seeds' order; None where unfinished."""
    found: Groups = {}
    for cell in cells:
        found.setdefault((cell.environment, cell.trajectories, cell.method), []).append(finished(cell, out))
    return found


def table(found: Groups) -> Table:
    """Means over the seeds that are done, where none of them failed."""
    shown = Table(title="Return of the last policy; means over seeds (lowest, highest)")
    for name in ("environment", "episodes", "method", "return", "ratio", "scaled", "rank", "steps", "minutes", "seeds"):
        shown.add_column(name, justify="left" if name in ("environment", "method") else "right")
    for (name, trajectories, method), group in found.items():
        done = [result for result in group if result is not None]
        seeds = f"{len(done)} of {len(group)}"
        if not done:
            shown.add_row(name, str(trajectories), method, *["unfinished"] + [""] * 5, seeds)
            continue
        failed = sum(one["status"] in FAILED for one in done)
        if failed:  # no mean over those that were luckier
            shown.add_row(name, str(trajectories), method, f"{failed} of {len(done)} failed", *[""] * 5, seeds)
            continue
        values = {key: [one[key] for one in done if one[key] is not None] for key in ("ratio", "scaled", "rank")}
        spread = {
            key: f"{np.mean(v):.2f} ({min(v):.2f}, {max(v):.2f})" if len(v) > 1 else f"{v[0]:.2f}" if v else "-"
            for key, v in values.items()
        }
        mean = {key: np.mean([one[key] for one in done]) for key in ("return", "expert", "env_steps", "solve_minutes")}
        shown.add_row(
            name, str(trajectories), method, f"{mean['return']:.0f} of {mean['expert']:.0f}", spread["ratio"],
            spread["scaled"], spread["rank"], f"{mean['env_steps']:.0f}", f"{mean['solve_minutes']:.1f}", seeds,
        )  # fmt: skip
    return shown


def draw(path: Path, found: Groups) -> None:
    """Write a PNG: a panel for each environment and number of episodes, a line for each finished cell's returns; none
    where no cell is finished.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors: Any = colormaps["tab20"]
    panels: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for (name, trajectories, method), group in found.items():
        done = [result for result in group if result is not None]
        if done:
            panels.setdefault((name, trajectories), {})[method] = done
    if not panels:
        return
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, ((name, trajectories), methods) in zip(axes, panels.items(), strict=True):
        for k, (method, results) in enumerate(methods.items()):
            for seed, result in enumerate(results):
                rows = [row for row in result["record"] if "returns" in row]  # the start has none
                width = max(1, len(rows) // 20)
                mean = np.convolve([row["returns"] for row in rows], np.ones(width) / width, "valid")
                steps = np.array([row["env_steps"] for row in rows][width - 1 :]) / 1000
                ax.plot(steps, mean, color=colors(k), label=method if seed == 0 else None, lw=1)
        one = next(iter(methods.values()))[0]
        ax.axhline(one["expert"], color="black", ls="--", lw=1, label="expert")
        ax.axhline(one["random"], color="black", ls=":", lw=1, label="random actions")
        ax.set(
            title=f"{name}, episodes: {trajectories}",
            xlabel="environment steps, thousands",
            ylabel="return, mean of 5 % of run",
        )
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    """Run what is missing, print the table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", type=Path, required=True, help="The folder of .npz files.")
    parser.add_argument("--environments", nargs="+", default=["CartPole-v1", "Pendulum-v1"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--trajectories", nargs="+", type=int, default=[1], help="Demonstrated episodes.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="Steps of the loop, 1000 updates of the agent each.")
    parser.add_argument("--out", type=Path, default=Path("results/control"))
    parser.add_argument("--table", action="store_true", help="Run nothing.")
    args = parser.parse_args()
    use_quick_compilation()
    args.out.mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(name, trajectories, method, seed, args.steps)
        for seed in range(args.seeds)
        for name in args.environments
        for trajectories in args.trajectories
        for method in args.methods
    ]
    for name in args.environments if not args.table else []:
        if load(args.demonstrations, name) is None:
            parser.error(f"no file for {name} in {args.demonstrations}; make one: bilevax expert {name}")
    for cell in cells if not args.table else []:
        path = args.out / cell.file
        if finished(cell, args.out) is None:
            demonstrations = load(args.demonstrations, cell.environment)
            assert demonstrations is not None
            checkpoint = path.with_suffix(".ckpt")
            try:
                result = run(cell, demonstrations, checkpoint)
            except KeyboardInterrupt:
                Console(stderr=True).print("Interrupted; the same command goes on from here.")
                raise SystemExit(130) from None
            write_json(path, result)
            checkpoint.unlink()
    found = groups(cells, args.out)
    Console(width=140).print(table(found))
    draw(args.out / "returns.png", found)


if __name__ == "__main__":
    main()
