"""Draws without constraints: quadratics, curved objectives, proved constants, fixed points, many unknowns."""

from typing import Any, NamedTuple

import numpy as np

from bilevel import BilevelProblem, Constants, FixedPoint, Minimize
from bilevel.data import Full
from problems.hypergradients.answers import Rows, gradient, on_face
from problems.hypergradients.draws import DIM_X, Case, Draw, Family, stationary
from problems.hypergradients.exact import exact
from problems.hypergradients.levels import Level, Lower, Upper, curved, fixed, quadratic, upper

NOTHING = Rows([], [], [], [])


class Data(NamedTuple):
    """f, g, x and y0, and the `Constants` of both where they are proved."""

    f: Upper
    g: Lower
    x: Any
    y0: Any
    constants: Any = None


def build(objective: Any) -> Any:
    """The family's `build` for a lower objective or a map."""

    def made(data: Data) -> Any:
        lower = FixedPoint(fixed) if objective is fixed else Minimize(objective)
        problem = BilevelProblem(
            upper, lower, upper_data=Full(data.f), lower_data=Full(data.g), init=lambda key: (data.x, data.y0)
        )
        return problem, data.x, data.y0, {} if data.constants is None else {"constants": data.constants}

    return made


def _free(draw: Draw, kind: str, objective: Any, proved: bool = False) -> Case:
    H, f = draw.hessian(), draw.upper()
    x, y = draw.point()
    g = draw.lower(H, objective is curved)
    g = stationary(Level(g, x, objective), g, y, np.zeros(draw.n))
    level = Level(g, x, objective)
    right = gradient(level, NOTHING, f, on_face(level, NOTHING, [], exact(y)))
    constants = _constants(draw, f, g) if proved else None
    return draw.case(kind, Data(f, g, x, draw.start(y), constants), [right])


def _constants(draw: Draw, f: Upper, g: Lower) -> Constants:
    """Of a quadratic g: bounds of norms, and mu a little below the least eigenvalue that rounding allows."""
    values = np.linalg.eigvalsh(g.H.astype(float))
    norm = lambda M: float(np.linalg.norm(np.asarray(M, float), 2) * 1.001)  # noqa: E731
    mu = max(values[0] * 0.999 - 1e-14 * values[-1], values[-1] / draw.condition / 30)
    parts = {"mu": mu, "L_fx": norm(f.Q), "L_fy": norm(f.P), "L_gxy": 0.0, "L_gyy": 0.0, "C_gxy": norm(g.G),
             "L_g": norm(g.H)}  # fmt: skip
    return Constants(**{name: draw.cast(part) for name, part in parts.items()})


def _fixed(draw: Draw) -> Case:
    """M is q times a rotation, 1 - q down to one over the condition: y - T is monotone."""
    n, bent = draw.n, draw.rng.integers(0, 2)
    M = (1 - 1 / draw.condition) * np.linalg.qr(draw.normal(n, n))[0]
    (x, y), f = draw.point(), draw.upper()
    g = draw.lower(M)._replace(
        G=draw.cast(draw.normal(n, DIM_X) * (draw.y / draw.x)), tau=draw.cast(bent * draw.y * draw.size(1e-3, 1)),
        a=draw.cast(np.abs(draw.normal(n)) / draw.y),
    )  # fmt: skip
    R = np.array([float(r) for r in Level(g, x, fixed).at(exact(y)).R])
    g = g._replace(h=draw.cast(R))  # R = y - T
    level = Level(g, x, fixed)
    right = gradient(level, NOTHING, f, on_face(level, NOTHING, [], exact(y)))
    return draw.case("fixed point", Data(f, g, x, draw.start(y)), [right])


def _quadratic(draw: Draw) -> Case:
    return _free(draw, "free, quadratic", quadratic)


def _curved(draw: Draw) -> Case:
    return _free(draw, "free, curved", curved)


def _proved(draw: Draw) -> Case:
    return _free(draw, "free, quadratic, proved", quadratic, proved=True)


FAMILIES = [
    Family("free", build(quadratic), 5, _quadratic),
    Family("proved", build(quadratic), 5, _proved),
    Family("curved", build(curved), 5, _curved),
    Family("fixed", build(fixed), 4, _fixed),
]
