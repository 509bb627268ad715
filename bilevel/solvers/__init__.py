"""One algorithm per file, found by discovery: every `Solver` subclass defined in a module of this package is exported.

There is no list to edit: a new file is enough.
"""

import importlib
import inspect
import pkgutil
import sys

from bilevel.solver import Solver


def discover(package: str) -> dict[str, type[Solver]]:
    """The solvers of an imported package, by name."""
    found = {}
    for module_info in pkgutil.iter_modules(sys.modules[package].__path__):
        module = importlib.import_module(f"{package}.{module_info.name}")
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, Solver) and not name.startswith("_"):
                found[name] = value
    return dict(sorted(found.items()))


ALL = discover(__name__)
globals().update(ALL)
__all__ = list(ALL)  # pyright: ignore[reportUnsupportedDunderAll]
