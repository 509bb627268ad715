"""Draws on balls: the solution is inside, or on the boundary with a multiplier from 1e-3 to 1."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bilevel import Ball, BilevelProblem, Minimize
from bilevel.data import Full
from problems.hypergradients.answers import on_ball
from problems.hypergradients.draws import Case, Draw, Family, stationary
from problems.hypergradients.exact import exact
from problems.hypergradients.levels import Level, Lower, Upper, curved, quadratic, upper


class Data(NamedTuple):
    """f, g, the ball, x and y0."""

    f: Upper
    g: Lower
    middle: Any
    radius: Any
    x: Any
    y0: Any


def build(objective: Callable) -> Callable:
    """The family's `build`."""

    def made(data: Data) -> Any:
        problem = BilevelProblem(
            upper, Minimize(objective), y_set=Ball(data.radius, data.middle), upper_data=Full(data.f),
            lower_data=Full(data.g), init=lambda key: (data.x, data.y0),
        )  # fmt: skip
        return problem, data.x, data.y0, {}

    return made


def _draw(draw: Draw, kind: str, objective: Callable) -> Case:
    H, f = draw.hessian(), draw.upper()
    x, y = draw.point()
    outside = draw.rng.random() < 0.7
    away = draw.normal(draw.n)
    radius = draw.y * draw.size(1e-2, 1)
    inside = 1.0 if outside else draw.rng.uniform(0.1, 0.999)
    middle = draw.cast(y - inside * radius * away / np.linalg.norm(away))
    mu = draw.g / draw.y**2 * draw.size(1e-3, 1) if outside else 0.0
    g = draw.lower(H, objective is curved)
    g = stationary(Level(g, x, objective), g, y, mu * (y - middle).astype(float))
    radius = draw.cast(radius)
    right = on_ball(Level(g, x, objective), f, middle, radius, exact(y), exact(mu))
    word = "on the boundary" if outside else "inside"
    return draw.case(f"{kind}, {word}", Data(f, g, middle, radius, x, draw.start(y)), [right])


FAMILIES = [
    Family("ball", build(quadratic), 5, lambda draw: _draw(draw, "ball", quadratic)),
    Family("ball-curved", build(curved), 5, lambda draw: _draw(draw, "ball, curved", curved)),
]
