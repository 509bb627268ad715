"""Sweeps: the bits of `bilevax run`; a killed worker's cell runs again; finished cells never do; cores are shared."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from benchmarks.cli.main import app
from benchmarks.errors import UsageError
from benchmarks.study import files, registry, sweep

STUDY = [
    "-p",
    "quadratic[dim_x=2,dim_y=2]",
    "-s",
    "SOBA",
    "-s",
    "AID",
    "--seeds",
    "2",
    "--max-steps",
    "50",
    "--no-plot",
]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def without_times(path):
    result = json.loads(path.read_text())
    for row in [*result["record"], result["stats"]]:
        for name in [name for name in row if name.endswith("time")]:
            del row[name]
    return result


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "two"
    return call("sweep", *STUDY, "--workers", 2, "--out", folder, "--json"), folder


@pytest.mark.process
@pytest.mark.slow
def test_two_workers_give_the_bits_of_run(swept, tmp_path):
    result, folder = swept
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["statuses"] == {"MAX_STEPS": 4}
    assert call("run", *STUDY, "--out", tmp_path / "one").exit_code == 0
    for path in (tmp_path / "one/cells").iterdir():
        other = folder / "cells" / path.name
        if path.suffix == ".json":
            assert without_times(path) == without_times(other)
        else:
            assert path.read_bytes() == other.read_bytes()


def test_finished_cells_never_run_again(swept, monkeypatch):
    _, folder = swept
    monkeypatch.setattr(sweep, "task", lambda *arguments: pytest.fail("ran"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*")}
    assert call("sweep", *STUDY, "--workers", 2, "--out", folder).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("cells/*")} == before


@pytest.fixture
def study(tmp_path, synthetic, monkeypatch):
    """(folder, cells, run): a study whose cells only say that they ran; `run(deadly)` kills the workers of some cells.

    `deadly` maps a cell's number to how many times it kills. The tasks need no JAX, so that workers start quickly.
    """
    defaults = sweep.Place._field_defaults.values()
    place = namedtuple("Place", sweep.Place._fields, defaults=defaults)  # classes of here travel by value
    monkeypatch.setattr(sweep, "Place", place)
    text = {"problem": "quadratic", "solver": "SOBA"}
    cells = [dataclasses.make_dataclass("Cell", [*text, "seed"])(**text, seed=seed) for seed in range(6)]
    whole = synthetic.result(synthetic.rows([1.0, 0.5]))
    done = [(str(files.cell_path(tmp_path, k, cell)), whole | {"cell": vars(cell)}) for k, cell in enumerate(cells)]
    (tmp_path / "cells").mkdir()

    def run(deadly, backend=sweep.LOCAL, signal_number=int(signal.SIGKILL)):
        folder = str(tmp_path)

        def task(place, index, cell):  # local, so that it travels by value
            import json
            import os
            import pathlib

            tries = pathlib.Path(folder, f"tries-{index}")
            count = len(tries.read_text()) if tries.exists() else 0
            tries.write_text("x" * (count + 1))
            if count < deadly.get(index, 0):
                os.kill(os.getpid(), signal_number)
            path, result = done[index]
            pathlib.Path(path).write_text(json.dumps(result))
            return index

        monkeypatch.setattr(sweep, "task", task)
        seen = []
        assert sweep.sweep(tmp_path, cells, lambda count, cell: seen.append(count), workers=2, backend=backend)
        tries = [len((tmp_path / f"tries-{k}").read_text()) for k in range(len(cells))]
        return [files.read_cell(tmp_path, k, cell) for k, cell in enumerate(cells)], tries, seen

    return run


def cluster(backend, package):
    missing = importlib.util.find_spec(package) is None
    return pytest.param(
        backend, marks=pytest.mark.skipif(missing, reason=f"no {package}: pip install bilevax[{backend}]")
    )


@pytest.mark.process
@pytest.mark.parametrize("backend", [sweep.LOCAL, cluster("dask", "distributed"), cluster("ray", "ray")])
@pytest.mark.filterwarnings("ignore")  # of what the clusters leave open
def test_a_killed_worker_s_cell_is_run_again(study, backend):
    results, tries, seen = study({2: 1}, backend)
    assert [result["status"] for result in results] == ["MAX_STEPS"] * 6
    assert tries[2] == 2
    assert seen[-1] == 6


@pytest.mark.process
def test_a_cell_that_always_kills_becomes_a_row_and_the_others_finish(study, monkeypatch):
    monkeypatch.setattr(sweep, "BREAKS", 1)
    results, tries, _ = study({1: 99})
    assert [result["status"] for result in results] == ["MAX_STEPS", "ERROR", *["MAX_STEPS"] * 4]
    assert "the worker process died each time" in results[1]["reason"]
    assert tries[1] == sweep.BREAKS + 1


def test_a_worker_does_not_run_what_is_finished(tmp_path, synthetic, monkeypatch):
    """A cluster that has lost what a worker answered asks once more."""
    cell = registry.Cell("quadratic", "SOBA", 0)
    result = synthetic.result(synthetic.rows([1.0, 0.5])) | {"cell": dataclasses.asdict(cell)}
    files.write_json(files.cell_path(tmp_path, 0, cell), result)
    monkeypatch.setattr(sweep, "run_cell", lambda *arguments: pytest.fail("ran"))
    assert sweep.task(sweep.Place(tmp_path, 64, None), 0, cell) == 0


def test_a_worker_compiles_by_the_flags_of_its_study(tmp_path, monkeypatch):
    """A cluster's workers were started without them; other flags of XLA are other bits."""
    seen = []
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(sweep, "run_cell", lambda *arguments: seen.append(os.environ["XLA_FLAGS"]))
    place = sweep.Place(tmp_path, 64, None, flags="--xla_one=1")
    assert sweep.task(place, 0, registry.Cell("quadratic", "SOBA", 0)) == 0
    assert seen == ["--xla_one=1"]


def test_shares_of_the_cores_are_disjoint_and_whole():
    assert sweep.shares([0, 1, 2, 3, 4], 2) == ((0, 2, 4), (1, 3))
    assert sweep.shares([3, 5], 2) == ((3,), (5,))
    assert sweep.shares([3, 5], 3) == ((3,), (5,), (3,))


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind threads to cores")
def test_a_worker_binds_all_its_threads_to_a_free_share_and_ends_with_its_parent(tmp_path, program):
    first, *_, last = sweep.cores() * 2
    with FileLock(tmp_path / "0"):  # as another worker holds its share
        arguments = [*program("bound_worker"), str(tmp_path), str(first), str(last)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == sweep.ORPHANED, done.stderr
    assert done.stdout.strip() == str({(last,)})


def test_bad_backends_say_what_is_expected(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="expected loky, dask, ray"):
        sweep.sweep(tmp_path, [], print, workers=2, backend="slurm")
    with pytest.raises(UsageError, match="name its --backend"):
        sweep.sweep(tmp_path, [], print, workers=2, scheduler="tcp://head:1")
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(UsageError, match=r"pip install bilevax\[dask\]"):
        sweep.sweep(tmp_path, [], print, workers=2, backend="dask")
