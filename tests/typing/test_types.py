"""What type checkers make of the public names: pyright, on a file as users write them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USER = Path(__file__).parent / "user.py"
LINES = USER.read_text("utf8").splitlines()
EXPECTED = {k: match.groups() for k, line in enumerate(LINES) if (match := re.search(r"# (type|error): (.*)$", line))}


@pytest.fixture(scope="module")
def found():
    """Line -> (severity, message) of what pyright says of the file."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(USER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    said = json.loads(done.stdout)["generalDiagnostics"]
    return [(one["range"]["start"]["line"], one["severity"], one["message"]) for one in said]


@pytest.mark.parametrize("line", EXPECTED, ids=lambda line: LINES[line].partition("  #")[0].strip())
def test_a_line_is_seen_as_it_says(found, line):
    kind, text = EXPECTED[line]
    said = [(severity, message) for at, severity, message in found if at == line]
    if kind == "type":
        (message,) = (message for severity, message in said if severity == "information")
        assert re.search(rf'is "{re.escape(text)}(\[.*)?"$', message), message  # arrays have parameters
        assert not [message for severity, message in said if severity == "error"]
    else:
        assert any(severity == "error" and text in message for severity, message in said), said


def test_everything_else_is_accepted(found):
    assert [one for one in found if one[0] not in EXPECTED and one[1] == "error"] == []
