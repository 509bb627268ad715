"""Linearly constrained lower levels: a kink with known smoothing, quadratics with global optima, random active sets.

    min over x in X of f(x, y(x)),   y(x) = argmin of g(x, y) over A y + B x <= b, lo <= y <= hi.

kind = "kink", with `dim` coordinates: g = |y - x|^2/2, 0 <= y <= 1, f = 1'y - alpha 1'x + mu |x|^2/2, alpha = 0.3 and
mu = 0.2. Coordinate by coordinate F has its minimum at the kink x = 0, F = 0, and another local one at alpha/mu with
F = 1 - alpha^2/(2 mu). With q ~ N(0, s^2 I) the smoothed F has slope

    Phi(x/s) - Phi((x - 1)/s) - alpha + mu x,   so that its minimiser is close to s Phi^-1(alpha).

kind = "ridge": g = (y - x1)^2/2, 0 <= y <= 10, f = 5 (2 y - x1) + (x2 - 3)^2/2, |x1| <= 10, so that

    F = 5 |x1| + (x2 - 3)^2/2,

with the minimum 0 at the end of a ridge along which F falls slowly. Descent with a line search along gradients of F
stops on the ridge, where F still falls.

kind = "quadratic14", "quadratic16", "quadratic17", "quadratic18": four quadratics over R^2 whose global optima lie
inside smooth faces, with F* = -239.5, -50.5, -5, -211.5.

kind = "toy": f = |x|^2 + x'Q1 y/10 + |y|^2 + 1'x + 1'y, g = |x|^2 + x'Q2 y + |y|^2, A y + B x <= b with all entries
uniform on [0, 1]; the optimum is not known, and constraints are seldom active there.

kind = "random": g = y'H y/2 + x'G y + c'y with `rows` rows, of which `active` are active at (x*, y*), `weak` of these
with multiplier zero; the others have slack at least 0.1. f = |x - x*|^2/2 + |y - y*|^2/2, so that F* = 0, at x*.

Settings that work: `DSBLO(sigma=0.05)` on the kink; PIGD and SSIGD with their defaults on "random".

Reference: Asl, Overton. Analysis of the gradient method with an Armijo-Wolfe line search on a class of non-smooth
convex functions. Optimization Methods and Software 35, 2020, arXiv:1711.08517: descent fails on a |x1| + x2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, LinearCoupling, Minimize
from bilevel.backend.checks import is_count
from bilevel.data import Full
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

ALPHA, MU = 0.3, 0.2
KINDS = ("kink", "ridge", "quadratic14", "quadratic16", "quadratic17", "quadratic18", "toy", "random")


def kink_upper(x: Array, y: Array, batch: Any) -> Array:
    """1'y - alpha 1'x + mu |x|^2/2, shape []."""
    return jnp.sum(y) - ALPHA * jnp.sum(x) + MU / 2 * jnp.sum(x**2)


def kink_lower(x: Array, y: Array, batch: Any) -> Array:
    """|y - x|^2/2, shape []."""
    return 0.5 * jnp.sum((y - x) ** 2)


def upper(x: Array, y: Array, batch: dict[str, Array]) -> Array:
    """The quadratic x'S x/2 + x'Q y + y'P y/2 + s'x + p'y + r, shape []."""
    quadratic = 0.5 * x @ batch["S"] @ x + x @ batch["Q"] @ y + 0.5 * y @ batch["P"] @ y
    return quadratic + batch["s"] @ x + batch["p"] @ y + batch["r"]


def lower(x: Array, y: Array, batch: dict[str, Array]) -> Array:
    """The quadratic y'H y/2 + x'G y + c'y, shape []; terms in x alone change nothing."""
    return 0.5 * y @ batch["H"] @ y + (x @ batch["G"] + batch["c"]) @ y


@functools.cache
def _init(dim_x: int, dim_y: int) -> Callable[[Array], tuple[Array, Array]]:
    """(x0 ~ N(0, I), y0 = 0) of a key."""
    return lambda key: (jax.random.normal(key, (dim_x,), float), jnp.zeros(dim_y, float))


def _problem(f: dict, g: dict, rows: tuple | None, **sets: Any) -> BilevelProblem:
    coupling = None if rows is None else LinearCoupling(*map(floats, rows))
    f, g = ({name: floats(np.asarray(value, float)) for name, value in part.items()} for part in (f, g))
    shapes = _init(len(f["s"]), len(f["p"]))
    return BilevelProblem(
        upper, Minimize(lower), coupling=coupling, upper_data=Full(f), lower_data=Full(g), init=shapes, **sets
    )


def _quadratic(kind: str) -> Instance:
    """Upper level S |x|^2/2 + Q x.y + P |y|^2/2 + s 1'x + p 1'y + r, and so on, from scalars."""
    unit, ones = np.eye(2), np.ones(2)
    S, Q, P, s, p, r, H, G, c, bound, value, x = {
        "quadratic14": (0.5, 10, -0.5, 1, 1, 1, 1, 1, (0, 1), 1, -239.5, (-22.0, -22.0)),
        "quadratic16": (0.5, 5, -0.5, 0, 0, 0, 0.5, 0.5, (0, 0), 1, -50.5, None),
        "quadratic17": (1.0, 2, -1.0, 0, 0, 0, 1, 1, (0, 0), 1, -5.0, None),
        "quadratic18": (0.5, 2, -0.5, 0, 0, 1, 1, 1, (1, 1), 5, -211.5, None),
    }[kind]
    f = {"S": S * unit, "Q": Q * unit, "P": P * unit, "s": s * ones, "p": p * ones, "r": r}
    both = np.array([[1.0, 1.0], [-1.0, -1.0]])
    rows = (both, np.zeros((2, 2)), np.full(2, 5.0)) if kind == "quadratic18" else None
    problem = _problem(
        f, {"H": H * unit, "G": G * unit, "c": np.array(c)}, rows, y_set=Box(-float(bound), float(bound))
    )
    truth = Truth(value, None if x is None else floats(np.array(x)))
    return Instance(problem, truth, None, frozenset({"constrained-lower", "quadratic", "known-optimum"}))


