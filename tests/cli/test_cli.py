"""The command: usage, one real run from end to end, what a killed run leaves, the referee."""

import json
import statistics
import subprocess

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import bilevel
import irl
import problems
from benchmarks.cli.main import app
from benchmarks.show import report
from benchmarks.study import files, registry, runner, suites
from problems.quadratic import closed_form

PROBLEM = "quadratic[dim_x=3,dim_y=4]"
SOBA = "SOBA[linear_step_size=0.9,lower_step_size=0.9,upper_step_size=0.1]"
AID = "AID[lower_step_size=0.9,upper_step_size=0.4]"
ARGUMENTS = ["run", "-p", PROBLEM, "-s", SOBA, "-s", AID, "--seeds", "2", "--max-steps", "2000", "--every", "500"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(result, folder) of a run of two solvers and two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return call(*ARGUMENTS, "--out", folder, "--json"), folder


@pytest.mark.process
def test_help_and_version_import_nothing_heavy(program):
    done = subprocess.run(program("light_help"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Examples:") == 11
    assert "[upper_step_size=adam(0.05)]" in done.stdout  # not swallowed as markup


def test_version_is_the_distribution_s():
    from importlib.metadata import version

    assert call("--version").stdout == f"bilevax {version('bilevax')}\n"


def test_list_shows_every_solver_and_family():
    listed = json.loads(call("list", "--json").stdout)
    assert set(listed["solvers"]) == {*bilevel.solvers.ALL, *irl.solvers.ALL}
    assert set(listed["problems"]) == set(problems.families())
    assert all(entry["summary"] for kind in listed.values() for entry in kind.values())
    assert listed["solvers"]["AID"]["parameters"]["num_lower_steps"] == bilevel.AID().num_lower_steps
    abstract = "written from the abstract of arXiv:2505.10830 alone"
    assert listed["solvers"]["SampledPenalty"]["experimental"] == abstract
    assert listed["solvers"]["AID"]["experimental"] == ""
    text = call("list").stdout
    assert f"experimental: {abstract}" in text
    assert all(name in text for kind in listed.values() for name in kind)
    assert "Version 2027.1" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SOBA", ["upper_step_size", "None", "Assumptions:", "-s 'SOBA[lower_step_size=…]'"]),
        ("quadratic", ["dim_x", "10", "condition number of M", "-p 'quadratic[dim_x=…]'"]),
        ("quickstart", ["2027.1", "hyper_cleaning[batch_size=100]", "max_steps 600"]),
    ],
)
def test_list_shows_the_parameters_of_a_name(name, expected):
    shown = call("list", name)
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.stdout for word in expected)
    entries = [kind[name] for kind in json.loads(call("list", name, "--json").stdout).values()]
    assert all(entry["summary"] for entry in entries)


