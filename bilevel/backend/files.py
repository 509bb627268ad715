"""Files that are written whole or not at all."""

import contextlib
import os
import re
import secrets
import time
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder, flushed to disk, then renamed over `path`.

    The file's mode follows the umask. What a killed process leaves is hidden: `.<name>.<16 hex digits>`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep(path: Path) -> None:
    """Remove what killed writers of `path` have left beside it, but what was touched within a minute: its writer may be
    alive.
    """
    left = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{16}")
    for other in path.parent.glob(".*"):
        with contextlib.suppress(OSError):  # another process sweeps, too
            if left.fullmatch(other.name) and time.time() - other.stat().st_mtime > 60:
                other.unlink()
