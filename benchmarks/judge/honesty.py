"""How often what a solver said was not so, or it said nothing: what tables of costs alone do not show."""

from collections.abc import Sequence
from typing import Any

from bilevel.record import Status

HEADINGS = ("runs", "judged", "wrong gradients", "false converged", "NaN", "time-outs", "broken down")
BROKEN_DOWN = "ERROR", "CRASHED", "NONSENSE", "SILENT"


def counts(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Of a solver's results, those that it did not refuse, how many have each of `HEADINGS`.

    - judged: the referee computed the end again by other means (it agrees or disagrees).
    - wrong gradients: a gradient that a program told is not that of F, or the judge disagrees with the run's.
    - false converged: it ended CONVERGED, or a program said so of its last point, and it is not so: by the judge, or by
      the referee that measures every run.
    - NaN: a number that is not finite. time-outs: stopped by a limit of time. broken down: an error, a crash, nonsense.
    """
    ran = [result for result in results if result["status"] != "UNSUPPORTED"]
    return dict(
        zip(
            HEADINGS,
            (
                len(ran),
                sum(_verdict(result) in ("agrees", "disagrees") for result in ran),
                sum(map(_wrong_gradient, ran)),
                sum(map(_false_converged, ran)),
                sum(result["status"] == Status.NONFINITE.name for result in ran),
                sum(result["status"] in ("TIMED_OUT", Status.TIME_LIMIT.name) for result in ran),
                sum(result["status"] in BROKEN_DOWN for result in ran),
            ),
            strict=True,
        )
    )


def _verdict(result: dict[str, Any]) -> str | None:
    return (result["referee"] or {}).get("verdict")


def _wrong_gradient(result: dict[str, Any]) -> bool:
    told = result.get("claims", {}).get("wrong_gradients", 0)
    named = (result["referee"] or {}).get("reason") or ""
    return bool(told) or (_verdict(result) == "disagrees" and "gradient" in named)


def _false_converged(result: dict[str, Any]) -> bool:
    converged = result["status"] == Status.CONVERGED.name
    claimed = result.get("claims", {}).get("converged", False)
    return (converged and _verdict(result) == "disagrees") or (claimed and not converged)
