"""Instances as data, and programs as solvers: what is written is the problem, and no program can stop the command."""

import importlib.util
import json
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from typer.testing import CliRunner

import bilevel
import problems
from benchmarks.cli.main import app
from benchmarks.study import instances, programs, submission
from bilevel.backend import compilation

PAGE = Path(__file__).parents[2] / "docs" / "enter.md"


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def named(**points):
    """{"x0": …} of points."""
    return {f"{name}{k}": float(number) for name, point in points.items() for k, number in enumerate(point)}


def total(monomials, z):
    """A sum of monomials at z = {"x0": …}."""
    return sum(coefficient * np.prod([z[name] for name in unknowns]) for coefficient, *unknowns in monomials)


@pytest.mark.parametrize("text", ["quadratic[dim_x=2,dim_y=3,num_samples=3]", "textbook[case=bard_falk]"])
def test_an_exported_instance_is_the_problem(text, tmp_path):
    shown = call("export", "-p", text, "--out", tmp_path, "--json")
    assert shown.exit_code == 0, shown.output
    (folder,) = json.loads(shown.stdout)["folders"]
    told = json.loads((tmp_path / folder / "instance.json").read_text("utf8"))
    made = problems.make(text.partition("[")[0], **({"case": "bard_falk"} if "case" in text else
                         {"dim_x": 2, "dim_y": 3, "num_samples": 3}))  # fmt: skip
    problem = made.problem
    rng = np.random.default_rng(0)
    formulas = told["expressions"]
    for _ in range(2):  # g's terms of x alone are left out: differences in y remain
        x, y, other = (jax.numpy.asarray(rng.normal(size=told["dimensions"][name])) for name in ("x", "y", "y"))
        z, moved = (named(x=x, y=part) for part in (y, other))
        f = problem.upper(x, y, problem.upper_data.full())
        np.testing.assert_allclose(total(formulas["upper"], z), f, rtol=1e-12)
        g = [float(problem.lower.g(x, part, problem.lower_data.full())) for part in (y, other)]
        fall = total(formulas["lower"], z) - total(formulas["lower"], moved)
        np.testing.assert_allclose(fall, g[0] - g[1], rtol=1e-11)
        if problem.coupling is not None:
            rows = problem.coupling.A @ y + problem.coupling.B @ x - problem.coupling.b
            found = [total(row, z) for row in formulas["coupling"]["at_most_zero"]]
            np.testing.assert_allclose(found, rows, rtol=1e-12)
    assert len(told["expressions"]["upper_constraints"]["at_most_zero"]) == (problem.upper_constraints is not None)
    assert told["optimum"]["value"] == pytest.approx(made.truth.value, abs=1e-12)
    assert told["optimum"]["certificate"]["status"] in ("CONVERGED", "ESTIMATED")
    with np.load(tmp_path / folder / "arrays.npz") as arrays:
        assert {part["name"]: list(arrays[part["name"]].ravel()) for part in told["arrays"]} == {
            part["name"]: part["data"] for part in told["arrays"]
        }
    assert call("export", "-p", text, "--out", tmp_path).exit_code == 0  # the same again: nothing changes
    (tmp_path / folder / "instance.json").write_text("{}")
    assert "not overwritten" in call("export", "-p", text, "--out", tmp_path).stderr


def test_sets_and_start_are_told(tmp_path):
    made = problems.make("ridge")
    told, arrays = instances.describe("ridge", 0, made, secrets=False)
    assert (told["sets"]["x"]["kind"], told["sets"]["x"]["lo"], told["sets"]["y"]["kind"]) == (
        "box",
        [-8.0] * 10,
        "whole",
    )
    assert told["expressions"] is None
    assert "g" in told["expressions_missing"]
    assert not {"optimum", "constants"} & set(told)
    assert "BSD-3-Clause" in told["licence"]["data"]
    assert list(arrays) == ["upper_data/0", "upper_data/1", "lower_data/0", "lower_data/1"]
    assert told["start"]["x"] == list(ravel_pytree(made.problem.init(jax.random.key(0))[0])[0])


