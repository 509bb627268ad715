"""Faulty fusions of XLA's CPU compiler are switched off in time, and other programs get the user's own flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bilevel.backend import compilation

pytestmark = pytest.mark.process
PROGRAM = Path(__file__).parents[2] / "programs" / "safe_compilation.py"
OFF = f"--{compilation.FLAG}="


def run(*arguments, **variables):
    """What the program prints, in a fresh process with these variables alone of those that matter."""
    names = (*compilation.OWN, *(compilation.GIVEN + name for name in compilation.OWN), compilation.SWITCH)
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments], env=environment | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_fusions_are_off_after_the_import():
    """60 executables: unprotected, 3 to 23 per cent of them give NaN on the jaxlibs that make these fusions."""
    found = run("count", "60", "solve")
    assert found["flags"] == OFF
    assert found["wrong"] == 0
    assert not found["warned"]
    assert not found["started_by_import"]  # users choose devices after the import
    assert found["solved"]
    assert found["user"] is None
    assert not found["marks"]


def test_what_the_user_has_set_stays():
    """XLA reads no further than the second word here, so that ours stands before it."""
    own = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    found = run("fused", XLA_FLAGS=own)
    assert found["flags"] == f"{OFF} {own}"
    assert found["user"] == own
    assert not found["fused"]


@pytest.mark.skipif(
    compilation.jax.__version_info__[:3] < compilation.AFFECTED, reason="this jaxlib makes no such fusions"
)
def test_flags_in_a_file_are_told_of(tmp_path):
    file = tmp_path / "flags"
    file.write_text("--xla_cpu_multi_thread_eigen=false\n")
    found = run("solve", XLA_FLAGS=str(file))
    assert "names a file" in found["warned"][0]
    assert found["flags"] == str(file)
    assert found["solved"]


@pytest.mark.parametrize(
    "variables", [{"XLA_FLAGS": f"--{compilation.FLAG}=dot"}, {compilation.SWITCH: "off"}], ids=["flag", "switch"]
)
def test_the_user_may_keep_the_fusions(variables):
    found = run("early", **variables)
    assert found["flags"] == variables.get("XLA_FLAGS")
    assert not found["warned"]
    assert found["options"] is None


@pytest.mark.skipif(
    compilation.jax.__version_info__[:3] < compilation.AFFECTED, reason="this jaxlib makes no such fusions"
)
def test_too_late_is_told_once_and_the_librarys_own_programs_are_safe_still():
    found = run("early", "solve")
    assert len(found["warned"]) == 1
    assert OFF in found["warned"][0]
    assert found["options"] == {compilation.FLAG: ""}
    assert found["flags"] is None
    assert found["solved"]


def test_a_child_process_still_knows_what_the_user_had(monkeypatch):
    """A worker inherits the changed variable, and the mark beside it."""
    monkeypatch.setenv("XLA_FLAGS", f"--mine {OFF}")
    monkeypatch.setenv(f"{compilation.GIVEN}XLA_FLAGS", "--mine")
    assert compilation.protect() is None
    assert compilation.user_environment()["XLA_FLAGS"] == "--mine"
