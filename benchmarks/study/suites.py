"""Suites: studies in TOML that are named, versioned and never change; the format stands at the head of quickstart.toml.

A suite of the library has a version, as 2027.1, and a test holds what it runs by its `digest`: whoever changes a
problem, a seed, a solver or a budget in it gives it a new version, and keeps the old one as `name@version.toml` beside
it. So results of one version compare, whenever they were made.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.errors import UsageError, nearest
from benchmarks.study.formats import LIMITS, MOST_CELLS, SCORES, SUITE
from benchmarks.study.registry import (
    Cell,
    Search,
    check_count,
    check_limits,
    check_names,
    checked,
    label,
    parse,
    settings_of_solver,
)
from bilevel.backend.schema import printable

SUITES = Path(__file__).parents[1] / "suites"


def content_of(name: str) -> tuple[Path, dict[str, Any]]:
    """(file, what it holds) of a suite: one of the library's by its name, also with its version, as quickstart@2027.1,
    or the path of a TOML file.

    Raises:
        UsageError: no such suite or version, or a file that cannot be read.
    """
    known = {path.stem: path for path in SUITES.glob("*.toml")}
    stem, at, wanted = name.partition("@")
    path = known.get(name) or (known.get(stem) if at else None) or Path(name)
    if path.parent != SUITES and path.suffix != ".toml":
        raise nearest("suite", name, known)
    try:
        content = printable(tomllib.loads(path.read_text("utf8")))
        SUITE(content, "")
    except (OSError, ValueError) as error:
        raise UsageError(f"suite {path}: {error}") from error
    except RecursionError:
        raise UsageError(f"suite {path}: brackets in brackets without end.") from None
    if at and path.parent == SUITES and content.get("version") != wanted:
        raise UsageError(
            f"suite {stem}: got version {wanted}; this bilevax has {content.get('version')}. Leave @{wanted} out, or "
            "install the version of bilevax that has it."
        )
    return path, content


def read_suite(name: str, seeds: int | None = None, **limits: Any) -> tuple[str, list[Cell]]:
    """(name, cells) of a suite, as `content_of` finds it.

    `seeds` and `limits` that are not None replace what the suite says. The format is explained in
    suites/quickstart.toml.

    Raises:
        UsageError: no such suite, or a file that cannot be read, with the entry and what is wrong in it.
    """
    path, content = content_of(name)
    _check_keys(f"suite {path}", content, ("version", "problem", "tuning"))
    cells: list[Cell] = []
    check_limits("", {key: value for key, value in limits.items() if value is not None})
    given = _one_budget({key: value for key, value in limits.items() if value is not None})
    for entry in content.get("problem", []):
        _check_keys(f"suite {path}, [[problem]]", entry, ("run", "seeds", "solvers", *LIMITS))
        if not entry.get("run") or not entry.get("solvers"):
            raise UsageError(f'suite {path}: every [[problem]] needs run = "name[…]" and solvers = ["name[…]", …].')
        common = {key: entry[key] for key in LIMITS if key in entry}
        count = entry.get("seeds", 1) if seeds is None else seeds
        items = [{"run": item} if isinstance(item, str) else item for item in entry["solvers"]]
        check_count(f"suite {path}, {entry['run']}", len(items), count)
        by_solver = []
        for item in items:
            _check_keys(f"suite {path}, solvers of {entry['run']}", item, ("run", "tune", *LIMITS))
            own = _one_budget({key: value for key, value in item.items() if key in LIMITS})
            by_solver.append((label(item["run"]), common | own | given))
        searches = _searches(f"suite {path}, {entry['run']}", content.get("tuning"), items, count)
        for seed in range(count):
            cells += [
                Cell(label(entry["run"]), run, seed, search=search, **settings)
                for (run, settings), search in zip(by_solver, searches, strict=True)
            ]
    if not cells:
        raise UsageError(f"suite {path}: no [[problem]] in it, nothing to run.")
    return path.stem, checked(list(dict.fromkeys(cells)))


def digest(cells: list[Cell]) -> str:
    """Sixteen digits that stand for all that cells run: problems, solvers, seeds, budgets and searches, in order."""
    asked = [{key: value for key, value in dataclasses.asdict(cell).items() if value is not None} for cell in cells]
    text = json.dumps(asked, sort_keys=True)  # without None, so that a new field of Cell changes nothing
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def summaries() -> dict[str, dict[str, Any]]:
    """{suite: {"version", "runs", "problems", "digest", "summary"}} of the library's."""
    found = {}
    for path in sorted(SUITES.glob("*.toml")):
        _, cells = read_suite(path.stem)
        found[path.stem] = {
            "version": content_of(path.stem)[1].get("version"), "runs": len(cells),
            "problems": len({cell.problem for cell in cells}), "digest": digest(cells),
            "summary": _sentence(path.read_text("utf8")),
        }  # fmt: skip
    return found


