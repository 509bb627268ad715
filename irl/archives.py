"""Arrays from .npz files of others: nothing is unpacked that is not declared, nothing of it is run."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from bilevel.struct import invalid

PLENTY = 2**28  # bytes that any archive may unpack to
RATIO = 100  # how many times its own size a larger one may: of zeros, deflate packs a thousand times as many
BROKEN = (OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def read(path: str | os.PathLike, names: Iterable[str], what: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """(the arrays of `names` that the file has, all names in it).

    Raises:
        InvalidInput: no archive of NumPy arrays, a broken one, one that unpacks to more than it may, an array of
            objects, an array that is larger than its file.
    """
    where = f"path ({what})"
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            declared = sum(info.file_size for info in members.values())
            allowed = max(PLENTY, RATIO * os.path.getsize(path))
            if declared > allowed:
                got = f"{os.fspath(path)!r}, which unpacks to {declared} bytes"
                invalid(where, got, f"at most {allowed}", "Save it by np.savez, which does not compress.")
            found = {name: _read_one(archive, members[name], where) for name in names if name in members}
    except FileNotFoundError:
        invalid(where, f"{os.fspath(path)!r}, which is not there", "an .npz file", "Name the file that np.savez wrote.")
    except BROKEN as error:
        if type(error).__name__ == "InvalidInput":
            raise
        got = f"{os.fspath(path)!r}, which cannot be read ({error})"
        invalid(where, got, "an .npz file of arrays of numbers", "Write it again: np.savez(path, states=…, actions=…).")
    return found, sorted(members)


def _read_one(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> np.ndarray:
    """One array, whose header has been held against the declared size of its file."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        header: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(member)
    if dtype.hasobject:
        invalid(where, f"an array {info.filename!r} of objects", "arrays of numbers", "Convert it.")
    if math.prod(shape) * dtype.itemsize > info.file_size:
        got = f"an array {info.filename!r} of shape {shape} in {info.file_size} bytes"
        invalid(where, got, "as many bytes as the array has", "The file is broken: write it again.")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
