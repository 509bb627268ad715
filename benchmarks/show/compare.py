"""Compare solvers over one folder of results or several: what `bilevax compare` says, as one dictionary.

A run *reaches the tolerance* tau on an instance (a problem and a seed) at its first measurement inside the sets with

    F(x) <= F_L + tau (F_0 - F_L)          by value: Moré and Wild (2009), equation (2.2)
    |grad F(x)| <= tau |grad F|_0          by gradient

F_L is the optimum where it is known, else the least F that any compared run reached; F_0 and |grad F|_0 are the largest
of the runs' first measurements, so that all solvers have one threshold; where none of these is inside the sets, of the
first that are, and what is within 1e-9 (1 + |F_L|) of F_L has reached it, too. A run whose numbers the referee refutes
never reaches it. Costs are read at measurements: they are rounded up to the next one.
"""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.errors import UsageError
from benchmarks.judge import statistics
from benchmarks.judge.trials import COLUMNS, Trial
from benchmarks.show import report
from benchmarks.study import tuning
from benchmarks.study.files import FAILED, UNSUPPORTED
from benchmarks.study.registry import label

AXES = ("oracles", "time")
NEAR = 1e-9  # of 1 + |F_L|, where the first measurement inside the sets may be the optimum
RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0, math.inf)
BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # parts of the largest cost paid


def read(folders: list[Path], problems: list[str], solvers: list[str]) -> tuple[list[Trial], list[str]]:
    """(trials, notes) of folders; `problems` and `solvers` choose, by name or by name[…]; empty lists mean all.

    Where folders hold the same cell, its solvers carry their folder's name: `SOBA @ before`.

    Raises:
        UsageError: a folder that is no run, a choice that fits nothing, instances that differ between folders.
    """
    runs = [report.load(folder) for folder in folders]
    keys = [{(c.problem, c.solver, c.seed) for c, _ in run.results} for run in runs]
    overlap = any(a & b for k, a in enumerate(keys) for b in keys[k + 1 :])
    names = report_names(folders)
    trials: list[Trial] = []
    known: dict[tuple[str, int], dict[str, Any]] = {}
    for run, name, folder in zip(runs, names, folders, strict=True):
        searches = tuning.spent(folder, [cell for cell, _ in run.results])
        seen: Counter[tuple[str, str, int]] = Counter()
        for cell, result in run.results:
            if not (_chosen(cell.problem, problems) and _chosen(cell.solver, solvers)):
                continue
            key = cell.problem, cell.solver, cell.seed
            seen[key] += 1
            text = cell.solver + (f" #{seen[key]}" if seen[key] > 1 else "") + (f" @ {name}" if overlap else "")
            facts = run.instances.get((cell.problem, cell.seed), {"sizes": None, "optimum": None})
            first = known.setdefault((cell.problem, cell.seed), facts)
            if facts["sizes"] is not None and first["sizes"] is not None and not _same(first, facts):
                raise UsageError(
                    f"{cell.problem} seed {cell.seed} is another instance in {name} (sizes or optimum differ): runs of "
                    "different instances do not compare. Run both with one version."
                )
            spent = searches.get((cell.problem, cell.solver), {})
            trials.append(Trial(cell.problem, cell.seed, text, result, facts, spent))
    if not trials:
        raise UsageError("nothing to compare: no cell fits. `bilevax show DIR` lists problems and solvers.")
    return trials, _provenance(runs, names)


def report_names(folders: list[Path]) -> list[str]:
    """The folders' last parts, or whole paths where those are not unique."""
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def _chosen(text: str, wanted: list[str]) -> bool:
    return not wanted or any(label(choice) == text or choice == text.partition("[")[0] for choice in wanted)


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a["sizes"] != b["sizes"] or (a["optimum"] is None) != (b["optimum"] is None):
        return False
    return a["optimum"] is None or math.isclose(a["optimum"], b["optimum"], rel_tol=1e-6, abs_tol=1e-12)


def _provenance(runs: list[report.Run], names: list[str]) -> list[str]:
    """What differs between the folders besides the cells."""
    notes = []
    for key, what in (("precision", "precision"), ("versions", "versions"), ("system", "machine")):
        told = [{k: v for k, v in run.settings[key].items() if not k.startswith("program ")} if key == "versions"
                else run.settings[key] for run in runs]  # fmt: skip
        if any(one != told[0] for one in told):
            consequence = "times do not compare" if key == "system" else "numbers may differ for that reason alone"
            notes.append(f"The folders differ in {what} ({', '.join(names)}): {consequence}.")
    return notes


