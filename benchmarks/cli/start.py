"""Where the command `bilevax` begins: it imports the rest, and says what to install where something is missing."""

import sys

OURS = ("bilevel", "irl", "problems", "benchmarks")


def main() -> None:
    """The console command; exit code 2 where a package that it needs is not installed."""
    try:
        from benchmarks.cli.main import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        from bilevel.backend.extras import missing  # only now: help is printed without an import of JAX

        print(str(error) if "pip install" in str(error) else missing(error, "cli"), file=sys.stderr)
        raise SystemExit(2) from None
