"""Kill -9 at random moments of runs, sweeps and checkpoints: nothing finished is lost, nothing half-written is read.

What comes out in the end is an uninterrupted run's to the bit. Five kills in all; a job of its own with 100 of each:
`BILEVAX_KILLS=100 pytest tests/cli/test_kills.py`.
"""

import json
import os
import subprocess

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]
STUDY = ["-p", "quadratic[dim_x=2,dim_y=2]", "-s", "SOBA", "--seeds", "3", "--max-steps", "20", "--no-plot"]


def attack(program, work, kills, tmp_path):
    arguments = [work, os.environ.get("BILEVAX_KILLS", str(kills)), tmp_path / "whole", tmp_path / "broken", *STUDY]
    command = [*program("kills"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("work", "kills"), [("run", 2), pytest.param("sweep", 1, marks=pytest.mark.nightly)])
def test_a_killed_study_loses_nothing(program, work, kills, tmp_path):
    attack(program, work, kills, tmp_path)
    paths = sorted((tmp_path / "whole/cells").iterdir())
    assert len(paths) == 6
    names = [path.name for path in (tmp_path / "broken/cells").iterdir() if not path.name.startswith(".")]
    assert [path.name for path in paths] == sorted(names)
    for path in paths:
        other = tmp_path / "broken/cells" / path.name
        if path.suffix == ".npz":
            assert path.read_bytes() == other.read_bytes()
            continue
        first, second = (json.loads(p.read_text()) for p in (path, other))
        for row in [*first["record"], *second["record"]]:
            del row["time"]
        assert first["record"] == second["record"]


def test_a_killed_solve_goes_on_from_its_checkpoint_to_the_same_bits(program, tmp_path):
    attack(program, "checkpoint", 2, tmp_path)
