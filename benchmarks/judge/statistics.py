"""Statistics of comparisons, as functions of arrays: costs to a tolerance, profiles, rank tests, Holm's correction.

A cost that was never paid, because the run ended before the tolerance, is infinite; it is never left out.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

Array = np.ndarray


def quantile(values: Sequence[float] | Array, q: float) -> float:
    """The q-quantile, linear between order statistics; infinite where one of the two is.

    `np.quantile` gives NaN between two infinities.
    """
    ordered = np.sort(np.asarray(values, float))
    place = q * (ordered.size - 1)
    low, part = int(place), place - int(place)
    if part == 0 or ordered[low] == ordered[low + 1]:
        return float(ordered[low])
    return float((1 - part) * ordered[low] + part * ordered[low + 1])


def spread(values: Sequence[float] | Array) -> dict[str, float | int | None]:
    """Count, mean, sample standard deviation, median and quartiles; what is not a number counts as infinite.

    Mean and deviation are None where a value is infinite: a mean over the runs that succeeded would favour a solver
    that fails on the hard ones.
    """
    numbers = np.asarray(values, float)
    numbers = np.where(np.isnan(numbers), np.inf, numbers)
    whole = numbers.size > 0 and bool(np.isfinite(numbers).all())
    quartiles = [quantile(numbers, q) if numbers.size else None for q in (0.25, 0.5, 0.75)]
    return {
        "count": int(numbers.size),
        "mean": float(numbers.mean()) if whole else None,
        "std": float(numbers.std(ddof=1)) if whole and numbers.size > 1 else None,
        "q25": quartiles[0],
        "median": quartiles[1],
        "q75": quartiles[2],
    }


def cost_to(amounts: Array, reached: Array, threshold: float) -> float:
    """The first of `amounts`, shape [rows], at which `reached`, shape [rows], is at most `threshold`; else infinite."""
    where = np.flatnonzero(np.asarray(reached) <= threshold)
    return float(amounts[where[0]]) if where.size else np.inf


def ratios(costs: Array) -> Array:
    """r[i, s] = t[i, s] / min_s t[i, s] for costs t of shape [instances, solvers]; infinite where unsolved.

    Where the best cost is zero, r is 1 for the solvers whose cost is zero and infinite for the others.

    Reference:
        E. D. Dolan and J. J. Moré, "Benchmarking optimization software with performance profiles", Mathematical
        Programming 91 (2002) 201-213, arXiv:cs/0102001, section 2.
    """
    best = costs.min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isinf(costs), np.inf, np.where(costs == best, 1.0, costs / best))


def fraction_within(values: Array, limits: Array) -> Array:
    """[limits, solvers]: the fraction of the rows of `values`, shape [instances, solvers], that are at most each limit.

    Of `ratios` it is the performance profile rho_s(alpha); of costs the data profile d_s(kappa). An infinite value
    is within no limit, not even an infinite one: that limit gives the fraction that is solved at all.

    Reference:
        J. J. Moré and S. M. Wild, "Benchmarking derivative-free optimization algorithms", SIAM Journal on
        Optimization 20 (2009) 172-191, equations (2.5) and (2.8).

    Differs from the paper: costs are not divided by n + 1. One pass here is a gradient or a product with all unknowns
    already, not one function value.
    """
    inside = (values[None] <= np.asarray(limits, float)[:, None, None]) & np.isfinite(values[None])
    return inside.mean(axis=1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for several tests: the i-th smallest becomes max_{j <= i} min(1, (m - j + 1) p_(j)).

    Reference:
        S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979)
        65-70.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, (p.size - np.arange(p.size)) * p[order]))
    return adjusted.tolist()


def log_ratios(a: Array, b: Array) -> Array:
    """log(a/b) of two solvers' costs, shape [instances]; ties are 0, also between two that are infinite.

    Where only one is infinite (or zero) the number is finite and larger than every other: a rank test sees its rank.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.where(a == b, 0.0, np.log(a) - np.log(b))
    finite = np.abs(difference[np.isfinite(difference)])
    return np.clip(difference, *(np.array([-1.0, 1.0]) * (1.0 + finite.max(initial=0.0))))


def rank_tests(costs: Array, names: Sequence[str]) -> dict[str, Any]:
    """Do solvers differ in their costs, shape [instances, solvers]? Ranks, Friedman's test, Wilcoxon's with Holm.

    Rank 1 is the cheapest on an instance; ties, and all that are unsolved, share the mean rank. Friedman's test (three
    solvers or more) asks whether any differ; Wilcoxon's signed-rank test asks it of each pair's log cost ratios, which
    compare across problems. Instances are taken as independent draws.

    Returns:
        mean_ranks by name; friedman {statistic, p} or None; pairs, each {a, b, wins, ties, losses (of a), p, p_holm}.

    Reference:
        J. Demšar, "Statistical comparisons of classifiers over multiple data sets", Journal of Machine Learning
        Research 7 (2006) 1-30, section 3.2.
    """
    ranks = stats.rankdata(costs, axis=1)
    friedman = None
    if len(names) >= 3 and len(costs) >= 2 and np.any(ranks != ranks.mean(axis=1, keepdims=True)):
        found = stats.friedmanchisquare(*ranks.T)
        friedman = {"statistic": float(found.statistic), "p": float(found.pvalue)}
    pairs = []
    for i, j in combinations(range(len(names)), 2):
        difference = log_ratios(costs[:, i], costs[:, j])
        moved = difference[difference != 0]
        test: Any = stats.wilcoxon(moved) if moved.size else None  # all ties: no difference at all
        p = 1.0 if test is None else float(test.pvalue)
        wins, losses = int((difference < 0).sum()), int((difference > 0).sum())
        ties = len(costs) - wins - losses
        pairs.append({"a": names[i], "b": names[j], "wins": wins, "ties": ties, "losses": losses, "p": p})
    for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = p
    return {
        "mean_ranks": dict(zip(names, ranks.mean(axis=0).tolist(), strict=True)),
        "friedman": friedman,
        "pairs": pairs,
    }
