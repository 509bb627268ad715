"""What the programs beside `table.py` that need other environments share: nothing but Python's own library."""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any


def report(
    call: Callable[[Any], Iterable[float]],
    points: Any,
    version: str,
    prepare: Callable[[Any], Any] = lambda x: x,
) -> None:
    """Time call(prepare(x)) at the first of points [n, …], then at each, preparing left out; print JSON.

    version; first: seconds of the first call; seconds and gradients of the later ones, one for each point.
    """

    def timed(x: Any) -> tuple[float, Any]:
        prepared = prepare(x)
        begin = time.perf_counter()
        gradient = call(prepared)
        return time.perf_counter() - begin, gradient

    first, found = timed(points[0])[0], [timed(x) for x in points]
    seconds, gradients = [taken for taken, _ in found], [list(map(float, gradient)) for _, gradient in found]
    print(json.dumps({"version": version, "first": first, "seconds": seconds, "gradients": gradients}))
