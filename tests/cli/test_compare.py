"""Comparisons: every number against a case worked out by hand, an enumeration, or a published example."""

import csv
import io
import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from benchmarks.cli.main import app
from benchmarks.errors import UsageError
from benchmarks.judge import statistics
from benchmarks.show.compare import compare
from benchmarks.show.sheets import FORMATS, as_csv, as_json, as_latex, as_markdown, as_text, latex

INF = math.inf


@pytest.fixture
def study(tmp_path, synthetic):
    """Two problems, two seeds each, solvers A, B, C. With tau = 0.1 passes to the tolerance are

        p/0  p/1  q/0  q/1
    A    20   40   20   20
    B    40   40   60    -
    C    20    -   20   40      (q/0: refuted by the referee; so -)
    """
    rows, result = synthetic.rows, synthetic.result
    p, q = "p[n=2]", "q"
    curves = {
        (p, "A[s=0.1]", 0): [11.0, 1.5, 1.0], (p, "A[s=0.1]", 1): [11.0, 3.0, 2.0],
        (p, "B", 0): [11.0, 3.0, 2.0], (p, "B", 1): [11.0, 2.5, 1.5],
        (p, "C", 0): [11.0, 2.0, 2.0], (p, "C", 1): [11.0, 9.0, 9.0],
        (q, "A[s=0.2]", 0): [4.0, 1.0, 1.0], (q, "A[s=0.2]", 1): [4.0, 0.1, 0.0],
        (q, "B", 0): [4.0, 2.0, 1.5, 1.3], (q, "B", 1): [4.0, 3.0, None],
        (q, "C", 0): [4.0, 0.0, 0.0], (q, "C", 1): [4.0, 2.0, 0.4],
    }  # fmt: skip
    results = {key: result(rows(values)) for key, values in curves.items()}
    results[q, "C", 0]["referee"]["verdict"] = "disagrees"
    results[q, "B", 1]["status"] = "NONFINITE"
    return synthetic.write(tmp_path / "study", results, optima={(p, 0): 1.0, (p, 1): 1.0})


# solvers A, B, C on p/0, p/1, q/0, q/1
COSTS = np.array([[20, 40, 20], [40, 40, INF], [20, 60, INF], [20, INF, 40]])


def test_costs_and_spreads_by_hand(study):
    found = compare([study], tolerance=0.1)
    assert found["solvers"] == ["A", "B", "C"]
    p, q = ({row["solver"]: row for row in problem["rows"]} for problem in found["problems"])
    assert p["A"]["oracles"]["median"] == 30
    assert p["A"]["oracles"]["std"] == pytest.approx(math.sqrt(200))
    assert p["A"]["time"]["mean"] == 7.5
    assert p["C"]["oracles"] == {"count": 2, "mean": None, "std": None, "q25": INF, "median": INF, "q75": INF}
    assert [p[name]["solved"] for name in "ABC"] == [2, 2, 1]
    assert [q[name]["solved"] for name in "ABC"] == [2, 1, 1]
    assert q["C"]["refuted"] == 1
    assert q["B"]["value"]["mean"] is None  # one seed has no number
    assert p["B"]["value"]["mean"] == 1.75
    assert p["B"]["gap"]["mean"] == 0.75
    assert "gap" not in q["A"]
    assert any("refuted" in note for note in found["notes"])
    assert any("1 runs failed (NONFINITE)" in note for note in found["notes"])


def test_calls_that_nobody_counted_are_neither_few_nor_many(tmp_path, synthetic):
    """C, first by time, has no oracle calls in its record: it is in no profile by calls and has no rank."""
    curves = {"A": [11.0, 3.0, 1.0], "B": [11.0, 5.0, 1.0], "C": [11.0, 1.0, 1.0]}
    results = {("p", name, 0): synthetic.result(synthetic.rows(curve)) for name, curve in curves.items()}
    for row in (*results["p", "C", 0]["record"], results["p", "C", 0]["stats"]):
        row["oracles"] = None
    folder = synthetic.write(tmp_path / "study", results, optima={("p", 0): 0.0})
    found = compare([folder], tolerance=0.1)
    assert list(found["profiles"]["oracles"]["data"]) == list(found["ranks"]["mean_ranks"]) == ["A", "B"]
    assert found["profiles"]["time"]["performance"]["C"] == [1.0]
    (row,) = (row for row in found["problems"][0]["rows"] if row["solver"] == "C")
    assert row["solved"] == 1
    assert row["oracles"]["median"] is None
    assert any(note.startswith("C: how many oracle calls") for note in found["notes"])
    text = CliRunner().invoke(app, ["compare", str(folder), "--tol", "0.1"])
    assert text.exit_code == 0
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0


