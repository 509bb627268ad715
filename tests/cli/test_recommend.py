"""`bilevax recommend`."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.cli.main import app


def test_a_list_for_people_and_one_for_programs():
    shown = CliRunner().invoke(app, ["recommend", "-p", "constrained", "-p", "quadratic"])
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == "constrained"
    assert lines[lines.index("quadratic") + 3].startswith(" 1  LBFGS")
    asked = CliRunner().invoke(app, ["recommend", "-p", "quadratic", "--json"])
    found = json.loads(asked.stdout)["quadratic"]
    assert found["ranked"][0]["solver"] == "LBFGS"
    assert found["seen"]["curvature"] == "strongly convex"
    assert "needs" in found["refused"]["MLIRL"] or found["refused"]["AT"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "quadratc"], "Did you mean quadratic?"),
        (["-p", "quadratic[dim_x=-1]"], "expected a whole number >= 1"),
        (["-p", "quadratic", "--precision", "16"], "expected 64 or 32"),
        ([], "Missing option"),
    ],
)
def test_bad_usage_is_told(arguments, said):
    shown = CliRunner().invoke(app, ["recommend", *arguments])
    assert shown.exit_code == 2
    assert said in " ".join(shown.stderr.split())