def test_a_name_that_is_nothing_is_named():
    shown = call("list", "SOAB")
    assert shown.exit_code == 2
    assert "Did you mean SOBA?" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-p", "quadratic", "-s", "SOAB"], "Did you mean SOBA?"),
        (["-p", "quadratc", "-s", "SOBA"], "Did you mean quadratic?"),
        (["-p", "quadratic[dimx=3]", "-s", "SOBA"], "Did you mean dim_x?"),
        (["-p", "quadratic", "-s", "SOBA[step=1]"], "SOBA accepts: lower_step_size=None, linear_step_size=None"),
        (["-p", "quadratic", "-s", "AID[num_lower_steps=2.5]"], "expected a whole number"),
        (["-p", "quadratic", "-s", "SOBA[lower_step_size=-1]"], "a positive finite number"),
        (["-p", "quadratic", "-s", "SOBA[lower_step_size=adamm(1)]"], "neither optax nor bilevel has adamm"),
        (["-p", "quadratic", "-s", "SOBA[lower_step_size"], "expected name or name[key=value"),
        (["--suite", "quickstrat"], "Did you mean quickstart?"),
        (["--suite", "absent.toml"], "absent.toml"),
        (["--suite", "quickstart", "-s", "SOBA"], "leave out -p and -s"),
        (["-p", "quadratic", "--precision", "16"], "expected 64 or 32"),
        (["-p", "quadratic", "--seeds", "0"], "--seeds"),
    ],
)
def test_bad_usage_says_what_is_accepted(arguments, expected, tmp_path):
    result = call("run", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_the_text_form_reads_values_and_calls():
    name, params = registry.parse("A[b=1,c=0.5,d=true,e=mlp,f=sgd(0.1,0.9),g=none]")
    assert (name, params) == ("A", {"b": 1, "c": 0.5, "d": True, "e": "mlp", "f": "sgd(0.1,0.9)", "g": None})
    assert registry.label("A[c=0.5, b=sgd(0.1, 0.9)]") == "A[b=sgd(0.1,0.9),c=0.5]"
    assert registry.parse(registry.label("A[ b = 1e-3 ]")) == ("A", {"b": 1e-3})
    with pytest.raises(registry.UsageError, match="twice"):
        registry.parse("A[b=1,b=2]")
    solver = registry.build_solver("SOBA[upper_step_size=adam(0.05),lower_step_size=1]")
    assert solver.upper_step_size.transformation is not None
    assert solver.lower_step_size.value == 1.0
    assert isinstance(solver.lower_step_size.value, float)  # a whole number would make the steps integers


def test_a_run_prints_only_json_and_reaches_the_optimum(finished):
    result, folder = finished
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["folder"] == str(folder)
    assert printed["unfinished"] == []
    assert printed["failed"] == 0
    assert [(r["solver"], r["seed"]) for r in printed["results"]] == [(SOBA, 0), (AID, 0), (SOBA, 1), (AID, 1)]
    for entry in printed["results"]:
        problem = problems.make("quadratic", seed=entry["seed"], dim_x=3, dim_y=4).problem
        exact = closed_form(problem.upper_data.full(), problem.lower_data.full())
        x = -np.linalg.solve(exact.M, exact.q)
        assert entry["status"] == "CONVERGED"
        assert entry["record"][-1]["value"] == pytest.approx(exact.q @ x / 2 + exact.r, abs=1e-10)
        assert entry["referee"]["verdict"] == "agrees"
        (points,) = folder.glob(f"cells/*-{files.slug(entry['solver'])}-seed{entry['seed']}.npz")
        with np.load(points) as saved:
            np.testing.assert_allclose(saved["x"], x, atol=1e-6)
            np.testing.assert_allclose(saved["y"], exact.A @ x + exact.c, atol=1e-6)


def test_the_folder_says_how_the_run_was_made(finished):
    _, folder = finished
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["versions"]["jax"] == jax.__version__
    assert settings["system"]["cpus"] >= 1
    assert settings["cells"][0]["max_steps"] == 2000
    (picture,) = folder.glob("*.png")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [path for path in folder.rglob(".*") if path.is_file()]  # no temporary file is left
    header, *lines = (folder / "summary.csv").read_text().splitlines()
    assert len(lines) == 2
    assert header.startswith("problem,kind,name,seeds,value")


def test_show_repeats_the_table_from_the_files(finished):
    result, folder = finished
    shown = call("show", folder, "--json")
    assert json.loads(shown.stdout) == json.loads(result.stdout)
    text = call("show", folder).stdout
    assert (folder / "summary.txt").read_text().split() == text.split()[: -len(f"Results: {folder}".split())]
    assert max(len(line) for line in (folder / "summary.txt").read_text().splitlines()) <= 120
    row = json.loads(shown.stdout)["problems"][0]["rows"][0]
    last = [r["record"][-1]["value"] for r in json.loads(shown.stdout)["results"] if r["solver"] == SOBA]
    assert row["value"] == pytest.approx(statistics.fmean(last), rel=1e-14)
    assert call("show", folder.parent).exit_code == 2


def test_a_killed_run_goes_on_and_keeps_what_is_finished(finished, tmp_path):
    _, first = finished
    folder = tmp_path / "killed"
    for path in [p for p in first.rglob("*") if p.is_file() and "seed1" not in p.name and "summary" not in p.name]:
        target = folder / path.relative_to(first)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (kept,) = folder.glob("cells/*SOBA*seed0.json")
    before = kept.stat().st_mtime_ns
    shown = json.loads(call("show", folder, "--json").stdout)
    assert shown["unfinished"] == [f"{PROBLEM} {SOBA} seed 1", f"{PROBLEM} {AID} seed 1"]
    assert "2 cells unfinished" in call("show", folder).stdout

    assert call(*ARGUMENTS, "--out", folder, "--no-plot").exit_code == 0
    assert kept.stat().st_mtime_ns == before
    for path in first.glob("cells/*.json"):
        old, new = json.loads(path.read_text()), json.loads((folder / "cells" / path.name).read_text())
        without_times = [[{k: v for k, v in row.items() if k != "time"} for row in r["record"]] for r in (old, new)]
        assert without_times[0] == without_times[1]  # the same numbers to the last bit


def test_another_run_or_a_foreign_folder_is_never_overwritten(finished, tmp_path):
    _, folder = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = call("run", "-p", PROBLEM, "-s", SOBA, "--max-steps", 10, "--out", folder)
    assert other.exit_code == 2
    assert "holds another run (cells differ)" in other.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    (tmp_path / "notes.txt").write_text("mine")
    foreign = call("run", "-p", PROBLEM, "-s", SOBA, "--out", tmp_path)
    assert foreign.exit_code == 2
    assert "no run of bilevax" in foreign.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_failures_are_rows_with_reasons(tmp_path):
    diverges = "SOBA[linear_step_size=0.9,lower_step_size=0.9,upper_step_size=1000.0]"
    arguments = ["run", "-p", PROBLEM, "-s", diverges, "--max-steps", "2000", "--every", "500"]
    result = call(*arguments, "--out", tmp_path / "a", "--no-plot")
    assert result.exit_code == 1
    assert "NONFINITE" in result.stdout
    assert "Reduce the solver's step sizes" in result.stdout

    skipped = call(
        "run", "-p", "quadratic[num_samples=5,batch_size=2]", "-s", "SABA", "--out", tmp_path / "b", "--json"
    )
    assert skipped.exit_code == 0
    (cell,) = json.loads(skipped.stdout)["results"]
    assert cell["status"] == "UNSUPPORTED"
    assert "batch_size must divide" in cell["reason"]


def test_an_exception_is_a_row_and_is_tried_again(finished, tmp_path, monkeypatch):
    def breaks(text, seed):
        if seed == 1:
            raise MemoryError("too large")
        return registry.build_instance(text, seed)

    monkeypatch.setattr(runner, "build_instance", breaks)
    failed = call(*ARGUMENTS, "--out", tmp_path / "out", "--no-plot", "--json")
    assert failed.exit_code == 1
    statuses = [(r["status"], r["reason"]) for r in json.loads(failed.stdout)["results"]]
    assert statuses == [("CONVERGED", None)] * 2 + [("ERROR", "MemoryError: too large")] * 2
    monkeypatch.undo()
    again = call(*ARGUMENTS, "--out", tmp_path / "out", "--no-plot", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["statuses"] == {"CONVERGED": 4}


def test_ctrl_c_keeps_finished_cells(finished, tmp_path, monkeypatch):
    real, calls = runner.run_instance, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(runner, "run_instance", interrupted)
    result = call(*ARGUMENTS, "--out", tmp_path / "out", "--no-plot", "--json")
    assert result.exit_code == 130
    assert [r["status"] for r in json.loads(result.stdout)["results"]] == ["CONVERGED"] + ["UNFINISHED"] * 3


def test_the_table_says_why_the_referee_skipped(tmp_path):
    result = call(
        "run",
        "-p",
        PROBLEM,
        "-s",
        SOBA,
        "--precision",
        32,
        "--max-steps",
        5,
        "--out",
        tmp_path / "o",
        "--no-plot",
        "--progress",
    )
    assert result.exit_code == 0, result.stderr
    assert "referee skipped: the reference needs float64" in result.stdout
    (points,) = tmp_path.glob("o/cells/*.npz")
    with np.load(points) as saved:
        assert saved["x"].dtype == np.float32


def test_points_of_any_structure_come_back(tmp_path):
    x = {"a": jax.numpy.arange(3.0), "b": [jax.numpy.ones((2, 2), "float32")]}
    y = (jax.numpy.zeros(()), {"w/1": jax.numpy.full(2, 0.1)})
    files.save_point(tmp_path / "p.npz", x, y)
    back = files.load_point(tmp_path / "p.npz", x, y)
    assert jax.tree.structure(back) == jax.tree.structure((x, y))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves((x, y)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("path", sorted(suites.SUITES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_suite_can_be_run_and_says_its_rule(path):
    name, cells = suites.read_suite(path.stem)
    assert name == path.stem
    for problem, solver in {(cell.problem, cell.solver) for cell in cells}:
        registry.check_problem(problem)
        registry.build_solver(solver)
    tuned = any(cell.search for cell in cells)
    assert tuned != ("Settings: fixed" in path.read_text().partition("[[")[0])


VERSIONS = {  # what each version of a suite runs, for ever: a change is a new line here, and no line changes
    ("adversarial-mnist", "2027.1"): "34c570145fa25a46",
    ("adversarial", "2027.1"): "c243aa08b6f3151b",
    ("algorithms", "2027.1"): "1d44846a35c5ad88",
    ("constrained", "2027.1"): "7c4f894dc8e5b1a8",
    ("data", "2027.1"): "94069b44199a4add",
    ("equilibria", "2027.1"): "cd775b133ff3250b",
    ("exact", "2027.1"): "39fe5d0dad36514e",
    ("irl-control", "2027.1"): "29a3e225085a518b",
    ("irl-tabular", "2027.1"): "dd62882f206a0a7e",
    ("llm-small", "2027.1"): "c3d649ae2f218907",
    ("nonconvex", "2027.1"): "3279ba52f2209752",
    ("quadratic", "2027.1"): "79e919e2edbd61b2",
    ("quickstart", "2027.1"): "58c1f15d1737753d",
    ("regressions", "2027.1"): "d83f996bf100600b",
    ("rotation-mnist", "2027.1"): "3ad5fe1c246b6600",
    ("rotation", "2027.1"): "eebddbdc5c127293",
}


def test_a_suite_of_one_version_never_changes():
    """If it must: give it a new version, add its line here, and keep the old file as name@version.toml."""
    here = {(name, entry["version"]): entry["digest"] for name, entry in suites.summaries().items()}
    assert here.items() <= VERSIONS.items()
    assert suites.read_suite("quickstart@2027.1") == suites.read_suite("quickstart")
    with pytest.raises(registry.UsageError, match="this bilevax has"):
        suites.read_suite("quickstart@2026.1")
    cells = suites.read_suite("quickstart")[1]
    assert suites.title("quickstart", cells) == "quickstart 2027.1"
    assert suites.title("quickstart", cells[1:]) == "quickstart 2027.1, altered by options"
    assert suites.title("mine", cells) is None


def test_the_suites_that_there_are():
    named = ["quickstart", "quadratic", "nonconvex", "constrained", "data", "adversarial", "irl-tabular", "irl-control"]
    named += ["regressions", "exact"]
    assert set(named) <= {path.stem for path in suites.SUITES.glob("*.toml")}


def test_suites_are_checked_and_overridden(tmp_path):
    cells = suites.read_suite("quickstart")[1]
    assert {cell.seed for cell in cells if cell.problem.startswith("hyper_cleaning[batch_size=100]")} == set(range(10))
    short = suites.read_suite("quickstart", seeds=1, max_steps=7)[1]
    assert {(cell.seed, cell.max_steps) for cell in short} == {(0, 7)}

    path = tmp_path / "mine.toml"
    path.write_text('[[problem]]\nrun = "ridge"\ntol = 0\nsolvers = ["SOBA", { run = "AID", max_steps = 5 }]\n')
    assert suites.read_suite(str(path)) == (
        "mine", [registry.Cell("ridge", "SOBA", 0, tol=0), registry.Cell("ridge", "AID", 0, max_steps=5, tol=0)],
    )  # fmt: skip
    for text, expected in (
        ("[[problem]]\nrun = 'ridge'", "solvers"),
        ("x = 1", "unknown key 'x'"),
        ("", "no .*problem"),
    ):
        path.write_text(text)
        with pytest.raises(registry.UsageError, match=expected):
            suites.read_suite(str(path))


def test_names_in_tables_are_no_markup():
    """Rich would take "[b=1]" for a style and leave it out."""
    text = report.table_text(["solver", "F"], [["SOBA[b=1]", "1.0"], ["SOBA[c=2]", "2.0"]])
    assert "SOBA[b=1]" in text
    assert "SOBA[c=2]" in text


def test_means_and_spreads():
    spread = report._spread([{"a": 1.0, "b": 2.0}, {"a": 4.0}])
    assert spread["a"] == {"mean": 2.5, "std": pytest.approx(statistics.stdev([1.0, 4.0])), "count": 2}
    assert spread["b"] == {"mean": 2.0, "std": None, "count": 1}
    failed = report._spread([{"c": 0.9, "d": None}, {"c": None, "d": None}])  # no mean over those that were solved
    assert [report._plus_minus(failed[name]) for name in "cd"] == ["1 of 2 failed", "failed"]
    assert files.clean({"a": [np.float64("nan"), np.int32(3)], "b": float("inf")}) == {"a": [None, 3], "b": None}
    assert report.short_names(["A[b=1]", "C[b=1]", "C"]) == {"A[b=1]": "A", "C[b=1]": "C[b=1]", "C": "C"}


def test_the_table_says_which_assumptions_steps_saw_fail(tmp_path, synthetic):
    """Counted over the seeds; a lower level that is not strongly convex, without a value of F, is a failure."""
    convex = "g_yy is positive definite (strong convexity)"
    ends = {seed: synthetic.result(synthetic.rows([1.0, 0.5]), "SADDLE", reason="no value") for seed in range(2)}
    for seed, failed in enumerate(({convex: 7}, {})):
        ends[seed]["stats"]["failed"] = failed
    synthetic.write(tmp_path / "run", {("a", "s", seed): end for seed, end in ends.items()})
    summary = report.summarise(report.load(tmp_path / "run"))
    assert summary["failed"] == 2
    assert report.exit_code(summary) == 1
    assert f"assumption failed at 7 of 20 steps: {convex}" in report.as_text(summary)
