"""The help of the commands, printed without an import of anything heavy."""

import sys

from benchmarks.cli.main import app

codes = []
names = ["list", "run", "sweep", "show", "compare", "report", "export", "submit", "site", "watch"]
for arguments in [["--help"], *[[name, "--help"] for name in names]]:
    try:
        app(arguments)
    except SystemExit as end:
        codes.append(end.code)
assert codes == [0] * 11
heavy = {"jax", "numpy", "matplotlib", "scipy", "bilevel", "problems"} & set(sys.modules)
assert not heavy, heavy