@pytest.mark.process
@pytest.mark.parametrize(
    ("program", "word", "said"),
    [
        ("raise SystemExit(3)", "CRASHED", "exit code 3"),
        ("1/0", "CRASHED", "ZeroDivisionError"),
        ("print('hello')", "NONSENSE", "line 1: no JSON"),
        ("print('[1, 2]')", "NONSENSE", "expected"),
        ("print(json.dumps({'x': [1.0], 'y': [0.0]}))", "NONSENSE", "list of 2 numbers, got 1"),
        ("print(json.dumps({'x': [1.0, 'a'], 'y': [0.0]}))", "NONSENSE", "'a'"),
        ("print(json.dumps({'x': [1.0, 2.0], 'y': [0.0], 'time': 1e9}))", "NONSENSE", "time"),
        ("print(json.dumps({'x': [1.0, float('nan')], 'y': [0.0]}))", "NONFINITE", "line 1: x"),
        ("print(json.dumps({'x': [1.0, 2.0], 'y': [None]}))", "NONFINITE", "line 1: y"),
        ("print('9' * 10000)", "NONSENSE", "characters"),
        ("sys.stdout.buffer.write(b'\\xff\\xfe\\n')", "NONSENSE", "line 1"),
        ("[print(json.dumps({'x': [1.0, 2.0], 'y': [0.0]})) for _ in range(2000)]", "NONSENSE", "1000 lines"),
        ("pass", "SILENT", "without a line"),
        ("print(json.dumps({'refuse': 'too hard'}))", "UNSUPPORTED", "too hard"),
        ("print(json.dumps({'x': [1.0, 2.0], 'y': [0.0]}), flush=True); time.sleep(60)", "TIMED_OUT", "killed"),
        ("sys.stdout.close(); os.close(1); time.sleep(60)", "TIMED_OUT", "killed"),
        ("while True: print(' ')", "TIMED_OUT", "killed"),
    ],
)
def test_a_program_that_fails_has_a_word_and_no_number(program, word, said, tmp_path):
    command = [sys.executable, "-S", "-c", f"import json, os, sys, time\n{program}"]
    late = word == "TIMED_OUT"
    found = programs.run(command, b"{}", 1.0 if late else 30.0, (2, 1), tmp_path / "log")
    assert (found.word, found.lines) == (word, [])
    assert said in found.reason


@pytest.mark.process
def test_a_program_gets_the_variables_of_the_user(tmp_path, monkeypatch):
    """Not the flags of our own XLA, at which another one may stop, nor our number of threads."""
    for name, theirs, ours in (("XLA_FLAGS", "--theirs", "--ours --theirs"), ("OPENBLAS_NUM_THREADS", "", "1")):
        monkeypatch.setenv(compilation.GIVEN + name, theirs)
        monkeypatch.setenv(name, ours)
    told = "os.environ.get('XLA_FLAGS'), os.environ.get('OPENBLAS_NUM_THREADS')"
    program = f"import json, os; print(json.dumps({{'refuse': str([{told}])}}))"
    found = programs.run([sys.executable, "-S", "-c", program], b"{}", 30.0, (2, 1), tmp_path / "log")
    assert "['--theirs', None]" in found.reason


def test_large_points_may_be_told_less_often():
    assert [programs.most_lines((n, n)) for n in (1, 2500, 50_000, 10**7)] == [1000, 1000, 50, 10]


@pytest.mark.process
def test_a_program_that_never_reads_and_leaves_a_child_is_ended(tmp_path):
    """Its stdin is larger than any pipe, and its child holds stdout open."""
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"
    program = f"{child}; print(p.pid, file=sys.stderr)"
    found = programs.run([sys.executable, "-S", "-c", program], b"x" * 10**6, 30.0, (2, 1), tmp_path / "log")
    assert found.word == "SILENT"  # it has ended, and its child does not count
    pid = int((tmp_path / "log").read_text())
    state = Path(f"/proc/{pid}/stat")
    if sys.platform == "linux":
        for _ in range(100):
            try:
                if state.read_text().split()[2] == "Z":
                    break
            except OSError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the child lives on")


def of_page(title, folder):
    """A program of the page as a file: what a reader does."""
    code = re.search(f'^```python title="{title}"\n(.*?)^```$', PAGE.read_text("utf8"), re.MULTILINE | re.DOTALL)
    (folder / title).write_text(code.group(1), "utf8")
    return folder / title


@pytest.fixture(scope="module")
def submitted(tmp_path_factory):
    """(result, arguments) of the page's program on an instance that it solves and one that it refuses."""
    folder = tmp_path_factory.mktemp("submitted")
    command = f"{sys.executable} {of_page('scipy_solver.py', folder)}"
    arguments = ["submit", "--command", command, "-p", "quadratic[dim_x=2,dim_y=3]", "-p", "textbook", "--out",
                 folder / "out"]  # fmt: skip
    return call(*arguments, "--json", "--no-plot"), arguments


