"""The command `bilevax list`: what can be run, and what it takes."""

import json
from typing import Annotated, Any

import typer

from benchmarks.cli.options import Json, usage_errors
from benchmarks.show.terminal import console

LIST_EXAMPLES = (
    "bilevax list",
    "bilevax list SOBA",
    "bilevax list quadratic",
    "bilevax list quickstart",
    "bilevax list --json | python -m json.tool",
)


def list_(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A solver, problem or suite: its parameters. Default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the solvers, problems and suites that are found, a line each; of a NAME, its parameters and what they mean.

    Exit code: 0, or 2 for a name that is none of them.
    """
    with usage_errors():
        from benchmarks.errors import nearest
        from benchmarks.study import registry, suites

        found = registry.summaries() | {"suites": suites.summaries()}
        kinds = [kind for kind in found if name in found[kind]]
        if name is not None and not kinds:
            raise nearest("solver, problem or suite", name, [one for kind in found.values() for one in kind])
        about = [(kind, registry.documentation(name) if kind != "suites" else "") for kind in kinds if name]
        cells = suites.read_suite(name)[1] if name and "suites" in kinds else []
    if as_json:
        told = (
            found if name is None else {kind: {name: found[kind][str(name)] | {"about": text}} for kind, text in about}
        )
        typer.echo(json.dumps(told, default=str))
        return
    if name is None:
        _tables(found)
    for kind, text in about:
        _shown(str(name), kind, found[kind][str(name)], text, cells)


def _tables(found: dict[str, Any]) -> None:
    """One table for each kind."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for kind, entries in found.items():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(
            kind, style="bold", no_wrap=True, min_width=max(len(n) for names in found.values() for n in names)
        )
        table.add_column("what it is")
        for name, entry in entries.items():
            why = entry.get("experimental")
            said = f" Version {entry['version']}, {entry['runs']} runs." if kind == "suites" else ""
            table.add_row(name, Text(entry["summary"] + said + (f"\nexperimental: {why}" if why else "")))
        console().print(table)


def _shown(name: str, kind: str, entry: dict[str, Any], text: str, cells: list[Any]) -> None:
    """One entry: its own words, and a table of its parameters, or of a suite's runs."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    typer.echo(f"{name} ({kind[:-1]}): {entry['summary']}\n" + (f"\n{text}\n" if text else ""))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if kind != "suites":
        headings, rows = ("parameter", "default"), [(key, str(value)) for key, value in entry["parameters"].items()]
    else:
        typer.echo(f"Version {entry['version']}, digest {entry['digest']}. Run it: bilevax run --suite {name}\n")
        headings, rows = ("problem", "solver", "seeds", "budget"), _of_suite(cells)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    if rows:
        console().print(table)
    if kind != "suites":
        flag, first = ("-s", next(iter(entry["parameters"]), None)) if kind == "solvers" else ("-p", None)
        first = first or next(iter(entry["parameters"]), None)
        inside = "" if first is None else f"[{first}=…]"
        typer.echo(f"On the command line: {flag} '{name}{inside}'" if inside else f"On the command line: {flag} {name}")


def _of_suite(cells: list[Any]) -> list[tuple[str, ...]]:
    """A row for each problem and solver of a suite."""
    from benchmarks.study.formats import LIMITS

    rows: dict[tuple[str, str, str], int] = {}
    for cell in cells:
        limits = ", ".join(f"{name} {value:g}" for name in LIMITS if (value := getattr(cell, name)) is not None)
        tuned = "" if cell.search is None else f"; the best of {cell.search.trials} trials"
        key = cell.problem, cell.solver, limits + tuned
        rows[key] = rows.get(key, 0) + 1
    return [(problem, solver, str(count), budget) for (problem, solver, budget), count in rows.items()]


BY_NAME = {"list": (list_, LIST_EXAMPLES)}
