"""What `bilevax peers` prints: the same gradients by other libraries, with error and time side by side.

Three cases, float64, one thread, the same problem, data and points for everybody: the ridge hypergradient (500 rows,
100 penalties), a quadratic program with its gradient (50 unknowns, 30 rows), and the gradient of maximum causal entropy
IRL (a gridworld of 225 states, 30 steps). Calls are interleaved, each at another point; errors are relative to NumPy's
dense answer. A library runs where it is installed and is skipped, with the reason, where it is not. torchopt,
boat-torch and imitation run in processes of their own, one after the other, with the first interpreter of `--python`
that has them: they need other versions of NumPy and Gymnasium than bilevax.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import constrained, entropy, hypergradient
from benchmarks.peers.timing import Measured, interleaved
from bilevel.backend.compilation import user_environment

ROWS, FEATURES, UNKNOWNS, LIMITS = 500, 100, 50, 30
ELSEWHERE = {  # name: (program, the modules that it needs, what its row is called)
    "torchopt": ("torch_ridge.py", "torch, torchopt", "torchopt custom_root + CG"),
    "boat-torch": ("boat_ridge.py", "torch, boat_torch", "boat-torch NGD + CG"),
    "imitation": ("imitation_mce.py", "imitation, seals", "imitation mce_irl"),
}
COLUMNS = ("library", "version", "first call (s)", "steady (ms)", "times ours", "worst gradient error")


def version(package: str) -> str:
    """A package's name and version, as in `numpy 2.3.1`."""
    return f"{package} {metadata.version('bilevax' if package == 'bilevel' else package)}"


def _relative(out: Any, truth: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(out) - truth) / np.linalg.norm(truth))


def _installed(makers: dict[str, Callable[[], dict[str, Callable]]], skipped: dict[str, str]) -> dict[str, Callable]:
    calls: dict[str, Callable] = {}
    for package, make in makers.items():
        if importlib.util.find_spec(package) is None:
            skipped[package] = "not installed: pip install 'bilevax[peers]'"
            continue
        calls |= make()
    return calls


