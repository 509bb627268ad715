"""Checkpoints with right checksums and wrong content: each is the run's, or a named error; never a traceback."""

import copy
import hashlib
import json
import random

import jax
import jax.numpy as jnp
import pytest
from safetensors import safe_open
from safetensors.numpy import save

import bilevel
from bilevel import CheckpointError
from bilevel.run import checkpoint
from bilevel.run.checkpoint import load_checkpoint, run_notes, save_checkpoint

LIKE = {"x": jnp.arange(3.0), "flag": jnp.array([True])}
ROW = {"step": 4.0, "value": 1.0, "hypergradient": 0.5, "lower_residual": 0.1, "violation": 0.0, "oracles": 8.0,
       "time": 0.25, "error_bound": 0.1, "status": 8.0, "own": float("nan")}  # fmt: skip
NOTES = {"step": 4, "time": 0.5, "failed": [1], "best": 0, "rows": [[{name: x.hex() for name, x in ROW.items()}]]}
HOSTILE = [None, True, -5, 10**12, 10**400, 1e308, -1.5, "", "x", "\x1b[2J", [], {}, [1], {"a": 1}, "0x1p9999", "nan"]


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "run", LIKE, owner="me", notes=NOTES)
    return tmp_path / "run"


def rewrite(path, change, payload=None):
    """Write the checkpoint again with its manifest changed by `change`, and right checksums."""
    with safe_open(path, "numpy") as file:
        manifest = json.loads(file.metadata()["manifest"])
        arrays = {name: file.get_tensor(name) for name in file.keys()} if payload is None else payload  # noqa: SIM118
    manifest = change(manifest)
    if isinstance(manifest, dict) and payload is not None:
        manifest["sha256"] = checkpoint._digest(arrays)
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    head = {"manifest": text, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.write_bytes(save(arrays, metadata=head))


def paths(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def mutated(tree, rng):
    tree = copy.deepcopy(tree)
    path = rng.choice([path for path in paths(tree) if path])
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if rng.random() < 0.25:
        del parent[path[-1]]
    else:
        parent[path[-1]] = rng.choice(HOSTILE)
    return tree


def test_a_changed_manifest_is_read_or_named(path):
    rng = random.Random(0)
    good = path.read_bytes()
    count = {"read": 0, "named": 0}
    for _ in range(500):
        rewrite(path, lambda manifest: "[" * 100_000 if rng.random() < 0.02 else mutated(manifest, rng))
        try:
            _, notes = load_checkpoint(path, LIKE, owner="me", notes=run_notes(1))
            bilevel.Record.decode(notes["rows"][0])
            said = f"checkpoint {path}"
            count["read"] += 1
        except CheckpointError as error:
            said = str(error)
            count["named"] += 1
        assert said.startswith(f"checkpoint {path}")
        assert "\x1b" not in said
        path.write_bytes(good)
    assert min(count.values()) > 5


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("step", -5, r"notes\.step: got -5; expected a whole number"),
        ("step", 10**12, r"notes\.step: got 1000000000000; expected a whole number"),
        ("step", 1e12, r"notes\.step: got 1000000000000\.0"),
        ("step", 3, r"notes\.step: got 3; expected at least that of the last row"),
        ("best", 1, r"notes\.best: got 1; expected one of the 1 rows"),
        ("failed", [], r"notes\.failed: got 0 entries"),
        ("rows", [], r"notes\.rows: got 0 entries"),
        ("time", -1.0, r"notes\.time: got -1\.0"),
    ],
)
def test_what_no_run_can_have_is_named(path, name, value, expected):
    rewrite(path, lambda manifest: manifest | {"notes": manifest["notes"] | {name: value}})
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(path, LIKE, owner="me", notes=run_notes(1))


def test_arrays_of_other_sizes_are_named(path):
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in ("000000", "000001")}
    flag, x = (arrays[name] for name in ("000000", "000001"))
    others = [{"000000": flag}, {"000000": flag, "1": x}, {"000000": flag, "000001": x[:-1]}, {"000000": flag + 1,
              "000001": x}, {"000000": flag, "000001": x.view("float64")}]  # fmt: skip
    for other in others:
        rewrite(path, lambda manifest: manifest, other)
        with pytest.raises(CheckpointError, match=r"damaged \(array"):
            load_checkpoint(path, LIKE, owner="me")
    rewrite(path, lambda manifest: manifest, arrays)
    assert jax.tree.leaves(load_checkpoint(path, LIKE, owner="me")[0])[1].tolist() == [0, 1, 2]