def _sentence(text: str) -> str:
    """The first sentence of a file's head, up to a command in it."""
    head = " ".join(
        line.strip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), text.split("\n"))
    )
    return re.split(r"(?<=\.)\s|: `|\. ", head)[0].rstrip(".") + "."


def title(name: str, cells: list[Cell]) -> str | None:
    """`quickstart 2027.1`, and whether options altered it, where the cells are of a suite of the library; else None."""
    if not (SUITES / f"{name}.toml").is_file() or (SUITES / f"{name}.toml").parent != SUITES:  # no path out of there
        return None
    same = read_suite(name)[1] == cells
    return f"{name} {content_of(name)[1].get('version')}" + ("" if same else ", altered by options")


def _one_budget(limits: dict[str, Any]) -> dict[str, Any]:
    """Limits that take the place of others: a budget in steps replaces one in passes, and the other way round."""
    steps = ("max_steps", "max_passes")
    return {name: None for name in steps if any(other in limits for other in steps)} | limits


def _searches(where: str, rule: dict[str, Any] | None, items: list[dict[str, Any]], count: int) -> list[Search | None]:
    """Each solver's search; equal trials for all of them, or none for any."""
    tuned = [item["run"] for item in items if "tune" in item]
    if not tuned:
        return [None] * len(items)
    if len(tuned) < len(items):
        left = next(item["run"] for item in items if "tune" not in item)
        raise UsageError(
            f"{where}: {tuned[0]} is tuned and {left} is not. Give all of its solvers tune = {{…}}, or none."
        )
    if not isinstance(rule, dict):
        raise UsageError(f"{where}: tune needs the rule of the search: [tuning] with trials = … and seeds = […].")
    _check_keys(f"{where}, [tuning]", rule, ("trials", "seeds", "score"))
    trials, seeds, score = rule.get("trials"), rule.get("seeds", []), rule.get("score", "value")
    whole = isinstance(seeds, list) and seeds and all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    if not (isinstance(trials, int) and 1 <= trials <= MOST_CELLS and whole and score in SCORES):
        raise UsageError(
            f"{where}, [tuning]: got {rule}; expected trials >= 1, seeds = [whole numbers], score = value or gradient."
        )
    shared = [seed for seed in seeds if seed < count]
    if shared:
        raise UsageError(f"{where}: seed {shared[0]} is tuned on and reported. Tune on seeds from {count} on.")
    found = []
    for item in items:
        name, _ = parse(item["run"])
        defaults = settings_of_solver(name)
        check_names(name, item["tune"], defaults)
        for key, values in item["tune"].items():
            _check_range(f"{where}, tune of {name}: {key}", values)
        found.append(Search(trials, tuple(seeds), score, tuple((k, tuple(v)) for k, v in item["tune"].items())))
    return found


def _check_range(what: str, values: Any) -> None:
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)  # noqa: E731
    if isinstance(values, list) and values:
        if all(isinstance(value, str) for value in values):
            return
        if len(values) == 2 and all(map(number, values)) and 0 < values[0] < values[1] < float("inf"):
            return
    raise UsageError(f"{what}: got {values!r}; expected a range [low, high] of positive numbers, or a list of words.")


def suite_text(cells: list[Cell]) -> str:
    """A suite's TOML that `read_suite` reads as these cells, which some suite or `grid` made."""
    entries: list[list[Cell]] = []
    for cell in cells:
        last = entries[-1][-1] if entries else None
        if last is None or last.problem != cell.problem or cell.seed < last.seed:
            entries.append([])
        entries[-1].append(cell)
    lines = []
    search = next((cell.search for cell in cells if cell.search is not None), None)
    if search is not None:
        lines += [
            "[tuning]",
            f"trials = {search.trials}",
            f"seeds = {list(search.seeds)}",
            f'score = "{search.score}"',
            "",
        ]
    for entry in entries:
        lines += [
            "[[problem]]",
            f"run = {json.dumps(entry[0].problem)}",
            f"seeds = {entry[-1].seed + 1}",
            "solvers = [",
        ]
        for cell in entry:
            if cell.seed == 0:
                limits = {name: getattr(cell, name) for name in LIMITS if getattr(cell, name) is not None}
                fields = {"run": json.dumps(cell.solver)} | {name: repr(value) for name, value in limits.items()}
                if cell.search is not None:
                    space = ", ".join(f"{name} = {json.dumps(list(values))}" for name, values in cell.search.space)
                    fields["tune"] = f"{{ {space} }}"
                lines.append("    { " + ", ".join(f"{name} = {value}" for name, value in fields.items()) + " },")
        lines += ["]", ""]
    return "\n".join(lines)


def _check_keys(where: str, table: dict[str, Any], accepted: tuple[str, ...]) -> None:
    for key in table:
        if key not in accepted:
            raise UsageError(f"{where}: unknown key {key!r}. Accepted: {', '.join(accepted)}.")
