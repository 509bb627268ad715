"""Run cells into a folder: every finished cell is a file, so that a killed run goes on where it stopped.

    settings.json            the cells, versions and system; written first; its cells and versions are the run's
    identity instances/<id>.json      per problem and seed: sizes, optimum, baselines' metrics
    cells/<id>.npz, .json    per cell: x and y; status, stats, metrics, referee, record. The .json comes last: finished
    summary.txt, .csv, .json and <problem>.png, made from these files

Every file is written under a temporary name and renamed. Numbers that are not finite are null in JSON.
"""

import dataclasses
import io
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bilevel
from benchmarks import referee
from benchmarks.registry import Cell, UsageError, build_instance, build_solver
from bilevel.checkpoint import write_atomically

PyTree = Any
PACKAGES = ("bilevax", "jax", "jaxlib", "numpy", "scipy", "optax", "flax", "scikit-learn")
ERROR, UNSUPPORTED = "ERROR", "UNSUPPORTED"
FAILED = (ERROR, bilevel.Status.NONFINITE.name)


def clean(value: Any) -> Any:
    """`value` for JSON: plain numbers, and null for those that are not finite."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, bool | int | str | None):
        return value
    number = np.asarray(value).item()
    return number if not isinstance(number, float) or math.isfinite(number) else None


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically."""
    write_atomically(path, (json.dumps(clean(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a file that `write_json` wrote, None where there is no file."""
    return json.loads(path.read_text("utf8")) if path.exists() else None


def slug(text: str) -> str:
    """`text` as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_")


def cell_path(folder: Path, index: int, cell: Cell) -> Path:
    """The file that says that cell number `index` is finished."""
    return folder / "cells" / f"{index:03d}-{slug(cell.problem)}-{slug(cell.solver)}-seed{cell.seed}.json"


def instance_path(folder: Path, problem: str, seed: int) -> Path:
    """The file about one instance."""
    return folder / "instances" / f"{slug(problem)}-seed{seed}.json"


def settings_of(name: str, cells: list[Cell], precision: int) -> dict[str, Any]:
    """What settings.json holds."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = jax.devices()
    system = {
        "platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count(),
        "backend": jax.default_backend(), "device": devices[0].device_kind, "devices": len(devices),
    }  # fmt: skip
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    cells_as_dicts = [dataclasses.asdict(cell) for cell in cells]
    return {
        "format": 1, "name": name, "started": started, "precision": precision, "versions": versions, "system": system,
        "cells": cells_as_dicts,
    }  # fmt: skip


def open_folder(folder: Path | None, settings: dict[str, Any]) -> Path:
    """Make the run's folder, or go on in it where it holds the same run.

    Args:
        folder: None makes results/<time>-<name> below the working folder, always a new one.
        settings: what `settings_of` gives.

    Raises:
        UsageError: the folder holds another run, or other things.
    """
    if folder is None:
        stem = Path("results") / f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}-{settings['name']}"
        folder, k = stem, 2
        while folder.exists():
            folder, k = stem.with_name(f"{stem.name}-{k}"), k + 1
    elif folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: it is a file; expected a folder. Name another.")
    elif folder.exists() and any(folder.iterdir()):
        known = read_json(folder / "settings.json")
        if known is None:
            raise UsageError(f"--out {folder}: it holds files that are no run of bilevax. Name a new or empty folder.")
        changed = [
            key for key in ("format", "precision", "cells", "versions") if known.get(key) != clean(settings)[key]
        ]
        if changed:
            raise UsageError(
                f"--out {folder}: it holds another run ({', '.join(changed)} differ), which is not overwritten. "
                "Name another folder, or repeat that run's command to go on with it."
            )
        return folder
    write_json(folder / "settings.json", settings)
    return folder


def execute(folder: Path, cells: list[Cell], on_cell: Callable[[int, Cell], None]) -> bool:
    """Run every cell that is not finished in `folder`; true when all were run, false after Ctrl-C.

    A cell that raised an error is tried again. `on_cell(index, cell)` is called before each cell.
    """
    solvers = {text: build_solver(text) for text in dict.fromkeys(cell.solver for cell in cells)}
    held: tuple[tuple[str, int], Any] = (("", -1), None)  # the last instance: cells of one instance follow each other
    for index, cell in enumerate(cells):
        on_cell(index, cell)
        path = cell_path(folder, index, cell)
        before = read_json(path)
        if before is not None and before["status"] != ERROR:
            continue
        result: dict[str, Any] = {
            "status": ERROR,
            "reason": None,
            "stats": {},
            "metrics": {},
            "referee": None,
            "record": [],
        }
        try:
            if held[0] != (cell.problem, cell.seed):
                held = (cell.problem, cell.seed), build_instance(cell.problem, cell.seed)
                _describe(instance_path(folder, cell.problem, cell.seed), held[1])
            result |= _run(cell, held[1], solvers[cell.solver], path)
        except KeyboardInterrupt:
            return False
        except bilevel.Unsupported as error:
            result |= {"status": UNSUPPORTED, "reason": str(error)}
        except Exception as error:  # a cell that fails is a row with its reason
            result |= {"reason": f"{type(error).__name__}: {error}"}
        if result["status"] == bilevel.Status.INTERRUPTED.name:
            return False
        write_json(path, {"cell": dataclasses.asdict(cell)} | result)
    return True


def _describe(path: Path, instance: Any) -> None:
    """Write what is known of an instance: its sizes, optimum and the baselines' metrics."""
    if path.exists():
        return
    x, y = instance.problem.init(jax.random.key(0))
    sizes = {name: sum(np.size(leaf) for leaf in jax.tree.leaves(point)) for name, point in (("x", x), ("y", y))}
    optimum = None if instance.truth is None else float(instance.truth.value)
    baselines = {name: baseline() for name, baseline in instance.baselines.items()}
    write_json(path, {"sizes": sizes, "optimum": optimum, "tags": sorted(instance.tags), "baselines": baselines})


def _run(cell: Cell, instance: Any, solver: bilevel.Solver, path: Path) -> dict[str, Any]:
    solution = bilevel.solve(
        instance.problem, solver, key=jax.random.key(cell.seed), max_steps=cell.max_steps, every=cell.every,
        tol=cell.tol, time_limit=cell.time_limit, progress=False, measure=instance.measure,
    )  # fmt: skip
    result = {"status": solution.status.name, "stats": solution.stats, "record": solution.record.rows}
    if solution.status == bilevel.Status.INTERRUPTED:
        return result
    points = path.with_suffix(".npz")
    save_point(points, solution.x, solution.y)
    x, y = load_point(points, solution.x, solution.y)
    last = solution.record.rows[-1]
    with np.errstate(all="ignore"):  # a diverged run overflows in the metrics too: its numbers say so
        metrics = {} if instance.metrics is None else instance.metrics(x, y)
        if solution.status == bilevel.Status.NONFINITE or not math.isfinite(last["value"]):
            status = bilevel.Status.NONFINITE
            return result | {"status": status.name, "reason": status.advice, "metrics": metrics}
        verdict = referee.judge(instance, x, y, solution.record.rows)
    return result | {"metrics": metrics, "referee": verdict}


def save_point(path: Path, x: PyTree, y: PyTree) -> None:
    """Write x and y as an npz of leaves, each under its path in the pytree: "x", "y['w']", …."""
    leaves = {
        f"{name}{jax.tree_util.keystr(key)}": np.asarray(leaf)
        for name, point in (("x", x), ("y", y))
        for key, leaf in jax.tree_util.tree_leaves_with_path(point)
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **leaves)
    write_atomically(path, buffer.getvalue())


def load_point(path: Path, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
    """(x, y) of a file that `save_point` wrote, in the structure of the given ones."""
    with np.load(path, allow_pickle=False) as file:
        restored = [
            jax.tree_util.tree_map_with_path(
                lambda key, _, name=name: jax.numpy.asarray(file[f"{name}{jax.tree_util.keystr(key)}"]), point
            )
            for name, point in (("x", x), ("y", y))
        ]
    return restored[0], restored[1]