def thresholds(trials: list[Trial], by: str, tolerance: float) -> dict[tuple[str, int], float]:
    """{(problem, seed): what F or |grad F| must come down to}; see the head of this file."""
    found = {}
    for instance in dict.fromkeys(trial.instance for trial in trials):
        curves = [trial.inside(COLUMNS[by]) for trial in trials if trial.instance == instance and not trial.refuted]
        curves = [curve for curve in curves if curve.size]
        starts = [curve[0] for curve in curves if math.isfinite(curve[0])]
        late = [curve[np.isfinite(curve)][0] for curve in curves if np.isfinite(curve).any()] if not starts else []
        start = max(starts or late, default=math.inf)
        optima = [trial.known["optimum"] for trial in trials if trial.instance == instance]
        optimum = next((value for value in optima if value is not None), None)  # an unfinished folder may not know it
        least = min((curve.min() for curve in curves), default=math.inf) if optimum is None else optimum
        if not (math.isfinite(start) and math.isfinite(least)):
            found[instance] = -math.inf
        else:
            found[instance] = tolerance * start if by == "gradient" else least + tolerance * (start - least)
            found[instance] += NEAR * (1 + abs(least)) if late and by == "value" else 0.0
    return found


@np.errstate(over="ignore", invalid="ignore")  # of diverged runs
def compare(folders: list[Path], *, by: str = "value", tolerance: float = 1e-3, problems: list[str] | None = None,
            solvers: list[str] | None = None, count_tuning: bool = False) -> dict[str, Any]:  # fmt: skip
    """Everything `bilevax compare` prints; a cost that was never paid is infinite.

    Args:
        folders: of runs.
        by: "value" or "gradient".
        tolerance: tau, in (0, 1).
        problems: names to keep; None: all.
        solvers: names to keep; None: all.
        count_tuning: whether a tuned solver pays for its search, too: the cost of all trials before that of the run.

    Returns:
        costs: a row for each run, its "oracles" and "time" to the tolerance; problems: rows of `statistics.spread`;
        profiles; ranks; notes: what was left out, and what to beware of.

    Raises:
        UsageError: nothing to compare, bad arguments, or folders that cannot be read.
    """
    if by not in COLUMNS:
        raise UsageError(f"by: got {by!r}; expected {' or '.join(COLUMNS)}.")
    if not 0 < tolerance < 1:
        raise UsageError(f"tolerance: got {tolerance}; expected a number in (0, 1): a part of the way from the start.")
    trials, notes = read(folders, problems or [], solvers or [])
    trials = _renamed(trials)
    limits = thresholds(trials, by, tolerance)
    costs = {
        axis: {
            (*trial.instance, trial.solver): math.inf
            if trial.refuted
            else statistics.cost_to(trial.column(axis), trial.inside(COLUMNS[by]), limits[trial.instance])
            + (trial.spent.get(axis, 0.0) if count_tuning else 0.0)
            for trial in trials
            if trial.result is not None
        }
        for axis in AXES
    }
    chosen, instances, left_out = _blocks(trials)
    notes += left_out + _warnings(trials)
    if count_tuning:
        notes.append("Costs of tuned solvers have those of their search in them.")
    matrix = {axis: np.array([[costs[axis][*i, s] for s in chosen] for i in instances]) for axis in AXES}
    counted = {axis: np.flatnonzero(~np.isnan(matrix[axis]).any(axis=0)) for axis in AXES}
    names = {axis: [chosen[k] for k in counted[axis]] for axis in AXES}
    matrix = {axis: matrix[axis][:, counted[axis]] for axis in AXES}
    profiles = {axis: _profiles(matrix[axis], names[axis]) for axis in AXES if len(names[axis]) > 1}
    ranks = statistics.rank_tests(matrix["oracles"], names["oracles"]) if len(names["oracles"]) > 1 else None
    uncounted = [name for name in chosen if name not in names["oracles"]]
    if uncounted:
        notes.append(
            f"{', '.join(uncounted)}: how many oracle calls were made is not known; by time alone it compares."
        )
    if ranks is not None and len(instances) < 6:
        notes.append(
            f"{len(instances)} instances: the least p of a pair is 2^{1 - len(instances)}; six or more seeds can tell."
        )
    families = list(dict.fromkeys(trial.problem for trial in trials))
    return {
        "folders": [str(folder) for folder in folders], "by": by, "tolerance": tolerance,
        "costs": [dict(zip(("problem", "seed", "solver"), key, strict=True)) | {axis: costs[axis][key] for axis in AXES}
                  for key in costs["oracles"]],
        "problems": [_table(name, [t for t in trials if t.problem == name], costs) for name in families],
        "solvers": chosen, "instances": [f"{problem} seed {seed}" for problem, seed in instances],
        "profiles": profiles, "ranks": ranks, "notes": notes,
    }  # fmt: skip


