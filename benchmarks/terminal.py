"""What the commands share: help texts, messages on stderr, a progress bar, the compilation cache. Nothing heavy."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Problems = Annotated[
    list[str] | None,
    typer.Option("--problem", "-p", metavar="NAME[K=V,…]", help="A problem; may be repeated. Default: all."),
]
Solvers = Annotated[
    list[str] | None,
    typer.Option("--solver", "-s", metavar="NAME[K=V,…]", help="A solver; may be repeated. Default: all."),
]
Suite = Annotated[
    str | None,
    typer.Option(help="A suite's name or TOML file, instead of -p and -s. Without any of the three: quickstart."),
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Runs with seeds 0 to n-1. Default: 1, or the suite's.")]
MaxSteps = Annotated[int | None, typer.Option(min=0, help="Steps at most. Default: 1000, or the suite's.")]
Every = Annotated[int | None, typer.Option(min=1, help="Steps between measurements. Default: max-steps/20.")]
Tol = Annotated[float | None, typer.Option(min=0, help="Stop when the referee's residuals are below; 0 never stops.")]
TimeLimit = Annotated[float | None, typer.Option(min=0, help="Seconds of solver time for each run.")]
MaxPasses = Annotated[
    float | None, typer.Option(min=0, help="Oracle calls at most, in passes over the data: a budget instead of steps.")
]
Out = Annotated[Path | None, typer.Option(help="The folder for the results. Default: results/<time>-<suite>.")]
Precision = Annotated[int, typer.Option(help="Bits of the floats: 64 or 32.")]
Plot = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw a PNG for each problem.")]


def examples(*lines: str) -> str:
    """The end of a help text, a line each; brackets are escaped, since rich reads them as markup."""
    return "\n\n".join(["Examples:", *(line.replace("[", "\\[") for line in lines)])


@contextmanager
def usage_errors() -> Iterator[None]:
    """Bad usage, and folders that cannot be read or written, become a message on stderr and exit code 2."""
    from benchmarks.registry import UsageError

    try:
        yield
    except UsageError as error:
        typer.echo(f"bilevax: {error}", err=True)
        raise typer.Exit(2) from error


def console() -> Any:
    """As wide as the terminal, 120 columns where there is none."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120, highlight=False)


@contextmanager
def progress(total: int, lines: bool = False) -> Iterator[Any]:
    """A function (index, what) -> None that moves a bar on stderr, where that is a terminal; or writes `lines` there,
    which leave the place to a run's own curves.
    """

    def name(what: Any) -> str:
        return what if isinstance(what, str) else f"{what.problem} {what.solver} seed {what.seed}"

    if lines or not sys.stderr.isatty():
        shown = lines and sys.stderr.isatty()
        yield lambda index, what: typer.echo(f"{index + 1}/{total} {name(what)}", err=True) if shown else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def update(index: int, what: Any) -> None:
            bar.update(task, completed=index, description=name(what))

        yield update


def use_quick_compilation(folder: str = "xla") -> None:
    """Keep compiled programs between runs in `folder` of the user's cache (BILEVAX_CACHE=off switches that off).

    And on the CPU let XLA write loops by its older emitters, where jaxlib still has them: the same time to run, a
    quarter less to compile (a first run of SOBA on a quadratic 7.5 to 5.3 s, on hyper-cleaning 13.6 to 9.6 s). XLA
    reads its flags when it starts, and stops at one that it does not know; what else the user has set stays.
    """
    import jax
    import platformdirs

    if os.environ.get("BILEVAX_CACHE", "") != "off":
        keep_programs(str(Path(platformdirs.user_cache_dir("bilevax")) / folder))
    if jax.__version_info__[:2] == (0, 10):
        xla_flags("--xla_cpu_use_fusion_emitters=false")


def keep_programs(cache: str) -> None:
    """Keep compiled programs in the folder `cache`, unless another one is set."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def xla_flags(flags: str) -> None:
    """Set flags of XLA for this process and its children, before what the user has set, of which the last counts."""
    given = os.environ.get("XLA_FLAGS", "")
    if flags not in given:
        os.environ["XLA_FLAGS"] = f"{flags} {given}".strip()
