"""The files of a run's folder: names, atomic writes, checks. Every finished cell is a file, and nothing is overwritten.

    settings.json            the cells, versions and system; written first; its cells and versions are the run's
    identity instances/<id>.json      per problem and seed: sizes, optimum, baselines' metrics
    cells/<id>.npz, .json    per cell: x and y; status, stats, metrics, referee, record. The .json comes last: finished
    tuning/, tuning.json     where settings are searched: the trials' cells, and what they chose
    summary.txt, .csv, .json and <problem>.png, made from these files

Every file is written under a temporary name and renamed. Numbers that are not finite are null in JSON. One process
writes into a folder at a time: it holds `run.lock`, which the system takes from it when it dies.
"""

import dataclasses
import io
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

import bilevel
from benchmarks.errors import UsageError
from benchmarks.judge.platform import quick_check
from benchmarks.study import formats
from benchmarks.study.compilation import cache_folder
from benchmarks.study.formats import ERROR as ERROR
from benchmarks.study.formats import FORMAT, PROGRAM
from benchmarks.study.formats import UNSUPPORTED as UNSUPPORTED
from benchmarks.study.registry import Cell
from bilevel.backend.files import write_atomically
from bilevel.backend.schema import Kind, Misfit, anything, fields, parse_json, printable, whole

PyTree = Any
PACKAGES = ("bilevax", "jax", "jaxlib", "numpy", "scipy", "optax", "flax", "scikit-learn")
BROKEN = (  # ends without a value of F
    bilevel.Status.NONFINITE, bilevel.Status.INFEASIBLE_LOWER, bilevel.Status.NO_FOLLOWER, bilevel.Status.SADDLE,
    bilevel.Status.UNDETERMINED,
)  # fmt: skip
FAILED = (ERROR, *PROGRAM, *(status.name for status in BROKEN))
LOCK = "run.lock"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")  # of `write_atomically`
EMPTY: dict[str, Any] = {"status": ERROR, "reason": None, "stats": {}, "metrics": {}, "referee": None, "record": []}


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


class FolderError(UsageError):
    """A folder of results that cannot be read or written: what is wrong, with which file, and what to do."""


