"""What a file may hold, said once: one reader for results, suites and checkpoints, with errors that name the field.

A kind is a function (value, where) -> None that raises `Misfit` where the value is something else. Files come from
other programs, other versions and damaged disks, so that nothing of them is used before its kind has been checked.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

Kind = Callable[[Any, str], None]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX = sys.float_info.max
LARGEST = 2**31 - 2  # of whole numbers that become XLA's counters


class Said(str):
    """Words about a value, printed as they are."""

    __slots__ = ()
    __repr__ = str.__str__


class Misfit(ValueError):
    """A value that is not of its kind: where it stands, what it is, what was expected."""


def printable(value: Any) -> Any:
    """`value` with the control characters of its texts, but line ends and tabs, as visible escapes: what comes from a
    file must not move the terminal's cursor or name its window. Lists and tables are gone through.
    """
    if isinstance(value, str):
        return _CONTROL.sub(lambda match: repr(match.group())[1:-1], value)
    if isinstance(value, dict):
        return {printable(name): printable(item) for name, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


def misfit(where: str, value: Any, expected: str) -> NoReturn:
    """Raise `Misfit`; what is got is shown on one line, short."""
    is_long = isinstance(value, int) and abs(value) >= 10**30  # Python refuses to print some thousand digits
    got = "a number of many digits" if is_long else repr(value)
    if not isinstance(value, str | int | float | bool | None):
        got = type(value).__name__
    where = printable(where) if len(where) <= 200 else printable(where[:197]) + "..."
    raise Misfit(f"{where or 'all of it'}: got {got if len(got) <= 60 else got[:57] + '...'}; expected {expected}")


def parse_json(data: bytes | str) -> Any:
    """What the JSON text holds.

    Raises:
        Misfit: no JSON, or nested beyond what Python can follow.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise Misfit("all of it: got brackets in brackets without end; expected JSON") from None
    except ValueError as error:
        raise Misfit(f"no JSON: {error}") from None


def anything(value: Any, where: str) -> None:
    """Any value."""


def text(value: Any, where: str) -> None:
    """A text."""
    if not isinstance(value, str):
        misfit(where, value, "a text")


def truth(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        misfit(where, value, "true or false")


def whole(low: int = 0, high: int = LARGEST) -> Kind:
    """A whole number in [low, high]."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            misfit(where, value, f"a whole number in [{low}, {high}]")

    return check


def number(low: float = -math.inf) -> Kind:
    """A finite number >= low."""

    def check(value: Any, where: str) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not -MAX <= value <= MAX or value < low:  # a whole number may have a thousand digits
            misfit(where, value, "a finite number" + (f" >= {low:g}" if low > -math.inf else ""))

    return check


def one_of(*values: Any) -> Kind:
    """One of these."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(other) and value == other for other in values):
            misfit(where, value, ", ".join(map(str, values)))

    return check


def maybe(kind: Kind) -> Kind:
    """Null, or the kind."""
    return lambda value, where: None if value is None else kind(value, where)


def each(kind: Kind, least: int = 0, most: int | None = None) -> Kind:
    """A list of at least `least` and at most `most` of the kind."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            misfit(where, value, "a list")
        if len(value) < least or (most is not None and len(value) > most):
            misfit(where, Said(f"{len(value)} entries"), f"at least {least}" + (f", at most {most}" if most else ""))
        for k, item in enumerate(value):
            kind(item, f"{where}[{k}]")

    return check


def table(kind: Kind) -> Kind:
    """A table of the kind under any names."""
    return fields({}, others=kind)


def fields(needed: dict[str, Kind], optional: dict[str, Kind] | None = None, others: Kind | None = None) -> Kind:
    """A table with these fields; other names are of the kind `others`, or refused where it is None."""
    known = needed | (optional or {})

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            misfit(where, value, "a table")
        missing = [name for name in needed if name not in value]
        if missing:
            misfit(f"{where}.{missing[0]}".lstrip("."), Said("nothing"), "a value: it is missing")
        for name, item in value.items():
            kind = known.get(name, others)
            if kind is None:
                misfit(f"{where}.{name}".lstrip("."), Said("an unknown field"), f"one of {', '.join(known)}")
            kind(item, f"{where}.{name}".lstrip("."))

    return check
