"""The command `bilevax`. Everything heavy is imported inside the commands, so that help is quick."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cli import catalogue, commands, entries, findings, options
from benchmarks.cli.options import Json, examples, usage_errors
from benchmarks.show.terminal import progress
from benchmarks.study.compilation import use_quick_compilation

BENCHOPT = "benchopt"  # of the formats of `compare` the one that has every measurement

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bilevax {version('bilevax')}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "bilevax run",
        "bilevax list",
        "bilevax run -p quadratic -s SOBA -s AID --seeds 3",
    )
)
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Bilevel optimisation: run solvers on problems, judge the results by a referee, print tables and draw plots."""


@app.command(
    epilog=examples(
        "bilevax run",
        "bilevax run --suite quickstart --out results/mine",
        "bilevax run -p quadratic -s SOBA -s AID --seeds 3 --max-steps 2000",
        "bilevax run -p 'quadratic[dim_x=5]' -s 'SOBA[upper_step_size=adam(0.05)]' --json",
        "bilevax run -p 'logistic[batch_size=64]' -s benchopt:config/ijcnn1_best_params.yml",
        "The first runs the quickstart suite. An interrupted run goes on with the same command and --out.",
    )
)
def run(
    problem: options.Problems = None,
    solver: options.Solvers = None,
    suite: options.Suite = None,
    seeds: options.Seeds = None,
    max_steps: options.MaxSteps = None,
    every: options.Every = None,
    tol: options.Tol = None,
    time_limit: options.TimeLimit = None,
    max_passes: options.MaxPasses = None,
    out: options.Out = None,
    precision: options.Precision = 64,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes of this machine that compute each solve together.")
    ] = 1,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also print compile time and memory of a step, and write profile.json.")
    ] = False,
    curves: Annotated[
        bool, typer.Option("--progress", help="Draw the curves of the running cell live, on a terminal.")
    ] = False,
    plot: options.Plot = True,
    as_json: Json = False,
) -> None:
    """Run solvers on problems: every problem x solver x seed; print the table, keep everything in a folder.

    Exit code: 0 all ran (what a solver does not support is skipped with the reason), 1 a run failed, 2 bad usage, or a
    folder that cannot be read or written, 130 interrupted.
    """
    limits = {"max_steps": max_steps, "every": every, "tol": tol, "time_limit": time_limit}
    limits["max_passes"] = max_passes
    from benchmarks.study import processes as together

    if processes > 1 and together.COUNT not in os.environ:
        raise typer.Exit(together.launch(processes, sys.argv[1:]))
    together.join()
    with _study(problem, solver, suite, seeds, limits, precision) as (name, cells):
        from functools import partial

        from benchmarks.study.runner import execute

        _carry_out(name, cells, precision, out, plot, as_json, partial(execute, live=curves), profile, curves)


@app.command(
    epilog=examples(
        "bilevax sweep --suite quickstart --out results/mine",
        "bilevax sweep -p quadratic -s SOBA -s AID --seeds 20 --workers 4",
        "bilevax sweep --suite mine.toml --out /shared/mine --backend dask --scheduler tcp://head:8786",
        "The same command and --out again runs what is not finished, and nothing else.",
    )
)
def sweep(
    problem: options.Problems = None,
    solver: options.Solvers = None,
    suite: options.Suite = None,
    seeds: options.Seeds = None,
    max_steps: options.MaxSteps = None,
    every: options.Every = None,
    tol: options.Tol = None,
    time_limit: options.TimeLimit = None,
    max_passes: options.MaxPasses = None,
    out: options.Out = None,
    precision: options.Precision = 64,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core.")] = None,
    backend: Annotated[str, typer.Option(help="loky: processes of this machine; dask or ray: a cluster.")] = "loky",
    scheduler: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Of the cluster.")] = None,
    plot: options.Plot = True,
    as_json: Json = False,
) -> None:
    """Run a study as `bilevax run` does, many cells at a time; the results are the same.

    Exit code: as of run.
    """
    limits = {"max_steps": max_steps, "every": every, "tol": tol, "time_limit": time_limit}
    limits["max_passes"] = max_passes
    with _study(problem, solver, suite, seeds, limits, precision) as (name, cells):
        from functools import partial

        from benchmarks.study import sweep as sweeper

        how = partial(sweeper.sweep, precision=precision, workers=workers, backend=backend, scheduler=scheduler)
        _carry_out(name, cells, precision, out, plot, as_json, how)


