"""Commands of `bilevax` that need no study: registered in `cli`. Nothing heavy is imported before they run."""

import itertools
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cli.options import Json, Precision, usage_errors
from benchmarks.show.terminal import console, progress
from benchmarks.study.compilation import use_quick_compilation

EXPERT_EXAMPLES = (
    "bilevax expert Pendulum-v1",
    "bilevax expert Hopper-v5 --steps 500000 --trajectories 5 --out experts/hopper.npz",
)

DOCTOR_EXAMPLES = (
    "bilevax doctor",
    "bilevax doctor --json",
    "Exit code 1 where something is wrong with this machine.",
)

MOST_CHECKS = 21  # lines of `check-solver`, of a solver that takes all instances

PEERS_EXAMPLES = (
    "bilevax peers",
    "bilevax peers --repeats 101 --python torch-environment/bin/python --json",
    "Those that are not installed are skipped: pip install 'bilevax[peers]'.",
)

RECOMMEND_EXAMPLES = (
    "bilevax recommend -p ridge",
    "bilevax recommend -p 'nonconvex[case=mb_3_19]' -p quadratic",
    "bilevax recommend -p 'hyper_cleaning[batch_size=100]' --json | python -m json.tool",
    "In Python: print(bilevel.recommend(problem)); bilevel.solve(problem, key=key) takes the first.",
)


def recommend(
    problem: Annotated[
        list[str], typer.Option("--problem", "-p", metavar="NAME[K=V,…]", help="A problem; may be repeated.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the instance and of its start.")] = 0,
    precision: Precision = 64,
    as_json: Json = False,
) -> None:
    """Say which solvers suit a problem, the best first, with reasons, from what can be seen of it without solving it.

    Exit code: 0 each problem has a solver, 1 one has none, 2 bad usage.
    """
    if precision not in (32, 64):
        raise typer.BadParameter(f"got {precision}; expected 64 or 32.", param_hint="--precision")
    use_quick_compilation()
    import jax

    import bilevel
    from benchmarks.study import registry

    found: dict[str, dict | None] = {}
    with usage_errors(), jax.enable_x64(precision == 64):
        for text in problem:
            name = registry.label(text)
            try:
                answer = bilevel.recommend(registry.build_instance(text, seed).problem, jax.random.key(seed))
            except bilevel.InvalidInput as error:
                raise registry.UsageError(f"{name}: {error}") from error
            except bilevel.Unsupported as error:
                found[name] = None
                typer.echo(f"bilevax: {name}: {error}", err=True)
                continue
            found[name] = answer.as_dict()
            if not as_json:
                typer.echo("\n".join([*([""] * (len(found) > 1)), name, str(answer)]))
    if as_json:
        typer.echo(json.dumps(found))
    raise typer.Exit(1 if None in found.values() else 0)


CHECK_SOLVER_EXAMPLES = (
    "bilevax check-solver mine.py",
    "bilevax check-solver mine.py --json",
    "The file is a program and is run. docs/add-a-solver.md has one to begin with.",
)


def expert(
    environment: Annotated[str, typer.Argument(metavar="ENV", help="Of gymnax or Gymnasium's MuJoCo.")],
    steps: Annotated[int | None, typer.Option(min=1000, help="In the environment, and as many updates.")] = None,
    trajectories: Annotated[int, typer.Option(min=1, help="Episodes to save.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of training and episodes.")] = 0,
    sampled: Annotated[bool, typer.Option(help="Sample the actions instead of taking the best.")] = False,
    out: Annotated[Path | None, typer.Option(help="The file. Default: experts/ENV.npz.")] = None,
    as_json: Json = False,
) -> None:
    """Train an expert by soft actor-critic and save demonstrations of it with their returns."""
    use_quick_compilation()
    with usage_errors():
        from benchmarks.experiments import expert as maker

        total = (maker.steps_of(environment) if steps is None else steps) // 1000
        with progress(total) as on_chunk:
            made = maker.make(environment, steps, trajectories, seed, sampled, out, on_chunk)
    if as_json:
        typer.echo(json.dumps(made))
        return
    typer.echo(
        f"{made['trajectories']} episodes of {made['environment']}, return {made['return_mean']:.1f} +- "
        f"{made['return_std']:.1f}, {made['length_mean']:.0f} steps on average: {made['file']}"
    )


def peers(
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each library, in turn.")] = 21,
    python: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="An interpreter that has torchopt, boat-torch or imitation; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare hypergradients with other libraries': the same problem, data, precision and thread; error and time."""
    from bilevel.backend.compilation import set_variable  # other interpreters get the user's own XLA_FLAGS back

    flags, one_thread = os.environ.get("XLA_FLAGS", ""), "xla_cpu_multi_thread_eigen"
    if one_thread not in flags:
        set_variable("XLA_FLAGS", f"{flags} --{one_thread}=false".strip())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of other interpreters, too: one thread for everybody
    from benchmarks.peers import table

    found = table.run(repeats, python or ())
    typer.echo(json.dumps(found) if as_json else table.as_text(found))


def check_solver(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="With one subclass of bilevel.Solver.")],
    as_json: Json = False,
) -> None:
    """Check a solver in a file of its own: the contract that every solver keeps, and short runs with known optima.

    Exit code: 0 nothing is wrong, 1 a fault, 2 no such file, or not one solver in it.
    """
    use_quick_compilation()
    import jax

    jax.config.update("jax_enable_x64", True)
    with usage_errors():
        from benchmarks.judge import solver_check

        kind = solver_check.load(file)
    with progress(MOST_CHECKS) as on_check:
        checks = []
        for number, check in enumerate(solver_check.check(kind)):
            on_check(number, check.name)
            checks.append(check)
    _show_checks(checks, as_json)


def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, devices, threads, precision, and whether what is compiled here is right."""
    use_quick_compilation()
    import jax

    jax.config.update("jax_enable_x64", True)
    from benchmarks.judge import platform

    with progress(len(platform.CHECKS)) as on_check:
        number = itertools.count()
        checks = platform.check_all(lambda name: on_check(next(number), name))
    _show_checks(checks, as_json)


def _show_checks(checks: list, as_json: bool) -> None:
    """Print what was found, and exit with 1 where a check is a fault."""
    faults = sum(check.verdict == "fault" for check in checks)
    if as_json:
        typer.echo(json.dumps({"checks": [check._asdict() for check in checks], "faults": faults}))
    else:
        _table_of_checks(checks)
    raise typer.Exit(1 if faults else 0)


def _table_of_checks(checks: list) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(check.name, check.verdict, check.found, check.advice)
    console().print(table)


BY_NAME = {
    "check-solver": (check_solver, CHECK_SOLVER_EXAMPLES),
    "doctor": (doctor, DOCTOR_EXAMPLES),
    "expert": (expert, EXPERT_EXAMPLES),
    "peers": (peers, PEERS_EXAMPLES),
    "recommend": (recommend, RECOMMEND_EXAMPLES),
}
