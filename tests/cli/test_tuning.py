"""Budgets of suites and the tuning rule: equal trials, other seeds, the chosen settings in the table."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import bilevel
import problems
from benchmarks.cli.main import app
from benchmarks.errors import UsageError
from benchmarks.study import benchopt_settings, files, registry, runner, suites, tuning
from benchmarks.study.registry import Cell, Search
from bilevel.run import passes_per_step

HEAD = '[tuning]\ntrials = 3\nseeds = [100, 101]\n[[problem]]\nrun = "quadratic[dim_x=2,dim_y=2]"\nseeds = 2\n'
SOBA = "SOBA[linear_step_size=0.9,lower_step_size=0.9,upper_step_size=0.1]"
SUITE = HEAD + f'max_passes = 80\nsolvers = [{{ run = "{SOBA}", tune = {{ upper_step_size = [0.01, 1.0] }} }}]'


def suite(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return suites.read_suite(str(path))[1]


def test_every_solver_gets_the_same_number_of_trials_on_other_seeds(tmp_path):
    cells = suite(tmp_path, SUITE)
    assert [cell.seed for cell in cells] == [0, 1]
    trials = tuning.trials(cells)
    assert [trial.seed for trial in trials] == [100] * 3 + [101] * 3
    assert {trial.max_passes for trial in trials} == {80}
    texts = tuning.draws(cells[0])
    assert texts[0] == cells[0].solver
    assert [trial.solver for trial in trials] == texts * 2
    sizes = [registry.parse(text)[1]["upper_step_size"] for text in texts[1:]]
    assert all(registry.parse(text)[1]["lower_step_size"] == 0.9 for text in texts)
    assert sorted(size < 0.1 for size in sizes) == [False, True]  # a Latin hypercube: one in each half
    assert all(0.01 <= size <= 1 for size in sizes)
    assert tuning.draws(cells[1]) == texts


def test_ranges_of_whole_numbers_and_words():
    assert {tuning._value((1, 20), level) for level in np.linspace(0, 0.999, 400)} == set(range(1, 21))
    assert {tuning._value(("a", "b"), level) for level in (0.0, 0.49, 0.5, 0.99)} == {"a", "b"}


def test_cells_with_a_search_survive_files(tmp_path):
    (cell, _) = suite(tmp_path, SUITE)
    assert Cell.of(json.loads(json.dumps(dataclasses.asdict(cell)))) == cell
    (tmp_path / "again.toml").write_text(suites.suite_text(suite(tmp_path, SUITE)))
    assert suites.read_suite(str(tmp_path / "again.toml"))[1] == suite(tmp_path, SUITE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SUITE.replace("}]", '}, "AID"]'), "is tuned and AID is not"),
        (SUITE.replace("seeds = [100, 101]", "seeds = [1]"), "seed 1 is tuned on and reported"),
        (SUITE.replace("[tuning]\ntrials = 3\nseeds = [100, 101]\n", ""), "needs the rule"),
        (SUITE.replace("trials = 3", "trials = 0"), "expected trials >= 1"),
        (SUITE.replace("[0.01, 1.0]", "[1.0, 0.01]"), "expected a range"),
        (SUITE.replace("upper_step_size =", "uper_step_size ="), "Did you mean upper_step_size"),
        (HEAD + 'solvers = ["SOBA"]\ntime_limit = 1.0', "Give every"),
    ],
)
def test_unfair_or_unclear_rules_are_refused(tmp_path, text, expected):
    with pytest.raises(UsageError, match=expected):
        suite(tmp_path, text)


def test_the_best_mean_rank_is_chosen_and_failures_are_last(tmp_path, synthetic):
    search = Search(3, (7, 8), "value", (("upper_step_size", (0.01, 1.0)),))
    cell = Cell("quadratic", "SOBA", 0, max_passes=80.0, search=search)
    # by rank 2.0, 1.5, 2.5 on average, though the first has the least mean value
    ends = {7: ([-100.0], [1.0], None), 8: ([3.0], [1.0], [2.0])}
    for index, trial in enumerate(tuning.trials([cell])):
        values = ends[trial.seed][index % 3]
        found = files.EMPTY if values is None else synthetic.result(synthetic.rows([5.0, *values]))
        path = files.cell_path(tmp_path / tuning.FOLDER, index, trial)
        files.write_json(path, {"cell": dataclasses.asdict(trial)} | found)
    tuning.choose(tmp_path, [cell])
    assert runner.chosen_settings(tmp_path, cell) == tuning.draws(cell)[1]
    with pytest.raises(files.FolderError, match=r"tuning\.json"):
        runner.chosen_settings(tmp_path, dataclasses.replace(cell, problem="ridge"))


def test_a_tuned_run_from_end_to_end(tmp_path):
    (tmp_path / "mine.toml").write_text(SUITE)
    arguments = ["run", "--suite", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "out"), "--no-plot"]
    called = CliRunner().invoke(app, arguments)
    assert called.exit_code == 0, called.output
    chosen = json.loads((tmp_path / "out/tuning.json").read_text())["chosen"]["quadratic[dim_x=2,dim_y=2]"]
    (found,) = chosen.values()
    assert f"SOBA: tuned to {found['solver']}" in " ".join(called.stdout.split())
    assert "best of 3 trials a solver by value" in " ".join(called.stdout.split())
    paths = sorted((tmp_path / "out/cells").glob("*.json"))
    assert len(paths) == 2
    for path in paths:
        result = json.loads(path.read_text())
        assert result["tuned"] == found["solver"]
        assert result["stats"]["oracles"] <= 80
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("**/cells/*")}
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("**/cells/*")} == before


def test_a_budget_in_oracle_calls_becomes_steps():
    problem, solver = problems.make("quadratic", dim_x=2, dim_y=2).problem, bilevel.AID()
    price = passes_per_step(problem, solver)
    cell = Cell("quadratic", "AID", 0, max_passes=10.5 * price)
    assert runner.step_limit(cell, problem, solver) == 10
    assert runner.step_limit(dataclasses.replace(cell, max_steps=4), problem, solver) == 4
    assert runner.step_limit(Cell("quadratic", "AID", 0), problem, solver) == 1000
    with pytest.raises(bilevel.Unsupported, match="more than the whole budget"):
        runner.step_limit(dataclasses.replace(cell, max_passes=0.5), problem, solver)


CONFIG = """objective:
  - Bilevel Optimization
