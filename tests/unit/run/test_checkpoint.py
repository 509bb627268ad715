"""Checkpoints: exact, atomic, and every kind of damage or mix-up is a named error."""

import errno
import json
import os
import pickle
import subprocess
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import AID, SOBA, BilevelProblem, Box, CheckpointError, Full, Minibatch, Minimize, Newton
from bilevel.run import checkpoint
from bilevel.run.checkpoint import fingerprint, load_checkpoint, save_checkpoint


class State(NamedTuple):
    x: object
    y: object


def everything():
    return State(
        {
            "bfloat16": jnp.array([1.5, -0.1, jnp.inf, jnp.nan], jnp.bfloat16),
            "float16": jnp.array([[1.0, 65504.0]], jnp.float16),
            "float32": jnp.array(0.1, jnp.float32),
            "float64": jnp.array([0.1, -0.0, jnp.nan, 5e-324]),
            "complex": jnp.array([1 + 2j]),
            "float8": jnp.array([0.5, -3.0], jnp.float8_e4m3fn),
        },
        (
            jnp.array([True, False]),
            jnp.array([-(2**63), 2**63 - 1]),
            jnp.array([255], jnp.uint8),
            jnp.zeros((0, 3)),
            jax.random.split(jax.random.key(1), 3),
            jax.random.key(2, impl="rbg"),
            (),
        ),
    )


def test_round_trip_is_exact(tmp_path):
    tree, notes = everything(), {"step": 7, "time": 0.1, "rows": [{"a": "x"}]}
    path = tmp_path / "folder" / "run.safetensors"
    save_checkpoint(path, tree, owner="me", notes=notes)
    back, notes_back = load_checkpoint(path, jax.tree.map(jnp.zeros_like, tree), owner="me")
    assert notes_back == notes
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary file is left


@pytest.fixture
def saved(tmp_path):
    tree = {"a": jnp.arange(3.0), "k": jax.random.key(0), "none": jnp.zeros(0)}
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, tree, owner="me", notes={"step": 1})
    return path, tree


