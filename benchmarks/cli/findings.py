"""What commands print: the results of a run; of `bilevax verify` the guarantees, or the campaign of hypergradients."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from benchmarks.show.terminal import console, progress


def show(findings: Sequence[Any], commands: Mapping[str, str], as_json: bool) -> None:
    """The table of the guarantees, and the command that tries each counterexample again."""
    from benchmarks.judge import verify as verifier

    if as_json:
        typer.echo(
            json.dumps({"guarantees": [verifier.row(finding) for finding in findings], "replay": dict(commands)})
        )
        return
    terminal = console()
    terminal.print(verifier.table(findings))
    for name, command in commands.items():
        terminal.print(f"{name} is broken. Again: {command}", soft_wrap=True)


def hypergradients(names: Sequence[str], draws: int, seed: int, as_json: bool) -> None:
    """Hypergradients of drawn problems against exact arithmetic; exit code 1 where one is broken, or many refused.

    names: of families; none for all.
    """
    from benchmarks.judge import hypergradients as campaign

    families = campaign.choose(names)
    with progress(len(families) * len(campaign.DTYPES)) as advance:
        found = campaign.run(draws, seed, families, started=advance)
    held = campaign.holds(found)
    if as_json:
        typer.echo(json.dumps(campaign.summary(found, seed)))
    else:
        console().print(campaign.table(found))
    raise typer.Exit(0 if held else 1)


def results(folder: Path, run: Any, summary: dict[str, Any], as_json: bool) -> None:
    """The table of a run, or its results as JSON."""
    from benchmarks.show import report
    from benchmarks.study.files import clean
    from bilevel.backend.schema import printable

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
    terminal = console()
    terminal.print(report.tables(summary))
    terminal.print(printable(f"Results: {folder}"), soft_wrap=True, markup=False)
