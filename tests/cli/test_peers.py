"""The comparison with other libraries: one timing loop, skipped with a reason, error beside time."""

import sys

import numpy as np

from benchmarks.peers import table
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


def test_what_is_not_there_is_skipped_with_a_reason(monkeypatch):
    skipped = {}
    assert table._installed({"no_such_library": dict}, skipped) == {}
    assert "pip install" in skipped["no_such_library"]
    assert "No such file" in table.torch_ridge({}, [], "no-such-interpreter")
    monkeypatch.setitem(sys.modules, "torch", None)
    data = {part: {"Z": np.ones((2, 1)), "t": np.ones(2)} for part in ("train", "validation")}
    answer = table.torch_ridge(data, [np.ones(1)], sys.executable)
    assert isinstance(answer, dict) or "--python" in answer


def test_rows_show_time_and_error():
    found = {"bilevax hypergradient": Measured(1.0, [2e-3], [1e-14]), "jax scan": Measured(1.0, [6e-3], [1e-2])}
    rows = table._rows(found)
    assert [round(row["times_ours"]) for row in rows] == [1, 3]
    text = table.as_text({"cases": {"Case": rows}, "skipped": {"other": "not there"}})
    assert "6.00" in text
    assert "1e-02" in text
    assert "skipped: other: not there" in text
