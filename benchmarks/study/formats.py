"""What the files of a study hold: settings, results, instances, tuning, suites; each a kind of `backend.schema`.

What a later version of bilevax adds beside is left alone, so that its results can be shown; what is there must fit.
"""

from typing import Any

import bilevel
from bilevel.backend.schema import (
    Said,
    anything,
    each,
    fields,
    maybe,
    misfit,
    number,
    one_of,
    table,
    text,
    truth,
    whole,
)

FORMAT = 1
ERROR, UNSUPPORTED = "ERROR", "UNSUPPORTED"
PROGRAM = "CRASHED", "TIMED_OUT", "NONSENSE", "SILENT"  # ends of a submitted program that give no number
SCORES = ("value", "gradient")
MOST_CELLS = 100_000  # of a study: a list of them is held in memory, and each is a file
LIMITS = {
    "max_steps": whole(), "every": whole(1), "tol": number(0), "time_limit": number(0), "max_passes": number(0),
}  # fmt: skip


def _word_or_number(value: Any, where: str) -> None:
    if not isinstance(value, str):
        number()(value, where)


def _setting(value: Any, where: str) -> None:
    """A setting of a search with its values: a pair in JSON."""
    if not isinstance(value, list) or len(value) != 2:
        misfit(where, value, "a setting and its values")
    text(value[0], where)
    each(_word_or_number, 1)(value[1], where)


def _grid(value: Any, where: str) -> None:
    """Rows of numbers, all of one length."""
    each(each(maybe(number()), 1), 1)(value, where)
    if len({len(row) for row in value}) > 1:
        misfit(where, Said("rows of several lengths"), "rows of one length")


CELL = fields(
    {"problem": text, "solver": text, "seed": whole()},
    {name: maybe(kind) for name, kind in LIMITS.items()} | {"search": maybe(fields(
        {"trials": whole(1, MOST_CELLS), "seeds": each(whole(), 1), "score": one_of(*SCORES), "space": each(_setting)}
    ))},
)  # fmt: skip
SETTINGS = fields(
    {"name": text, "started": text, "precision": one_of(32, 64), "versions": table(text), "system": table(anything),
     "cells": each(CELL)},
    {"program": text, "suite": text},
    others=anything,
)  # fmt: skip
ROW = fields(
    {"step": whole(), "value": maybe(number()), "hypergradient": maybe(number()), "lower_residual": maybe(number()),
     "violation": maybe(number()), "oracles": maybe(number(0)), "time": number(0)},
    others=maybe(number()),
)  # fmt: skip
MEASURED = {"oracles": maybe(number(0)), "steps": whole(), "solve_time": number(0), "setup_time": number(0)}
STATS = fields({}, MEASURED | {"failed": table(whole())}, others=anything)
RESULT = fields(
    {"cell": CELL, "status": one_of(ERROR, UNSUPPORTED, *bilevel.Status.__members__, *PROGRAM), "reason": maybe(text),
     "stats": STATS, "metrics": table(maybe(number())), "record": each(ROW),
     "referee": maybe(fields({"verdict": one_of("agrees", "disagrees", "skipped"), "reason": maybe(text)},
                             others=anything))},
    {"tuned": text, "maps": table(_grid),
     "claims": fields({"converged": truth, "gradients": whole(), "wrong_gradients": whole(),
                       "worst_gradient": maybe(number(0))}),
     "active": each(fields({"oracles": maybe(number(0)), "time": number(0), "count": whole(), "changed": whole()}))},
    others=anything,
)  # fmt: skip
INSTANCE = fields(
    {"sizes": fields({"x": whole(), "y": whole()}), "optimum": maybe(number()),
     "baselines": table(table(maybe(number())))},
    others=anything,
)  # fmt: skip
TUNING = fields({"chosen": table(table(fields({"solver": text}, others=anything)))}, others=anything)


def result(value: Any, where: str) -> None:
    """What a cell's file holds."""
    RESULT(value, where)
    if value["record"]:
        fields(MEASURED, others=anything)(value["stats"], "stats")


def _solver(value: Any, where: str) -> None:
    """A solver of a suite: its text, or a table with its own limits."""
    if not isinstance(value, str):
        fields({"run": text}, {**LIMITS, "tune": table(anything)}, others=anything)(value, where)


SUITE = fields(
    {},
    {"version": text, "tuning": table(anything),
     "problem": each(fields({}, {"run": text, "seeds": whole(1, MOST_CELLS), "solvers": each(_solver), **LIMITS},
                            others=anything))},
    others=anything,
)  # fmt: skip
