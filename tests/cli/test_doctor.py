"""`bilevax doctor`: what it finds on a machine that is well, and on one that is not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.cli.main import app
from benchmarks.judge import platform


@pytest.mark.parametrize("number", [5])
def test_a_compiler_that_is_right_passes(number):
    found = platform.compile_trials(number)
    assert found.verdict == "ok"
    assert f"0 of {number}" in found.found


def test_wrong_executables_are_a_fault():
    """A kernel whose result is not what NumPy says, as a miscompiled one is."""
    wrong = platform.Kernel("sum", lambda a: jnp.sum(a) * jnp.nan, (np.ones(3),), 3.0)
    found = platform.compile_trials(4, [wrong])
    assert found.verdict == "fault"
    assert "4 of 4" in found.found
    assert "XLA_FLAGS" in found.advice


def test_the_short_form_is_kept_for_the_machine_and_done_again_when_damaged(tmp_path, monkeypatch):
    first = platform.quick_check(tmp_path)
    assert first == {"faults": [], "trials": platform.SHORT_TRIALS}
    monkeypatch.setattr(platform, "check_quickly", lambda: {"faults": ["again"], "trials": 0})
    assert platform.quick_check(tmp_path) == first
    (tmp_path / "platform.json").write_text("{")
    assert platform.quick_check(tmp_path)["faults"] == ["again"]


def test_a_probe_that_fails_is_told_not_raised():
    assert "exit code" in platform._probe("no such trial")


@pytest.mark.process
@pytest.mark.slow
def test_the_command_prints_every_check_and_its_verdict(monkeypatch):
    """Every check is made, with few trials of the compiler: `test_a_compiler_that_is_right_passes` has those."""

    def compile_trials():
        return platform.compile_trials(5)

    few = [compile_trials if check is platform.compile_trials else check for check in platform.CHECKS]
    monkeypatch.setattr(platform, "CHECKS", tuple(few))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(done.stdout)
    assert {check["name"] for check in found["checks"]} >= {"versions", "devices", "compile trials", "determinism"}
    assert {check["verdict"] for check in found["checks"]} <= {"ok", "note", "fault"}
    assert done.exit_code == (1 if found["faults"] else 0)
    assert jax.config.jax_enable_x64
