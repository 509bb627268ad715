"""One algorithm per file, found by discovery: every `Solver` subclass defined in a module of this package is exported.

There is no list to edit: a new file is enough.
"""

import importlib
import inspect
import pkgutil

from bilevel.solver import Solver


def _discover() -> dict[str, type[Solver]]:
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, Solver) and not name.startswith("_"):
                found[name] = value
    return dict(sorted(found.items()))


ALL = _discover()
globals().update(ALL)
__all__ = list(ALL)  # pyright: ignore[reportUnsupportedDunderAll]
