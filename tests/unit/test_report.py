"""The report: aligned rows, chosen rows, statuses; the progress bar stays away from files; plots are pictures."""

import math
import sys

import matplotlib.image
import numpy as np
import pytest

from bilevel import OracleCount, Record, Solution, Status, report
from bilevel import solution as end


def row(step, **changes):
    base = {"step": step, "value": 1 / (step + 1), "hypergradient": 1e-3, "lower_residual": 1e-9, "violation": 0.0,
            "oracles": 2.5 * step, "time": 0.01 * step, "error_bound": 1e-12, "status": 0}  # fmt: skip
    return base | changes


def solution(rows, status=Status.CONVERGED):
    stats = {"steps": 40, "solver": "SOBA", "referee": "solved again", "tol": 1e-6, "solve_time": 1.25,
             "setup_time": 2.5, "measure_time": 0.125}  # fmt: skip
    return Solution(None, None, status, Record(rows), stats, None, None)


def test_columns_are_aligned():
    text = [end.header().splitlines()[0]]
    extremes = ({}, {"value": -1.234567890123e-300}, {"value": math.nan, "hypergradient": math.inf},
                {"hypergradient": 0.0, "error_bound": math.inf, "status": 4},
                {"hypergradient": 1.0, "error_bound": math.nan, "status": 11},
                {"violation": 1e-5, "oracles": 1e12, "time": 99999.0, "lower_residual": math.nan})  # fmt: skip
    text += [end.row_text(row(123456, **changes)) for changes in extremes]
    bars = [[k for k, letter in enumerate(line) if letter == "|"] for line in text]
    assert len(bars[0]) == 7
    assert all(places == bars[0] for places in bars)
    assert len({len(line) for line in text}) == 1


def test_numbers_in_a_row():
    cells = [cell.strip() for cell in end.row_text(row(7, value=0.123456789, violation=2e-3)).split("|")]
    assert cells == ["7", "0.1234568", "1.000e-03", "1.000e-09", "2.00e-03", "17.5", "0.070", "CONVERGED"]


def test_a_gradient_without_a_bound_is_never_zero():
    for bound in (math.inf, math.nan):
        assert end.row_text(row(1, hypergradient=0.0, error_bound=bound)).split("|")[2].strip() == "unknown"
        assert end.row_text(row(1, hypergradient=0.5, error_bound=bound)).split("|")[2].strip() == "5.000e-01?"
    assert end.row_text(row(1, hypergradient=0.0)).split("|")[2].strip() == "0.000e+00"
    assert "no bound of its error" in str(solution([row(0), row(1, error_bound=math.inf)]))
    assert "no bound of its error" not in str(solution([row(0)]))


def test_the_footer_names_the_referee():
    assert "F and hypergrad: solved again" in str(solution([row(0)]))


def test_advice_for_a_gradient_names_what_to_change():
    assert "max_iterations" in Status.UNSOLVED_LINEAR.advice
    assert "in units of" in Status.ESTIMATED.advice


@pytest.mark.parametrize("count", [0, 1, 12, 13, 1000])
def test_at_most_twelve_rows_with_the_first_and_the_last(count):
    lines = str(solution([row(k) for k in range(count)])).splitlines()
    steps = [int(line.split("|")[0]) for line in lines[3:-2]]
    assert len(steps) == min(count, 12)
    assert steps == sorted(set(steps))
    if count:
        assert (steps[0], steps[-1]) == (0, count - 1)


@pytest.mark.parametrize("status", Status)
def test_footer_says_how_it_ended(status):
    text = str(solution([row(0)], status))
    assert f"{status.name} after 40 steps: {status.advice}" in text
    assert "solve 1.250 s, set-up 2.500 s, measuring 0.125 s" in text
    assert text.startswith("SOBA (tol 1.0e-06)\n")
    assert status.advice.endswith(".")


def test_statuses_keep_their_numbers():
    names = ["CONVERGED", "MAX_STEPS", "TIME_LIMIT", "NONFINITE", "INFEASIBLE_LOWER", "WEAKLY_ACTIVE", "STALLED",
             "INTERRUPTED", "ESTIMATED", "STOPPED"]  # fmt: skip
    assert [Status(k).name for k in range(len(names))] == names


