"""Docstrings: no sentence is cut by a blank line, and no symbol is capitalised because it begins one."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "bilevel", "irl", "problems", "benchmarks"
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
KINDS = ast.Module, ast.ClassDef, ast.FunctionDef
ENDS = re.compile(
    r"[.:;,!?]$|\)$|^\s{4}|^- "
)  # of a paragraph's last line: punctuation, a formula, or an item of a list
GOES_ON = re.compile(r"^(\s{4}|\d+[a-z]?\. |- )")  # the next paragraph is a formula or a list


def docstrings(text):
    """(line, names of the arguments, docstring) of everything that has one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, KINDS) and (found := ast.get_docstring(node)):
            arguments = node.args if isinstance(node, ast.FunctionDef) else ast.arguments(args=[], kwonlyargs=[])
            names = {argument.arg for argument in [*arguments.args, *arguments.kwonlyargs]}
            yield getattr(node, "lineno", 1), names, found


def cut(text):
    """Lines of definitions whose docstrings have a paragraph that ends in the middle of a sentence."""
    for line, _, docstring in docstrings(text):
        parts = docstring.split("\n\n")
        for before, after in itertools.pairwise(parts):
            if not ENDS.search(before.rstrip().splitlines()[-1]) and not GOES_ON.match(after):
                yield line


def capitalised(text):
    """Lines of functions whose docstrings begin with an argument of one letter, in the wrong case, or with its call."""
    for line, names, docstring in docstrings(text):
        word, after = re.match(r"(\w*)(.?)", docstring).groups()
        other = word[:1].lower() + word[1:]
        if word != other and other in names and word not in {*names, "A"} and (len(word) == 1 or after == "("):
            yield line


def test_faults_are_seen():
    assert list(cut('def f():\n    """Steps for which a bound\n\n    is known."""'))
    assert not list(cut('def f():\n    """The steps of\n\n        x <- x - a g\n\n    are these."""'))
    assert list(capitalised('def f(x):\n    """X minus one."""'))
    assert list(capitalised('def f(look):\n    """Look(state) after each step."""'))
    assert not list(capitalised('def f(a, x):\n    """A point F(x)."""'))


@pytest.mark.parametrize("find", [cut, capitalised])
def test_no_docstring_has_one(find):
    found = [f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in find(path.read_text("utf8"))]
    assert not found
