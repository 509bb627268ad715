"""Packages that only a part of the library needs: an import that fails names the command that installs them."""

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Generator[None]:
    """Around imports of packages that the extra `name` of the distribution brings.

    Raises:
        ModuleNotFoundError: one is not installed; the message has the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing(error, name), name=error.name) from None


def missing(error: ModuleNotFoundError, name: str) -> str:
    """What to say where a package of the extra `name` is not installed."""
    return f'{error.name} is not installed; it comes with: pip install "bilevax[{name}]"'
