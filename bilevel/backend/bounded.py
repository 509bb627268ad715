"""Compiled functions that are forgotten: one bounded store for all of the library's own entry points.

JAX keeps what it has compiled as long as the function lives that was given to `jax.jit`. An entry point of this library
lives for ever, and sees the user's functions as static parts of a problem: with new function objects in each call, as
lambdas made in a loop, it would keep 150 to 560 memory maps and some ten MiB a solve, until at the system's limit of
maps LLVM ends the process. So each structure of arguments has a `jax.jit` object of its own here, and what was not used
for the longest time is dropped together with its executables.
"""

import functools
import gc
import inspect
import itertools
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bilevel.backend.errors import invalid

MOST = 128  # functions that are kept: some 40 problems with a solver each, at most 25,000 of Linux' 65,530 maps
SPARE = 32  # how many are dropped at once, since collecting what they leave takes as long for one as for many
FULL = 0.6  # part of the system's memory maps beyond which functions are dropped early
ALIKE = 32  # structures of one entry point that differ in nothing but the identity of functions, when it is said


class Flat:
    """A problem or solver flattened once, as an argument of compiled functions, which see the original: flattening it
    node by node, at each call, is a sixth of what a call takes.
    """

    def __init__(self, tree: Any) -> None:
        self.leaves, self.structure = jax.tree.flatten(tree)


jax.tree_util.register_pytree_node(
    Flat, lambda flat: (flat.leaves, flat.structure), lambda structure, leaves: structure.unflatten(leaves)
)


@dataclass(slots=True)
class Entry:
    """What is kept for one structure of arguments."""

    call: Any
    """The jitted function, of a list of leaves."""
    looks: int
    """The hash of how the structure prints without addresses: equal for functions made anew by the same code."""
    used: int = 0
    """The number of the last call, counted over all entry points."""


_kept: dict[tuple, Entry] = {}
_calls = itertools.count()
_said: list[bool] = []  # whether the warning has been given; once is enough
_lock = threading.RLock()  # of changes to the store; a look-up needs none


def memory_maps() -> tuple[int, int] | None:
    """(memory maps of this process, the system's limit of them); None where the system does not tell."""
    try:
        used = Path("/proc/self/maps").read_bytes().count(b"\n")
        return used, int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return None


def clear() -> None:
    """Forget everything that the entry points of this library have compiled, and whether it was warned."""
    with _lock:
        _kept.clear()
        _said.clear()
    gc.collect()


class Bounded:
    """An entry point: like `jax.jit` of a function of positional arguments, with the bounded store behind it."""

    def __init__(self, function: Callable[..., Any], num_static: int, options: dict[str, Any]) -> None:
        """The last `num_static` arguments are static; `options` go to `jax.jit`."""
        functools.update_wrapper(self, function)
        self.function, self.num_static, self.options = function, num_static, options

    def __call__(self, *args: Any) -> Any:
        """What the function gives for `args`."""
        call, leaves = self._find(args)
        try:
            return call(leaves)
        except TypeError:
            self._name_what_is_no_number(args)
            raise

    def lower(self, *args: Any) -> Any:
        """The function lowered for `args`, as `jax.jit(f).lower` gives it."""
        call, leaves = self._find(args)
        return call.lower(leaves)

    def count(self) -> int:
        """How many programs of this entry point are compiled and kept."""
        with _lock:
            return sum(entry.call._cache_size() for key, entry in _kept.items() if key[0] is self)

    def _name_what_is_no_number(self, args: tuple) -> None:
        """Raise `InvalidInput` for the first leaf that JAX takes neither as an array nor as a number."""
        named = zip(inspect.signature(self.function).parameters, args[: len(args) - self.num_static], strict=False)
        for name, argument in named:
            for path, leaf in jax.tree_util.tree_leaves_with_path(argument):
                if not (isinstance(leaf, bool | int | float | complex) or hasattr(leaf, "dtype")):
                    got = f"{leaf!r}" if isinstance(leaf, str) else type(leaf).__name__
                    invalid(
                        f"{name}{jax.tree_util.keystr(path)}", got, "a number or an array", "Give one, or leave it out."
                    )

    def _find(self, args: tuple) -> tuple[Any, list[Any]]:
        """(the jitted function for the structure of `args`, the leaves that it takes)."""
        end = len(args) - self.num_static
        leaves, structure = jax.tree.flatten(args[:end])
        key = self, structure, args[end:]
        entry = _kept.get(key)
        if entry is None:
            with _lock:
                entry = _kept.get(key) or self._make(*key)
        entry.used = next(_calls)
        return entry.call, leaves

    def _make(self, _: "Bounded", structure: Any, static: tuple) -> Entry:
        """Make, keep and return the entry of a new structure."""
        function = self.function  # and not self: the entry must die with its place in the store

        def of_leaves(leaves: list[Any]) -> Any:
            return function(*structure.unflatten(leaves), *static)

        of_leaves.__name__ = of_leaves.__qualname__ = getattr(function, "__name__", "bounded")
        printed = str(structure)
        entry = Entry(jax.jit(of_leaves, **self.options), hash(re.sub(r" at 0x[0-9a-f]+", "", printed)))
        _make_room()
        _kept[self, structure, static] = entry
        alike = sum(key[0] is self and other.looks == entry.looks for key, other in _kept.items())
        if alike >= ALIKE and not _said:
            _said.append(True)
            _warn(printed)
        return entry


def _make_room() -> None:
    """Drop what was not used for the longest time, where too much is kept or too few memory maps are left."""
    maps = memory_maps()
    crowded = maps is not None and maps[0] > FULL * maps[1]
    if len(_kept) < MOST and not crowded:
        return
    for key in sorted(_kept, key=lambda key: _kept[key].used)[:SPARE]:
        del _kept[key]
    gc.collect()  # executables hang on cycles


def _warn(structure: str) -> None:
    names = dict.fromkeys(re.findall(r"<function (\S+) at 0x", structure))
    warnings.warn(
        f"bilevel: {ALIKE} problems have been compiled that differ in nothing but the identity of their functions "
        f"({', '.join(names) or 'callable objects'}): made anew for each call, they compile anew, for seconds and "
        f"megabytes each. Define them once, outside of the loop, and pass what changes as arrays: upper_data, "
        "lower_data, or dataclasses.replace(problem, …). What is compiled and not used for long is dropped.",
        RuntimeWarning,
        stacklevel=6,
    )


def bounded_jit(function: Callable[..., Any] | None = None, *, num_static: int = 0, **options: Any) -> Any:
    """`jax.jit` for an entry point of this library: what it compiles is bounded, and freed.

    Args:
        function: of positional arguments.
        num_static: how many of its last arguments are static.
        options: to `jax.jit`.
    """
    if function is None:
        return functools.partial(bounded_jit, num_static=num_static, **options)
    return Bounded(function, num_static, options)
