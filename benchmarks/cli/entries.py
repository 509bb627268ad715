"""Commands of `bilevax` for those outside: instances as data, programs in any language as solvers."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cli import findings, options
from benchmarks.cli.options import Json, usage_errors
from benchmarks.show.terminal import progress
from benchmarks.study.compilation import use_quick_compilation

EXPORT_EXAMPLES = (
    "bilevax export -p ridge --out instances",
    "bilevax export -p 'quadratic[dim_x=3,dim_y=4]' -p textbook --seeds 5 --out instances",
    "Each becomes a folder with instance.json and arrays.npz; docs/enter.md explains their fields.",
)

SUBMIT_EXAMPLES = (
    "bilevax submit --command 'julia solver.jl' -p 'quadratic[dim_x=3]' --seeds 5",
    "bilevax submit --command 'python scipy_solver.py' --suite exact --time-limit 20 --out results/mine",
    "bilevax submit --command \"sh -c 'cd mine && ./solve'\" --name mine -p ridge --json",
    'The program reads one line of JSON, the instance, and writes lines {"x": […], "y": […], "time": seconds}.',
    "docs/enter.md has the protocol and two programs to begin with, one with SciPy and one with torch.",
)

Exported = Annotated[
    list[str], typer.Option("--problem", "-p", metavar="NAME[K=V,…]", help="A problem; may be repeated.")
]


def export(
    problem: Exported,
    out: Annotated[Path, typer.Option(help="The folder; each instance has its own below.")],
    seeds: Annotated[int, typer.Option(min=1, help="Instances with seeds 0 to n-1.")] = 1,
    as_json: Json = False,
) -> None:
    """Write instances as data: dimensions, sets, start, arrays, formulas, the optimum and what vouches for it.

    Small linear and quadratic ones have all functions as sums of monomials. Nothing is overwritten.

    Exit code: 0, or 2 for bad usage and a folder that cannot be written.
    """
    use_quick_compilation()
    import jax

    written = []
    with usage_errors(), jax.enable_x64(True):
        import bilevel
        from benchmarks.study import instances, registry

        for text in problem:
            registry.check_problem(text)
        for text in problem:
            for seed in range(seeds):
                try:
                    made = registry.build_instance(text, seed)
                except bilevel.InvalidInput as error:
                    raise registry.UsageError(f"{text}: {error}") from error
                written.append(str(instances.write(out, text, seed, made)))
                if not as_json:
                    typer.echo(written[-1])
    if as_json:
        typer.echo(json.dumps({"folders": written}))


def submit(
    command: Annotated[str, typer.Option(help="The program and its arguments; no shell reads them.")],
    problem: Annotated[
        list[str] | None, typer.Option("--problem", "-p", metavar="NAME[K=V,…]", help="A problem; may be repeated.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="A suite's problems and seeds, in place of -p.")] = None,
    seeds: options.Seeds = None,
    time_limit: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds for an instance, start-up included; then it is killed."),
    ] = 60.0,
    name: Annotated[str | None, typer.Option(help="In tables. Default: the program's file.")] = None,
    out: options.Out = None,
    plot: options.Plot = True,
    as_json: Json = False,
) -> None:
    """Run any program as a solver: an instance in as JSON, lines of x, y and time out; the referee judges each line.

    A program that crashes, is late, or writes nonsense, NaN or nothing has that as its status, and no number.

    Exit code: 0 all ran, 1 one of them failed so, 2 bad usage, 130 interrupted.
    """
    if bool(problem) == (suite is not None):
        raise typer.BadParameter("give problems, -p NAME, or the name of a suite: one of the two.", param_hint="-p")
    use_quick_compilation()
    import jax

    with usage_errors(), jax.enable_x64(True):
        from functools import partial

        from benchmarks.study import registry, submission, suites

        words, own = submission.name_of(command, name)
        title = "custom"
        if suite is not None:
            title, of_suite = suites.read_suite(suite, seeds)
            wanted = dict.fromkeys((cell.problem, cell.seed) for cell in of_suite)
        else:
            wanted = dict.fromkeys((registry.label(text), seed) for text in problem or () for seed in range(seeds or 1))
        for text in dict.fromkeys(text for text, _ in wanted):
            registry.check_problem(text)
        cells = [registry.Cell(text, own, seed, time_limit=time_limit) for text, seed in wanted]
        how = partial(submission.execute, words=words)
        said = {"program": command}
        if suite is not None and (of := suites.title(title, of_suite)) is not None:
            said["suite"] = of
        _submitted(f"{title}-{own}", cells, said, out, plot, as_json, how)


def _submitted(
    name: str, cells: list[Any], said: dict[str, str], out: Path | None, plot: bool, as_json: bool, how: Any
) -> None:
    """Run the cells into a folder, print what came out and exit."""
    from benchmarks.show import report
    from benchmarks.study import files, submission

    settings: dict[str, Any] = files.settings_of(name, cells, 64) | said
    settings["versions"] |= submission.fingerprints(how.keywords["words"])
    with files.open_folder(out, settings) as folder:
        with progress(len(cells)) as on_cell:
            complete = how(folder, cells, on_cell=on_cell)
        loaded = report.load(folder)
        summary = report.write(folder, loaded, plot)
    findings.results(folder, loaded, summary, as_json)
    raise typer.Exit(report.exit_code(summary) if complete else 130)


SITE_EXAMPLES = (
    "bilevax site results/mine --out site",
    "bilevax site results/before results/after results/julia --out site --by gradient --tol 1e-5",
    "Open site/index.html, or put the folder on any host: the pages load nothing and run nothing.",
)


def site(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Folders of runs and submissions.")],
    out: Annotated[Path, typer.Option(help="The folder of the site; a site that is there is written anew.")] = Path(
        "site"
    ),
    by: Annotated[str, typer.Option(help="As of compare: value or gradient.")] = "value",
    tol: Annotated[float, typer.Option(help="As of compare.")] = 1e-3,
    as_json: Json = False,
) -> None:
    """Write a static site about runs: leaderboards, how often solvers were wrong, a page for each problem and solver.

    Exit code: 0, or 2 for folders that cannot be read or written, or an --out that holds something else.
    """
    with usage_errors():
        from benchmarks.show import site as maker

        pages = maker.write(folders, out, by=by, tolerance=tol)
    if as_json:
        typer.echo(json.dumps({"pages": [str(page) for page in pages]}))
        return
    typer.echo(f"{pages[0]} and {len(pages) - 1} pages beside it")


WATCH_EXAMPLES = (
    "bilevax watch results/mine",
    "bilevax watch results/mine --every 0.5 --json",
    "In another terminal than the run's, or on another machine that sees the folder. Ctrl-C ends the watching alone.",
)


def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, sweep or submission.")],
    every: Annotated[float, typer.Option(min=0.05, help="Seconds between looks.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each look.")] = False,
) -> None:
    """Follow a running study: a line for each run as it ends, then the table.

    Exit code: 0 all is finished, 1 a run failed, or nobody runs what is left, 2 no such run, 130 interrupted.
    """
    from benchmarks.show import report
    from benchmarks.show import watch as watcher
    from bilevel.backend.schema import printable

    seen = None
    with usage_errors():
        try:
            for seen in watcher.follow(folder, every):
                if as_json:
                    typer.echo(json.dumps(seen._asdict()))
                for line in [] if as_json else seen.lines:
                    typer.echo(printable(line))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        loaded = report.load(folder)
        summary = report.summarise(loaded)
    if not as_json:
        findings.results(folder, loaded, summary, False)
    if seen is not None and seen.done < seen.total:
        typer.echo("bilevax: nobody runs what is left: repeat the run's command to go on.", err=True)
        raise typer.Exit(1)
    raise typer.Exit(report.exit_code(summary))


BY_NAME = {
    "export": (export, EXPORT_EXAMPLES),
    "submit": (submit, SUBMIT_EXAMPLES),
    "site": (site, SITE_EXAMPLES),
    "watch": (watch, WATCH_EXAMPLES),
}
