"""Watching a study: a line for each run as it ends, the end of the watching, and who holds the folder."""

import csv
import io
import json
import shutil

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from benchmarks.cli.main import app
from benchmarks.show import watch
from benchmarks.study import files


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path, synthetic):
    """A run of three cells; the last has failed."""
    rows, result = synthetic.rows, synthetic.result
    found = {("q[a=1]", "A[x=1]", k): result(rows([3.0, 1.0]), "CONVERGED") for k in (0, 1)}
    found["q[a=1]", "B", 0] = result([], "ERROR", reason="ValueError: no")
    return synthetic.write(tmp_path / "run", found, optima={("q[a=1]", k): 0.5 for k in (0, 1)})


def test_a_finished_study_is_told_and_ends(folder):
    shown = call("watch", folder)
    assert shown.exit_code == 1  # a run failed
    assert "1/3 q[a=1] A[x=1] seed 0: CONVERGED, F 1 (F - F* = 5.0e-01)" in shown.stdout
    assert "3/3 q[a=1] B seed 0: ERROR, ValueError: no" in shown.stdout
    assert "3 cells:" in shown.stdout
    (line,) = call("watch", folder, "--json").stdout.splitlines()
    assert json.loads(line) | {"lines": []} == {"lines": [], "done": 3, "total": 3, "running": False}


def test_results_are_told_as_they_come(folder):
    path = next(folder.glob("cells/002-*.json"))
    kept = path.with_suffix(".kept")
    shutil.move(path, kept)
    with FileLock(folder / files.LOCK):  # somebody runs it
        looks = watch.follow(folder, 0.01)
        first = next(looks)
        assert (first.done, first.running, len(first.lines)) == (2, True, 2)
        assert (next(looks).lines, next(looks).lines) == ([], [])
        shutil.move(kept, path)
        last = next(looks)
        assert (last.done, last.running) == (3, False)
        assert list(looks) == []


def test_nobody_runs_what_is_left(folder):
    for path in folder.glob("cells/*.json"):
        path.unlink()
    shown = call("watch", folder)
    assert shown.exit_code == 1
    assert "nobody runs what is left" in shown.stderr


def test_a_folder_that_is_no_run_is_named(tmp_path):
    shown = call("watch", tmp_path)
    assert shown.exit_code == 2
    assert "no settings.json" in shown.stderr


def test_measurements_are_written_as_benchopt_reads_them(folder):
    shown = call("compare", folder, "--format", "benchopt")
    assert shown.exit_code == 0, shown.output
    lines = list(csv.DictReader(io.StringIO(shown.stdout)))
    assert len(lines) == 2 * 2
    wanted = {"objective_name": "Bilevel Optimization", "data_name": "q[a=1]", "solver_name": "A[x=1]", "idx_rep": "1",
              "stop_val": "10", "objective_value": "1.0", "p_solver_x": "1", "p_dataset_a": "1",
              "sampling_strategy": "Iteration"}  # fmt: skip
    assert wanted.items() <= lines[-1].items()
    assert "benchopt" in call("compare", folder, "--format", "xml").stderr
