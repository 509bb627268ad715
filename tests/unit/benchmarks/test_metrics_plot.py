"""The picture of metrics: a panel a metric, a row a solver or baseline; dashes in the table are gaps here."""

from benchmarks.show.metrics_plot import draw_metrics


def test_metrics_are_drawn_where_there_are_some(tmp_path):
    half = {"mean": 0.5, "std": None, "count": 1}
    rows = [
        {"solver": "SOBA", "metrics": {"accuracy": {"mean": 0.9, "std": 0.01, "count": 5}, "f1": half}},
        {"solver": "AID[a=1]", "metrics": {"accuracy": {"mean": None, "std": None, "count": 0}}},
    ]
    problem = {"problem": "p[q=1]", "rows": rows, "baselines": [{"baseline": "plain", "metrics": {"accuracy": half}}]}
    names = {"SOBA": "SOBA", "AID[a=1]": "AID"}
    assert draw_metrics(tmp_path / "metrics.png", problem, names)
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    nothing = {"problem": "p", "rows": [{"solver": "SOBA", "metrics": {}}], "baselines": []}
    assert not draw_metrics(tmp_path / "none.png", nothing, names)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.png"]
