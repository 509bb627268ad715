"""`bilevax run --processes 2`: two processes over loopback, one mesh of both their devices, agree with one process."""

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.cli.main import app

pytestmark = [pytest.mark.process, pytest.mark.slow]
STUDY = [
    "run", "-p", "quadratic[batch_size=4,dim_x=2,dim_y=2,num_samples=8]",
    "-s", "SOBA[linear_step_size=0.1,lower_step_size=0.1,upper_step_size=0.05]", "--max-steps", "20", "--no-plot",
]  # fmt: skip


def test_two_processes_agree_with_one(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.cli.main",
        *STUDY,
        "--processes",
        "2",
        "--json",
        "--out",
        tmp_path / "two",
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["statuses"] == {"MAX_STEPS": 1}
    settings = json.loads((tmp_path / "two/settings.json").read_text())
    assert settings["system"]["devices"] == 2
    assert CliRunner().invoke(app, [*STUDY, "--out", str(tmp_path / "one")]).exit_code == 0
    (one,), (two,) = (list((tmp_path / name / "cells").glob("*.npz")) for name in ("one", "two"))
    assert one.name == two.name
    with np.load(one) as alone, np.load(two) as together:
        assert set(alone) == set(together) == {"x", "y"}
        for name in alone:
            np.testing.assert_allclose(alone[name], together[name], rtol=1e-12, atol=1e-12)
    records = [json.loads(path.with_suffix(".json").read_text())["record"] for path in (one, two)]
    values = [[row["value"] for row in rows] for rows in records]
    np.testing.assert_allclose(*values, rtol=1e-12)
    assert values[0][0] != values[0][-1]
