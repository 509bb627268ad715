"""The project's own promises: two set-up commands, one version, short files, a wheel without tests."""

import ast
import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
PACKAGES = ("bilevel", "irl", "problems", "benchmarks")


def shell_blocks(text: str) -> list[str]:
    return re.findall(r"^```(?:sh|bash|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def command_under(heading: str) -> str:
    """What .ci/run reads out of README.md, by its own function."""
    script = (ROOT / ".ci/run").read_text("utf8")
    function = re.search(r"^command_under\(\) \{\n.*?^\}$", script, re.MULTILINE | re.DOTALL)
    assert function
    program = f'root="{ROOT}"\n{function.group()}\ncommand_under "{heading}"'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_readme_has_exactly_two_commands_of_one_line():
    blocks = [block.strip() for block in shell_blocks((ROOT / "README.md").read_text("utf8"))]
    assert len(blocks) == 2
    assert not any("\n" in block for block in blocks)
    run, test = blocks
    assert run.endswith("bilevax run")
    assert "[test]" in test
    assert re.search(r"&& \S*pytest( -n 2)?( --dist loadfile)?$", test)  # last: its closing line is the command's
    assert all("-c constraints.txt" in block for block in blocks)


def test_ci_reads_the_commands_out_of_the_readme():
    run, test = (block.strip() for block in shell_blocks((ROOT / "README.md").read_text("utf8")))
    script = (ROOT / ".ci/run").read_text("utf8")
    headings = re.findall(r'"([^"]+)"', re.search(r"^for heading in (.*); do$", script, re.MULTILINE).group(1))
    assert [command_under(heading) for heading in headings] == [test, run]
    assert command_under("No such heading") == ""
    assert "pip install" not in script


@pytest.mark.process
@pytest.mark.parametrize(("test", "outcome"), [("echo tested >> $LOG", "tested ran wheel"), ("false", "")])
def test_ci_runs_both_commands_in_fresh_clones(tmp_path, test, outcome):
    """A stand-in project whose commands write to a log; a failing test command fails the whole run at once."""
    project, log = tmp_path / "project", tmp_path / "log"
    (project / ".ci").mkdir(parents=True)
    (project / ".ci/run").write_text((ROOT / ".ci/run").read_text("utf8"), "utf8")
    (project / ".ci/wheel").write_text("#!/usr/bin/env bash\necho wheel >> $LOG\n", "utf8")
    (project / ".ci/wheel").chmod(0o755)
    run = "test ! -e left-over && echo ran >> $LOG"
    fence = "```"
    (project / "README.md").write_text(
        f"# Stand-in\n\n## Run it\n\n{fence}sh\n{run}\n{fence}\n\n## Test it\n\n{fence}sh\n{test}\n{fence}\n", "utf8"
    )
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "all"],
    ):
        subprocess.run(["git", *arguments], cwd=project, check=True)
    (project / "left-over").touch()
    finished = subprocess.run(["bash", ".ci/run"], cwd=project, env={**os.environ, "LOG": str(log)}, check=False)
    assert (finished.returncode == 0) == bool(outcome)
    assert (log.read_text("utf8").split() if log.exists() else []) == outcome.split()


def test_installed_version_is_the_projects():
    assert importlib.metadata.version("bilevax") == PYPROJECT["project"]["version"]


def test_console_command_points_at_a_function():
    module, _, function = PYPROJECT["project"]["scripts"]["bilevax"].partition(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text("utf8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_only_the_four_packages_are_installed():
    assert tuple(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == PACKAGES


def test_constraints_are_versions_without_addresses():
    names = set()
    for line in (ROOT / "constraints.txt").read_text("utf8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r'([A-Za-z0-9._-]+)==[0-9][\w.]*( ; python_version (<|>=) "3\.12")?', line)
            assert match, line
            names.add(re.sub(r"[-_.]+", "-", match.group(1)).lower())
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + [
        requirement
        for extra in ("test", "docs", "cli", "reference", "irl")
        for requirement in project["optional-dependencies"][extra]
    ]
    wanted = {re.match(r"[\w-]+", requirement).group().lower() for requirement in wanted} - {"bilevax"}
    assert wanted <= names


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_files_stay_under_400_lines(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text("utf8").splitlines())) > 400}
    assert not long
