"""What leaves the commands: a closed or full stdout, commands that a shell may repeat, no control characters."""

import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from benchmarks.cli.main import app
from benchmarks.show import html
from bilevel.backend import files

START = [sys.executable, "-c", "from benchmarks.cli.start import main; main()"]


def run(what, **streams):
    return subprocess.run([*START, *what], stderr=subprocess.PIPE, text=True, check=False, **streams)


@pytest.mark.process
@pytest.mark.parametrize("what", [["--help"], ["list"]])
def test_a_reader_that_has_gone_is_no_traceback(what):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(what, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.process
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_stdout_is_named():
    with open("/dev/full", "w") as full:
        done = run(["list", "--json"], stdout=full)
    assert (done.returncode, done.stderr) == (2, "bilevax: stdout cannot be written (No space left on device).\n")


@pytest.mark.process
def test_a_closed_stdout_is_nothing_to_say():
    closing = ["sh", "-c", 'exec "$@" >&-', "sh", *START, "list"]  # no preexec_fn: JAX warns of forks in a used process
    done = subprocess.run(closing, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_that_repeats_a_run_is_quoted(synthetic, tmp_path):
    found = synthetic.result(synthetic.rows([1.0, 0.5]))
    cells = {("quadratic", "SOBA", 0): found}
    name = "x; rm -rf ~ '$(id)"
    page = html.page(synthetic.write(tmp_path / "a", cells, name=name))
    assert "bilevax run --suite &#39;x; rm -rf ~ &#39;&#34;&#39;&#34;&#39;$(id).toml&#39;" in page
    page = html.page(synthetic.write(tmp_path / "b", cells, name="../suites/quickstart"))
    assert "bilevax run --suite ../suites/quickstart.toml" in page


def test_control_characters_of_files_do_not_reach_the_terminal(synthetic, tmp_path):
    found = synthetic.result(synthetic.rows([1.0, 0.5])) | {"reason": "bad\x1b[2J\x1b]0;owned\x07 \u202eend"}
    folder = synthetic.write(tmp_path / "run", {("quadratic", "SOBA", 0): found}, system={"a\x9b1m": "b\x1b[31m"})
    for command in ("show", "compare", "report"):
        said = CliRunner().invoke(app, [command, str(folder)])
        assert said.exit_code == 0, said.output
        assert not any(sign in said.output for sign in "\x1b\x07\x9b\u202e")
    assert r"bad\x1b[2J\x1b]0;owned\x07" in CliRunner().invoke(app, ["show", str(folder)]).stdout
    wrong = CliRunner().invoke(app, ["show", str(tmp_path / "no\x1b[2Jthing")])
    assert (wrong.exit_code, "\x1b" in wrong.stderr) == (2, False)


def test_what_killed_writers_leave_is_swept(tmp_path):
    path = tmp_path / "run.ckpt"
    dead, living, other = (tmp_path / f".{name}.{'0123456789abcde' + end}" for name, end in (
        ("run.ckpt", "0"), ("run.ckpt", "1"), ("run.ckpt2", "0")))  # fmt: skip
    for left in (dead, living, other):
        left.write_text("half")
    hour_ago = time.time() - 3600
    for left in (dead, other):
        os.utime(left, (hour_ago, hour_ago))
    files.write_atomically(path, b"whole")
    files.sweep(path)
    assert sorted(left.name for left in tmp_path.iterdir()) == sorted([living.name, other.name, path.name])
