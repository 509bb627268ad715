"""What a run leaves behind, as people type it: the record by columns, statuses by name."""

import json
import sys
from collections.abc import Mapping

import jax.numpy as jnp
import pytest

from bilevel import Hypergradient, InvalidInput, Record, Status


def row(step, **more):
    base = {"step": step, "value": 1 / (step + 1), "hypergradient": 1e-3, "lower_residual": 1e-9, "violation": 0.0,
            "oracles": 2.5 * step, "time": 0.01 * step, "error_bound": 1e-12, "status": 0}  # fmt: skip
    return base | more


def test_a_record_is_a_mapping_of_columns():
    record = Record([row(0), row(3, extra=1.0)])
    assert isinstance(record, Mapping)
    assert "value" in record
    assert "valeu" not in record
    assert list(record) == list(record.keys()) == [*row(0), "extra"]
    assert len(record.keys()) == len(record.items()) == len(record.values()) == len(row(0)) + 1
    assert {name: column.tolist() for name, column in record.items()}["value"] == [1.0, 0.25]
    assert dict(record)["step"].tolist() == [0, 3]
    assert record.get("valeu") is None
    assert record == record
    assert record != Record(record.rows)


def test_an_unknown_column_is_an_error_that_names_the_known_ones():
    with pytest.raises(
        InvalidInput, match=r"^column: got 'valeu'; expected one of step, value.*Did you mean 'value'\?"
    ):
        Record([row(0)])["valeu"]
    with pytest.raises(KeyError, match="Rows by number"):
        Record([row(0)])[0]  # pyright: ignore[reportArgumentType]
    assert Record()["value"].shape == (0,)
    with pytest.raises(KeyError, match="expected one of step, value"):
        Record()["extra"]


def test_a_record_shows_its_columns_and_ends():
    text = repr(Record([row(k, extra=1.0) for k in range(30)])).splitlines()
    assert text[0].startswith("Record of 30 rows; columns: step, value")
    assert text[0].endswith("extra")
    assert text[1].split()[:2] == ["step", "value"]
    assert [line.split()[0] for line in text[2:]] == ["0", "1", "2", "3", "4", "…", "25", "26", "27", "28", "29"]
    assert repr(Record()).startswith("Record of 0 rows; columns: step")


def test_a_record_as_a_data_frame():
    frame = Record([row(0), row(3, extra=1.0)]).to_pandas()
    assert frame["step"].tolist() == [0, 3]
    assert frame["step"].dtype.kind == "i"
    assert frame["value"].tolist() == [1.0, 0.25]
    assert frame["extra"].isna().tolist() == [True, False]


def test_without_pandas_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "bilevax\[pandas\]"'):
        Record([row(0)]).to_pandas()


def test_a_status_prints_by_name():
    assert str(Status.CONVERGED) == f"{Status.CONVERGED}" == "CONVERGED"
    assert f"{Status.SADDLE:>8}|{Status.SADDLE:<8}|" == "  SADDLE|SADDLE  |"
    assert f"{Status.SADDLE:d} {Status.SADDLE:03d} {Status.SADDLE:.1f} {int(Status.SADDLE)}" == "10 010 10.0 10"
    assert json.dumps([Status.SADDLE, Status(0)]) == "[10, 0]"
    assert "%d %s" % (Status.SADDLE, Status.SADDLE) == "10 SADDLE"  # noqa: UP031
    assert Status.SADDLE == 10


def test_a_gradient_of_which_nothing_is_known_is_not_printed_as_a_number():
    """And 1e-200 is not printed as zero."""
    zero, size = jnp.zeros(()), jnp.full(2, 3e-200)

    def line(status, bound):
        found = Hypergradient(zero, {"a": size}, size, zero, zero, jnp.asarray(bound), zero, jnp.asarray(status), size)
        return str(found).splitlines()[0]

    assert "|gradient| = 4.2426e-200, error <= 1.0e-203" in line(Status.ESTIMATED, 1e-203)
    assert "|gradient| unknown, error unknown" in line(Status.UNSOLVED_LINEAR, jnp.inf)
    assert "|gradient| = 4.2426e-200, error unknown" in line(Status.UNCHECKED, jnp.inf)
