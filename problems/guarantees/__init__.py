"""The library's own guarantees, found by discovery: every `Guarantee` that a module of this package names.

`bilevax verify` runs them. There is no list to edit: a new file, or a new name in one, is enough.
"""

import functools
import importlib
import pkgutil

from bilevel.guarantees import Guarantee


@functools.cache
def guarantees() -> dict[str, Guarantee]:
    """All of them by name, in the order of the files and of their lines."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Guarantee)]
    return {guarantee.name: guarantee for guarantee in found}
