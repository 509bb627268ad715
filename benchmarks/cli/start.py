"""Where the command `bilevax` begins: it imports the rest, and says what to install where something is missing."""

import errno
import os
import sys

OURS = ("bilevel", "irl", "problems", "benchmarks")


def main() -> None:
    """The console command; exit code 2 where a package that it needs is not installed, or stdout is full, 1 where the
    reader of a pipe has gone.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before we began: what would be said is not wanted
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()  # now, and not when Python ends, where nobody could say what is wrong
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there
        if error.errno == errno.EPIPE:
            raise SystemExit(1) from None
        print(f"bilevax: stdout cannot be written ({error.strerror}).", file=sys.stderr)
        raise SystemExit(2) from None


def _run() -> None:
    try:
        from benchmarks.cli.main import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        from bilevel.backend.extras import missing  # only now: help is printed without an import of JAX

        print(str(error) if "pip install" in str(error) else missing(error, "cli"), file=sys.stderr)
        raise SystemExit(2) from None
