"""Code blocks of README.md and docs/ run; commands in them parse; what solvers and tables claim is so."""

import re
import shlex
from pathlib import Path

import pytest

import bilevel
import irl
from benchmarks.show import solver_tables

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text("utf8") for page in PAGES}
SLOW = {"docs/verify.md", "docs/devices.md", "docs/irl.md"}
WITH_PYTHON = [name for name, text in TEXT.items() if "```python\n" in text]


def blocks(name: str, language: str) -> list[tuple[int, str]]:
    """(line, code) of a page's fenced blocks. Those with a title are files to copy: test_skeletons.py runs them."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", TEXT[name], re.MULTILINE | re.DOTALL)
    return [(TEXT[name].count("\n", 0, match.start()) + 1, match.group(1)) for match in found]


def test_pages_with_code_are_found():
    assert {"README.md", "docs/index.md", "docs/concepts.md", "docs/verify.md"} <= set(WITH_PYTHON)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in WITH_PYTHON])
def test_python_blocks_run(name, monkeypatch, tmp_path):
    """In order, in one namespace a page."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for line, code in blocks(name, "python"):
        exec(compile("\n" * line + code, str(ROOT / name), "exec"), namespace)
    assert namespace["problem"].validate()
    if name == "README.md":  # the one page without assertions of its own
        assert namespace["solution"].status == bilevel.Status.CONVERGED


def test_the_readmes_example_is_short():
    ((_, code),) = blocks("README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_commands_in_the_pages_parse():
    """Each `bilevax …` line names a command and options that exist."""
    from typer.main import get_command

    from benchmarks.cli.main import app

    commands = get_command(app).commands
    lines = [line for name in TEXT for _, code in blocks(name, "sh") for line in code.splitlines()]
    calls = [shlex.split(line)[1:] for line in lines if line.startswith("bilevax ")]
    assert calls
    for name, *arguments in calls:
        arguments = [argument for argument in arguments if argument != "--help"]
        commands[name].make_context(name, arguments)


@pytest.mark.parametrize("page", solver_tables.PAGES)
def test_the_tables_of_solvers_are_current(page):
    """If not: python -m benchmarks.show.solver_tables --write."""
    assert {found[2] for found in solver_tables.BLOCK.finditer(TEXT[page])} == set(solver_tables.PAGES[page])
    assert solver_tables.current(TEXT[page]) == TEXT[page]


def test_every_status_has_a_row():
    rows = re.findall(r"^\| `([A-Z_]+)` \|", TEXT["docs/not-converging.md"], re.MULTILINE)
    assert sorted(rows) == sorted(status.name for status in bilevel.Status)


def test_every_solver_has_a_row():
    for name, kind in bilevel.solvers.ALL.items():
        if kind.__module__.startswith("bilevel.solvers."):
            assert kind.about is not None, f"{name}.about says nothing"
            assert f"| `{name}`" in TEXT["README.md"]


def test_cited_identifiers_are_in_the_bibliography():
    bibliography = (ROOT / "docs/references.bib").read_text("utf8")
    cited = set()
    for path in (ROOT / "bilevel").rglob("*.py"):
        cited |= set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", path.read_text("utf8")))
    assert cited
    assert not {number for number in cited if f"{{{number}}}" not in bibliography}


def documented() -> set[str]:
    """The dotted names that the pages of the API render: whole modules as their prefix with a star."""
    found = set()
    for name, text in TEXT.items():
        if name.startswith("docs/api-"):
            for entry in re.finditer(r"^::: (\S+)\n(?P<options>(?:    .*\n)*)", text, re.MULTILINE):
                members = re.search(r"members: \[(.*?)\]", entry["options"])
                listed = members[1].split(", ") if members else ["*"]
                found |= {entry[1], *(f"{entry[1]}.{member}" for member in listed)}
    return found


@pytest.mark.parametrize("package", [bilevel, irl])
def test_every_public_name_is_on_a_page_of_the_api(package):
    shown, missing = documented(), []
    for name in package.__all__:
        thing = getattr(package, name)
        module = getattr(thing, "__module__", "types")  # a module has none, and neither has a union of types
        if module != "types" and not {f"{module}.{name}", f"{module}.*"} & shown:
            missing.append(f"{module}.{name}")
    assert not missing, "a ::: entry on one of docs/api-*.md"