def write_file(path: Path, data: bytes) -> None:
    """`write_atomically` for results; raises `FolderError` on a full disk or a read-only folder."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise FolderError(
            f"{path}: it cannot be written ({error.strerror or error}). What is finished is kept: make room, or make "
            "the folder writable, and repeat the command to go on."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically.

    Raises:
        FolderError: a full disk, a folder that is read-only.
    """
    write_file(path, (json.dumps(clean(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, kind: Kind = anything, do: str = "Bring it back from a copy.") -> Any:
    """The content of a file that `write_json` wrote, None where there is no file.

    Args:
        path: of the file.
        kind: what it must hold, of `benchmarks.study.formats`.
        do: what the error says to do.

    Raises:
        FolderError: a file that cannot be read, is damaged or holds something else: the file, the field, what to do.
    """
    try:
        content = printable(parse_json(path.read_bytes()))
        kind(content, "")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FolderError(f"{path}: it cannot be read ({error.strerror or error}).") from error
    except (Misfit, RecursionError) as error:
        raise FolderError(f"{path}: it is damaged ({error}). {do}") from error


def read_settings(folder: Path) -> dict[str, Any] | None:
    """settings.json of a run's folder, None where there is none.

    Raises:
        FolderError: damaged, or of another format.
    """
    path = folder / "settings.json"

    def settings(content: Any, where: str) -> None:
        fields({"format": whole()}, others=anything)(content, where)
        if content["format"] == FORMAT:
            formats.SETTINGS(content, where)

    found = read_json(path, settings)
    if found is not None and found["format"] != FORMAT:
        versions = found.get("versions")
        version = versions.get("bilevax", "unknown") if isinstance(versions, dict) else "unknown"
        raise FolderError(
            f"{path}: format {found['format']}, expected {FORMAT}. Use the bilevax that wrote it: {version}."
        )
    return found


def read_cell(folder: Path, index: int, cell: Cell) -> dict[str, Any] | None:
    """The result of cell number `index`, None where it is unfinished.

    Raises:
        FolderError: damaged, or another cell's.
    """
    path = cell_path(folder, index, cell)
    result = read_json(path, formats.result, "Bring it back from a copy, or delete it to run the cell again.")
    if result is not None and Cell.of(result["cell"]) != Cell.of(dataclasses.asdict(cell)):
        raise FolderError(f"{path}: it is the result of another run's cell. Move it away to run this cell.")
    return result


def read_instance(folder: Path, problem: str, seed: int, needed: bool) -> dict[str, Any] | None:
    """What is known of an instance, None where there is no file and none is `needed`, since no cell of it has begun.

    Raises:
        FolderError: damaged, or missing.
    """
    path = instance_path(folder, problem, seed)
    known = read_json(path, formats.INSTANCE)
    if known is None and needed:
        raise FolderError(f"{path}: it is missing, though a cell of it is finished. Bring it back from a copy.")
    return known


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
    """What settings.json holds. `platform`: whether what this machine compiles is right, looked at once a machine."""
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
        "format": FORMAT, "name": name, "started": started, "precision": precision, "versions": versions,
        "system": system, "platform": quick_check(cache_folder()), "cells": cells_as_dicts,
    }  # fmt: skip


@contextmanager
def open_folder(folder: Path | None, settings: dict[str, Any]) -> Iterator[Path]:
    """Make the run's folder, or go on in it where it holds the same run; inside, no other process writes into it.

    Args:
        folder: None makes results/<time>-<name> below the working folder, always a new one.
        settings: what `settings_of` gives.

    Raises:
        FolderError: the folder holds another run, or other things; another process writes into it; it is read-only.
    """
    if folder is None:
        stem = Path("results") / f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}-{settings['name']}"
        folder, k = stem, 2
        while folder.exists():
            folder, k = stem.with_name(f"{stem.name}-{k}"), k + 1
    _check_folder(folder, settings)
    lock = FileLock(folder / LOCK, timeout=0.2)  # `bilevax watch` may hold it for a moment
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise FolderError(
            f"--out {folder}: another process is writing into it. Wait for it, or name another folder."
        ) from error
    except OSError as error:
        raise FolderError(
            f"--out {folder}: it cannot be written ({error.strerror or error}). Name another folder, or make it "
            "writable; `bilevax show` reads a finished one as it is."
        ) from error
    try:
        if not _check_folder(folder, settings):  # again: what was there before the lock may have changed
            write_json(folder / "settings.json", settings)
        for path in folder.rglob(".*"):
            if TEMPORARY.fullmatch(path.name):  # a killed process left it half-written
                path.unlink()
        yield folder
    finally:
        lock.release()


def _check_folder(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds this very run; false where it is new. Anything else raises `FolderError`."""
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"--out {folder}: it is a file; expected a folder. Name another.")
    if not folder.exists() or all(p.name == LOCK or TEMPORARY.fullmatch(p.name) for p in folder.iterdir()):
        return False
    known, own = read_settings(folder), clean(settings)
    if known is None:
        raise FolderError(f"--out {folder}: it holds files that are no run of bilevax. Name a new or empty folder.")
    changed = [key for key in ("precision", "cells", "versions", "system") if known[key] != own[key]]
    if changed:
        details = [
            f"{name} {known[key].get(name)} there, {own[key].get(name)} here"
            for key in changed
            if key in ("versions", "system")
            for name in own[key]
            if known[key].get(name) != own[key].get(name)
        ]
        raise FolderError(
            f"--out {folder}: it holds another run ({', '.join(changed)} differ), which is not overwritten. "
            f"{'; '.join([*details, ''])}name another folder, or repeat that run's command to go on with it."
        )
    return True


def save_point(path: Path, x: PyTree, y: PyTree) -> None:
    """Write x and y as an npz of leaves, each under its path in the pytree: "x", "y['w']", …."""
    leaves = {
        f"{name}{jax.tree_util.keystr(key)}": np.asarray(leaf)
        for name, point in (("x", x), ("y", y))
        for key, leaf in jax.tree_util.tree_leaves_with_path(point)
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **leaves)
    write_file(path, buffer.getvalue())


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