def _carry_out(
    name: str, cells: Any, precision: int, out: Path | None, plot: bool, as_json: bool, how: Callable[..., bool],
    profile: bool = False, curves: bool = False,
) -> None:  # fmt: skip
    """Run the cells into a folder by `how`, the search of their settings first; print what came out and exit."""
    from benchmarks.show import report
    from benchmarks.study import files, processes, suites, tuning

    trials = tuning.trials(cells)
    if not processes.leads():
        nobody = lambda k, cell: None  # noqa: E731
        done = not trials or how(Path(), trials, nobody)
        raise typer.Exit(0 if done and how(Path(), cells, nobody) else 130)
    settings: dict[str, Any] = files.settings_of(name, cells, precision)
    if (suite := suites.title(name, cells)) is not None:
        settings["suite"] = suite
    for fault in settings["platform"]["faults"]:
        typer.echo(f"bilevax: this machine: {fault} `bilevax doctor` tells more.", err=True)
    with files.open_folder(out, settings) as folder:
        with progress(len(trials) + len(cells), lines=curves) as on_cell:
            complete = not trials or how(folder / tuning.FOLDER, trials, on_cell)
            if complete and trials:
                tuning.choose(folder, cells)
            complete = complete and how(folder, cells, lambda k, cell: on_cell(len(trials) + k, cell))
        loaded = report.load(folder)
        summary = report.write(folder, loaded, plot)
        if profile:
            from benchmarks.experiments import profile as profiler

            typer.echo(profiler.write(folder, cells), err=as_json)
    findings.results(folder, loaded, summary, as_json)
    raise typer.Exit(report.exit_code(summary) if complete else 130)


@contextmanager
def _study(
    problem: list[str] | None, solver: list[str] | None, suite: str | None, seeds: int | None, limits: dict[str, Any],
    precision: int,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """(name, cells) that the options ask for, checked; inside, floats have `precision` bits."""
    if precision not in (32, 64):
        raise typer.BadParameter(f"got {precision}; expected 64 or 32.", param_hint="--precision")
    if suite is not None and (problem or solver):
        raise typer.BadParameter("it says which problems and solvers run: leave out -p and -s.", param_hint="--suite")
    use_quick_compilation()
    import jax

    from benchmarks.study import benchopt_settings, registry, suites

    with usage_errors(), jax.enable_x64(precision == 64):
        if problem or solver:
            given = {key: value for key, value in limits.items() if value is not None}
            solver, notes = benchopt_settings.expanded(solver or [])
            for note in notes:
                typer.echo(f"bilevax: {note}", err=True)
            name, cells = "custom", registry.grid(problem or [], solver, seeds or 1, **given)
        else:
            name, cells = suites.read_suite(suite or "quickstart", seeds, **limits)
        for text in dict.fromkeys(cell.problem for cell in cells):
            registry.check_problem(text)
        for text in dict.fromkeys(cell.solver for cell in cells):
            registry.build_solver(text)
        yield name, cells


@app.command(
    epilog=examples(
        "bilevax show results/mine",
        "bilevax show results/mine --json",
    )
)
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    as_json: Json = False,
) -> None:
    """Print the table of a run from its files, and say what is unfinished."""
    with usage_errors():
        from benchmarks.show import report

        loaded = report.load(folder)
        summary = report.summarise(loaded)
    findings.results(folder, loaded, summary, as_json)