def test_profiles_by_hand(study):
    found = compare([study], tolerance=0.1)
    assert [found["profiles"]["oracles"]["data"][name] for name in "ABC"] == np.sort(COSTS, axis=0).T.tolist()
    profile = compare([study], tolerance=0.1)["profiles"]["oracles"]
    # ratios to the best: A 1 1 1 1; B 2 1 3 -; C 1 - - 2
    assert profile["performance"] == {"A": [1, 1, 1, 1], "B": [1, 2, 3, INF], "C": [1, 2, INF, INF]}
    assert profile["ratios"] == [1, 2, 4, 8, 16, INF]
    assert np.array(profile["within_ratio"]).T.tolist() == [[1] * 6, [0.25, 0.5, 0.75, 0.75, 0.75, 0.75],
                                                            [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]]  # fmt: skip
    assert profile["data"]["B"] == [40, 40, 60, INF]
    assert profile["budgets"] == [3.75, 7.5, 15, 30, 60]
    assert np.array(profile["within_budget"]).T.tolist() == [[0, 0, 0, 0.75, 1], [0, 0, 0, 0, 0.75],
                                                             [0, 0, 0, 0.25, 0.5]]  # fmt: skip


def test_ranks_by_hand(study):
    ranks = compare([study], tolerance=0.1)["ranks"]
    # p/0: 1.5 3 1.5   p/1: 1.5 1.5 3   q/0: 1 2 3   q/1: 1 3 2
    assert ranks["mean_ranks"] == {"A": 5 / 4, "B": 9.5 / 4, "C": 9.5 / 4}
    # Friedman with ties: 12 sum(R_j - 4*2)^2 / (n k (k+1)) / (1 - 2 * (2^3 - 2) / (n (k^3 - k)))
    statistic = 12 * (3**2 + 1.5**2 + 1.5**2) / (4 * 3 * 4) / (1 - 2 * 6 / (4 * 24))
    assert ranks["friedman"]["statistic"] == pytest.approx(statistic)
    assert ranks["friedman"]["p"] == pytest.approx(math.exp(-statistic / 2))  # chi2 with two degrees of freedom
    a_b = ranks["pairs"][0]
    assert {k: a_b[k] for k in ("a", "b", "wins", "ties", "losses")} == {
        "a": "A", "b": "B", "wins": 3, "ties": 1, "losses": 0,
    }  # fmt: skip
    assert a_b["p"] == 0.25  # three wins: 2 of the 8 sign patterns are as far out


def test_holm_is_the_published_procedure():
    # p = 0.01, 0.04, 0.03, 0.005: 4 * 0.005, 3 * 0.01, 2 * 0.03, then 1 * 0.04 lifted to 0.06
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_wilcoxon_is_the_enumeration_over_signs():
    rng = np.random.default_rng(0)
    costs = np.exp(rng.normal(size=(7, 2)))
    costs[3, 1] = INF  # one unsolved: the largest difference
    difference = statistics.log_ratios(*costs.T)
    assert np.abs(difference).argmax() == 3
    ranks = stats.rankdata(np.abs(difference))
    observed = abs(ranks @ np.sign(difference))
    signs = np.array(list(itertools.product([-1, 1], repeat=7)))
    exact = np.mean(np.abs(signs @ ranks) >= observed - 1e-9)
    assert statistics.rank_tests(costs, ["a", "b"])["pairs"][0]["p"] == pytest.approx(exact)


def test_log_ratios_and_ratios_of_costs_that_are_zero_or_infinite():
    a, b = np.array([0.0, 0.0, 2.0, INF, INF]), np.array([0.0, 5.0, 1.0, INF, 3.0])
    assert statistics.log_ratios(a, b) == pytest.approx([0, -1 - math.log(2), math.log(2), 0, 1 + math.log(2)])
    assert statistics.ratios(np.stack([a, b], 1)).tolist() == [[1, 1], [1, INF], [2, 1], [INF, INF], [INF, 1]]
    within = statistics.fraction_within(np.array([[1.0, INF]]), np.array([1.0, INF]))
    assert within.tolist() == [[1, 0], [1, 0]]


def test_quantiles_are_numpys_and_survive_infinities():
    values = np.random.default_rng(1).normal(size=9)
    for q in (0.25, 0.5, 0.75):
        assert statistics.quantile(values, q) == pytest.approx(np.quantile(values, q))
    assert statistics.quantile([1.0, INF, INF], 0.25) == INF
    assert statistics.quantile([1.0, 2.0, INF], 0.5) == 2.0
    assert statistics.spread([])["median"] is None
    assert statistics.spread([1.0, math.nan])["q75"] == INF


