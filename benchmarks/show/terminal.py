"""Messages and progress on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


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