def test_one_line():
    assert repr(solution([row(0), row(1)])) == "Solution(status=CONVERGED, steps=40, F=0.5)"
    assert repr(solution([])) == "Solution(status=CONVERGED, steps=40, F=nan)"


def test_record_columns():
    record = Record([row(0)])
    record.append(**row(3), extra=1.0)
    assert len(record) == 2
    assert record["value"].tolist() == [1.0, 0.25]
    assert math.isnan(record["extra"][0])
    assert record["extra"][1] == 1


def test_oracle_counts():
    count = OracleCount(upper_gradients=1, lower_gradients=2, hvps=3, jvps=4)
    assert count.total == 10
    assert count.passes(0.1, 0.01) == pytest.approx(0.1 + 0.09)
    assert count.as_dict()["hvps"] == 3


def test_no_progress_bar_where_there_is_no_terminal(capfd):
    bar = report.Progress(None, 10, "SOBA")
    assert not bar.wanted
    bar.begin -= 10  # as if ten seconds had passed
    bar.update(5, Record([row(5)]))
    bar.close()
    assert capfd.readouterr() == ("", "")


def test_progress_bar_appears_after_two_seconds_only(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stream for a terminal
    bar = report.Progress(True, 10, "SOBA")
    bar.begin += 1000
    bar.update(1, Record([row(1)]))
    assert bar.bar is None
    bar.begin -= 2000
    bar.update(5, Record([]))  # nothing measured yet: NaN, no error
    bar.update(6, Record([row(4, Lhat=-2.0, returns=math.nan), row(5, Lhat=3.5, returns=math.nan)]), "SADDLE")
    assert bar.bar is not None
    bar.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert "SOBA, at step 5: SADDLE" in err
    line = next(line for line in err.splitlines() if "Lhat" in line)  # the solver's own columns are curves, too
    assert "3.5" in line
    assert "▁█" in line
    assert "returns" not in err  # not yet a number


def test_sparklines():
    assert report.sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert report.sparkline([7, math.nan, 0, math.inf]) == "█ ▁ "
    assert report.sparkline([2.0, 2.0]) == "▁▁"
    assert report.sparkline([]) == ""
    assert report.sparkline([math.nan]) == " "
    assert report.sparkline([1e-7, 1.0, 1e7]) == "▁▅█"  # decades apart: by logarithms
    long = report.sparkline(range(1000), width=8)
    assert long == "▁▂▃▄▅▆▇█"


def test_a_solution_as_html_has_every_row_and_is_escaped():
    result = solution([row(k) for k in range(3)])
    result.stats["solver"] = "<script>"
    page = result._repr_html_()
    assert page.count("<tr>") == 1 + 3
    assert page.count("<th>") == len(end.HEADINGS)
    assert page.count("<td>") == 3 * len(end.HEADINGS)
    assert "<script>" not in page
    assert "&lt;script&gt; (tol 1.0e-06)" in page
    assert f"CONVERGED after 40 steps: {Status.CONVERGED.advice}" in page
    assert solution([row(k) for k in range(100)])._repr_html_().count("<tr>") == 1 + 12


def test_the_plot_of_a_solution_has_labelled_axes():
    result = solution([row(0), row(1), row(2, value=math.nan)])
    figure = result.plot()
    assert len(figure.axes) == 6
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), result.record["value"])
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), result.record["oracles"])
    assert figure.get_suptitle() == "SOBA: CONVERGED after 40 steps"
    assert len(solution([]).plot().axes) == 6


def test_without_matplotlib_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "bilevax\[cli\]"'):
        solution([row(0)]).plot()


def test_plot_is_a_picture(tmp_path):
    records = {
        "SOBA": [Record([row(k) for k in range(5)]), Record([row(0), row(1, value=math.nan)])],
        "AID": [Record([row(0)])],
    }
    for optimum, name in ((None, "a.png"), (0.1, "folder/b.png")):
        path = report.plot_records(records, tmp_path / name, "title", optimum)
        picture = matplotlib.image.imread(path)
        assert picture.shape[0] > 500
        assert picture.std() > 0.05  # not a blank page
    report.plot_records({}, tmp_path / "none.png")