def test_any_flipped_byte_is_noticed(saved):
    path, tree = saved
    data = path.read_bytes()
    for flip in (0x01, 0xFF):
        for k in range(len(data)):
            path.write_bytes(data[:k] + bytes([data[k] ^ flip]) + data[k + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                load_checkpoint(path, tree, owner="me")
    path.write_bytes(data)
    load_checkpoint(path, tree, owner="me")


def test_truncated_extended_and_missing_files(saved):
    path, tree = saved
    data = path.read_bytes()
    for damaged in (b"", data[:5], data[: len(data) // 2], data[:-1], data + b"\0", b"not a checkpoint at all"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"cannot be read|damaged"):
            load_checkpoint(path, tree, owner="me")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path.parent / "nowhere", tree, owner="me")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path.parent, tree, owner="me")


def test_a_foreign_safetensors_file(tmp_path):
    from safetensors.numpy import save

    (tmp_path / "weights").write_bytes(save({"w": np.ones(3)}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "weights", {}, owner="me")


def test_other_owner_version_and_shapes(saved, monkeypatch):
    path, tree = saved
    with pytest.raises(CheckpointError, match="another problem, solver, key or setting"):
        load_checkpoint(path, tree, owner="you")
    others = (
        tree | {"a": jnp.arange(4.0)}, tree | {"a": jnp.arange(3)}, tree | {"a": jnp.arange(3.0, dtype=jnp.float32)},
        tree | {"k": jax.random.key(0, impl="rbg")}, tree | {"b": jnp.zeros(1)}, {"a": tree["a"], "k": tree["k"]},
        {"c": tree["a"], "k": tree["k"], "none": tree["none"]},
    )  # fmt: skip
    for other in others:
        with pytest.raises(CheckpointError, match="differ in path, shape or dtype"):
            load_checkpoint(path, other, owner="me")
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
    with pytest.raises(CheckpointError, match="format 2, expected 3"):
        load_checkpoint(path, tree, owner="me")


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    (tmp_path / "run.ckpt").write_bytes(pickle.dumps(Evil()))
    np.save(tmp_path / "other.npy", np.array([Evil()], object))
    for name in ("run.ckpt", "other.npy"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(tmp_path / name, {}, owner="me")
    assert not (tmp_path / "was here").exists()


def test_a_failed_write_keeps_the_old_file(saved, monkeypatch):
    path, tree = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written .No space left on device.*solve again to go on"):
        save_checkpoint(path, tree, owner="me", notes={})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def upper(x, y, batch):
    return jnp.sum(x * y)


def lower(x, y, batch):
    return jnp.sum((y - x) ** 2) + jnp.mean(batch)


def make(scale=1.0, f=upper, **changes):
    data = Full(jnp.full(3, scale))
    return BilevelProblem(f, Minimize(lower), lower_data=data, init=lambda key: (jnp.ones(2), jnp.ones(2)), **changes)


def scaled(factor):
    return lambda x, y, batch: factor * jnp.sum(x * y)


def recursive():
    def f(k):
        return 1 if k == 0 else k * f(k - 1)

    return f


FINGERPRINTS = {
    "base": lambda: (make(), SOBA(), jax.random.key(0)),
    "another key": lambda: (make(), SOBA(), jax.random.key(1)),
    "another key type": lambda: (make(), SOBA(), jax.random.key(0, impl="rbg")),
    "another datum": lambda: (make(2.0), SOBA(), jax.random.key(0)),
    "another set": lambda: (make(x_set=Box(0.0, 1.0)), SOBA(), jax.random.key(0)),
    "another bound": lambda: (make(x_set=Box(0.0, 2.0)), SOBA(), jax.random.key(0)),
    "another function": lambda: (make(f=lower), SOBA(), jax.random.key(0)),
    "a lambda": lambda: (make(f=lambda x, y, batch: jnp.sum(x + y)), SOBA(), jax.random.key(0)),
    "a lambda with another constant": lambda: (make(f=lambda x, y, batch: jnp.sum(x + y) + 2), SOBA(), 0),
    "a closure": lambda: (make(f=scaled(1.0)), SOBA(), jax.random.key(0)),
    "a closure over another number": lambda: (make(f=scaled(2.0)), SOBA(), jax.random.key(0)),
    "a closure over an array": lambda: (make(f=scaled(jnp.array(1.0))), SOBA(), jax.random.key(0)),
    "a closure over a numpy array": lambda: (make(f=scaled(np.array(2.0))), SOBA(), jax.random.key(0)),
    "under jit": lambda: (make(f=jax.jit(scaled(3.0))), SOBA(), jax.random.key(0)),
    "under jit, another number": lambda: (make(f=jax.jit(scaled(4.0))), SOBA(), jax.random.key(0)),
    "a step size": lambda: (make(), SOBA(upper_step_size=0.1), jax.random.key(0)),
    "another step size": lambda: (make(), SOBA(upper_step_size=0.2), jax.random.key(0)),
    "a schedule": lambda: (make(), SOBA(upper_step_size=optax.cosine_decay_schedule(0.1, 10)), jax.random.key(0)),
    "another schedule": lambda: (make(), SOBA(upper_step_size=optax.cosine_decay_schedule(0.1, 20)), jax.random.key(0)),
    "adam": lambda: (make(), SOBA(upper_step_size=optax.adam(0.1)), jax.random.key(0)),
    "adam, another rate": lambda: (make(), SOBA(upper_step_size=optax.adam(0.2)), jax.random.key(0)),
    "adam, another momentum": lambda: (make(), SOBA(upper_step_size=optax.adam(0.1, b1=0.8)), jax.random.key(0)),
    "another solver": lambda: (make(), AID(), jax.random.key(0)),
    "Newton": lambda: (Newton(),),
    "Newton, other static setting": lambda: (Newton(max_steps=3),),
    "without replacement": lambda: (Minibatch(jnp.ones(3), 2),),
    "with replacement": lambda: (Minibatch(jnp.ones(3), 2, "independent"),),
    "float": lambda: (1.0,),
    "whole": lambda: (1,),
    "true": lambda: (True,),
    "text": lambda: ("1",),
    "one list": lambda: ([[1], 2],),
    "another list": lambda: ([1, [2]],),
    "a set": lambda: ({"a", "b", "c"},),
    "a dictionary": lambda: ({"a": 1, "b": 2},),
    "a default": lambda: (lambda x=1: x,),
    "another default": lambda: (lambda x=2: x,),
    "recursive": lambda: (recursive(),),
    "a method": lambda: (make(f=Minibatch(jnp.ones(2), 1).take),),
    "a method of another object": lambda: (make(f=Minibatch(jnp.zeros(2), 1).take),),
}  # fmt: skip


def all_fingerprints():
    return {name: fingerprint(*parts()) for name, parts in FINGERPRINTS.items()}


@pytest.mark.process
def test_fingerprints_differ_and_repeat_in_another_process(program):
    ours = all_fingerprints()
    seen = {}
    for name, value in ours.items():
        assert value not in seen, f"{name} collides with {seen[value]}"
        seen[value] = name
    assert all_fingerprints() == ours  # new objects, the same settings
    command = [*program("fingerprints"), __name__, __file__]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == ours