@app.command(
    epilog=examples(
        "bilevax verify",
        "bilevax verify soba certified --examples 1000",
        "bilevax verify DSBLO --seed 1",
        "bilevax verify hypergradient box ball --draws 2000 --json",
        "bilevax verify my_package.claims:MY_GUARANTEE",
        "The last takes a Guarantee of your own, by module and attribute.",
    )
)
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAMES]",
            help="Guarantees, beginnings of their names, or solvers; or hypergradient. Default: all.",
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Draws for each guarantee, of 64 instances each.")] = 200,
    draws: Annotated[int, typer.Option(min=1, help="Problems drawn for the name hypergradient.")] = 10_000,
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop drawing after so many seconds in all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
    out: Annotated[Path, typer.Option(help="Where counterexamples are kept.")] = Path("counterexamples"),
    replay: Annotated[Path | None, typer.Option(help="Try a saved counterexample again; with one NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Try to break every theorem: draw instances, climb towards measured > bound, keep what breaks one.

    Exit code: 0 nothing broke, 1 a counterexample was found, 2 bad usage.
    """
    use_quick_compilation()
    import jax

    from benchmarks.judge import verify as verifier

    with usage_errors(), jax.enable_x64(True):
        if names and names[0] == "hypergradient":
            findings.hypergradients(names[1:], draws, seed, as_json)
        chosen = verifier.choose(names or [])
        if replay is not None:
            if len(chosen) != 1:
                raise typer.BadParameter("it needs the name of one guarantee.", param_hint="--replay")
            ((name, guarantee),) = chosen.items()
            path, broken = verifier.replay(guarantee, replay)
            data = {"guarantee": name, "broken": broken, **verifier.path_data(path)}
            typer.echo(json.dumps(data, indent=None if as_json else 1))
            raise typer.Exit(1 if broken else 0)
        with progress(len(chosen)) as advance:
            found = verifier.run(list(chosen.values()), examples, seconds, seed, advance)
        commands = {
            name: verifier.save(out, name, finding.guarantee, finding.counterexample, examples, seed)
            for name, finding in zip(chosen, found, strict=True)
            if finding.counterexample is not None
        }
    findings.show(found, commands, as_json)
    raise typer.Exit(1 if commands else 0)


@app.command(
    epilog=examples(
        "bilevax compare results/mine",
        "bilevax compare results/before results/after --tol 1e-5 --by gradient",
        "bilevax compare results/mine -s SOBA -s AID --format latex > table.tex",
        "bilevax compare results/mine --format benchopt > outputs/bilevax.csv",
    )
)
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Folders of runs.")],
    problem: options.Problems = None,
    solver: options.Solvers = None,
    by: Annotated[str, typer.Option(help="What must come down: value (F - F_L) or gradient (|grad F|).")] = "value",
    tol: Annotated[float, typer.Option(help="The part of its start that it must come down to.")] = 1e-3,
    spread: Annotated[str, typer.Option(help="quantiles (median and quartiles) or std (mean, deviation).")] = (
        "quantiles"
    ),
    count_tuning: Annotated[
        bool, typer.Option("--count-tuning", help="Tuned solvers pay for their trials, too.")
    ] = False,
    form: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help="text, csv, json, markdown, latex or benchopt (all curves)."),
    ] = "text",
    as_json: Json = False,
) -> None:
    """Compare solvers: oracle calls and time to a tolerance, performance and data profiles, rank tests."""
    with usage_errors():
        from benchmarks.show import compare as comparer
        from benchmarks.show import sheets
        from benchmarks.study import registry

        form = "json" if as_json else form
        for what, value, known in (("--format", form, sheets.FORMATS), ("--spread", spread, sheets.SPREADS)):
            if value not in known and (what, value) != ("--format", BENCHOPT):
                also = [BENCHOPT] if what == "--format" else []
                raise registry.UsageError(f"{what}: got {value!r}; expected {', '.join([*known, *also])}.")
        if form == BENCHOPT:
            from benchmarks.show import benchopt

            typer.echo(benchopt.as_csv(folders, problem or [], solver or []), nl=False)
            return
        found = comparer.compare(folders, by=by, tolerance=tol, problems=problem, solvers=solver,
                                 count_tuning=count_tuning)  # fmt: skip
    typer.echo(sheets.FORMATS[form](found, spread), nl=False)


@app.command(
    "report",
    epilog=examples(
        "bilevax report results/mine",
        "bilevax report results/mine --out page.html --tol 1e-5",
    ),
)
def report_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    out: Annotated[Path | None, typer.Option(help="The page's file. Default: report.html in the folder.")] = None,
    by: Annotated[str, typer.Option(help="As of compare: value or gradient.")] = "value",
    tol: Annotated[float, typer.Option(help="As of compare.")] = 1e-3,
) -> None:
    """Write one HTML page about a run: tables, convergence, profiles, settings, the command that repeats it."""
    with usage_errors():
        from benchmarks.show import html

        typer.echo(html.write(folder, out, by=by, tolerance=tol))


for _name, (_command, _lines) in {**catalogue.BY_NAME, **commands.BY_NAME, **entries.BY_NAME}.items():
    app.command(_name, epilog=examples(*_lines))(_command)


def main() -> None:
    """The console command."""
    app()


if __name__ == "__main__":
    main()
