"""Faults: what is finished stays, nothing is overwritten, and each is a message that names the file or folder."""

import errno
import json
import os
import stat
import subprocess

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.cli.main import app
from benchmarks.study import files, runner
from bilevel.backend.files import write_atomically

STUDY = ["-p", "quadratic[dim_x=2,dim_y=2]", "-s", "SOBA", "--seeds", "3", "--max-steps", "20", "--no-plot"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def quick(synthetic, monkeypatch):
    """`bilevax run` whose cells end at once, so that nothing but the files is tested; gives the seeds that ran."""
    ran = []

    def run(cell, instance, solver, path, live):
        ran.append(cell.seed)
        files.save_point(path.with_suffix(".npz"), np.zeros(2), np.zeros(2))
        return {"status": "MAX_STEPS"} | {
            name: synthetic.result(synthetic.rows([1.0, 0.5]))[name] for name in ("stats", "record", "referee")
        }

    known = {"sizes": {"x": 2, "y": 2}, "optimum": None, "tags": [], "baselines": {}}
    monkeypatch.setattr(runner, "run_instance", run)
    monkeypatch.setattr(runner, "build_instance", lambda text, seed: None)
    monkeypatch.setattr(runner, "describe", lambda path, instance: files.write_json(path, known))
    return ran


@pytest.fixture
def folder(quick, tmp_path):
    """A finished run's."""
    assert call("run", *STUDY, "--out", tmp_path / "done").exit_code == 0
    quick.clear()
    return tmp_path / "done"


def test_files_follow_the_umask(tmp_path):
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            write_atomically(tmp_path / "file", b"x")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_a_full_disk_ends_the_run_and_loses_nothing(quick, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 5:  # settings; instance, point and result of seed 0; instance of seed 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    failed = call("run", *STUDY, "--out", tmp_path / "out")
    assert failed.exit_code == 2
    assert "No space left on device" in failed.stderr
    assert "repeat the command to go on" in failed.stderr
    assert [path.name[-10:] for path in (tmp_path / "out/cells").iterdir() if path.suffix == ".json"] == ["seed0.json"]
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.is_file()]
    monkeypatch.setattr(os, "fsync", real)
    quick.clear()
    assert call("run", *STUDY, "--out", tmp_path / "out").exit_code == 0
    assert quick == [1, 2]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"[1]\xff"])
@pytest.mark.parametrize("name", ["settings.json", "cells/001-quadratic_dim_x=2_dim_y=2-SOBA-seed1.json"])
def test_a_damaged_result_is_named_and_kept(folder, quick, name, damage):
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    before = content(folder)
    commands = (
        ["run", *STUDY, "--out"],
        ["sweep", *STUDY, "--workers", "2", "--out"],
        ["show"],
        ["compare"],
        ["report"],
    )
    for command in commands:
        called = call(*command, folder)
        assert called.exit_code == 2, command
        assert name in called.stderr
        assert "damaged" in called.stderr
    assert content(folder) == before
    assert quick == []


@pytest.mark.parametrize(
    ("key", "change", "expected"),
    [
        ("versions", {"jax": "0.0.1"}, "jax 0.0.1 there"),
        ("system", {"cpus": 4096}, "cpus 4096 there"),
        ("precision", 32, "precision differ"),
        ("format", 2, "format 2, expected 1. Use the bilevax that wrote it"),
    ],
)
def test_another_version_or_machine_s_results_are_not_overwritten(folder, quick, key, change, expected):
    path = folder / "settings.json"
    settings = json.loads(path.read_text())
    settings[key] = settings[key] | change if isinstance(change, dict) else change
    path.write_text(json.dumps(settings))
    before = content(folder)
    called = call("run", *STUDY, "--out", folder)
    assert called.exit_code == 2
    assert expected in called.stderr
    assert content(folder) == before
    assert quick == []
    assert call("show", folder).exit_code == (2 if key == "format" else 0)


def test_another_run_s_result_in_the_folder_is_noticed(folder, quick):
    first, second = sorted(folder.glob("cells/*.json"))[:2]
    second.write_bytes(first.read_bytes())
    called = call("run", *STUDY, "--out", folder)
    assert called.exit_code == 2
    assert f"{second.name}: it is the result of another run's cell" in called.stderr


@pytest.mark.process
def test_two_processes_do_not_write_into_one_folder_and_the_dead_hold_nothing(folder, quick, program):
    arguments = [*program("held_lock"), str(folder / files.LOCK)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = content(folder)
        for command in ("run", "sweep"):
            called = call(command, *STUDY, "--out", folder)
            assert called.exit_code == 2
            assert "another process is writing into it" in called.stderr
        assert content(folder) == before
        assert call("show", folder).exit_code == 0  # reading is free
        other.kill()
    (folder / "cells/.half-written.json.0123456789abcdef").write_text("{")
    assert call("run", *STUDY, "--out", folder).exit_code == 0
    assert not list(folder.rglob(".half*"))


def test_a_point_with_pickled_objects_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    np.savez(tmp_path / "cell.npz", x=np.array([Evil()], object), y=np.zeros(2))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        files.load_point(tmp_path / "cell.npz", np.zeros(1), np.zeros(2))
    assert not (tmp_path / "was here").exists()


@pytest.mark.process
def test_a_read_only_folder_is_named(tmp_path, program):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path, *tmp_path.parents[:3]):  # readable by others, where the test is run by root
        if path.stat().st_uid == os.geteuid() and path.name.startswith(("test_", "pytest-", "popen-")):
            path.chmod(0o755)
    for path in (tmp_path / "empty", tmp_path):
        path.chmod(0o555)
    folders = [str(tmp_path / "empty"), str(tmp_path / "new")]
    done = subprocess.run([*program("without_rights"), *folders], capture_output=True, text=True, check=True)
    tmp_path.chmod(0o755)
    first, second = done.stdout.splitlines()
    for line, folder in ((first, folders[0]), (second, folders[1])):
        assert line.startswith(f"--out {folder}: it cannot be written (Permission denied")
    assert list((tmp_path / "empty").iterdir()) == []
