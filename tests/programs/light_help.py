"""The help of the commands, printed without an import of anything heavy."""

import sys

from benchmarks.cli.main import app

codes = []
for arguments in [["--help"], *[[name, "--help"] for name in ["list", "run", "sweep", "show", "compare", "report"]]]:
    try:
        app(arguments)
    except SystemExit as end:
        codes.append(end.code)
assert codes == [0] * 7
heavy = {"jax", "numpy", "matplotlib", "scipy", "bilevel", "problems"} & set(sys.modules)
assert not heavy, heavy
