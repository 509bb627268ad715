"""Solvers as a configuration of benchopt's benchmark_bilevel has them: `-s benchopt:config/ijcnn1_best_params.yml`.

Its step sizes are `step_size` below and step_size/outer_ratio above, constant in AmIGO, SABA and StocBiO, and over
sqrt(k + 1) in SOBA. A list of values means every one of them. The number of samples in a batch is the problem's here,
as in -p 'logistic[batch_size=64]', and seeds are --seeds; data sets that have to be downloaded are not here.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.errors import UsageError
from benchmarks.study.registry import label

PREFIX = "benchopt:"
MOST = 1_000_000  # characters of a file
USED = "step_size", "outer_ratio", "n_inner_steps", "n_shia_steps"
ELSEWHERE = "batch_size", "eval_freq", "framework", "random_state"  # of the problem, or of the run


def expanded(texts: list[str]) -> tuple[list[str], list[str]]:
    """(solver texts, notes): each `benchopt:FILE` among `texts` replaced by the solvers that the file has settings for.

    Raises:
        UsageError: a file that cannot be read, or has no solver that is known here.
    """
    found, notes = [], []
    for text in texts:
        if not text.startswith(PREFIX):
            found.append(text)
            continue
        path, own, other = Path(text.removeprefix(PREFIX)), [], []
        for entry in _entries(path):
            name, parameters = _parsed(path, entry)
            dropped = [key for key in parameters if key not in (*USED, *ELSEWHERE)]
            translated = TRANSLATIONS.get(name.lower())
            if translated is None:
                other.append(name)
            else:
                own += [label(translated(one)) for one in _product(parameters)]
                notes += [f"{path}: {name}'s {key} means nothing here." for key in dropped]
        if not own:
            raise UsageError(f"-s {text}: none of its solvers is translated. Translated: {', '.join(TRANSLATIONS)}.")
        found += own
        if other:
            notes.append(f"{path}: left out, for want of a translation: {', '.join(dict.fromkeys(other))}.")
    return list(dict.fromkeys(found)), list(dict.fromkeys(notes))


def _entries(path: Path) -> list[str]:
    """The lines of the list `solver:` in the file, which is YAML of the simplest kind."""
    try:
        with path.open(encoding="utf8") as file:
            text = file.read(MOST)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"-s {PREFIX}{path}: it cannot be read ({error}).") from error
    block = re.search(r"^solver:[ \t]*\n((?:[ \t]*(?:-|#).*\n?|[ \t]*\n)*)", text, re.MULTILINE)
    lines = [] if block is None else [line.partition(" #")[0].strip() for line in block[1].splitlines()]
    entries = [line.removeprefix("-").strip().strip("'\"") for line in lines if line.startswith("-")]
    if not entries:
        raise UsageError(f"-s {PREFIX}{path}: expected a list under `solver:`, as benchopt's configurations have it.")
    return entries


def _parsed(path: Path, entry: str) -> tuple[str, dict[str, list[str]]]:
    """(name, {parameter: its values}) of `Name[key=value,key=[value,value]]`."""
    match = re.fullmatch(r"(\w+)\s*(?:\[(.*)\])?", entry)
    if match is None:
        raise UsageError(f"-s {PREFIX}{path}: cannot read {entry[:80]!r}; expected Name[key=value,…].")
    pairs = re.findall(r"(\w+)\s*=\s*(\[[^\]]*\]|[^,\[\]]+)", match[2] or "")
    return match[1], {key: [one.strip() for one in value.strip("[] ").split(",")] for key, value in pairs}


def _product(parameters: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Every choice of the values of the parameters that are used."""
    own = {key: values for key, values in parameters.items() if key in USED}
    for choice in itertools.product(*own.values()):
        try:
            yield {key: float(value) for key, value in zip(own, choice, strict=True)}
        except ValueError as error:
            got = dict(zip(own, choice, strict=True))
            raise UsageError(f"benchopt's settings: got {got}; expected numbers.") from error


def _sizes(given: dict[str, Any], power: float = 0.0) -> str:
    """The three step sizes of benchmark_bilevel; its defaults where they are not given."""
    low = given.get("step_size", 0.1)
    up = low / given.get("outer_ratio", 1.0)
    low, up = (f"{a:.6g}" if power == 0 else f"decay({a:.6g},{power:g})" for a in (low, up))
    return f"lower_step_size={low},linear_step_size={low},upper_step_size={up}"


def _amigo(given: dict[str, Any]) -> str:
    steps = int(given.get("n_inner_steps", 10))
    return f"AmIGO[{_sizes(given)},num_lower_steps={steps},num_linear_steps={steps}]"


def _stocbio(given: dict[str, Any]) -> str:
    steps, terms = int(given.get("n_inner_steps", 10)), int(given.get("n_shia_steps", 10))
    return f"StocBiO[{_sizes(given)},num_lower_steps={steps},num_linear_steps={terms}]"


TRANSLATIONS = {
    "amigo": _amigo,
    "saba": lambda given: f"SABA[{_sizes(given)}]",
    "soba": lambda given: f"SOBA[{_sizes(given, 0.5)}]",
    "stocbio": _stocbio,
}
