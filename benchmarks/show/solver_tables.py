"""The tables of solvers in README.md and docs/, written from the classes: a solver is one file, and no list is edited.

    python -m benchmarks.show.solver_tables            # says which pages are out of date; exit code 1 if any is
    python -m benchmarks.show.solver_tables --write    # writes them

A page has a pair of comments for each table, and what stands between them is written anew. Rows come from the classes'
`about`, families from the folders of `bilevel/solvers` and the docstrings of their `__init__.py`. Families and solvers
stand in the order of the years in which they were published.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import bilevel
import irl
from bilevel.recommend import RULES
from bilevel.solver import Solver

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- solvers: (\w+)[^>]*-->\n).*?(<!-- end of solvers -->)", re.DOTALL)
CALLS = "Calls per step: upper gradients, residuals, HVPs, cross products"
COLUMNS = {
    "calls": CALLS, "lower": "Lower level", "smoothing": "Smoothing", "memory": "Memory beyond x, y, v",
    "stops": "Stops where",
}  # fmt: skip

Solvers = Mapping[str, type[Solver]]


def year(kind: type[Solver]) -> int:
    """The year of the first reference; without one, later than all."""
    found = re.search(r"\b(19|20)\d\d$", kind.about.reference.split(";")[0]) if kind.about else None
    return int(found[0]) if found else 9999


def families(solvers: Solvers) -> dict[str, list[type[Solver]]]:
    """The solvers of each folder."""
    found: dict[str, list[type[Solver]]] = {}
    for kind in sorted(solvers.values(), key=lambda kind: (year(kind), kind.__name__)):
        found.setdefault(kind.__module__.rsplit(".", 1)[0], []).append(kind)
    return found


def label(kind: type[Solver]) -> str:
    """A solver's name in a table."""
    return f"`{kind.__name__}`" + " (experimental)" * bool(kind.experimental)


def data(kind: type[Solver]) -> str:
    """Which data a step uses."""
    return (kind.about and kind.about.data) or ("all of it" if kind.full_batch else "batches")


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def ideas(solvers: Solvers) -> str:
    """One table of all solvers: name, family, idea, data and reference."""
    rows = [
        [label(kind), package.rsplit(".", 1)[1], kind.about.idea, data(kind), kind.about.reference]
        for package, kinds in families(solvers).items()
        for kind in kinds
        if kind.about
    ]
    return table(["Solver", "Family", "Idea", "Data", "Reference"], rows)


def comparison(solvers: Solvers) -> str:
    """A section for each family: what its folder says of itself, and a table of costs and ends.

    A column that no solver of the family fills is left out.
    """
    parts = []
    for package, kinds in families(solvers).items():
        abouts = [(kind, kind.about) for kind in kinds if kind.about]
        columns = [name for name in COLUMNS if any(getattr(about, name) for _, about in abouts)]
        rows = [[label(kind), data(kind), *(getattr(about, name) for name in columns)] for kind, about in abouts]
        headings = ["Solver", "Data", *(COLUMNS[name] for name in columns)]
        said = (sys.modules[package].__doc__ or "").strip()
        parts.append(f"### {package.rsplit('.', 1)[1].capitalize()}\n\n{said}\n\n{table(headings, rows)}")
    return "\n".join(parts)


def rules() -> str:
    """The rules of `bilevel.recommend` in their order: the first whose condition holds gives the list."""
    lines = ["The problem is one where", "First, with the reason", "Then"], []
    for rule in RULES:
        (first, why), *rest = rule.solvers.items()
        lines[1].append([rule.when, f"`{first}`: {why}", ", ".join(f"`{name}`" for name, _ in rest)])
    return table(*lines)


def api(solvers: Solvers) -> str:
    """An entry of the API for each solver."""
    return "\n".join(
        f"::: {kind.__module__}.{kind.__name__}\n" for kinds in families(solvers).values() for kind in kinds
    )


def own(solvers: Solvers, package: str) -> dict[str, type[Solver]]:
    """Those of `solvers` that are defined below a package: not those that a user's module brought."""
    return {name: kind for name, kind in solvers.items() if kind.__module__.startswith(f"{package}.")}


BLOCKS: dict[str, Callable[[], str]] = {
    "ideas": lambda: ideas(own(bilevel.solvers.ALL, "bilevel.solvers")),
    "comparison": lambda: comparison(own(bilevel.solvers.ALL, "bilevel.solvers")),
    "api": lambda: api(own(bilevel.solvers.ALL, "bilevel.solvers")),
    "rules": rules,
    "irl": lambda: api(own(irl.solvers.ALL, "irl.solvers")),
}
PAGES = {
    "README.md": ("ideas",), "docs/choose-a-solver.md": ("rules", "comparison"), "docs/api-solvers.md": ("api",),
    "docs/api-irl.md": ("irl",),
}  # fmt: skip


def current(text: str) -> str:
    """A page with its tables written anew."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n{found[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the pages")
    write, stale = parser.parse_args(arguments).write, 0
    for page in PAGES:
        path = ROOT / page
        text = path.read_text("utf8")
        if current(text) != text:
            stale += not write
            print(f"{page}: {'written' if write else 'out of date'}")
            if write:
                path.write_text(current(text), "utf8")
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