dataset:
  - ijcnn1
solver:
  - AmIGO[batch_size=64,n_inner_steps=5,eval_freq=2048,step_size=[0.125, 0.25],outer_ratio=0.5,mode=zero]  # two
  - SOBA[batch_size=64,step_size=0.5,outer_ratio=0.25,framework=none]
  - Optuna[random_state=[1, 2]]
n-repetitions: 1
"""


def test_settings_of_benchopt_are_read(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(CONFIG)
    texts, notes = benchopt_settings.expanded(["LBFGS", f"benchopt:{path}"])
    amigo = "AmIGO[linear_step_size={0},lower_step_size={0},num_linear_steps=5,num_lower_steps=5,upper_step_size={1}]"
    soba = "SOBA[linear_step_size=decay(0.5,0.5),lower_step_size=decay(0.5,0.5),upper_step_size=decay(2,0.5)]"
    assert texts == ["LBFGS", amigo.format(0.125, 0.25), amigo.format(0.25, 0.5), soba]
    assert "AmIGO's mode means nothing here" in notes[0]
    assert "Optuna" in notes[1]
    rule = registry.build_solver(texts[-1]).upper_step_size
    assert [float(rule.at(jnp.asarray(k))[0]) for k in (0, 3)] == [2.0, 1.0]
    assert bilevel.decay(2.0, 0.5) is bilevel.decay(2.0, 0.5)
    shown = CliRunner().invoke(
        app,
        ["run", "-p", "quadratic[dim_x=2,dim_y=2]", "-s", f"benchopt:{path}", "--max-steps", "3", "--no-plot", "--json",
         "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert len(json.loads(shown.stdout)["results"]) == 3
    assert "left out, for want of a translation: Optuna" in shown.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("solvers: none", "expected a list under"),
        ("solver:\n  - Optuna\n", "Translated: amigo, saba, soba, stocbio"),
        ("solver:\n  - SOBA[step_size=fast]\n", "expected numbers"),
        ("solver:\n  - SOBA[step_size=0.1\n", "cannot read"),
    ],
)
def test_other_files_are_named(text, said, tmp_path):
    path = tmp_path / "config.yml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=said):
        benchopt_settings.expanded([f"benchopt:{path}"])


@pytest.mark.parametrize(("value", "power"), [(0.0, 0.5), (1.0, -1.0), (float("nan"), 1.0)])
def test_steps_that_make_no_sense_are_refused(value, power):
    with pytest.raises(bilevel.InvalidInput, match="decay"):
        bilevel.decay(value, power)
