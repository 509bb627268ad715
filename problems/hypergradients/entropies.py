"""Draws with entropies and barriers, whose domains end: on simplices, with rows, in boxes, and alone."""

from collections.abc import Callable
from typing import Any

import numpy as np

from problems.hypergradients.answers import gradient, minimise
from problems.hypergradients.draws import DIM_X, Case, Draw, Family, stationary
from problems.hypergradients.exact import exact
from problems.hypergradients.levels import Level, barrier, entropy, fermi
from problems.hypergradients.polyhedra import Data, Limits, build, in_rows


def _separable(
    draw: Draw, kind: str, objective: Callable, y: np.ndarray, limits: Limits, active: Any, pull: Any
) -> Case:
    """The case of positive y, on `limits`, with a quadratic beside the entropy or not; y0 is well inside."""
    n, rng = draw.n, draw.rng
    a = draw.g / (draw.y if objective is entropy else 1.0) * np.array([draw.size(1e-2, 1) for _ in range(n)])
    H = draw.hessian() * rng.integers(0, 2)
    x = draw.cast(draw.x * draw.normal(DIM_X))
    g = draw.lower(H)._replace(a=draw.cast(a))
    f = draw.upper()
    g = stationary(Level(g, x, objective), g, y, pull)
    level, rows = Level(g, x, objective), in_rows(limits, x, n)
    found = minimise(level, rows, list(active), exact(y))
    middle = draw.cast(np.full(n, 0.5 if objective is fermi else draw.y / n))
    return draw.case(kind, Data(f, g, limits, x, draw.one_of(middle, y)), [gradient(level, rows, f, found)])


def _spread(draw: Draw) -> np.ndarray:
    """Positive weights whose logarithms are of size 1 to 30: softmax of scores like these."""
    return np.exp(draw.size(1, 30) * draw.rng.uniform(-1, 0, draw.n))


def _on_simplex(draw: Draw) -> Case:
    y = _spread(draw)
    y = draw.cast(draw.y * y / np.sum(y))
    limits = Limits(scale=draw.cast(np.sum(y.astype(float))))
    pull = draw.normal(1) * draw.g / draw.y * np.ones(draw.n)
    return _separable(draw, "entropy, simplex", entropy, y, limits, [1] + [0] * draw.n, pull)


def _with_rows(draw: Draw) -> Case:
    """Entropy with two equalities: the marginals of a transport plan are of this kind."""
    y = draw.cast(draw.y * _spread(draw))
    A = draw.cast(draw.rng.integers(0, 2, (2, draw.n)) + np.eye(2, draw.n))
    B = draw.cast(draw.normal(2, DIM_X) * draw.y / draw.x * 1e-3)
    lam = draw.normal(2) * draw.g / draw.y
    # b must be of the x that `_separable` draws: B counts from there, so that it is taken off afterwards.
    limits = Limits(A_eq=A, B_eq=0 * B, b_eq=draw.cast(A.astype(float) @ y))
    return _separable(draw, "entropy, equalities", entropy, y, limits, [1, 1], A.T.astype(float) @ lam)


def _in_box(draw: Draw) -> Case:
    n = draw.n
    y = draw.cast(draw.y * _spread(draw))
    active = draw.rng.integers(0, 2, n)
    above = np.where(active, y, y * (1 + draw.size(1e-2, 10)))
    limits = Limits(lo=draw.cast(np.zeros(n)), hi=draw.cast(above))
    pull = active * draw.g / y.astype(float) * draw.size(1e-2, 1)
    return _separable(draw, "barrier, box", barrier, y, limits, active.tolist(), pull)


def _alone(draw: Draw) -> Case:
    y = draw.cast(draw.y * _spread(draw))
    return _separable(draw, "barrier", barrier, y, Limits(), [], np.zeros(draw.n))


def _coins(draw: Draw) -> Case:
    draw.y = 1.0
    y = draw.cast(1 / (1 + np.exp(draw.size(1, 12) * draw.rng.uniform(-1, 1, draw.n))))
    limits = Limits(lo=draw.cast(np.zeros(draw.n)), hi=draw.cast(np.ones(draw.n)))
    return _separable(draw, "fermi, box", fermi, y, limits, [0] * draw.n, np.zeros(draw.n))


FAMILIES = [
    Family("entropy-simplex", build(entropy), 5, _on_simplex),
    Family("entropy-rows", build(entropy), 5, _with_rows),
    Family("barrier-box", build(barrier), 5, _in_box),
    Family("barrier", build(barrier), 5, _alone),
    Family("fermi-box", build(fermi), 5, _coins),
]
