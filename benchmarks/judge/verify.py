"""`bilevax verify`: search for counterexamples of every guarantee, print the table, keep what breaks one."""

import importlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

import bilevel
import irl
from benchmarks.errors import UsageError, nearest
from bilevel.backend import schema
from bilevel.guarantees import Counterexample, Finding, Guarantee, Recipe, judge, search
from bilevel.guarantees import Path as Trace
from bilevel.report import save_figure
from problems.guarantees import guarantees

SAVED = schema.fields({"guarantee": schema.text, "drawn": schema.anything}, others=schema.anything)
RECIPE = schema.fields(
    {"build": schema.text, "seed": schema.whole(), "numbers": schema.table(schema.number())}, others=schema.anything
)


def choose(names: Sequence[str]) -> dict[str, Guarantee]:
    """What `names` mean, by the name that calls each: exact names, beginnings, solvers, or `module:attribute`.

    Without names, all.

    Raises:
        UsageError: a name that means nothing, with the nearest.
    """
    known = guarantees()
    chosen: dict[str, Guarantee] = {}
    carried = carried_by_solvers()
    for name in names or known:
        if ":" in name:
            matched = {name: _imported(name)}
        elif name in known:
            matched = {name: known[name]}
        elif name in carried:
            matched = {key: known[key] for key in carried[name]}
        else:
            matched = {key: guarantee for key, guarantee in known.items() if key.startswith(name)}
        if not matched:
            raise nearest("guarantee", name, [*known, *carried])
        chosen |= matched
    return chosen


def carried_by_solvers() -> dict[str, tuple[str, ...]]:
    """Names of guarantees by the solver that carries them."""
    solvers: dict[str, Any] = {**bilevel.solvers.ALL, **irl.solvers.ALL}
    return {name: kind.guarantees for name, kind in solvers.items() if kind.guarantees}


def _imported(name: str) -> Guarantee:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # as python -m does
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{name}: {error}. Expected module:attribute of a Guarantee.") from error
    finally:
        sys.path.remove("")
    if not isinstance(found, Guarantee):
        raise UsageError(f"{name}: got {type(found).__name__}; expected a bilevel.guarantees.Guarantee.")
    return found


def run(
    chosen: Sequence[Guarantee], examples: int, seconds: float | None, seed: int,
    started: Callable[[int, str], None] = lambda index, name: None,
) -> list[Finding]:  # fmt: skip
    """Search each; `seconds` is for all of them together, shared out as they go."""
    findings, began = [], time.perf_counter()
    for index, guarantee in enumerate(chosen):
        started(index, guarantee.name)
        left = math.inf
        if seconds is not None:
            left = (seconds - (time.perf_counter() - began)) / (len(chosen) - index)
        findings.append(search(guarantee, examples=examples, seconds=left, seed=seed))
    return findings


def _rate(guarantee: Guarantee, fit: tuple[float, float] | None) -> str:
    """`0.938^k ± 0.001` or `k^-1.02 ± 0.05`."""
    if fit is None:
        return ""
    value, half = fit
    text = f"{value:.5g}^k" if guarantee.rate == "geometric" else f"k^{value:.3g}"
    return text if half < 5e-5 * max(abs(value), 1e-9) else f"{text} ± {half:.1g}"


def row(finding: Finding) -> dict[str, Any]:
    """A finding as plain data."""
    guarantee, steady = finding.guarantee, finding.steady
    fits = {"fitted": None, "claimed": None}
    if steady is not None:
        fits = {"fitted": steady.fit(guarantee.rate), "claimed": steady.fit(guarantee.rate, of_bound=True)}
    worst = finding.counterexample.path if finding.counterexample is not None else finding.tightest
    return {
        "guarantee": guarantee.name,
        "statement": guarantee.statement,
        "source": guarantee.source,
        "assumptions": [check.__name__ for check in guarantee.assumptions],
        "draws": finding.draws,
        "instances": finding.instances,
        "tightest": None if worst is None else worst.worst,
        "rate": guarantee.rate,
        "fitted_rate": fits["fitted"],
        "claimed_rate": None if fits["claimed"] is None else fits["claimed"][0],
        "verdict": finding.verdict,
        "seconds": finding.seconds,
        "worst": None if worst is None else path_data(worst),
    }


def path_data(path: Trace) -> dict[str, Any]:
    """A path as plain data; the recipe where there is one, else its text."""
    drawn: Any = repr(path.drawn)
    if isinstance(path.drawn, Recipe):
        drawn = {"build": path.drawn.build.__name__, "seed": path.drawn.seed, "numbers": dict(path.drawn.numbers)}
    numbers = {name: [float(v) for v in getattr(path, name)] for name in ("ratio", "measured", "bound")}
    return {"drawn": drawn, "horizon": list(path.horizon), **numbers, "allowance": path.allowance}


