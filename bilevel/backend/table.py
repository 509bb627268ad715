"""A table that grows by rows and is read by columns, as a data frame: what a record of measurements is."""

import difflib
import math
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import numpy as np

from bilevel.backend.errors import InvalidInput
from bilevel.backend.extras import extra


class UnknownColumn(KeyError, InvalidInput):
    """A column that the table does not have; the message names those that it has."""

    def __str__(self) -> str:
        """The message itself, where a KeyError would show it in quotation marks."""
        return str(self.args[0])


class Table(Mapping[str, np.ndarray]):
    """Rows of numbers by name; as a mapping, the columns by name, each an array of floats of shape [rows].

    Like a data frame it iterates over the names of its columns, and its length is the number of its rows. A number that
    a row does not have is NaN in its column. Tables compare by identity, because equality of arrays is no truth value.
    """

    rows: list[Any]
    """The rows, one mapping of numbers by column each."""

    expected: tuple[str, ...] = ()
    """Columns that the table has before there is a row."""

    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in the order in which they first came."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return tuple(names) if self.rows else self.expected

    def __iter__(self) -> Iterator[str]:
        """Over the names of the columns."""
        return iter(self.columns())

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __contains__(self, column: object) -> bool:
        """Whether there is such a column."""
        return column in self.columns()

    def __getitem__(self, column: str) -> np.ndarray:
        """One column, shape [rows].

        Raises:
            UnknownColumn: there is none of this name.
        """
        if column not in self:
            names = self.columns()
            near = difflib.get_close_matches(str(column), names, n=1)
            do = f"Did you mean {near[0]!r}?" if near else "Rows by number are in .rows."
            raise UnknownColumn(f"column: got {column!r}; expected one of {', '.join(names)}. {do}")
        return np.array([row.get(column, math.nan) for row in self.rows], float)

    def keys(self) -> KeysView[str]:
        """The names of the columns."""
        return dict.fromkeys(self.columns()).keys()

    def values(self) -> ValuesView[np.ndarray]:
        """The columns."""
        return {name: self[name] for name in self}.values()

    def items(self) -> ItemsView[str, np.ndarray]:
        """(name, column) of every column."""
        return {name: self[name] for name in self}.items()

    def to_pandas(self) -> Any:
        """The table as a `pandas.DataFrame`: a row for each row, whole numbers kept whole.

        Raises:
            ModuleNotFoundError: pandas is not installed; the message has the command that installs it.
        """
        with extra("pandas"):
            import pandas
        return pandas.DataFrame(self.rows, columns=pandas.Index(self.columns()))

    def __eq__(self, other: object) -> bool:
        """Whether it is the same table."""
        return self is other

    def __hash__(self) -> int:
        """By identity, too."""
        return id(self)


def text(rows: Iterable[Mapping[str, Any]], columns: Iterable[str], most: int = 10) -> str:
    """Aligned lines: the names of `columns`, then at most `most` of the rows, the first and last ones of them."""
    columns, rows = list(columns), list(rows)
    lines = [columns, *([_cell(row.get(name, math.nan)) for name in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    shown = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
    if len(rows) > most:
        shown = [*shown[: 1 + most // 2], "…", *shown[len(shown) - most // 2 :]]
    return "\n".join(shown)


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, int | str) else f"{float(value):.6g}"
