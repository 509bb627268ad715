"""What the commands share: help texts, messages on stderr, a progress bar, the compilation cache. Nothing heavy."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

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
    from benchmarks.errors import UsageError
    from bilevel.backend.schema import printable

    try:
        yield
    except UsageError as error:
        typer.echo(f"bilevax: {printable(str(error))}", err=True)
        raise typer.Exit(2) from error
