"""The comparison with other libraries: one timing loop, skipped with a reason, error beside time."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers import entropy, table
from benchmarks.peers.timing import Measured, interleaved


def test_calls_take_turns_and_are_judged():
    seen = []
    calls = {name: (lambda x, name=name: seen.append((name, x)) or x) for name in "ab"}
    found = interleaved(calls, [(1,), (2,)], lambda k, out: 10 * k + out)
    assert seen == [("a", 1), ("b", 1), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert found["a"].judged == [1, 12]
    assert found["b"].worst == 12
    assert len(found["b"].seconds) == 2
    assert found["b"].least <= found["b"].median


def test_what_is_not_there_is_skipped_with_a_reason(tmp_path):
    skipped = {}
    assert table._installed({"no_such_library": dict}, skipped) == {}
    assert "pip install" in skipped["no_such_library"]
    broken = tmp_path / "python"  # an interpreter whose packages do not go together
    broken.write_text("#!/bin/sh\necho 'ImportError: it needs gymnasium < 1' >&2\nexit 1\n")
    broken.chmod(0o755)
    answer = table.run_elsewhere("imitation_mce.py", "imitation", {}, ["no-such-interpreter", str(broken)])
    assert "no-such-interpreter: No such file" in answer
    assert "it needs gymnasium < 1" in answer
    assert "--python" in answer


def test_programs_elsewhere_get_the_data_and_their_failure_is_a_reason(tmp_path, monkeypatch):
    """The stand-ins run under this interpreter: the libraries need environments of their own."""
    monkeypatch.setattr(table, "__file__", str(tmp_path / "table.py"))
    (tmp_path / "good.py").write_text(
        "import json, sys, numpy\n"
        "x = numpy.load(sys.argv[1])['points'].tolist()\n"
        "print(json.dumps({'version': 'good 1', 'first': 1.0, 'seconds': [3e-3, 3e-3], 'gradients': x}))\n"
    )
    (tmp_path / "bad.py").write_text("raise RuntimeError('no such optimiser')\n")
    elsewhere = {"good": ("good.py", "numpy", "good CG"), "bad": ("bad.py", "numpy", "bad CG")}
    monkeypatch.setattr(table, "ELSEWHERE", elsewhere)
    points, skipped = np.array([[3.0, 4.0], [0.0, 1.0]]), {}
    ours = [{"library": "bilevax", "steady": 1e-3}]
    truths = [np.array([3.0, 4.5]), points[1]]
    rows = table._elsewhere(("good", "bad"), {"points": points}, truths, ["none", sys.executable], skipped)
    assert [(row["library"], row["version"]) for row in rows] == [("good CG", "good 1")]
    assert [round(row["times_ours"]) for row in table._beside_ours(ours + rows)] == [1, 3]
    assert rows[0]["error"] == pytest.approx(0.5 / np.linalg.norm(truths[0]))
    assert skipped == {"bad": "it failed: RuntimeError: no such optimiser"}


def test_the_gradient_of_causal_entropy_is_the_dense_one(monkeypatch):
    monkeypatch.setattr(entropy, "SIZE", 3)
    monkeypatch.setattr(entropy, "HORIZON", 4)
    mdp, arrays = entropy.make()
    x = np.array([0.3, -1.0, 0.5, 2.0])
    for call in entropy.calls(mdp, arrays).values():
        np.testing.assert_allclose(call(jnp.asarray(x)), entropy.exact(arrays, x), atol=1e-13)


def test_rows_show_time_and_error():
    found = {"bilevax hypergradient": Measured(1.0, [2e-3], [1e-14]), "jax scan": Measured(1.0, [6e-3], [1e-2])}
    rows = table._beside_ours(table._rows(found))
    assert [round(row["times_ours"]) for row in rows] == [1, 3]
    text = table.as_text({"cases": {"Case": rows}, "skipped": {"other": "not there"}})
    assert "6.00" in text
    assert "1e-02" in text
    assert "skipped: other: not there" in text
