"""Verdicts in reports and comparisons."""

import numpy as np

from benchmarks.show import compare, report
from bilevel import Status

PROBLEM = "quadratic"


def test_verdicts_are_shown_and_doubtful_rows_do_not_count(synthetic, tmp_path):
    """A saddle of g at the last rows, a gradient without a bound, and an end worse than the best point."""
    record = synthetic.rows([1.0, 0.5, 0.0, 0.0])
    for row in record[2:]:
        row |= {"status": int(Status.SADDLE), "error_bound": None, "hypergradient": 0.0}
    found = synthetic.result(record, status="SADDLE")
    found["stats"] |= {"best_value": 0.5, "best_step": 10, "end_is_worse": True}
    key = (PROBLEM, "AID", 0)
    folder = synthetic.write(tmp_path / "run", {key: found}, optima={(PROBLEM, 0): 0.0})
    summary = report.summarise(report.load(folder))
    (row,) = summary["problems"][0]["rows"]
    assert row["verdicts"] == {"SADDLE": 1}
    text = report.as_text(summary)
    assert "unknown" in text
    assert "SADDLE: The lower level stopped where g_yy" in text
    assert "1 of 1 runs end worse than their best point; its F: 0.5" in text
    assert ",SADDLE,SADDLE,agrees" in report.as_csv(summary)
    trials, _ = compare.read([folder], [], [])
    assert trials[0].inside("value").tolist() == [1.0, 0.5, np.inf, np.inf]
