"""Names that people type stay valid: those that the documentation mentions, and those that version 0.1.0 had."""

import importlib
import re
import sys
import warnings
from pathlib import Path

import pytest

import bilevel
from bilevel.backend.moved import MOVED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALWAYS = ("bilevel.linear.CG", "bilevel.lower.solve", "bilevel.oracles.hvp", "bilevel.run.solve", "bilevel.checkpoint")
FILES = (".py", ".md", ".toml", ".json", ".npz")


def mentioned() -> set[str]:
    """Dotted names below the four packages that stand in a page."""
    found = set()
    for page in PAGES:
        for name in re.findall(r"(?<![\w./-])((?:bilevel|irl|problems|benchmarks)(?:\.\w+)+)", page.read_text("utf8")):
            if not name.endswith(FILES):
                found.add(name)
    return found


def resolve(dotted: str) -> object:
    """What the name means: the longest part of it that is a module, then attributes."""
    parts = dotted.split(".")
    for k in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[k:]:
            value = getattr(value, attribute)
        return value
    raise ModuleNotFoundError(dotted)


def test_names_in_the_pages_are_found():
    assert {"bilevel.solve", "bilevel.hypergradient", "irl.to_bilevel"} <= mentioned()


@pytest.mark.parametrize("name", sorted({*mentioned(), *ALWAYS}))
def test_names_in_the_pages_mean_something(name):
    resolve(name)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_modules_of_the_last_version_are_found_with_a_warning(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        assert importlib.import_module(old) is importlib.import_module(MOVED[old])


def test_an_old_module_is_an_attribute_too():
    sys.modules.pop("bilevel.polyhedral", None)
    vars(bilevel).pop("polyhedral", None)
    with pytest.warns(DeprecationWarning, match=r"bilevel\.lower\.polyhedral"):
        assert bilevel.polyhedral.solve is not None


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_old_name_is_an_attribute_of_its_package(old, monkeypatch):
    package, _, name = old.rpartition(".")
    module = importlib.import_module(package)
    monkeypatch.delitem(vars(module), name, raising=False)  # where an earlier import left it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # only the first import of a name warns
        assert getattr(module, name) is importlib.import_module(MOVED[old])
