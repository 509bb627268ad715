"""What can be run, and how it is written: `name[key=value,…]` for problems and solvers.

One text form serves the command line, the suites, the result files and the tables. Values are Python literals
(`5`, `0.1`, `true`), words (`model=mlp`) and, for solvers, calls of optax or bilevel with positional arguments
(`upper_step_size=adam(0.05)`, `linear=Dense()`).
"""

import ast
import dataclasses
import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import bilevel
import irl
import problems
from benchmarks.errors import UsageError, nearest
from benchmarks.study.formats import LIMITS, MOST_CELLS
from bilevel.backend.schema import Misfit


@dataclasses.dataclass(frozen=True)
class Search:
    """How a solver's settings are chosen before its runs: `trials` settings, as many for each solver, on other seeds.

    space: (setting, values) pairs; two numbers are a range, drawn evenly in the logarithm, words are choices. score:
    "value" or "gradient", what is compared at the end of a trial. `benchmarks.study.tuning` carries it out.
    """

    trials: int
    seeds: tuple[int, ...]
    score: str
    space: tuple[tuple[str, tuple[Any, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a problem, a solver, a seed (of the instance and of the solver's key), and its budget.

    max_passes counts oracle calls in passes over the data. The first limit that is reached ends the run; without any
    of the three it is 1000 steps. search: how the solver's settings were chosen, None where they are as written.
    """

    problem: str
    solver: str
    seed: int
    max_steps: int | None = None
    every: int | None = None
    tol: float | None = None
    time_limit: float | None = None
    max_passes: float | None = None
    search: Search | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Cell":
        """The cell that `dataclasses.asdict` and JSON have been through."""
        search: Any = fields.get("search")
        if isinstance(search, dict):
            space = tuple((name, tuple(values)) for name, values in search["space"])
            search = Search(search["trials"], tuple(search["seeds"]), search["score"], space)
        return cls(**{**fields, "search": search})


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """(name, parameters) of `name` or `name[key=value,…]`."""
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\[(.*)\])?\s*", text, re.DOTALL)
    if match is None:
        raise UsageError(f"cannot read {text!r}: expected name or name[key=value,…], as in SOBA[upper_step_size=0.1].")
    name, inside = match.group(1), (match.group(2) or "").strip()
    params: dict[str, Any] = {}
    for item in re.split(r",(?![^(]*\))", inside) if inside else []:  # commas inside brackets belong to the value
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key.isidentifier() and equals and value):
            raise UsageError(f"cannot read {item.strip()!r} in {text!r}: expected key=value.")
        if key in params:
            raise UsageError(f"{text!r} sets {key} twice.")
        params[key] = _value(value)
    return name, params


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text


def label(text: str) -> str:
    """The text form of `text` that compares: no spaces, keys sorted."""
    name, params = parse(text)
    inside = ",".join(f"{key}={str(value).replace(' ', '')}" for key, value in sorted(params.items()))
    return f"{name}[{inside}]" if inside else name


def summaries() -> dict[str, dict[str, dict[str, Any]]]:
    """{"solvers" | "problems": {name: {"summary": one line, "parameters": {name: default}}}}, all by discovery.

    Solvers have an entry "experimental", too: why, or an empty text.
    """
    solvers = {
        name: {
            "summary": _first_line(cls), "parameters": _solver_fields(cls), "experimental": cls.experimental
        } for name, cls in _solvers().items()
    }  # fmt: skip
    families = {
        name: {"summary": _first_line(make), "parameters": _accepted(make)} for name, make in _families().items()
    }
    return {"solvers": solvers, "problems": families}


def documentation(name: str) -> str:
    """What a solver's class says of it, or a family's file and its `make`: formulas, parameters with their ranges."""
    if name in _solvers():
        return inspect.getdoc(_solvers()[name]) or ""
    make = _families()[name]
    return "\n\n".join(filter(None, (inspect.getdoc(sys.modules[make.__module__]), inspect.getdoc(make))))


def _solvers() -> dict[str, Any]:
    return {**bilevel.solvers.ALL, **irl.solvers.ALL}


def _families() -> dict[str, Callable[..., Any]]:
    return {name: family.make for name, family in problems.families().items()}


def _first_line(thing: Any) -> str:
    """The first line of the docstring of the file that defines `thing`, without the name it opens with."""
    text = inspect.getdoc(sys.modules[thing.__module__]) or inspect.getdoc(thing) or ""
    line = text.partition("\n")[0].strip()
    name, colon, rest = line.partition(": ")
    return rest[:1].upper() + rest[1:] if colon and name.lower() == getattr(thing, "__name__", "").lower() else line


def _solver_fields(cls: Any) -> dict[str, Any]:
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default for field in dataclasses.fields(cls)
    }


def settings_of_solver(name: str) -> dict[str, Any]:
    """The settings of a solver with their defaults; none of one that is not known."""
    return _solver_fields(_solvers()[name]) if name in _solvers() else {}


def _accepted(make: Callable) -> dict[str, Any]:
    """Parameters with defaults of a family's make, but for the seed, which --seeds sets."""
    parameters = inspect.signature(make).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "seed"]
    return {p.name: None if p.default is p.empty else p.default for p in named}


def check_names(what: str, params: dict[str, Any], accepted: dict[str, Any]) -> None:
    """Raise `UsageError` for a parameter that is not among the accepted ones."""
    unknown = [key for key in params if key not in accepted]
    if unknown:
        listing = ", ".join(f"{key}={default}" for key, default in accepted.items()) or "no parameters"
        close = difflib.get_close_matches(unknown[0], accepted, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"{what} has no parameter {unknown[0]!r}.{hint} {what} accepts: {listing}.")


def build_solver(text: str) -> bilevel.Solver:
    """The solver that `text` names.

    Raises:
        UsageError: an unknown name or parameter, or a value that the solver refuses.
    """
    name, params = parse(text)
    if name not in _solvers():
        raise nearest("solver", name, _solvers())
    cls = _solvers()[name]
    defaults = _solver_fields(cls)
    now = {key: cls.renamed.get(key, key) for key in params}
    check_names(name, {now[key]: value for key, value in params.items()}, defaults)
    values = {key: _setting(f"{name}: {key}", value, defaults[now[key]]) for key, value in params.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"{text}: {error}") from error


def _setting(what: str, value: Any, default: Any) -> Any:
    """`value` in the type of the solver's default: whole numbers stay, other numbers are floats, words are optax
    calls.
    """
    if isinstance(default, int) and not isinstance(default, bool):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"{what}: got {value!r}; expected a whole number, as the default {default}.")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 10**300:
            raise UsageError(f"{what}: got a number of {len(str(abs(value)))} digits; expected a float.")
        return float(value)
    call = re.fullmatch(r"(\w+)\((.*)\)", value) if isinstance(value, str) else None
    if call is None:
        return value
    import optax

    function = getattr(optax, call.group(1), getattr(bilevel, call.group(1), None))
    try:
        if function is None:
            raise ValueError(f"neither optax nor bilevel has {call.group(1)}")
        return function(*ast.literal_eval(f"({call.group(2)},)" if call.group(2) else "()"))
    except Exception as error:  # whatever optax says of such arguments
        raise UsageError(f"{what}: got {value!r}; expected a number or a call as adam(0.05): {error}") from error


def check_problem(text: str) -> None:
    """Raise `UsageError` for an unknown family or parameter."""
    name, params = parse(text)
    if name not in _families():
        raise nearest("problem", name, _families())
    check_names(name, params, _accepted(_families()[name]))


def build_instance(text: str, seed: int) -> Any:
    """The `problems.instance.Instance` that `text` names, drawn with `seed`."""
    check_problem(text)
    name, params = parse(text)
    return problems.make(name, seed=seed, **params)


def check_limits(where: str, limits: dict[str, Any]) -> None:
    """Raise `UsageError` for a limit that makes no sense."""
    for name, value in limits.items():
        try:
            LIMITS[name](value, name if where else f"--{name.replace('_', '-')}")
        except Misfit as error:
            raise UsageError(f"{where}{error}.") from error


def check_count(where: str, *counts: int) -> None:
    """Raise `UsageError` where the product of `counts` is more cells than a study can have."""
    if math.prod(counts) > MOST_CELLS:
        raise UsageError(
            f"{where}: got {' x '.join(map(str, counts))} runs; expected at most {MOST_CELLS}. Ask for fewer seeds."
        )


def grid(problem_texts: list[str], solver_texts: list[str], seeds: int = 1, **limits: Any) -> list[Cell]:
    """Every problem x seed x solver; an empty list means all that are known."""
    chosen = [label(text) for text in problem_texts or _families()]
    solvers = [label(text) for text in solver_texts or _solvers()]
    check_limits("", limits)
    check_count("--seeds", len(chosen), len(solvers), seeds)
    cells = [Cell(p, s, seed, **limits) for p in chosen for seed in range(seeds) for s in solvers]
    return checked(list(dict.fromkeys(cells)))


def checked(cells: list[Cell]) -> list[Cell]:
    """The cells, none of which has a budget of time without a word of when to measure."""
    for cell in cells:
        if cell.time_limit is not None and cell.max_steps is None and cell.max_passes is None and cell.every is None:
            raise UsageError(
                f"{cell.solver} on {cell.problem}: a budget of time alone says nothing of when to measure. Give every "
                "(steps between measurements), or max_steps."
            )
    return cells