def table(findings: Sequence[Finding]) -> Table:
    """The table; the tightest ratio of a broken guarantee is that of its counterexample."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    out.add_column("guarantee", style="bold", no_wrap=True)
    out.add_column("source")
    for name in ("examples", "tightest\nmeasured/bound", "fitted rate", "claimed rate"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("verdict", no_wrap=True)
    for finding in findings:
        data, guarantee = row(finding), finding.guarantee
        claimed = None if data["claimed_rate"] is None else (data["claimed_rate"], 0.0)
        tightest = "" if data["tightest"] is None else f"{data['tightest']:.6g}"
        style = "green" if data["verdict"] == "holds" else "red"
        out.add_row(
            guarantee.name, guarantee.source, str(finding.instances), tightest, _rate(guarantee, data["fitted_rate"]),
            _rate(guarantee, claimed), f"[{style}]{data['verdict']}[/{style}]",
        )  # fmt: skip
    return out


def save(
    folder: Path, name: str, guarantee: Guarantee, found: Counterexample, examples: int, seed: int
) -> str:  # fmt: skip
    """Write counterexample.json, instance.npz and path.png into a folder of its own; return the command to replay.

    An instance that was drawn finished, not as a recipe, is found again by the same search.
    """
    folder = folder / guarantee.name
    folder.mkdir(parents=True, exist_ok=True)
    data = {"guarantee": guarantee.name, "statement": guarantee.statement, "broken": found.broken}
    data |= {"search": {"examples": examples, "seed": seed}}
    text = json.dumps(data | path_data(found.path), indent=1)
    (folder / "counterexample.json").write_text(text, "utf8")
    drawn = found.path.drawn
    instance = drawn.instance() if isinstance(drawn, Recipe) else drawn
    leaves = jax.tree_util.tree_leaves_with_path(instance)
    arrays: dict[str, Any] = {jax.tree_util.keystr(where).strip("."): np.asarray(leaf) for where, leaf in leaves}
    np.savez(folder / "instance.npz", **arrays)
    plot(folder / "path.png", guarantee, found.path)
    if not isinstance(drawn, Recipe):
        return f"bilevax verify {shlex.quote(name)} --examples {examples} --seed {seed}"
    return f"bilevax verify {shlex.quote(name)} --replay {shlex.quote(str(folder))}"


def plot(file: Path, guarantee: Guarantee, path: Trace) -> None:
    """Measured and bound over the horizon."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values, style in (("measured", path.measured, "o-"), ("bound", path.bound + path.allowance, "s--")):
        axes.plot(path.horizon, np.maximum(values, 1e-300), style, label=name)
    axes.set(yscale="log", xlabel="k", title=f"{guarantee.name}: {path.worst:.3g} times the bound")
    axes.legend()
    save_figure(figure, file)


def replay(guarantee: Guarantee, folder: Path) -> tuple[Trace, bool]:
    """(the path, whether it still breaks the bound or an assumption) of a saved counterexample.

    Raises:
        UsageError: a folder without a counterexample of this guarantee that has a recipe.
    """
    import hypothesis
    from hypothesis.errors import NoSuchExample

    try:
        saved = schema.printable(schema.parse_json((folder / "counterexample.json").read_bytes()))
        SAVED(saved, "")
        drawn = saved["drawn"]
        if isinstance(drawn, dict):
            RECIPE(drawn, "drawn")
    except (OSError, schema.Misfit, RecursionError) as error:
        raise UsageError(f"{folder}: no counterexample in it ({error}).") from error
    if saved["guarantee"] != guarantee.name or not isinstance(drawn, dict):
        raise UsageError(f"{folder}: a counterexample of {saved['guarantee']}, drawn as {drawn}; expected a recipe of "
                         f"{guarantee.name}.")  # fmt: skip
    quick = hypothesis.settings(database=None, deadline=None)

    def fits(recipe: Any) -> bool:
        of_build = isinstance(recipe, Recipe) and recipe.build.__name__ == drawn["build"]
        return of_build and recipe.numbers.keys() == drawn["numbers"].keys()

    try:
        any_recipe: Any = hypothesis.find(guarantee.instances, fits, settings=quick)
    except NoSuchExample as error:
        raise UsageError(f"{folder}: {guarantee.name} draws no {drawn['build']} with these numbers.") from error
    recipe = Recipe(any_recipe.build, drawn["seed"], drawn["numbers"])
    trial = guarantee.try_on(recipe)
    path, broken = judge(guarantee, recipe, jax.tree.map(lambda leaf: leaf[:1], trial))
    return path, broken is not None