def _ridge(slope: float = 5.0, end: float = 3.0) -> Instance:
    """F = slope |x1| + (x2 - end)^2/2."""
    f = {"S": np.diag([0.0, 1.0]), "Q": np.zeros((2, 1)), "P": np.zeros((1, 1)), "s": [-slope, -end], "p": [2 * slope]}
    g = {"H": np.eye(1), "G": np.array([[-1.0], [0.0]]), "c": np.zeros(1)}
    top = floats(np.array([10.0, np.inf]))  # beyond y stays at 10, and F falls for ever
    problem = _problem({**f, "r": end**2 / 2}, g, None, x_set=Box(-top, top), y_set=Box(0.0, 10.0))
    truth = Truth(0.0, floats(np.array([0.0, end])), floats(np.zeros(1)))
    return Instance(problem, truth, None, frozenset({"constrained-lower", "nonsmooth", "known-optimum"}))


def _toy(rng: np.random.Generator, dim: int, rows: int) -> Instance:
    Q1, Q2 = rng.uniform(size=(2, dim, dim))
    coupling = rng.uniform(size=(rows, dim)), rng.uniform(size=(rows, dim)), rng.uniform(size=rows)
    unit, ones = np.eye(dim), np.ones(dim)
    f = {"S": 2 * unit, "Q": 0.1 * Q1, "P": 2 * unit, "s": ones, "p": ones, "r": 0.0}
    problem = _problem(f, {"H": 2 * unit, "G": Q2, "c": 0 * ones}, coupling)
    return Instance(problem, None, None, frozenset({"constrained-lower", "quadratic"}))


def _random(rng: np.random.Generator, dim: int, rows: int, active: int, weak: int) -> Instance:
    Z = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    H, G = Z @ Z.T + 0.5 * np.eye(dim), rng.normal(size=(dim, dim)) / np.sqrt(dim)
    A, B = rng.normal(size=(2, rows, dim)) / np.sqrt(dim)
    x, y = rng.normal(size=(2, dim))
    order = rng.permutation(rows)
    lam, slack = np.zeros(rows), np.zeros(rows)
    lam[order[weak:active]] = rng.uniform(0.1, 1, active - weak)
    slack[order[active:]] = rng.uniform(0.1, 1, rows - active)
    f = {"S": np.eye(dim), "Q": np.zeros((dim, dim)), "P": np.eye(dim), "s": -x, "p": -y, "r": (x @ x + y @ y) / 2}
    g = {"H": H, "G": G, "c": -H @ y - x @ G - A.T @ lam}
    problem = _problem(f, g, (A, B, A @ y + B @ x + slack))
    tags = {"constrained-lower", "quadratic", "known-optimum"} | ({"weakly-active"} if weak else set())
    return Instance(problem, Truth(0.0, floats(x), floats(y)), None, frozenset(tags))


def make(
    kind: str = "kink", seed: int = 0, dim: int = 10, rows: int = 5, active: int | None = None, weak: int = 0
) -> Instance:
    """An instance of the kinds above.

    Args:
        kind: one of `KINDS`.
        seed: >= 0; for "toy" and "random".
        dim: size of x and of y, >= 1; not for the ridge and the four quadratics.
        rows: constraints of "toy" and "random", >= 1.
        active: rows active at the optimum of "random", at most min(rows, dim); default half of that.
        weak: how many of these have multiplier zero.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    if kind not in KINDS:
        invalid("kind (constrained)", repr(kind), f"one of {KINDS}", "See the module's docstring.")
    for name, value in (("dim", dim), ("rows", rows)):
        if not is_count(value, 1):
            invalid(f"{name} (constrained)", value, "a whole number >= 1", "Give a size.")
    active = min(rows, dim) // 2 if active is None else active
    for name, value, most in (("active", active, min(rows, dim)), ("weak", weak, active)):
        if not (is_count(value, 0) and value <= most):
            invalid(f"{name} (constrained)", value, f"a whole number in [0, {most}]", "More cannot be independent.")
    rng = np.random.default_rng(seed)
    if kind == "kink":
        problem = BilevelProblem(kink_upper, Minimize(kink_lower), y_set=Box(0.0, 1.0), init=_init(dim, dim))
        tags = frozenset({"constrained-lower", "nonsmooth", "known-optimum"})
        return Instance(problem, Truth(0.0, floats(np.zeros(dim)), floats(np.zeros(dim))), None, tags)
    if kind == "toy":
        return _toy(rng, dim, rows)
    if kind == "ridge":
        return _ridge()
    return _random(rng, dim, rows, active, weak) if kind == "random" else _quadratic(kind)
