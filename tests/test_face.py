"""The public face: what `bilevel` and `irl` show of themselves is spelt out, complete and nothing else."""

import ast
import dataclasses
import importlib.metadata
import inspect
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import bilevel
import irl
from bilevel.backend import moved

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", [bilevel, irl])
def test_solvers_that_are_spelt_out_are_those_that_are_found(package):
    shown = {name for name in package.__all__ if isinstance(getattr(package, name), type)}
    listed = {name for name in shown if issubclass(getattr(package, name), bilevel.Solver)}
    listed -= {"Solver", "AugmentedLagrangian"}  # the base, and what is made around another solver
    assert listed == set(package.solvers.ALL), f"write it in {package.__name__}/__init__.py and in its __all__"
    for name in listed:
        assert getattr(package, name) is package.solvers.ALL[name]


@pytest.mark.parametrize("package", [bilevel, irl])
def test_dir_is_the_list_and_the_version(package):
    assert len(set(package.__all__)) == len(package.__all__)
    assert sorted(dir(package)) == sorted([*package.__all__, "__version__"])
    for name in package.__all__:
        owner = getattr(package, name)
        module = owner.__name__ if isinstance(owner, ModuleType) else getattr(owner, "__module__", package.__name__)
        assert module.partition(".")[0] in ("bilevel", "irl", "types"), f"{package.__name__}.{name} is {module}'s"


ALL = {**bilevel.solvers.ALL, **irl.solvers.ALL}


@pytest.mark.parametrize("name", ALL)
def test_what_rests_on_an_abstract_or_on_memory_says_so_first(name):
    kind = ALL[name]
    doc = " ".join(kind.__doc__.split())
    reported = re.search(r"from (its|the) abstract|from memory|not at hand", doc) is not None
    assert bool(kind.experimental) == reported
    assert doc.startswith(f"Experimental: {kind.experimental}. ") == reported


@pytest.mark.parametrize("name", ALL)
def test_each_setting_has_a_line_of_its_own(name):
    docs = "\n".join(inspect.getdoc(base) or "" for base in ALL[name].__mro__ if dataclasses.is_dataclass(base))
    for field in dataclasses.fields(ALL[name]):
        assert re.search(rf"^ +{field.name}: ", docs, re.MULTILINE), f"{name}'s docstring has no line on {field.name}"


@pytest.mark.parametrize("name", ALL)
def test_each_field_of_a_state_or_info_says_what_it_is(name):
    module = ast.parse(Path(inspect.getfile(ALL[name])).read_text())
    for kind in (node for node in module.body if isinstance(node, ast.ClassDef) and node.name in ("State", "Info")):
        for field, after in zip(kind.body, [*kind.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert said, f"{name}: {kind.name}.{ast.unparse(field.target)}"


@pytest.mark.parametrize("name", ["bilevel", "irl", "problems", "benchmarks"])
def test_packages_are_typed(name):
    assert (ROOT / name / "py.typed").is_file()


def test_an_unknown_name_has_a_near_one():
    with pytest.raises(AttributeError, match=r"module 'bilevel' has no attribute 'SOBBA'\. Did you mean 'SOBA'\?"):
        bilevel.SOBBA  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'irl' has no attribute 'MLIRLL'\. Did you mean 'MLIRL'\?"):
        irl.MLIRLL  # noqa: B018


def test_the_version_is_the_distributions(monkeypatch):
    assert bilevel.__version__ == irl.__version__ == importlib.metadata.version("bilevax")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert moved.version() == "0"  # in a folder that is not installed there is none to tell


def test_a_solve_needs_the_hard_dependencies_alone(program):
    done = subprocess.run(program("hard_dependencies"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SOBA (tol" in done.stdout


def test_the_command_says_what_to_install(program):
    done = subprocess.run([*program("hard_dependencies"), "command"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == 'typer is not installed; it comes with: pip install "bilevax[cli]"'
