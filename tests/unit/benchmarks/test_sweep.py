"""The temporary folders of sweeps."""

import tempfile

from filelock import FileLock

from benchmarks.study.sweep import OWNER, PREFIX, own_folder


def test_folders_of_killed_sweeps_are_removed_and_those_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, running, foreign = (tmp_path / f"{PREFIX}{name}" for name in ("killed", "running", "foreign"))
    for folder in (killed, running, foreign):
        folder.mkdir()
    (killed / OWNER).touch()
    with FileLock(running / OWNER), own_folder() as own:
        assert own.parent == tmp_path
        assert own.is_dir()
        assert not killed.exists()
        assert running.is_dir()
        assert foreign.is_dir()
    assert not own.exists()
