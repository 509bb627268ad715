"""Every tutorial runs, with its own assertions, each in a process of its own as a reader runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = "import sys; sys.path.insert(0, 'docs'); import notebooks; assert notebooks.run(sys.argv[1])[1]"


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("*.py")))
def test_a_tutorial_runs_alone(name):
    done = subprocess.run([sys.executable, "-c", PROGRAM, name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
