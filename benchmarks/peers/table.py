"""What `bilevax peers` prints: the same gradients by other libraries, with error and time side by side.

Two cases, float64, one thread, the same problem, data and points for everybody: the ridge hypergradient (500 rows, 100
penalties) and a quadratic program with its gradient (50 unknowns, 30 rows). Calls are interleaved, each at another
point; errors are relative to NumPy's dense answer. A library runs where it is installed and is skipped, with the
reason, where it is not. torchopt runs in a process of its own, with the interpreter of `--python`.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import constrained, hypergradient
from benchmarks.peers.timing import Measured, interleaved

ROWS, FEATURES, UNKNOWNS, LIMITS = 500, 100, 50, 30
ELSEWHERE = {
    "boat-torch": "no adapter yet",
    "imitation": "no adapter yet; it learns policies, gives no hypergradient, and needs an environment of its own",
}
COLUMNS = ("library", "version", "first call (s)", "steady (ms)", "times ours", "worst gradient error")


def version(package: str) -> str:
    """`name 1.2.3`."""
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


def ridge(repeats: int, python: str, skipped: dict[str, str]) -> list[dict[str, Any]]:
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
    rows = _rows(found)
    other = torch_ridge(data, points, python)
    if isinstance(other, str):
        skipped["torchopt"] = other
    else:
        errors = [_relative(g, truth) for g, truth in zip(other["gradients"], truths, strict=True)]
        measured = Measured(other["first"], other["seconds"], errors)
        rows.append(_row("torchopt custom_root + CG", other["version"], measured, rows))
    return rows


def torch_ridge(data: dict, points: list[np.ndarray], python: str) -> dict[str, Any] | str:
    """What `torch_ridge.py` prints under the interpreter `python`, or why it cannot run there."""
    probe = [python, "-c", "import torch, torchopt"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python}: {error.strerror}"
    if done.returncode:
        return f"{done.stderr.strip().splitlines()[-1]}: give the interpreter that has it by --python"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        arrays = {"Z": data["train"]["Z"], "t": data["train"]["t"]}
        arrays |= {"V": data["validation"]["Z"], "s": data["validation"]["t"], "points": np.stack(points)}
        np.savez(path, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
        program = Path(__file__).with_name("torch_ridge.py")
        done = subprocess.run([python, str(program), str(path)], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else f"it failed: {done.stderr.strip().splitlines()[-1]}"


def program(repeats: int, skipped: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of the quadratic program."""
    data, rows = constrained.make_data(UNKNOWNS, LIMITS)
    problem = constrained.make_problem(data, rows)
    y0 = jnp.zeros(UNKNOWNS)
    solve = jax.jit(constrained.polyhedral.solve)
    makers: dict[str, Callable[[], dict[str, Callable]]] = {
        "bilevel": lambda: {"bilevax hypergradient": jax.jit(constrained.gradient_of(problem, y0))},
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
    return _rows(interleaved(calls, [(jnp.asarray(x),) for x in points], lambda k, out: _relative(out[1], truths[k])))


def _rows(found: dict[str, Measured]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, measured in found.items():
        package = name.split()[0].strip(",")
        rows.append(_row(name, version(package), measured, rows))
    ours = min(row["steady"] for row in rows if row["library"].startswith("bilevax"))
    return [row | {"times_ours": row["steady"] / ours} for row in rows]


def _row(name: str, version: str, measured: Measured, rows: list[dict[str, Any]]) -> dict[str, Any]:
    ours = min((row["steady"] for row in rows if row["library"].startswith("bilevax")), default=measured.median)
    return {
        "library": name, "version": version, "first": measured.first, "steady": measured.median,
        "times_ours": measured.median / ours, "error": measured.worst,
    }  # fmt: skip


def run(repeats: int, python: str | None = None) -> dict[str, Any]:
    """{"cases": {title: rows}, "skipped": {library: reason}}; seconds and relative errors."""
    skipped: dict[str, str] = {}
    with jax.enable_x64(True):
        cases = {
            f"Ridge hypergradient, {ROWS} rows, {FEATURES} penalties": ridge(
                repeats, python or sys.executable, skipped
            ),
            f"Quadratic program and gradient, {UNKNOWNS} unknowns, {LIMITS} rows": program(repeats, skipped),
        }
    return {"cases": cases, "skipped": skipped | ELSEWHERE}


def as_text(found: dict[str, Any]) -> str:
    """Tables and reasons."""
    from benchmarks.report import table_text

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
