"""Atomic checkpoints: a safetensors file of raw bytes with a manifest. No pickled code; loading executes nothing.

The manifest (JSON in the file's header) holds the format version, the fingerprint of the run it belongs to, every
leaf's path, shape and dtype, and the SHA-256 of all names and bytes: a flipped bit, another problem or a missing leaf
is a named error.
"""

import dataclasses
import functools
import hashlib
import json
import os
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bilevel.backend.files import sweep, write_atomically
from bilevel.backend.schema import Kind, Misfit, Said, anything, each, fields, misfit, number, parse_json, text, whole
from bilevel.record import Status

PyTree = Any
VERSION = 2  # 2: with the best point
MANIFEST = fields({"version": whole(), "owner": text, "leaves": anything, "sha256": text, "notes": anything})


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message says which file, why, and what to do."""


def _to_numpy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _describe(tree: PyTree) -> list[list[Any]]:
    leaves = [
        (jax.tree_util.keystr(path), leaf, _to_numpy(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return [[path, str(getattr(leaf, "dtype", raw.dtype)), list(np.shape(leaf))] for path, leaf, raw in leaves]


def fingerprint(*parts: Any) -> str:
    """A SHA-256 over structures, settings, functions and all numbers: the same for the same problem, solver and key.

    A function counts by its name, its code, its defaults and what it closes over, so that two lambdas, or two optax
    transformations with other learning rates, differ. What it reads from global variables is not seen.
    """
    digest = hashlib.sha256()
    _feed(digest.update, parts, ())
    return digest.hexdigest()


def _feed(put: Callable[[bytes], Any], value: Any, above: tuple[int, ...]) -> None:
    """Describe `value` to `put`, never by an address: those change from process to process. `above`: ids of parents."""
    if id(value) in above:  # a recursive function closes over itself
        return put(b"cycle;")
    parts: Iterable[Any] = ()
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        raw = np.ascontiguousarray(_to_numpy(value))
        label = f"{value.dtype}{value.shape}"
        put(hashlib.sha256(repr(raw.tolist()).encode() if raw.dtype == object else raw.tobytes()).digest())
    elif isinstance(value, bool | int | float | complex | str | bytes | None | np.dtype):
        label = f"{type(value).__name__} {value!r}"
    elif isinstance(value, types.CodeType):
        label, parts = value.co_code.hex(), (value.co_consts, value.co_names)
    elif isinstance(value, functools.partial):
        label, parts = "partial", (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        label, parts = "method", (value.__func__, value.__self__)
    elif isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        label, parts = _name(value), (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
    elif isinstance(value, type | types.ModuleType):
        label = _name(value)
    elif hasattr(value, "__wrapped__"):
        label, parts = "wrapped", (value.__wrapped__,)
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        label, parts = f"{_name(type(value))} {names}", [getattr(value, name, None) for name in names]
    elif isinstance(value, dict):
        label, parts = "dict", [item for key in sorted(value, key=str) for item in (str(key), value[key])]
    elif isinstance(value, set | frozenset):
        label, parts = "set", sorted(map(fingerprint, value))
    elif isinstance(value, tuple | list):
        label, parts = f"{_name(type(value))} {len(value)}", value
    else:  # another pytree node by its children; anything else by its name, or its type's
        label = _name(value) if callable(value) and hasattr(value, "__qualname__") else _name(type(value))
        parts = [leaf for leaf in jax.tree.leaves(value) if leaf is not value]
    put(f"({label};".encode())
    for part in parts:
        _feed(put, part, (*above, id(value)))
    put(b")")


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def _digest(payload: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in payload.items():
        digest.update(f"{name} {array.dtype} {array.shape};".encode() + array.tobytes())
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike, tree: PyTree, *, owner: str, notes: dict[str, Any]) -> None:
    """Write `tree` (arrays and typed keys), the fingerprint `owner` and JSON-able `notes` to `path`, atomically.

    Raises:
        CheckpointError: a full disk, a folder that is read-only or missing.
    """
    arrays = [_to_numpy(leaf) for leaf in jax.tree.leaves(tree)]
    payload = {f"{k:06d}": np.frombuffer(array.tobytes(), np.uint8) for k, array in enumerate(arrays)}
    manifest = {
        "version": VERSION,
        "owner": owner,
        "leaves": _describe(tree),
        "sha256": _digest(payload),
        "notes": notes,
    }
    written = json.dumps(manifest)
    head = {"manifest": written, "manifest_sha256": hashlib.sha256(written.encode()).hexdigest()}
    try:
        write_atomically(Path(path), save(payload, metadata=head))
        sweep(Path(path))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path}: it cannot be written ({error.strerror or error}). What was saved before is kept: make "
            "room, or make the folder writable, and solve again to go on from it."
        ) from error


def run_notes(num_assumptions: int) -> Kind:
    """The kind of the notes of a run of one lane, whose solver checks so many assumptions."""
    row = fields(
        {name: _hexadecimal for name in ("value", "hypergradient", "lower_residual", "violation", "oracles", "time",
                                         "error_bound")} | {"step": _whole_hexadecimal, "status": _status},
        others=_hexadecimal,
    )  # fmt: skip
    failed = each(whole(), num_assumptions, num_assumptions)
    run = {"step": whole(), "time": number(0), "failed": failed, "rows": each(each(row, 1), 1, 1), "best": whole()}

    def check(value: Any, where: str) -> None:
        fields(run, others=anything)(value, where)
        rows = value["rows"][0]
        if value["best"] >= len(rows):
            misfit(f"{where}.best", value["best"], f"one of the {len(rows)} rows")
        if value["step"] < float.fromhex(rows[-1]["step"]):
            misfit(f"{where}.step", value["step"], "at least that of the last row")

    return check


def _hexadecimal(value: Any, where: str) -> None:
    """A number as `float.hex` writes it."""
    text(value, where)
    try:
        float.fromhex(value)
    except (ValueError, OverflowError):
        misfit(where, value, "a number in hexadecimal")


def _whole_hexadecimal(value: Any, where: str) -> None:
    _hexadecimal(value, where)
    found = float.fromhex(value)
    whole()(int(found) if found.is_integer() else found, where)


def _status(value: Any, where: str) -> None:
    _whole_hexadecimal(value, where)
    if int(float.fromhex(value)) not in list(Status):
        misfit(where, value, "the number of a status")


def load_checkpoint(
    path: str | os.PathLike, like: PyTree, *, owner: str, notes: Kind = anything
) -> tuple[PyTree, dict[str, Any]]:
    """(tree shaped like `like`, notes of the kind `notes`).

    Raises:
        CheckpointError: unreadable or damaged file, another version, another run's checkpoint, other shapes or dtypes,
            a field that holds something else.
    """
    manifest, payload = _read(Path(path))
    if manifest["version"] != VERSION:
        raise CheckpointError(
            f"checkpoint {path}: format {manifest['version']}, expected {VERSION}. Use the bilevax that wrote it."
        )
    if manifest["owner"] != owner:
        raise CheckpointError(
            f"checkpoint {path}: it belongs to another problem, solver, key or setting. "
            "Name another file, or delete it."
        )
    if manifest["leaves"] != _describe(like):
        raise CheckpointError(f"checkpoint {path}: its arrays differ in path, shape or dtype from this run's state.")
    try:
        notes(manifest["notes"], "notes")
        _check_payload(payload, jax.tree.leaves(like))
    except (Misfit, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: it is damaged ({error}). Delete it to start afresh.") from error
    leaves = [
        _restore(part.tobytes(), leaf) for part, leaf in zip(payload.values(), jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), manifest["notes"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(manifest, arrays by name) of a file whose checksums are right."""
    try:
        with safe_open(path, "numpy") as file:
            head = file.metadata() or {}
            payload = {name: file.get_tensor(name) for name in sorted(file.keys())}
        written = head["manifest"]
        intact = hashlib.sha256(written.encode()).hexdigest() == head["manifest_sha256"]
        manifest = parse_json(written)
        MANIFEST(manifest, "")
        intact = intact and _digest(payload) == manifest["sha256"]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error}). Delete it to start afresh.") from error
    if not intact:
        raise CheckpointError(
            f"checkpoint {path}: its checksum does not match: the file is damaged. Delete it to start afresh."
        )
    return manifest, payload


def _check_payload(payload: dict[str, np.ndarray], leaves: list[Any]) -> None:
    """Raise `Misfit` unless there are the bytes of every leaf."""
    if [*payload] != [f"{k:06d}" for k in range(len(leaves))]:
        misfit("arrays", Said(f"{len(payload)} arrays"), f"{len(leaves)}, by their numbers")
    for (name, part), leaf in zip(payload.items(), leaves, strict=True):
        raw = _to_numpy(leaf)
        if part.dtype != np.uint8 or part.size != raw.nbytes:
            misfit(f"array {name}", Said(f"{part.nbytes} bytes as {part.dtype}"), f"{raw.nbytes} bytes")
        if raw.dtype == bool and (part > 1).any():
            misfit(f"array {name}", Said("a byte above 1"), "booleans")


def _restore(buffer: bytes, like: Any) -> Any:
    raw = _to_numpy(like)
    value = jnp.asarray(np.frombuffer(buffer, raw.dtype).reshape(raw.shape))
    if jnp.issubdtype(getattr(like, "dtype", raw.dtype), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    return value