def _renamed(trials: list[Trial]) -> list[Trial]:
    """Short solver names, the same over all problems: parameters go where no problem has two of one name."""

    def short(text: str) -> str:
        end = text.rfind("]")
        return text.partition("[")[0] + (text[end + 1 :] if end >= 0 else "")

    long = {
        name
        for problem in {trial.problem for trial in trials}
        for name, count in Counter(
            short(text) for text in {trial.solver for trial in trials if trial.problem == problem}
        ).items()
        if count > 1
    }
    return [t if short(t.solver) in long else dataclasses.replace(t, solver=short(t.solver)) for t in trials]


def _table(name: str, trials: list[Trial], costs: dict[str, dict]) -> dict[str, Any]:
    rows = []
    for solver in dict.fromkeys(trial.solver for trial in trials):
        done = [trial for trial in trials if trial.solver == solver and trial.result is not None]
        last = {
            column: [trial.column(column)[-1] if trial.column(column).size else math.nan for trial in done]
            for column in COLUMNS.values()
        }
        optima = [trial.known["optimum"] for trial in done]
        if optima and None not in optima:
            last["gap"] = [value - optimum for value, optimum in zip(last["value"], optima, strict=True)]
        paid = {axis: [costs[axis][*trial.instance, solver] for trial in done] for axis in AXES}
        solved = sum(map(math.isfinite, paid["time"]))
        paid = {axis: [] if np.isnan(values).any() else values for axis, values in paid.items()}  # not counted
        rows.append(
            {"solver": solver, "runs": len(done), "solved": solved,
             "refuted": sum(trial.refuted for trial in done)}
            | {column: statistics.spread(values) for column, values in (last | paid).items()}
        )  # fmt: skip
    return {"problem": name, "seeds": len({trial.seed for trial in trials}), "rows": rows}


def _blocks(trials: list[Trial]) -> tuple[list[str], list[tuple[str, int]], list[str]]:
    """(solvers, instances that all of them were run on, what was left out).

    Of all such blocks with two solvers or more it is the one with the most runs; of equals, with the most solvers.
    """
    order = list(dict.fromkeys(trial.solver for trial in trials))
    total = list(dict.fromkeys(trial.instance for trial in trials))
    ran = {
        instance: frozenset(t.solver for t in trials if t.instance == instance and t.result is not None)
        for instance in total
    }
    sets = set(ran.values())
    while len(grown := sets | {a & b for a in sets for b in sets}) > len(sets):
        sets = grown

    def size(solvers: frozenset[str]) -> tuple[bool, int, int, list[int]]:
        count = sum(solvers <= found for found in ran.values())
        first = [-order.index(name) for name in order if name in solvers]  # of equals, the first named
        return len(solvers) > 1, len(solvers) * count, len(solvers), first

    best = max(sets, key=size)
    instances = [instance for instance in total if best and best <= ran[instance]]
    notes = [
        f"{name} is left out of profiles and tests: it was run on {sum(name in found for found in ran.values())} of "
        f"{len(total)} instances, and not on all of the {len(instances)} that are compared."
        for name in order
        if name not in best
    ]
    if len(instances) < len(total):
        notes.append(f"Profiles and tests use {len(instances)} of {len(total)} instances: all their solvers ran there.")
    return [name for name in order if name in best], instances, notes


def _warnings(trials: list[Trial]) -> list[str]:
    statuses = Counter(trial.result["status"] if trial.result else "unfinished" for trial in trials)
    notes = []
    if statuses["unfinished"]:
        notes.append(f"{statuses['unfinished']} cells are unfinished: repeat the run's command.")
    if statuses[UNSUPPORTED]:
        notes.append(f"{statuses[UNSUPPORTED]} runs are not supported by their solver: they count as not solved.")
    failed = sum(statuses[name] for name in FAILED)
    if failed:
        notes.append(f"{failed} runs failed ({', '.join(n for n in FAILED if statuses[n])}).")
    refuted = sum(trial.refuted for trial in trials)
    if refuted:
        notes.append(f"{refuted} runs are refuted by the referee: they count as not solved.")
    return notes


def _profiles(costs: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Performance and data profile of costs, shape [instances, solvers]: every step of both, and their tables."""
    ratio = statistics.ratios(costs)
    largest = costs[np.isfinite(costs)].max(initial=0.0)
    budgets = np.array(BUDGETS) * largest
    return {
        "performance": {name: np.sort(column).tolist() for name, column in zip(names, ratio.T, strict=True)},
        "data": {name: np.sort(column).tolist() for name, column in zip(names, costs.T, strict=True)},
        "ratios": list(RATIOS),
        "within_ratio": statistics.fraction_within(ratio, np.array(RATIOS)).tolist(),
        "budgets": budgets.tolist(),
        "within_budget": statistics.fraction_within(costs, budgets).tolist(),
    }
