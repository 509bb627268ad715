"""`bilevax verify`: table, JSON, counterexamples that are kept and replayed, usage."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.cli.main import app

FALSE = """
from typing import NamedTuple
import jax.numpy as jnp
from bilevel.guarantees import Guarantee
from problems import strategies

class Point(NamedTuple):
    value: object
    constants: object

def point(key, value):
    return Point(value * jnp.ones(2), value)

FALSE = Guarantee(
    "false-claim", "nobody", (), strategies.recipes(point, value=strategies.fractions(0.0, 1.0)),
    lambda instance, ks: jnp.stack([instance.value[0] / k for k in ks]), lambda value, k: 0.5 / k + 0 * value,
    (1, 2, 4), lambda value: 0.0, "value <= 1/2", "power",
)
"""


def call(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_a_guarantee_that_holds(tmp_path):
    result = call("project-bo", "--examples", 4, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert [row["guarantee"] for row in printed["guarantees"]] == ["project-box"]
    for row in printed["guarantees"]:
        assert row["verdict"] == "holds"
        assert row["instances"] == 256
        assert 0 < row["tightest"] <= 1
    assert not (tmp_path / "out").exists()


def test_a_counterexample_is_kept_and_replayed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_claims.py").write_text(FALSE, "utf8")
    result = call("own_claims:FALSE", "--examples", 100, "--out", "kept")
    assert result.exit_code == 1, result.stderr
    assert "broken" in result.stdout
    assert "bilevax verify own_claims:FALSE --replay kept/false-claim" in result.stdout
    saved = json.loads((tmp_path / "kept/false-claim/counterexample.json").read_text("utf8"))
    assert saved["drawn"]["numbers"]["value"] == 33 / 64  # the smallest that breaks it
    assert saved["drawn"]["seed"] == 0
    np.testing.assert_allclose(np.load(tmp_path / "kept/false-claim/instance.npz")["value"], [33 / 64] * 2)
    assert (tmp_path / "kept/false-claim/path.png").stat().st_size > 0

    again = call("own_claims:FALSE", "--replay", "kept/false-claim", "--json")
    assert again.exit_code == 1
    assert json.loads(again.stdout)["measured"] == saved["measured"]


FINISHED = (
    FALSE
    + """
import dataclasses
from hypothesis import strategies as st

WHOLE = dataclasses.replace(FALSE, name="whole", instances=st.integers(0, 9).map(lambda k: point(None, k / 9)))
"""
)


def test_an_instance_that_is_no_recipe_is_found_again_by_its_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "finished_claims.py").write_text(FINISHED, "utf8")
    arguments = "finished_claims:WHOLE", "--examples", 30, "--seed", 3
    result = call(*arguments, "--out", "kept")
    assert result.exit_code == 1, result.stderr
    assert "bilevax verify finished_claims:WHOLE --examples 30 --seed 3" in result.stdout
    saved = json.loads((tmp_path / "kept/whole/counterexample.json").read_text("utf8"))
    assert saved["search"] == {"examples": 30, "seed": 3}
    np.testing.assert_allclose(np.load(tmp_path / "kept/whole/instance.npz")["value"], [5 / 9] * 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sobaa"], "Did you mean soba?"),
        (["absent_module:X"], "absent_module"),
        (["json:dumps"], "expected a bilevel.guarantees.Guarantee"),
        (["project-box", "--replay", "absent"], "no counterexample in it"),
        (["--examples", "0"], "--examples"),
    ],
)
def test_bad_usage(arguments, expected):
    result = call(*arguments)
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.replace("│", " ").split())


def test_a_campaign_of_hypergradients():
    result = call("hypergradient", "free", "--draws", 20, "--json")
    assert result.exit_code in (0, 1), result.stderr
    printed = json.loads(result.stdout)
    assert printed["draws"] == 20
    assert [(row["kind"], row["dtype"]) for row in printed["kinds"]] == [
        ("free, quadratic", "float32"), ("free, quadratic", "float64"),
    ]  # fmt: skip
    assert printed["broken"] == []
    assert printed["holds"] == (result.exit_code == 0)
    assert call("hypergradient", "fre").exit_code == 2
