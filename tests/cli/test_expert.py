"""`bilevax expert`: what it says of bad usage, and what it saves."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import irl
from benchmarks.cli import main as cli
from benchmarks.experiments import control, expert
from benchmarks.study import files


def call(*arguments):
    return CliRunner().invoke(cli.app, ["expert", *arguments])


def test_it_saves_demonstrations_with_returns(tmp_path, monkeypatch):
    """A process of two states in place of a simulator: the command's own path, file and numbers."""
    mdp = irl.MDP.dense(np.eye(2)[[[0, 1], [0, 1]]], start=[0.5, 0.5], discount=0.9)
    world = irl.Tabular(mdp, np.array([[0.0, 0.0], [1.0, 1.0]]), max_steps=10)
    monkeypatch.setattr(irl, "make", lambda name: world)
    monkeypatch.setattr(expert, "agent_of", lambda *_: irl.SAC(hidden=(8,), batch_size=16, learning_rate=0.01))
    path = tmp_path / "new" / "twostates.npz"
    done = call("TwoStates", "--steps", "1000", "--trajectories", "4", "--out", str(path), "--json")
    assert done.exit_code == 0, done.output
    told, saved = json.loads(done.stdout), irl.Demonstrations.load(path)
    assert told["file"] == str(path)
    np.testing.assert_allclose(told["return_mean"], saved.returns.mean())
    assert saved.returns.min() >= 9  # in state 1 from the second step on
    assert saved.states.shape == (4, 10, 2)
    assert control.load(path.parent, "TwoStates-v1").num_trajectories == 4
    assert control.load(path.parent, "Hopper-v5") is None


def test_a_result_of_other_settings_is_not_the_cells(tmp_path):
    cell = control.Cell("Pendulum-v1", 1, "GAIL", 0, 5)
    assert control.finished(cell, tmp_path) is None
    files.write_json(tmp_path / cell.file, {"settings": control.settings_of(cell), "return": 1.0})
    found = control.finished(cell, tmp_path)
    assert found is not None
    assert found["return"] == 1.0
    files.write_json(tmp_path / cell.file, {"settings": control.settings_of(cell).replace("=10.0", "=0.0")})
    assert control.finished(cell, tmp_path) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("Hopper-v5", "--steps", "1500"), "a multiple of 1000"), (("Nowhere-v7",), "Nowhere-v7")],
)
def test_bad_usage(arguments, message):
    pytest.importorskip("gymnasium")
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
