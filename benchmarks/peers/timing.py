"""The timing loop of all comparisons: calls in turn, over the same points; a busy machine then troubles all alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np


@dataclass
class Measured:
    """Of one call: seconds of the first one (trace, compile, run), of each later one, and what `judge` said of them."""

    first: float
    seconds: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of the later calls."""
        return float(np.median(self.seconds))

    @property
    def least(self) -> float:
        """The fastest of the later calls, which a busy machine distorts least."""
        return float(np.min(self.seconds))

    @property
    def worst(self) -> float:
        """The largest of what `judge` said; NaN where one of them is, or nothing was judged."""
        return float(np.max(self.judged)) if self.judged else float("nan")


def interleaved(
    calls: dict[str, Callable[..., Any]], points: Sequence[tuple], judge: Callable[[int, Any], float] | None = None,
    in_a_row: int = 1, clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measured]:  # fmt: skip
    """Every call once on points[0], then all calls in turn on each of `points`; results are waited for.

    Args:
        calls: by name; each takes a point's entries as arguments.
        points: tuples of arguments.
        judge: (number of the point, result) -> a number, an error for instance; not timed.
        in_a_row: so many points for one call before the next one's turn, so that caches hold what a call needs.
        clock: seconds; `time.process_time` for CPU time, which other programs on the machine hardly change.
    """
    found = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        jax.block_until_ready(call(*points[0]))
        found[name] = Measured(time.perf_counter() - begin)
    for first in range(0, len(points), in_a_row):
        turn = points[first : first + in_a_row]
        for name, call in calls.items():
            begin = clock()
            outs = [jax.block_until_ready(call(*point)) for point in turn]
            found[name].seconds.append((clock() - begin) / len(turn))
            if judge is not None:
                found[name].judged += [judge(first + k, out) for k, out in enumerate(outs)]
    return found
