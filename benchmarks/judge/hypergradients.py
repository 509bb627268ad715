"""`bilevax verify hypergradient`: hypergradients of drawn problems against exact arithmetic.

A draw is broken where its status is a good word (`record.solved`) and the gradient is off by more than the error bound,
or one of the two is not finite. Below a lower level without a unique solution every good word is broken.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.table import Table

from benchmarks.errors import nearest
from bilevel import hypergradient
from bilevel.record import SOLVED, Status
from problems.hypergradients import FAMILIES, Case, Family, case
from problems.hypergradients.exact import digits, exact, minus, norm

DRAWS = 10_000
DTYPES = ("float32", "float64")
REFERENCE = 70  # digits of |f|/|x| that the reference is right to: it computes with 80
EASY_SHARE, EASY_RATIO = 0.99, 100.0


class Verdict(NamedTuple):
    """What one draw gave."""

    family: str
    dtype: str
    index: int
    kind: str
    easy: bool
    status: Status
    size: float
    """|grad F|, NaN where there is none."""
    error: float
    """The distance of the gradient to the nearest right one; infinite where there is none, NaN where it is NaN."""
    bound: float
    broken: bool
    numbers: dict[str, float]

    @property
    def good(self) -> bool:
        """Whether the status is a good word."""
        return self.status in SOLVED


def choose(names: Sequence[str]) -> list[Family]:
    """The families of these names; all without names.

    Raises:
        UsageError: a name that means nothing, with the nearest.
    """
    known = {family.name: family for family in FAMILIES}
    for name in names:
        if name not in known:
            raise nearest("family", name, list(known))
    return [known[name] for name in names or known]


def run(
    draws: int, seed: int, families: Sequence[Family] = FAMILIES, dtypes: Sequence[str] = DTYPES,
    started: Callable[[int, str], None] = lambda index, name: None,
) -> list[Verdict]:  # fmt: skip
    """`draws` draws, shared out evenly among the families and dtypes; at least one of each."""
    found, batches = [], [(family, dtype) for family in families for dtype in dtypes]
    for k, (family, dtype) in enumerate(batches):
        started(k, f"{family.name} {dtype}")
        count = max(draws * (k + 1) // len(batches) - draws * k // len(batches), 1)
        found += judged(family, dtype, seed, count)
    return found


def judged(family: Family, dtype: str, seed: int, count: int, first: int = 0) -> list[Verdict]:
    """So many draws of a family, from the one with index `first` on."""
    with np.errstate(all="ignore"):
        cases = [case(family, dtype, seed, first + index) for index in range(count)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(one.data for one in cases))

    def call(data: Any) -> Any:
        problem, x, y0, options = family.build(data)
        h = hypergradient(problem, x, y0, **options)
        return h.gradient, h.error_bound, h.status, h.value

    results = jax.device_get(jax.jit(jax.vmap(call))(stacked))
    with digits():
        return [
            _verdict(family.name, dtype, first + k, one, *(part[k] for part in results)) for k, one in enumerate(cases)
        ]


def _verdict(
    family: str, dtype: str, index: int, one: Case, gradient: Any, bound: Any, status: Any, value: Any
) -> Verdict:
    word, bound = Status(int(status)), float(bound)
    right = one.right + (one.sides if word == Status.WEAKLY_ACTIVE else [])
    error, size = Decimal("Infinity"), Decimal("NaN")
    if not np.isfinite(gradient).all() or not np.isfinite(value):
        error = Decimal("NaN")
    elif right:
        error, nearest = min((norm(minus(exact(gradient), answer)), answer) for answer in right)
        size = norm(nearest)
    noise = Decimal(10) ** (int(one.numbers["f"] - one.numbers["x"]) - REFERENCE)
    holds = math.isfinite(bound) and error.is_finite() and error <= exact(bound) + noise
    broken = word in SOLVED and not holds
    return Verdict(
        family, dtype, index, one.kind, one.easy, word, float(size), float(error), bound, broken, one.numbers
    )


def by_kind(found: Sequence[Verdict]) -> Iterator[tuple[str, str, list[Verdict]]]:
    """(kind, dtype, its draws), in the order in which they were met."""
    for kind in dict.fromkeys(one.kind for one in found):
        for dtype in DTYPES:
            chosen = [one for one in found if (one.kind, one.dtype) == (kind, dtype)]
            if chosen:
                yield kind, dtype, chosen


def row(chosen: Sequence[Verdict]) -> dict[str, Any]:
    """What the table says of some draws: how many, the share with a good word, the median of bound/error of these, the
    largest error/bound, how many are broken; and the statuses that were no good words.
    """
    good = [one for one in chosen if one.good]
    ratios = [one.bound / one.error if one.error else math.inf for one in good]
    bad = [one.status.name for one in chosen if not one.good]
    return {
        "draws": len(chosen),
        "good": len(good) / len(chosen),
        "median_ratio": float(np.median(ratios)) if good else None,
        "worst": max((_quotient(one) for one in good), default=None),
        "broken": sum(one.broken for one in chosen),
        "others": {name: bad.count(name) for name in sorted(set(bad))},
    }


def _quotient(one: Verdict) -> float:
    if math.isnan(one.error) or math.isnan(one.bound):
        return math.inf
    return one.error / one.bound if one.bound else (math.inf if one.error else 0.0)


def summary(found: Sequence[Verdict], seed: int) -> dict[str, Any]:
    """The whole campaign as plain data."""
    easy = [one for one in found if one.easy]
    return {
        "draws": len(found),
        "seed": seed,
        "kinds": [{"kind": kind, "dtype": dtype, **row(chosen)} for kind, dtype, chosen in by_kind(found)],
        "easy": row(easy) if easy else None,
        "broken": [_plain(one) for one in found if one.broken],
        "holds": holds(found),
    }


def _plain(one: Verdict) -> dict[str, Any]:
    return one._asdict() | {"status": one.status.name}


def holds(found: Sequence[Verdict]) -> bool:
    """Whether nothing is broken, and easy draws are solved, with bounds that say something."""
    easy = [one for one in found if one.easy]
    shown = row(easy) if easy else {"good": 1.0, "median_ratio": 1.0}
    refused = shown["good"] < EASY_SHARE or (shown["median_ratio"] or math.inf) > EASY_RATIO
    return not refused and not any(one.broken for one in found)


def table(found: Sequence[Verdict]) -> Table:
    """A row for each kind and dtype, and one for the easy draws."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("kind", style="bold", no_wrap=True)
    out.add_column("dtype", no_wrap=True)
    for name in ("draws", "good", "median\nbound/error", "largest\nerror/bound", "broken"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("other words")
    easy = [one for one in found if one.easy]
    rows = [*by_kind(found), *([("all easy", "float64", easy)] if easy else [])]
    for kind, dtype, chosen in rows:
        data = row(chosen)
        ratio, worst = (("" if data[name] is None else f"{data[name]:.3g}") for name in ("median_ratio", "worst"))
        style = "red" if data["broken"] else "green"
        others = ", ".join(f"{name} {count}" for name, count in data["others"].items())
        out.add_row(
            kind, dtype, str(data["draws"]), f"{data['good']:.1%}", ratio, worst,
            f"[{style}]{data['broken']}[/{style}]", others,
        )  # fmt: skip
    return out
