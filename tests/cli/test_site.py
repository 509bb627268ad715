"""The site: closed pages that link to each other, leaderboards, how often solvers were wrong, commands that parse."""

import html
import json
import re
import shlex

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks.cli.main import app
from benchmarks.judge import honesty
from benchmarks.show import compare
from benchmarks.study import files, tuning
from benchmarks.study.registry import Cell, Search

EVIL = 'p[a=<script>console.error("evil")</script>&]'


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def site(tmp_path_factory, synthetic):
    """(result, folder) of a site about two folders: solvers of the library, and a program that told wrong things."""
    rows, result, write = synthetic.rows, synthetic.result, synthetic.write
    folder = tmp_path_factory.mktemp("site")
    fast, slow = rows([10.0, 1.0, 0.5]), rows([10.0, 5.0, 0.5])
    ours = {("quadratic", "A[x=1]", k): result(fast, "CONVERGED") for k in (0, 1)}
    ours |= {("quadratic", "B", 0): result(slow, "CONVERGED", verdict="disagrees", reason="value 1 by the reference")}
    ours |= {("quadratic", "B", 1): result(rows([10.0, None]), "NONFINITE")}
    ours |= {(EVIL, "A[x=1]", 0): result(fast, reason="<b>bold</b>"), (EVIL, "B", 0): result([], "UNSUPPORTED")}
    write(folder / "ours", ours, optima={("quadratic", k): 0.5 for k in (0, 1)})
    claims = {"converged": True, "gradients": 3, "wrong_gradients": 1, "worst_gradient": 0.5}
    theirs = {("quadratic", "mine", 0): result(fast, "STOPPED") | {"claims": claims}}
    theirs |= {("quadratic", "mine", 1): result([], "TIMED_OUT", reason="it had not ended after 60 s")}
    write(folder / "theirs", theirs, optima={("quadratic", k): 0.5 for k in (0, 1)}, program="julia 'my solver.jl'")
    for path in (folder / "theirs" / "cells").glob("*.json"):  # a program has a limit of time
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"cell": found["cell"] | {"time_limit": 60.0}}))
    settings = json.loads((folder / "theirs" / "settings.json").read_text())
    settings["cells"] = [cell | {"time_limit": 60.0} for cell in settings["cells"]]
    (folder / "theirs" / "settings.json").write_text(json.dumps(settings))
    shown = call("site", folder / "ours", folder / "theirs", "--out", folder / "out", "--tol", "0.1", "--json")
    return shown, folder


def pages(site):
    shown, folder = site
    assert shown.exit_code == 0, shown.output
    return {path.name: path.read_text("utf8") for path in (folder / "out").iterdir()}


def table(page, title):
    """{first column: the others} of the table with that title."""
    found = re.search(rf"<caption>{re.escape(title)} .*?</table>", page, re.DOTALL).group()
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)]
    return {html.unescape(row[0]): row[1:] for row in cells[1:]}


def test_every_page_is_closed_and_every_link_leads_to_one(site):
    written = pages(site)
    assert len(written) == 1 + 2 + 3
    reached = set()
    for text in written.values():
        assert not re.search(r"<(script|iframe|object|embed|form|base)\b", text)
        assert "default-src 'none'" in text
        assert all(source.startswith("data:image/svg+xml") for source in re.findall(r'src="([^"]*)', text))
        links = set(re.findall(r'<a href="([^"]*)"', text))
        assert links <= set(written)
        reached |= links
    assert reached == set(written)
    assert "&lt;b&gt;bold" in "".join(written.values())


def test_leaderboards_and_wrong_answers(site):
    index = pages(site)["index.html"]
    board = table(index, "Oracle calls, in passes over the data")
    assert list(board) == ["A", "mine", "B"]  # A solved all of its three instances
    assert board["A"][:2] == ["3/3", "100%"]
    assert board["B"][0] == "0/3"
    wrong = table(index, "How often it was wrong")
    assert wrong["mine"] == ["2", "1", "1 (50%)", "1 (50%)", "0 (0%)", "1 (50%)", "0 (0%)"]
    assert wrong["B"] == ["2", "2", "0 (0%)", "1 (50%)", "1 (50%)", "0 (0%)", "0 (0%)"]
    assert wrong["A"][2:] == ["0 (0%)"] * 5


def test_the_command_of_each_row_parses(site):
    commands = get_command(app).commands
    lines = {line for text in pages(site).values() for line in re.findall(r"<pre[^>]*>(bilevax .*?)</pre>", text)}
    assert len(lines) == 5
    for line in map(html.unescape, lines):
        name, *arguments = shlex.split(line)[1:]
        context = commands[name].make_context(name, arguments)
        assert context.params["seeds"] in (1, 2)
        if name == "submit":
            assert context.params["command"] == "julia 'my solver.jl'"


def test_a_folder_with_other_things_is_not_written_into(site, tmp_path):
    _, folder = site
    (tmp_path / "letter.txt").write_text("dear")
    shown = call("site", folder / "ours", "--out", tmp_path)
    assert shown.exit_code == 2
    assert "other things than a site" in shown.stderr
    again = call("site", folder / "ours", "--out", folder / "out")  # a site is written anew
    assert again.exit_code == 0
    assert "index.html and" in again.stdout
    assert call("site", tmp_path).exit_code == 2


def test_reasons_for_wrong_gradients_are_the_judge_s(synthetic):
    rows, result = synthetic.rows, synthetic.result
    wrong = result(rows([1.0, 0.5]), verdict="disagrees")
    wrong["referee"]["reason"] = "hypergradient 1 by the reference, 2 in the run"
    assert honesty.counts([wrong, result([], "CRASHED")]) == dict(
        zip(honesty.HEADINGS, (2, 1, 1, 0, 0, 0, 1), strict=True)
    )


def test_tuned_solvers_can_be_made_to_pay_for_their_search(tmp_path, synthetic):
    rows, result, write = synthetic.rows, synthetic.result, synthetic.write
    search = Search(3, (100,), "value", (("x", (0.1, 1.0)),))
    folder = write(tmp_path / "run", {("q", "A", 0): result(rows([10.0, 0.1]))}, optima={("q", 0): 0.0})
    settings = json.loads((folder / "settings.json").read_text())
    cell = Cell("q", "A", 0, max_steps=100, every=10, search=search)
    settings["cells"] = [files.clean(settings["cells"][0] | {"search": json.loads(json.dumps(search.__dict__))})]
    (folder / "settings.json").write_text(json.dumps(settings))
    (path,) = folder.glob("cells/*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cell": settings["cells"][0]}))
    for index, trial in enumerate(tuning.trials([cell])):
        own = {"cell": files.clean(trial.__dict__)} | result(rows([10.0, 1.0]))
        files.write_json(files.cell_path(folder / "tuning", index, trial), own)
    free, paid = (
        compare.compare([folder], tolerance=0.1, count_tuning=count)["costs"][0]["oracles"] for count in (False, True)
    )
    assert (free, paid) == (20.0, 20.0 + 3 * 20.0)
