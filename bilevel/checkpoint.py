"""Atomic checkpoints: a safetensors file of raw bytes with a manifest. No pickled code; loading executes nothing.

The manifest (JSON in the file's header) holds the format version, the fingerprint of the run it belongs to, every
leaf's
path, shape and dtype, and the SHA-256 of all bytes: a flipped bit, another problem or a missing leaf is a named error.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

PyTree = Any
VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message says which file, why, and what to do."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder, flushed to disk, then renamed over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _to_numpy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _describe(tree: PyTree) -> list[list[Any]]:
    leaves = [
        (jax.tree_util.keystr(path), leaf, _to_numpy(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return [[path, str(getattr(leaf, "dtype", raw.dtype)), list(np.shape(leaf))] for path, leaf, raw in leaves]


def fingerprint(*parts: PyTree) -> str:
    """A SHA-256 over structures, static settings and all numbers: the same for the same problem, solver and key."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_structure_text(part).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            raw = _to_numpy(leaf)
            digest.update(f"{jax.tree_util.keystr(path)}{raw.dtype}{raw.shape}".encode())
            digest.update(np.ascontiguousarray(raw).tobytes())
    return digest.hexdigest()


def _structure_text(value: Any) -> str:
    """The static part of a pytree, functions by name: addresses in a repr would change from process to process."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dataclass_fields__"):
        inside = ",".join(f"{name}={_structure_text(getattr(value, name))}" for name in value.__dataclass_fields__)
        return f"{type(value).__qualname__}({inside})"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_structure_text(item)}" for name, item in sorted(value.items())) + "}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}[" + ",".join(map(_structure_text, value)) + "]"
    if isinstance(value, bool | int | str | None):
        return repr(value)
    return type(value).__name__


def save_checkpoint(path: str | os.PathLike, tree: PyTree, *, owner: str, notes: dict[str, Any]) -> None:
    """Write `tree` (arrays and typed keys), the fingerprint `owner` and JSON-able `notes` to `path`, atomically."""
    arrays = [_to_numpy(leaf) for leaf in jax.tree.leaves(tree)]
    payload = {f"{k:06d}": np.frombuffer(array.tobytes(), np.uint8) for k, array in enumerate(arrays)}
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    manifest = {
        "version": VERSION,
        "owner": owner,
        "leaves": _describe(tree),
        "sha256": digest,
        "notes": notes,
    }
    text = json.dumps(manifest)
    head = {"manifest": text, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_atomically(Path(path), save(payload, metadata=head))


def load_checkpoint(path: str | os.PathLike, like: PyTree, *, owner: str) -> tuple[PyTree, dict[str, Any]]:
    """(tree shaped like `like`, notes).

    Raises:
        CheckpointError: unreadable or damaged file, another version, another run's checkpoint, other shapes or dtypes.
    """
    path = Path(path)
    try:
        with safe_open(path, "numpy") as file:
            head = file.metadata() or {}
            buffers = [file.get_tensor(name).tobytes() for name in sorted(file.keys())]
        text = head["manifest"]
        manifest = json.loads(text)
        intact = hashlib.sha256(text.encode()).hexdigest() == head["manifest_sha256"]
        intact = intact and hashlib.sha256(b"".join(buffers)).hexdigest() == manifest["sha256"]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error}). Delete it to start afresh.") from error
    if not intact:
        raise CheckpointError(
            f"checkpoint {path}: its checksum does not match: the file is damaged. Delete it to start afresh."
        )
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
    leaves = [_restore(buffer, leaf) for buffer, leaf in zip(buffers, jax.tree.leaves(like), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), manifest["notes"]


def _restore(buffer: bytes, like: Any) -> Any:
    raw = _to_numpy(like)
    value = jnp.asarray(np.frombuffer(buffer, raw.dtype).reshape(raw.shape))
    if jnp.issubdtype(getattr(like, "dtype", raw.dtype), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    return value
