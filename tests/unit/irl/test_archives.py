"""Demonstrations from files that are broken, too large, or hold what demonstrations cannot be."""

import io
import os
import zipfile

import numpy as np
import pytest

import irl
from bilevel import InvalidInput

SEEN = np.zeros((2, 3, 1))
MEMORY = {"observation": SEEN, "next_observation": SEEN, "action": SEEN, "reward": np.zeros((2, 3)),
          "terminal": np.array([[0, 1, 0], [0, 0, 0]])}  # fmt: skip
TABLE = {"states": np.zeros((2, 3), int), "actions": np.zeros((2, 3), int)}


def load(path, arrays, save=np.savez):
    save(path, **arrays)
    return irl.Demonstrations.load(path)


def member(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_whole_files_are_read(tmp_path):
    assert load(tmp_path / "a.npz", TABLE).states.shape == (2, 3)
    assert load(tmp_path / "a.npz", TABLE, np.savez_compressed).states.shape == (2, 3)
    memory = load(tmp_path / "b.npz", MEMORY)
    assert memory.lengths.tolist() == [2, 3]
    assert memory.terminated.tolist() == [True, False]
    padded = TABLE | {"states": np.array([[0, 1, -1], [0, -1, -1]]), "lengths": np.array([2, 1])}
    assert load(tmp_path / "c.npz", padded).states.tolist() == [[0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no archive"])
def test_a_broken_archive_is_named(tmp_path, damage):
    load(tmp_path / "a.npz", TABLE)
    (tmp_path / "a.npz").write_bytes(damage((tmp_path / "a.npz").read_bytes()))
    with pytest.raises(InvalidInput, match=r"path \(Demonstrations\.load\): got .*a\.npz', which cannot be read"):
        irl.Demonstrations.load(tmp_path / "a.npz")


def test_every_flipped_byte_is_read_or_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **TABLE)
    data = path.read_bytes()
    for k in range(len(data)):
        path.write_bytes(data[:k] + bytes([data[k] ^ 0xFF]) + data[k + 1 :])
        try:
            irl.Demonstrations.load(path)
        except InvalidInput as error:
            named = str(error)
    assert "Demonstrations.load" in named


def test_no_file(tmp_path):
    with pytest.raises(InvalidInput, match="which is not there"):
        irl.Demonstrations.load(tmp_path / "nowhere.npz")


def test_a_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("states.npy", "w") as file:
        for _ in range(300):
            file.write(bytes(2**20))
    with pytest.raises(InvalidInput, match="which unpacks to 314572800 bytes; expected at most 268435456"):
        irl.Demonstrations.load(path)


def test_an_array_larger_than_its_file_is_not_made(tmp_path):
    header = io.BytesIO()
    fields = {"descr": "<i8", "fortran_order": False, "shape": (2_000_000_000_000, 3)}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("states.npy", header.getvalue() + bytes(48))
        archive.writestr("actions.npy", member(np.zeros((2, 3), int)))
    with pytest.raises(InvalidInput, match=r"shape \(2000000000000, 3\) in"):
        irl.Demonstrations.load(tmp_path / "a.npz")


def test_objects_are_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    with pytest.raises(InvalidInput, match=r"'states\.npy' of objects"):
        load(tmp_path / "a.npz", {"states": np.array([[Evil()]], object), "actions": np.zeros((1, 1), int)})
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize(
    ("arrays", "change", "expected"),
    [
        (TABLE, {"states": np.full((2, 3), -1)}, r"states .*got -1; expected whole numbers >= 0"),
        (TABLE, {"actions": np.full((2, 3), 2**63, np.uint64)}, r"actions .*from 9223372036854775808"),
        (TABLE, {"states": np.zeros((2, 3))}, r"states .*dtype float64"),
        (TABLE, {"lengths": np.array([2**40, 1])}, r"lengths .*expected lengths in \[1, 3\]"),
        (TABLE, {"weights": np.array([np.nan, 1.0])}, r"weights .*not finite"),
        (TABLE, {"weights": np.array(["a", "b"])}, r"weights .*dtype <U1"),
        (TABLE, {"terminated": np.array([0.5, 1.0])}, r"terminated .*neither 0 nor 1"),
        (TABLE, {"terminated": np.array([np.nan, 1.0])}, r"terminated .*neither 0 nor 1"),
        (TABLE, {"returns": np.array([np.inf, 1.0])}, r"returns .*not finite"),
        (MEMORY, {"terminal": np.full((2, 3), 2)}, r"terminal .*neither 0 nor 1"),
        (MEMORY, {"terminal": np.zeros(2)}, r"terminal .*shape \(2,\); expected shape \(2, 3\)"),
        (MEMORY, {"reward": np.full((2, 3), np.nan)}, r"reward .*not finite"),
        (MEMORY, {"observation": np.full((2, 3, 1), np.nan)}, r"states .*not finite"),
        (MEMORY, {"observation": np.zeros((2, 3))}, r"observation .*shape \(2, 3\)"),
        (MEMORY, {"next_observation": np.zeros((2, 3, 2))}, r"next_observation .*shape"),
        (MEMORY, {"reward": None}, r"reward \(Demonstrations\.load\): got arrays .*expected an array 'reward'"),
    ],
)
def test_what_demonstrations_cannot_be_is_named(tmp_path, arrays, change, expected):
    changed = {name: array for name, array in (arrays | change).items() if array is not None}
    with pytest.raises(InvalidInput, match=expected):
        load(tmp_path / "a.npz", changed)
