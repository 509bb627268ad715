"""One algorithm per file, in a folder for each family, found by discovery: every `Solver` subclass defined in a module
below this package is exported. There is no list to edit: a new file is enough.

A file whose name begins with _ is a helper, and is passed over; so is a method that is made around another solver, a
class one of whose settings has no default.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from bilevel.backend import moved
from bilevel.solver import KNOWN, Solver, complete


def modules(package: str) -> Iterator[ModuleType]:
    """The modules below an imported package, those in its folders too."""
    for found in pkgutil.iter_modules(sys.modules[package].__path__):
        if not found.name.startswith("_"):
            module = importlib.import_module(f"{package}.{found.name}")
            yield from modules(module.__name__) if found.ispkg else (module,)


def discover(package: str) -> dict[str, type[Solver]]:
    """The solvers of an imported package, by name; `bilevel.recommend` knows them from then on."""
    found: dict[str, type[Solver]] = {}
    for module in modules(package):
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, Solver) and not name.startswith("_"):
                found[name] = value
    KNOWN.update(found)
    return {name: kind for name, kind in sorted(found.items()) if complete(kind)}


ALL = discover(__name__)
globals().update(ALL)
__all__ = list(ALL)  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # to a type checker, other names are errors

    def __getattr__(name):
        """A module by its old name, or an error with the nearest name."""
        return moved.lookup(__name__, name, {}, __all__)
