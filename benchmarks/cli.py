"""The command `bilevax`: list, run, show. Everything heavy is imported inside the commands, so that help is quick."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


def _examples(*lines: str) -> str:
    """The end of a help text, a line each; brackets are escaped, since rich reads them as markup."""
    return "\n\n".join(["Examples:", *(line.replace("[", "\\[") for line in lines)])


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bilevax {version('bilevax')}")
        raise typer.Exit


@app.callback(
    epilog=_examples(
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


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Bad usage becomes a message on stderr and exit code 2."""
    from benchmarks.registry import UsageError

    try:
        yield
    except UsageError as error:
        typer.echo(f"bilevax: {error}", err=True)
        raise typer.Exit(2) from error


def _console() -> Any:
    """As wide as the terminal, 120 columns where there is none."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120, highlight=False)


@app.command(
    "list",
    epilog=_examples(
        "bilevax list",
        "bilevax list --json | python -m json.tool",
    ),
)
def list_(as_json: Json = False) -> None:
    """List the solvers and problems that are found, a line each, with their parameters in --json."""
    with _usage_errors():
        from benchmarks.registry import summaries

        found = summaries()
    if as_json:
        typer.echo(json.dumps(found, default=str))
        return
    from rich import box
    from rich.table import Table

    for kind in ("solvers", "problems"):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(
            kind, style="bold", no_wrap=True, min_width=max(len(n) for names in found.values() for n in names)
        )
        table.add_column("what it is")
        for name, entry in found[kind].items():
            table.add_row(name, entry["summary"])
        _console().print(table)


@app.command(
    epilog=_examples(
        "bilevax run",
        "bilevax run --suite quickstart --out results/mine",
        "bilevax run -p quadratic -s SOBA -s AID --seeds 3 --max-steps 2000",
        "bilevax run -p 'quadratic[dim_x=5]' -s 'SOBA[upper_step_size=adam(0.05)]' --json",
        "The first runs the quickstart suite. An interrupted run goes on with the same command and --out.",
    )
)
def run(
    problem: Annotated[
        list[str] | None,
        typer.Option("--problem", "-p", metavar="NAME[K=V,…]", help="A problem; may be repeated. Default: all."),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option("--solver", "-s", metavar="NAME[K=V,…]", help="A solver; may be repeated. Default: all."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="A suite's name or TOML file, instead of -p and -s. Without any of the three: quickstart."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs with seeds 0 to n-1. Default: 1, or the suite's.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=0, help="Steps at most. Default: 1000, or the suite's.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Steps between measurements. Default: max-steps/20.")] = None,
    tol: Annotated[
        float | None, typer.Option(min=0, help="Stop when the referee's residuals are below; 0 never stops.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(min=0, help="Seconds of solver time for each run.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder for the results. Default: results/<time>-<suite>.")
    ] = None,
    precision: Annotated[int, typer.Option(help="Bits of the floats: 64 or 32.")] = 64,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw a PNG for each problem.")] = True,
    as_json: Json = False,
) -> None:
    """Run solvers on problems: every problem x solver x seed; print the table, keep everything in a folder.

    Exit code: 0 all ran (what a solver does not support is skipped with the reason), 1 a run failed, 2 bad usage,
    130 interrupted.
    """
    if precision not in (32, 64):
        raise typer.BadParameter(f"got {precision}; expected 64 or 32.", param_hint="--precision")
    if suite is not None and (problem or solver):
        raise typer.BadParameter("it says which problems and solvers run: leave out -p and -s.", param_hint="--suite")
    _use_compilation_cache()
    import jax

    from benchmarks import registry, report, runner

    limits = {"max_steps": max_steps, "every": every, "tol": tol, "time_limit": time_limit}
    with _usage_errors(), jax.enable_x64(precision == 64):
        if problem or solver:
            given = {key: value for key, value in limits.items() if value is not None}
            name, cells = "custom", registry.grid(problem or [], solver or [], seeds or 1, **given)
        else:
            name, cells = registry.read_suite(suite or "quickstart", seeds, **limits)
        for text in dict.fromkeys(cell.problem for cell in cells):
            registry.check_problem(text)
        for text in dict.fromkeys(cell.solver for cell in cells):
            registry.build_solver(text)
        folder = runner.open_folder(out, runner.settings_of(name, cells, precision))
        with _progress(len(cells)) as on_cell:
            complete = runner.execute(folder, cells, on_cell)
        loaded = report.load(folder)
        summary = report.write(folder, loaded, plot)
    _print(folder, loaded, summary, as_json)
    raise typer.Exit(report.exit_code(summary) if complete else 130)


@app.command(
    epilog=_examples(
        "bilevax show results/mine",
        "bilevax show results/mine --json",
    )
)
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    as_json: Json = False,
) -> None:
    """Print the table of a run from its files, and say what is unfinished."""
    with _usage_errors():
        from benchmarks import report

        loaded = report.load(folder)
        summary = report.summarise(loaded)
    _print(folder, loaded, summary, as_json)


def _print(folder: Path, run: Any, summary: dict[str, Any], as_json: bool) -> None:
    from benchmarks import report
    from benchmarks.runner import clean

    if as_json:
        results = [
            {"problem": cell.problem, "solver": cell.solver, "seed": cell.seed}
            | ({"status": "UNFINISHED"} if result is None else {k: v for k, v in result.items() if k != "cell"})
            for cell, result in run.results
        ]
        typer.echo(
            json.dumps(
                clean({"folder": str(folder), "settings": run.settings, **summary, "results": results}), allow_nan=False
            )
        )
        return
    console = _console()
    console.print(report.tables(summary))
    console.print(f"Results: {folder}", soft_wrap=True)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A function (index, cell) -> None that moves a bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda index, cell: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda index, cell: bar.update(
            task, completed=index, description=f"{cell.problem} {cell.solver} seed {cell.seed}"
        )


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs in the user's cache folder; BILEVAX_CACHE=off switches it off."""
    import os

    import jax
    import platformdirs

    if os.environ.get("BILEVAX_CACHE", "") != "off" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(platformdirs.user_cache_dir("bilevax")) / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def main() -> None:
    """The console command."""
    app()


if __name__ == "__main__":
    main()
