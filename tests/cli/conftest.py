"""A run's folder written by hand: what compares and reports reads it like any other, without running JAX."""

import dataclasses
import json

import pytest

from benchmarks.study import files
from benchmarks.study.registry import Cell


def rows(values, gradients=None, every=10, passes=2.0, seconds=0.5, violation=0.0):
    """A record: one row a value, `every` steps apart, at so many passes and seconds a step."""
    gradients = gradients or values
    return [
        {"step": every * k, "value": value, "hypergradient": gradient, "lower_residual": 1e-9, "violation": violation,
         "oracles": every * k * passes, "time": every * k * seconds, "error_bound": 1e-9, "status": 0}
        for k, (value, gradient) in enumerate(zip(values, gradients, strict=True))
    ]  # fmt: skip


def result(record, status="MAX_STEPS", verdict="agrees", reason=None):
    """What a cell's file holds."""
    stats = {"steps": record[-1]["step"], "oracles": record[-1]["oracles"], "solve_time": 1.0, "setup_time": 0.1,
             "measure_time": 0.1, "tol": 1e-8} if record else {}  # fmt: skip
    referee = {"verdict": verdict, "reason": None, "value": 0.0, "hypergradient": 0.0} if record else None
    return {"status": status, "reason": reason, "stats": stats, "metrics": {}, "referee": referee, "record": record}


def write(folder, results, optima=None, **settings):
    """Write {(problem, solver, seed): result or None} as the folder of a run; return it."""
    cells = [Cell(*key, max_steps=100, every=10) for key in results]
    base = {
        "format": 1, "name": "custom", "started": "2026-01-01T00:00:00Z", "precision": 64,
        "versions": {"bilevax": "0.1.0", "jax": "0.10.2"}, "system": {"cpus": 2},
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(base | settings))
    for index, (cell, found) in enumerate(zip(cells, results.values(), strict=True)):
        optimum = (optima or {}).get((cell.problem, cell.seed))
        known = {"sizes": {"x": 2, "y": 2}, "optimum": optimum, "tags": [], "baselines": {}}
        files.write_json(files.instance_path(folder, cell.problem, cell.seed), known)
        if found is not None:
            whole = {"cell": dataclasses.asdict(cell)} | found
            files.write_json(files.cell_path(folder, index, cell), whole)
    return folder


class Synthetic:
    """The three functions, as one fixture."""

    rows, result, write = staticmethod(rows), staticmethod(result), staticmethod(write)


@pytest.fixture(scope="session")
def synthetic():
    return Synthetic
