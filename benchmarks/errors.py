"""Bad usage, told in one line: exit code 2."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A name, a setting or a folder that cannot be used; the message says what can."""


def nearest(kind: str, name: str, names: Iterable[str]) -> UsageError:
    """The error for an unknown `name`, with the nearest of `names` and all of them."""
    names = sorted(names)
    lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[close[0]]}?" if close else ""
    return UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")
