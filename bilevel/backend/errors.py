"""The one error for bad input; everywhere but in this folder it is imported from `bilevel.struct`."""

from typing import NoReturn


class InvalidInput(ValueError):
    """Bad input. The message says which argument, what was got, what was expected, and what to do."""


def invalid(argument: str, got: object, expected: str, do: str) -> NoReturn:
    """Raise `InvalidInput` for `argument`."""
    raise InvalidInput(f"{argument}: got {got}; expected {expected}. {do}")
