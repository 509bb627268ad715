"""Problem families, one per file, found by discovery: every module of this package with a function `make`.

    problems.make("quadratic", seed=3, dim_x=20)

There is no list to edit: a new file is enough. The first line of its docstring is what `bilevax list` prints.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from bilevel.struct import invalid
from problems.instance import Instance


@functools.cache
def families() -> dict[str, ModuleType]:
    """Every module of this package that has a function `make`, by name. The first call imports them."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in sorted(names)}
    return {name: module for name, module in modules.items() if hasattr(module, "make")}


def make(name: str, **params: Any) -> Instance:
    """The instance of family `name` that `params` describe; the family's own `make` gives names, ranges and defaults.

    Raises:
        InvalidInput: an unknown family or parameter, with the nearest known name, or what the family refuses.
    """
    known = families()
    if name not in known:
        invalid("name (problems.make)", repr(name), "a problem family", _nearest(name, known))
    parameters = inspect.signature(known[name].make).parameters
    for param in params:
        if param not in parameters:
            invalid(f"{param} ({name})", "an unknown parameter", "one that the family has", _nearest(param, parameters))
    return known[name].make(**params)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."