@pytest.mark.process
def test_every_line_of_a_program_is_judged(submitted):
    shown, _ = submitted
    assert shown.exit_code == 0, shown.output
    solved, refused = json.loads(shown.stdout)["results"]
    made = problems.make("quadratic", dim_x=2, dim_y=3)
    assert (solved["solver"], solved["status"], solved["referee"]["verdict"]) == ("scipy_solver", "CONVERGED", "agrees")
    assert solved["record"][-1]["value"] == pytest.approx(made.truth.value, abs=1e-12)
    assert solved["stats"]["steps"] == len(solved["record"]) - 1 > 2
    values, times = ([row[name] for row in solved["record"]] for name in ("value", "time"))
    assert times == sorted(times)
    assert times[0] == 0.0
    assert values[0] == pytest.approx(
        float(bilevel.implicit_objective(made.problem)(instances.start(made.problem, 0)[0]))
    )
    assert (refused["status"], refused["record"]) == ("UNSUPPORTED", [])
    assert "quadratic f and g" in refused["reason"]


@pytest.mark.process
def test_a_submission_goes_on_and_a_changed_program_is_another_run(submitted):
    _, arguments = submitted
    folder = arguments[-1]
    before = {path.name: path.read_bytes() for path in folder.glob("cells/*")}
    assert call(*arguments, "--no-plot").exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.glob("cells/*")} == before
    settings = json.loads((folder / "settings.json").read_text())
    assert submission.again(settings).startswith("bilevax submit --command '")
    page = call("report", folder)
    assert page.exit_code == 0
    assert "bilevax submit --command" in (folder / "report.html").read_text()
    file = Path(arguments[2].split()[1])
    file.write_text(file.read_text() + "# changed\n")
    assert "program scipy_solver.py" in call(*arguments).stderr


@pytest.mark.process
def test_what_a_program_claims_is_checked(tmp_path):
    """It says that it has converged at the start, and tells a gradient that is right and one with a wrong sign."""
    made = problems.make("quadratic", dim_x=2, dim_y=3)
    x, y = instances.start(made.problem, 0)
    gradient = np.asarray(bilevel.hypergradient(made.problem, x).gradient).tolist()
    right = {"x": x.tolist(), "y": y.tolist(), "gradient": gradient}
    wrong = right | {"gradient": [-number for number in gradient], "converged": True}
    (tmp_path / "told.py").write_text(f"import json\nfor line in {[right, wrong]}: print(json.dumps(line))")
    shown = call("submit", "--command", f"{sys.executable} {tmp_path}/told.py", "-p", "quadratic[dim_x=2,dim_y=3]",
                 "--out", tmp_path / "out", "--no-plot", "--json")  # fmt: skip
    (told,) = json.loads(shown.stdout)["results"]
    assert told["status"] == "STOPPED"
    assert told["claims"] | {"worst_gradient": None} == {
        "converged": True, "gradients": 2, "wrong_gradients": 1, "worst_gradient": None,
    }  # fmt: skip
    assert told["claims"]["worst_gradient"] == pytest.approx(2.0)


@pytest.mark.process
def test_torch_is_refused_by_name(tmp_path):
    if importlib.util.find_spec("torch"):
        pytest.skip("torch is installed, and its program runs")
    told, _ = instances.describe("ridge", 0, problems.make("ridge"), secrets=False)
    command = [sys.executable, str(of_page("torch_solver.py", tmp_path))]
    found = programs.run(command, json.dumps({"instance": told}).encode(), 60.0, (10, 10), tmp_path / "log")
    assert (found.word, found.reason) == ("UNSUPPORTED", "needs torch: pip install torch")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--command", "no-such-program", "-p", "ridge"], "no-such-program"),
        (["--command", "", "-p", "ridge"], "got nothing"),
        (["--command", "sh -c 'x", "-p", "ridge"], "No closing quotation"),
        (["--command", "true", "-p", "rigde"], "Did you mean ridge?"),
        (["--command", "true", "-p", "ridge", "--name", "a[b]"], "letters"),
        (["--command", "true"], "one of the two"),
    ],
)
def test_bad_submissions_are_named(arguments, said, tmp_path):
    shown = call("submit", *arguments, "--out", tmp_path / "out")
    assert shown.exit_code == 2
    assert said in " ".join(shown.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