def test_least_value_found_stands_in_for_an_unknown_optimum(tmp_path, synthetic):
    rows, result = synthetic.rows, synthetic.result
    folder = synthetic.write(tmp_path / "a", {
        ("p", "A", 0): result(rows([10.0, 5.0, 0.0])),
        ("p", "B", 0): result(rows([10.0, 2.0, 1.0])),
        ("p", "C", 0): result(rows([10.0, -90.0, -90.0], violation=1e-3)),  # below all, but outside the sets
    })  # fmt: skip
    found = compare([folder], tolerance=0.1)  # F_L = 0, F_0 = 10: F <= 1
    assert [row["oracles"]["median"] for row in found["problems"][0]["rows"]] == [40, 40, INF]
    by_gradient = compare([folder], by="gradient", tolerance=0.2)  # |grad F| <= 2
    assert [row["oracles"]["median"] for row in by_gradient["problems"][0]["rows"]] == [40, 20, INF]


def test_folders_with_the_same_cells_are_told_apart(tmp_path, synthetic):
    rows, result = synthetic.rows, synthetic.result
    first = synthetic.write(tmp_path / "before", {("p", "A", 0): result(rows([1.0, 0.5]))}, {("p", 0): 0.0})
    second = synthetic.write(
        tmp_path / "after", {("p", "A", 0): result(rows([1.0, 0.0]))}, {("p", 0): 0.0}, system={"cpus": 64}
    )
    found = compare([first, second])
    assert found["solvers"] == ["A @ before", "A @ after"]
    assert any("machine" in note and "times do not compare" in note for note in found["notes"])
    other = synthetic.write(tmp_path / "other", {("p", "A", 0): result(rows([1.0, 0.0]))}, {("p", 0): 7.0})
    with pytest.raises(UsageError, match="another instance in other"):
        compare([first, other])


def test_the_block_of_most_runs_is_compared_and_the_rest_named(tmp_path, synthetic):
    rows, result = synthetic.rows, synthetic.result
    done = result(rows([1.0, 0.0]))
    folder = synthetic.write(tmp_path / "a", {
        ("p", "A", 0): done, ("p", "B", 0): done, ("p", "D", 0): done, ("p", "A", 1): done, ("p", "B", 1): None,
        ("q", "A", 0): result([], "UNSUPPORTED", reason="no"), ("q", "C", 0): done, ("q", "B", 0): done,
    })  # fmt: skip
    found = compare([folder])  # A, B on two instances are 4 runs; A, B, D on one are 3, and so are A, B, C
    assert found["solvers"] == ["A", "B"]
    assert found["instances"] == ["p seed 0", "q seed 0"]
    notes = " ".join(found["notes"])
    assert "C is left out of profiles and tests: it was run on 1 of 3 instances" in notes
    assert "D is left out" in notes
    assert "1 cells are unfinished" in notes
    assert "1 runs are not supported" in notes
    assert compare([folder], solvers=["C"])["ranks"] is None


def test_every_format_says_the_same(study):
    found = compare([study], tolerance=0.1)
    back = json.loads(as_json(found, "std"))
    assert back["problems"][0]["rows"][2]["oracles"]["median"] is None
    table = list(csv.DictReader(io.StringIO(as_csv(found, "std"))))
    (median,) = [
        row["number"] for row in table
        if (row["problem"], row["solver"], row["quantity"], row["statistic"]) == ("p[n=2]", "A", "oracles", "median")
    ]  # fmt: skip
    assert float(median) == 30
    text, markdown, tex = (form(found, "quantiles") for form in (as_text, as_markdown, as_latex))
    assert "30 [25, 35]" in text
    assert "30 \\[25, 35\\]" in markdown
    assert "30 [25, 35]" in tex
    assert "30 ± 14" in as_text(found, "std")
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 8
    for line in (line for line in markdown.splitlines() if line.startswith("|")):
        assert line.replace("\\|", "").count("|") in (3, 6, 7, 8)
    assert latex("50% a_b & {c} ~ \\d") == r"50\% a\_b \& \{c\} \textasciitilde{} \textbackslash{}d"


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_prints_each_format(study, form):
    called = CliRunner().invoke(app, ["compare", str(study), "--tol", "0.1", "--format", form])
    assert called.exit_code == 0, called.stderr
    assert called.stdout == FORMATS[form](compare([study], tolerance=0.1), "quantiles")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tol", "2"], "expected a number in (0, 1)"),
        (["--by", "x"], "expected value or gradient"),
        (["--format", "x"], "text"),
        (["-s", "Z"], "nothing to compare"),
        (["absent"], "no settings.json"),
    ],
)
def test_bad_usage(study, arguments, expected):
    called = CliRunner().invoke(app, ["compare", str(study), *arguments])
    assert called.exit_code == 2
    assert expected in " ".join(called.stderr.replace("│", " ").split())