def ridge(repeats: int, pythons: Sequence[str], skipped: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of the ridge hypergradient."""
    data = hypergradient.prepared(ROWS, FEATURES)
    rng = np.random.default_rng(1)
    points = [rng.normal(size=FEATURES) - 3 for _ in range(repeats)]
    truths = [hypergradient.exact(data, x) for x in points]
    makers = {
        "bilevel" if name == "bilevax" else name: lambda make=make: make(data, FEATURES)
        for name, make in hypergradient.MAKERS.items()
    }
    calls = {name: jax.jit(call) for name, call in _installed(makers, skipped).items()}
    arguments = [(jnp.asarray(x),) for x in points]
    found = interleaved(calls, arguments, lambda k, out: _relative(out[1], truths[k]))
    arrays = {"Z": data["train"]["Z"], "t": data["train"]["t"]}
    arrays |= {"V": data["validation"]["Z"], "s": data["validation"]["t"], "points": np.stack(points)}
    return _beside_ours(_rows(found) + _elsewhere(("torchopt", "boat-torch"), arrays, truths, pythons, skipped))


def causal_entropy(repeats: int, pythons: Sequence[str], skipped: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of maximum causal entropy IRL."""
    mdp, arrays = entropy.make()
    points = list(np.random.default_rng(1).normal(size=(repeats, len(arrays["expert"]))))
    truths = [entropy.exact(arrays, x) for x in points]
    calls = entropy.calls(mdp, arrays)
    found = interleaved(calls, [(jnp.asarray(x),) for x in points], lambda k, out: _relative(out, truths[k]))
    arrays |= {"points": np.stack(points)}
    return _beside_ours(_rows(found) + _elsewhere(("imitation",), arrays, truths, pythons, skipped))


def _elsewhere(
    names: Sequence[str], arrays: dict[str, Any], truths: list[np.ndarray], pythons: Sequence[str],
    skipped: dict[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the libraries that have a program of their own; who has none of the interpreters is skipped."""
    found = []
    for name in names:
        program, modules, title = ELSEWHERE[name]
        other = run_elsewhere(program, modules, arrays, pythons)
        if isinstance(other, str):
            skipped[name] = other
            continue
        errors = [_relative(g, truth) for g, truth in zip(other["gradients"], truths, strict=True)]
        found.append(_row(title, other["version"], Measured(other["first"], other["seconds"], errors)))
    return found


def run_elsewhere(
    program: str, modules: str, arrays: dict[str, Any], pythons: Sequence[str]
) -> dict[str, Any] | str:  # fmt: skip
    """What `program`, a file beside this one, prints of `arrays` under the first interpreter that imports `modules`; or
    why it cannot run.
    """
    theirs = user_environment()  # another interpreter may have another XLA, which stops at flags that it does not know
    reasons = []
    for python in pythons:
        try:
            done = subprocess.run(
                [python, "-c", f"import {modules}"], env=theirs, capture_output=True, text=True, check=False
            )
        except OSError as error:
            reasons.append(f"{python}: {error.strerror}")
            continue
        if done.returncode == 0:
            break
        reasons.append(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    else:
        return f"{'; '.join(reasons)}. Give an interpreter that has it by --python"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(path, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
        file = Path(__file__).with_name(program)
        done = subprocess.run([python, str(file), str(path)], env=theirs, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else f"it failed: {done.stderr.strip().splitlines()[-1]}"


def program(repeats: int, skipped: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of the quadratic program."""
    data, rows = constrained.make_data(UNKNOWNS, LIMITS)
    problem = constrained.make_problem(data, rows)
    y0, ours = jnp.zeros(UNKNOWNS), constrained.bilevax_step(rows)
    solve = jax.jit(constrained.polyhedral.solve)
    makers: dict[str, Callable[[], dict[str, Callable]]] = {
        "bilevel": lambda: {"bilevax hypergradient": jax.jit(lambda x: ours(data, x, y0)[:2])},
        "qpax": lambda: {
            "qpax, default": jax.jit(constrained.qpax_call(data, rows)),
            "qpax, tight": jax.jit(constrained.qpax_call(data, rows, solver_tol=1e-10, target_kappa=1e-8)),
        },
        "jaxopt": lambda: {"jaxopt OSQP": jax.jit(constrained.jaxopt_call(data, rows))},
        "cvxpylayers": lambda: {"cvxpylayers (no jit)": constrained.cvxpylayers_call(data, rows)},
    }
    calls = _installed(makers, skipped)
    points = [1e-3 * np.random.default_rng(k).normal(size=constrained.DIM_X) for k in range(repeats)]
    solved = [np.asarray(solve(problem, jnp.asarray(x), y0, data).y) for x in points]
    truths = [constrained.exact(data, rows, x, y) for x, y in zip(points, solved, strict=True)]
    found = interleaved(calls, [(jnp.asarray(x),) for x in points], lambda k, out: _relative(out[1], truths[k]))
    return _beside_ours(_rows(found))


def _row(name: str, version: str, measured: Measured) -> dict[str, Any]:
    return {
        "library": name, "version": version, "first": measured.first, "steady": measured.median, "error": measured.worst
    }  # fmt: skip


def _rows(found: dict[str, Measured]) -> list[dict[str, Any]]:
    return [_row(name, version(name.split()[0].strip(",")), measured) for name, measured in found.items()]


def _beside_ours(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its steady time as a multiple of our shortest."""
    ours = min(row["steady"] for row in rows if row["library"].startswith("bilevax"))
    return [row | {"times_ours": row["steady"] / ours} for row in rows]


def run(repeats: int, pythons: Sequence[str] = ()) -> dict[str, Any]:
    """{"cases": {title: rows}, "skipped": {library: reason}}; seconds and relative errors."""
    skipped: dict[str, str] = {}
    pythons = [*pythons, sys.executable]
    size, steps = entropy.SIZE, entropy.HORIZON
    with jax.enable_x64(True):
        cases = {
            f"Ridge hypergradient, {ROWS} rows, {FEATURES} penalties": ridge(repeats, pythons, skipped),
            f"Quadratic program and gradient, {UNKNOWNS} unknowns, {LIMITS} rows": program(repeats, skipped),
            f"Causal entropy IRL, {size} x {size} cells, {steps} steps": causal_entropy(repeats, pythons, skipped),
        }
    return {"cases": cases, "skipped": skipped}


def as_text(found: dict[str, Any]) -> str:
    """The tables as text, and why libraries are missing from them."""
    from benchmarks.show.report import table_text

    parts = []
    for title, rows in found["cases"].items():
        lines = [
            [row["library"], row["version"], f"{row['first']:.2f}", f"{1e3 * row['steady']:.2f}",
             f"{row['times_ours']:.1f}", f"{row['error']:.0e}"]
            for row in rows
        ]  # fmt: skip
        parts.append(f"{title}; float64, one thread\n{table_text(list(COLUMNS), lines)}")
    parts += [f"skipped: {name}: {reason}" for name, reason in found["skipped"].items()]
    return "\n".join(parts)
