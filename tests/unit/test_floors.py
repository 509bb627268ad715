"""Imports only go down: read from the source, so that lazy imports inside functions count, too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = (  # of the files and folders at the top of bilevel: each imports those above it alone
    "backend",
    "struct",
    "qp",
    "linear",
    "report",
    "record",
    "solution",
    "step",
    "sets",
    "data",
    "problem",
    "constraints",
    "solver",
    "oracles",
    "theory",
    "reference",
    "lower",
    "sampled",
    "hypergradient",
    "implicit",
    "parts",
    "diagnostics",
    "solvers",
    "recommend",
    "run",
    "guarantees",
)
FOLDERS = {  # the same in the other packages, where their files go straight into the order
    "irl": ("mdp", "archives", "demonstrations", "rewards", "problem", "tabular", "deep", "solvers"),
    "benchmarks": ("errors", "judge", "study", "show", "peers", "experiments", "cli"),
}
HEIGHT = {"bilevel": ORDER, **FOLDERS}
MOST = 26  # files and folders at the top of bilevel, besides __init__.py and py.typed
LEVELS = 11  # the longest chain of imports among them
ARROWS = 120  # pairs of them of which one imports the other
TOP = {"bilevel": 0, "irl": 1, "problems": 2, "benchmarks": 3}


def imports(path: Path) -> list[str]:
    """Dotted names that the file imports, `from a import b` as a.b; relative ones made absolute."""
    found = []
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            prefix = ".".join(part for part in (base, node.module) if part)
            found += [f"{prefix}.{alias.name}" for alias in node.names]
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(dotted: str) -> str:
    """The file or folder at the top of a package that <package>.<name>[.…] means; the package itself for names that it
    re-exports.
    """
    package, name = [*dotted.split("."), ""][:2]
    path = ROOT / package / name
    return name if name and (path.is_dir() or path.with_suffix(".py").exists()) else package


def upward(path: Path) -> list[str]:
    """Why each upward import of the file is one."""
    me, wrong = path.relative_to(ROOT).with_suffix("").parts, []
    for name in imports(path):
        top = name.split(".")[0]
        if top not in TOP:
            continue
        if TOP[top] > TOP[me[0]]:
            wrong.append(f"{'/'.join(me)} imports {name}: {top} is above {me[0]}")
        order = HEIGHT.get(me[0], ())
        if top != me[0] or not order or me[1:] == ("__init__",):
            continue
        here, there = me[1], module_of(name)
        if here == "solvers" and there == "solvers":
            if me[-1] != "__init__" and not name.split(".")[-2].startswith("_") and top == "bilevel":
                wrong.append(f"{'/'.join(me)} imports {name}: solvers do not import each other")
        elif here not in order or there not in order or order.index(there) > order.index(here):
            wrong.append(f"{'/'.join(me)} imports {name}: not above it in the order")
    return wrong


def tops(package: str) -> set[str]:
    return {path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in files(package)} - {"__init__"}


@pytest.mark.parametrize("package", HEIGHT)
def test_everything_at_the_top_has_its_place(package):
    assert tops(package) == set(HEIGHT[package])


def arrows(package: str) -> set[tuple[str, str]]:
    """(file or folder at the top, one that it imports)."""
    found = set()
    for path in files(package):
        me = path.relative_to(ROOT).with_suffix("").parts[1]
        found |= {(me, module_of(name)) for name in imports(path) if name.startswith(f"{package}.")}
    return {(a, b) for a, b in found if a != b and "__init__" not in (a, b)}


def test_the_house_is_small_enough_to_hold_in_the_head():
    pairs = arrows("bilevel")
    level = {}
    for name in ORDER:
        level[name] = 1 + max((level[b] for a, b in pairs if a == name), default=0)
    assert len(tops("bilevel")) <= MOST
    assert max(level.values()) <= LEVELS
    assert len(pairs) <= ARROWS


@pytest.mark.parametrize("package", TOP)
def test_files_do_not_import_each_other_in_a_circle(package):
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files(package)}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    ahead = {
        name: {hit for dotted in imports(path) for hit in (dotted, dotted.rpartition(".")[0]) if hit in names} - {name}
        for name, path in names.items()
        if path.name != "__init__.py"  # a folder's face imports what is in it, which imports other folders' faces
    }
    while ends := [name for name, deps in ahead.items() if not deps & set(ahead)]:
        for name in ends:
            del ahead[name]
    assert not ahead


@pytest.mark.parametrize("package", TOP)
def test_imports_go_down(package):
    assert files(package)
    assert [why for path in files(package) for why in upward(path)] == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("bilevel/sets.py", "from bilevel.problem import Minimize"),
        ("bilevel/sets.py", "from bilevel import problem"),
        ("bilevel/sets.py", "from .problem import Minimize"),
        ("bilevel/sets.py", "from bilevel import data"),
        ("bilevel/linear/solvers.py", "def f():\n    import bilevel.run"),
        ("bilevel/linear/solvers.py", "import bilevel"),
        ("bilevel/lower/newton.py", "import problems.quadratic"),
        ("bilevel/lower/newton.py", "from bilevel.hypergradient import hypergradient"),
        ("bilevel/solvers/implicit/soba.py", "from bilevel.solvers.implicit.aid import AID"),
        ("bilevel/solvers/implicit/soba.py", "from bilevel.solvers import AID"),
        ("bilevel/solvers/implicit/soba.py", "from bilevel.run import advance"),
        ("bilevel/solvers/implicit/soba.py", "from bilevel import SOBA"),
        ("irl/mdp.py", "from benchmarks import cli"),
        ("irl/tabular/soft.py", "from irl.deep import sac"),
        ("benchmarks/study/runner.py", "from benchmarks.cli import main"),
        ("problems/ridge.py", "import benchmarks"),
    ],
)
def test_the_check_sees_upward_imports(where, line, tmp_path, monkeypatch):
    """A copy of the tree's names with one offending file."""
    for path in (path for package in HEIGHT for path in files(package)):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(ROOT)).touch()
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert upward(tmp_path / where)


@pytest.mark.process
def test_import_is_light():
    """Slow packages stay out until something needs them."""
    program = "import sys, bilevel; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"cvxpy", "sklearn", "matplotlib", "flax", "hypothesis", "rich", "typer", "problems", "benchmarks", "irl"}
    assert not heavy & set(loaded.stdout.split())
