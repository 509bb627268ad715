"""First-order methods against their exact worst case: `python -m benchmarks.peers.pepit [--conditions 10 100]`.

On functions that are mu-strongly convex with an L-Lipschitz gradient, L = 1, three numbers side by side:

    exact       the largest value that any such function, of any dimension, can give: a semidefinite program (PEPit)
    published   the theorem's bound, which `bilevax verify` searches to break
    found       the worst instance that the same search finds, measured on the library's hypergradients

found <= exact <= published must hold, up to the tolerance of the program's solver; found/exact says how good the search
is, exact/published how good the theorem. Exit code 1 where the order is broken, 2 where PEPit is not installed
(pip install 'bilevax[peers]').

Reference: Goujaud, Moucer, Glineur, Hendrickx, Taylor, Dieuleveut. PEPit: computer-assisted worst-case analyses of
    first-order optimization methods in Python. Mathematical Programming Computation 2024.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from rich import box
from rich.table import Table

from benchmarks.show.terminal import console, progress
from benchmarks.study.compilation import use_quick_compilation
from bilevel.guarantees import Guarantee, Path, search
from problems import strategies
from problems.guarantees import gradient

TOLERANCE = 1e-4  # relative, of the semidefinite program


class Case(NamedTuple):
    """One line of the table; ratios are found/exact and exact/published."""

    method: str
    measure: str
    condition: float
    steps: int
    exact: float
    published: float
    found: float
    instance: str

    @property
    def ordered(self) -> bool:
        """Whether found <= exact <= published."""
        return self.found <= self.exact * (1 + TOLERANCE) and self.exact <= self.published * (1 + TOLERANCE)


class Method(NamedTuple):
    """A method with its guarantee, from which the search takes its measure.

    exact: (mu, k) -> the worst case for a start of size one; published: the same of the theorem; start: constants of an
    instance -> its start's size; the measured value is the first of the guarantee's columns.
    """

    guarantee: Guarantee
    measure: str
    exact: Callable[[float, int], float]
    published: Callable[[float, int], float]
    start: Callable[[gradient.KnownHuber], Any]
    corner: Any = strategies.just(0.0)


def _program(mu: float) -> tuple[Any, Any, Any, Any]:
    """(PEPit's problem, f, its minimiser, x_0)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from PEPit import PEP
        from PEPit.functions import SmoothStronglyConvexFunction

    program = PEP()
    f = program.declare_function(SmoothStronglyConvexFunction, mu=mu, L=1.0)
    return program, f, f.stationary_point(), program.set_initial_point()


def _solve(program: Any, metric: Any) -> float:
    program.set_performance_metric(metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(program.solve(verbose=0))


def exact_descent(mu: float, steps: int, size: float, values: bool) -> float:
    """Of gradient descent with |x_0 - x*| = 1: the largest F(x_k) - F*, or |x_k - x*|."""
    program, f, best, x = _program(mu)
    program.set_initial_condition((x - best) ** 2 <= 1)
    for _ in range(steps):
        x = x - size * f.gradient(x)
    return _solve(program, f(x) - f(best)) if values else math.sqrt(_solve(program, (x - best) ** 2))


def exact_projected(mu: float, steps: int, size: float) -> float:
    """The largest |x_k - x*| of projected gradient descent, over all closed convex sets, with |x_0 - x*| = 1."""
    program, f, _, x = _program(mu)
    from PEPit.functions import ConvexIndicatorFunction
    from PEPit.primitive_steps import proximal_step

    inside = program.declare_function(ConvexIndicatorFunction)
    best = (f + inside).stationary_point()
    program.set_initial_condition((x - best) ** 2 <= 1)
    for _ in range(steps):
        x, _, _ = proximal_step(x - size * f.gradient(x), inside, size)
    return math.sqrt(_solve(program, (x - best) ** 2))


def exact_accelerated(mu: float, steps: int) -> float:
    """The largest F(x_k) - F* of Nesterov's method with F(x_0) - F* + mu |x_0 - x*|^2/2 = 1."""
    program, f, best, x = _program(mu)
    program.set_initial_condition(f(x) - f(best) + mu / 2 * (x - best) ** 2 <= 1)
    z, b = x, (1 - math.sqrt(mu)) / (1 + math.sqrt(mu))
    for _ in range(steps):
        new = z - f.gradient(z)
        x, z = new, new + b * (new - x)
    return _solve(program, f(x) - f(best))


METHODS = {
    "gradient, step 2/(mu + L)": Method(
        gradient.SMOOTH, "|x_k - x*|", lambda mu, k: exact_descent(mu, k, 2 / (1 + mu), values=False),
        lambda mu, k: ((1 - mu) / (1 + mu)) ** k, lambda known: known.distance,
    ),
    "gradient, step 1/L": Method(
        gradient.CONVEX, "F(x_k) - F*", lambda mu, k: exact_descent(mu, k, 1.0, values=True),
        lambda mu, k: min(1 / (4 * k + 2), (1 - mu) ** (2 * k) / 2), lambda known: known.distance**2,
    ),
    "projected, step 1/L": Method(
        gradient.PROJECTED, "|x_k - x*|", lambda mu, k: exact_projected(mu, k, 1.0), lambda mu, k: (1 - mu) ** k,
        lambda known: known.distance, strategies.sizes(),
    ),
    "accelerated, step 1/L": Method(
        gradient.ACCELERATED, "F(x_k) - F*", exact_accelerated, lambda mu, k: (1 - math.sqrt(mu)) ** k,
        lambda known: known.potential,
    ),
}  # fmt: skip


def case(name: str, condition: float, steps: int, examples: int, seed: int = 0) -> Case:
    """One line: the program, the formula, and a search that climbs towards the exact worst case."""
    method, mu = METHODS[name], 1 / condition
    exact = method.exact(mu, steps)

    def measure(instance: gradient.Huber, horizon: tuple[int, ...]) -> jax.Array:
        measured = method.guarantee.measure(instance, horizon)
        return measured.reshape(len(horizon), -1)[:, 0]

    hunt = dataclasses.replace(
        method.guarantee, horizon=(steps,), measure=measure, bound=lambda known, k: exact * method.start(known),
        rounding=lambda known: 0.0, assumptions=(),
        instances=gradient.hubers(strategies.just(mu), strategies.just(1.0), corner=method.corner),
    )  # fmt: skip
    finding = search(hunt, examples=examples, seed=seed, shrink=False)
    found = finding.tightest if finding.counterexample is None else finding.counterexample.path
    assert isinstance(found, Path)
    return Case(name, method.measure, condition, steps, exact, method.published(mu, steps), exact * found.worst,
                repr(found.drawn))  # fmt: skip


def table(cases: list[Case]) -> Table:
    """The table."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("method", "measure"):
        out.add_column(column, no_wrap=True)
    for column in ("L/mu", "k", "exact", "published", "found", "found/\nexact", "exact/\npublished"):
        out.add_column(column, justify="right", no_wrap=True)
    for c in cases:
        style = "" if c.ordered else "[red]"
        out.add_row(
            c.method, c.measure, f"{c.condition:g}", str(c.steps), f"{c.exact:.5g}", f"{c.published:.5g}",
            f"{style}{c.found:.5g}", f"{c.found / c.exact:.5f}", f"{c.exact / c.published:.4f}",
        )  # fmt: skip
    return out


def main() -> int:
    """Search, print, and say whether the order holds."""
    parser = argparse.ArgumentParser(description="first-order methods against their exact worst case (PEPit)")
    parser.add_argument("--conditions", type=float, nargs="+", default=[10.0, 100.0], help="values of L/mu, > 1")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5], help="numbers k of steps")
    parser.add_argument("--examples", type=int, default=100, help="draws of a search, of 64 instances each")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if importlib.util.find_spec("PEPit") is None:
        print("PEPit is not installed: pip install 'bilevax[peers]'", file=sys.stderr)
        return 2
    use_quick_compilation()
    wanted = [(name, condition, k) for name in METHODS for condition in options.conditions for k in options.steps]
    cases = []
    with jax.enable_x64(True), progress(len(wanted)) as advance:
        for index, (name, condition, k) in enumerate(wanted):
            advance(index, f"{name}, L/mu = {condition:g}, k = {k}")
            cases.append(case(name, condition, k, options.examples))
    if options.json:
        print(json.dumps([c._asdict() for c in cases]))
    else:
        console().print(table(cases))
    return 0 if all(c.ordered for c in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
