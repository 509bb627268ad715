"""Imports only go down: read from the source, so that lazy imports inside functions count, too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = (  # lowest first; files on one floor do not import each other
    {"struct", "least_distance", "tracing", "precision", "nets"},
    {"sharding"},
    {"record", "sets", "data", "estimators", "active_set"},
    {"problem", "checkpoint"},
    {"report", "per_sample", "constraints"},
    {"oracles"},
    {"sample_oracles"},
    {"linear", "step", "sampling", "polyhedral"},
    {"nystrom"},
    {"polyhedral_gradient", "projected", "lagrangian", "refine"},
    {"projected_gradient", "lower", "tracking", "renewal", "answer"},
    {"hypergradient"},
    {"goldstein", "implicit", "gap"},
    {"diagnostics"},
    {"tuning", "theory", "theory_nonsmooth", "assumptions"},
    {"reference"},
    {"solver"},
    {"solvers", "lanes"},
    {"run"},
    {"guarantees"},
)
ALLOWED = {("record", "report")}  # str(solution) asks for the report, lazily
HEIGHT = {name: k for k, floor in enumerate(FLOORS) for name in floor}
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
    """The module of bilevel that bilevel.<module>[.…] means; the package itself for names that it re-exports."""
    name = [*dotted.split("."), ""][1]
    path = ROOT / "bilevel" / name
    return name if name and (path.is_dir() or path.with_suffix(".py").exists()) else "bilevel"


def upward(path: Path) -> list[str]:
    """Why each upward import of the file is one."""
    me, wrong = path.relative_to(ROOT).with_suffix("").parts, []
    for name in imports(path):
        top = name.split(".")[0]
        if top not in TOP:
            continue
        if TOP[top] > TOP[me[0]]:
            wrong.append(f"{'/'.join(me)} imports {name}: {top} is above {me[0]}")
        if me[0] != "bilevel" or top != "bilevel" or me == ("bilevel", "__init__"):
            continue
        here, there = me[1], module_of(name)
        if here == "solvers":
            if (there == "solvers" and me[-1] != "__init__") or there in ("run", "bilevel"):
                wrong.append(f"{'/'.join(me)} imports {name}: solvers import neither each other, run nor the package")
        elif there not in HEIGHT or (HEIGHT[there] >= HEIGHT[here] and (here, there) not in ALLOWED):
            wrong.append(f"{'/'.join(me)} imports {name}: not on a lower floor")
    return wrong


def test_every_file_has_a_floor():
    names = {path.stem if path.parent.name == "bilevel" else "solvers" for path in files("bilevel")} - {"__init__"}
    assert names <= set(HEIGHT), f"give {names - set(HEIGHT)} a floor in this test"


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
        ("bilevel/linear.py", "def f():\n    import bilevel.run"),
        ("bilevel/linear.py", "import bilevel"),
        ("bilevel/lower.py", "import problems.quadratic"),
        ("bilevel/solvers/soba.py", "from bilevel.solvers.aid import AID"),
        ("bilevel/solvers/soba.py", "from bilevel.run import advance"),
        ("bilevel/solvers/soba.py", "from bilevel import SOBA"),
        ("irl/mdp.py", "from benchmarks import cli"),
        ("problems/ridge.py", "import benchmarks"),
    ],
)
def test_the_check_sees_upward_imports(where, line, tmp_path, monkeypatch):
    """A copy of the tree's names with one offending file."""
    for path in files("bilevel"):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(ROOT)).touch()
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert upward(tmp_path / where)


def test_import_is_light():
    """Slow packages stay out until something needs them."""
    program = "import sys, bilevel; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"cvxpy", "sklearn", "matplotlib", "flax", "hypothesis", "rich", "typer", "problems", "benchmarks", "irl"}
    assert not heavy & set(loaded.stdout.split())
