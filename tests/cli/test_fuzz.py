"""Files that hold something else: each change of a run or of a suite is read as what it is, or refused by name."""

import copy
import json
import random

import pytest
from typer.testing import CliRunner

from benchmarks.cli.main import app
from benchmarks.errors import UsageError
from benchmarks.show import compare, report, sheets
from benchmarks.study import registry, suites

PROBLEM = "quadratic[dim_x=2]"
HOSTILE = [
    None, True, -5, 10**12, 10**400, 1e308, -1.5, "", "x", "\x1b[2J", [], {}, [1], {"a": 1}, [[]], [None], "SOBA[",
    "SOBA[" + "(" * 500 + "]", "a" * 1000,
]  # fmt: skip
SUITE = {
    "tuning": {"trials": 3, "seeds": [2], "score": "value"},
    "problem": [
        {"run": PROBLEM, "seeds": 2, "max_steps": 10, "solvers": [
            {"run": "SOBA", "tune": {"upper_step_size": [0.01, 1.0]}, "tol": 1e-3},
            {"run": "AID", "tune": {"upper_step_size": [0.01, 1.0]}, "max_passes": 20.0},
        ]},
    ],
}  # fmt: skip


def paths(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def mutated(tree, rng):
    """`tree` with one node changed, renamed or taken out."""
    tree = copy.deepcopy(tree)
    path = rng.choice(list(paths(tree)))
    if not path:
        return rng.choice(HOSTILE)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    how = rng.random()
    if how < 0.25:
        del parent[path[-1]]
    elif how < 0.35 and isinstance(parent, dict):
        parent["\x1b]0;name\x07"] = parent.pop(path[-1])
    else:
        parent[path[-1]] = rng.choice(HOSTILE)
    return tree


def toml(value):
    """The value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(v) for v in value if v is not None) + "]"
    return json.dumps(value)


@pytest.fixture
def folder(synthetic, tmp_path):
    """A run with everything that a result can hold."""
    full, plain = (synthetic.result(synthetic.rows(values)) for values in ([1.0, 0.5, 0.1], [1.0, 0.6, 0.2]))
    full |= {"active": [{"oracles": 0.0, "time": 0.0, "count": 1, "changed": 0}], "metrics": {"accuracy": 0.5},
             "maps": {"true reward": [[0.0, 1.0], [1.0, 2.0]]}, "tuned": "SOBA[upper_step_size=0.1]"}  # fmt: skip
    full["stats"]["failed"] = {"a sentence": 1}
    cells = {(PROBLEM, "SOBA", 0): full, (PROBLEM, "AID", 0): plain, (PROBLEM, "SOBA", 1): plain}
    return synthetic.write(tmp_path / "run", cells | {(PROBLEM, "AID", 1): None}, {(PROBLEM, 0): 0.0})


def show_all(folder):
    """Everything that is made from a folder but pictures, which take long; as one text."""
    summary = report.summarise(report.load(folder))
    found = compare.compare([folder])
    texts = [form(found, "quantiles") for form in sheets.FORMATS.values()]
    return "".join([report.as_text(summary), report.as_csv(summary), *texts])


def test_a_changed_result_is_shown_or_named(folder):
    rng = random.Random(0)
    show_all(folder)
    files = sorted(folder.rglob("*.json"))
    count = {"shown": 0, "named": 0}
    for _ in range(300):
        path = rng.choice(files)
        before = path.read_bytes()
        path.write_text("[" * 100_000 if rng.random() < 0.02 else json.dumps(mutated(json.loads(before), rng)))
        try:
            text = show_all(folder)
            count["shown"] += 1
        except UsageError as error:
            text = str(error)
            assert str(folder) in text
            count["named"] += 1
        assert "\x1b" not in text
        path.write_bytes(before)
    assert min(count.values()) > 30


def test_a_changed_suite_is_read_or_named(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "mine.toml"
    count = {"read": 0, "named": 0}
    for _ in range(500):
        tree = mutated(SUITE, rng)
        lines = [f"{json.dumps(k)} = {toml(v)}" for k, v in tree.items()] if isinstance(tree, dict) else [toml(tree)]
        path.write_text("a = " + "[" * 20_000 if rng.random() < 0.02 else "\n".join(lines))
        try:
            cells = suites.read_suite(str(path))[1]
            for text in {cell.problem for cell in cells}:
                registry.check_problem(text)
            for text in {cell.solver for cell in cells}:
                registry.build_solver(text)
            suites.suite_text(cells)
            said = ""
            count["read"] += 1
        except UsageError as error:
            said = str(error)
            count["named"] += 1
        assert "\x1b" not in said
    assert min(count.values()) > 30


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("settings.json", {"precision": 16}, "damaged (precision: got 16; expected 32, 64)"),
        ("settings.json", {"cells": {}}, "damaged (cells: got dict; expected a list)"),
        ("settings.json", {"name": "a\x1b[2Jb", "cells": 1}, "damaged (cells: got 1"),
        ("cells", {"status": "FINE"}, "damaged (status: got 'FINE'; expected ERROR, UNSUPPORTED, CONVERGED"),
        ("cells", {"record": [{"step": -5}]}, "damaged (record[0].value: got nothing; expected a value"),
        ("cells", {"stats": {}}, "damaged (stats.oracles: got nothing"),
        ("instances", {"sizes": [1, 2]}, "damaged (sizes: got list; expected a table)"),
    ],
)
def test_the_file_and_the_field_are_named(folder, name, change, expected):
    path = next(path for path in sorted(folder.rglob("*.json")) if name in str(path.relative_to(folder)))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError) as caught:
        show_all(folder)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_a_finished_cell_without_its_instance(folder):
    next(folder.glob("instances/*seed1.json")).unlink()
    with pytest.raises(UsageError, match=r"seed1\.json: it is missing"):
        show_all(folder)


@pytest.mark.parametrize("value", ["-5", "1000000000000", "1e12", "nan"])
def test_a_step_that_no_run_can_have(folder, value):
    path = next(folder.glob("cells/*.json"))
    path.write_text(path.read_text().replace('"step": 10,', f'"step": {value.replace("nan", "NaN")},', 1))
    with pytest.raises(UsageError, match=r"record\[1\]\.step: got .*expected a whole number in \[0, 2147483646\]"):
        show_all(folder)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--seeds", "1000000000", "at most 100000"),
        ("--max-steps", "100000000000", "--max-steps: got 100000000000; expected a whole number in"),
        ("--max-passes", "inf", "--max-passes: got inf; expected a finite number >= 0"),
        ("--tol", "inf", "--tol: got inf; expected a finite number >= 0"),
        ("--every", "1000000000000", "--every: got 1000000000000"),
        ("--time-limit", "inf", "--time-limit: got inf"),
    ],
)
@pytest.mark.parametrize("what", [["-p", "quadratic", "-s", "SOBA"], ["--suite", "quickstart"]])
def test_limits_without_end_are_bad_usage(what, option, value, expected, tmp_path):
    called = CliRunner().invoke(app, ["run", *what, option, value, "--out", str(tmp_path / "out")])
    assert called.exit_code == 2
    assert expected in called.stderr
    assert not (tmp_path / "out").exists()
