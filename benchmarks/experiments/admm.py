"""Penalties of ADMM: learnt by gradients through K steps, searched, and the rules of the literature.

    python -m benchmarks.experiments.admm [--seeds 5] [--evaluations 120] [--kinds qp lasso]

Family `admm`, 16 instances to learn from and 16 others to report. The contraction factor per step, exp(F), on both:
mean over seeds and its standard deviation. Everything that learns may evaluate F on the 16 as often as --evaluations
says; a gradient counts as one evaluation and takes as long as some four. Per method, the best on the 16 is reported.

    constant, schedule, rule     `LBFGS` on F, from rho = 1; the rule from OSQP's
    random constants             log rho drawn evenly from where constants may be
    evolved numbers              the rule's four numbers, by mutation: Gaussian steps, a fifth of the range at first,
                                 halved where no better one was found in ten
    evolved formula              log rho += e, e an expression over the logarithms of the relative residuals, their
                                 difference, the time k/K and constants, by mutation of its tree; ten kept of twenty
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import bilevel
import problems
from benchmarks.study.compilation import use_quick_compilation
from problems import admm, admm_rules

Formula = tuple[Any, ...] | str | float
TWO: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "min": min, "max": max,
}  # fmt: skip
ONE: dict[str, Callable[[float], float]] = {"tanh": np.tanh, "half": lambda a: a / 2, "minus": lambda a: -a}
SEEN = "primal", "dual", "ratio", "time"
DEEPEST, STEPS, COUNT = 4, 15, 16


def value(formula: Formula, seen: dict[str, float]) -> float:
    """The number that a formula is."""
    if isinstance(formula, str):
        return seen[formula]
    if not isinstance(formula, tuple):
        return formula
    operation, *parts = formula
    return (TWO | ONE)[operation](*(value(part, seen) for part in parts))


def text(formula: Formula) -> str:
    """A formula as one writes it."""
    if isinstance(formula, tuple):
        return f"{formula[0]}({', '.join(text(part) for part in formula[1:])})"
    return formula if isinstance(formula, str) else f"{formula:.2g}"


def grown(rng: np.random.Generator, depth: int) -> Formula:
    """A random formula."""
    if depth == 0 or rng.uniform() < 0.3:
        return str(rng.choice(SEEN)) if rng.uniform() < 0.7 else float(rng.normal())
    name = str(rng.choice([*TWO, *ONE]))
    return (name, *(grown(rng, depth - 1) for _ in range(2 if name in TWO else 1)))


def mutated(rng: np.random.Generator, formula: Formula, depth: int = DEEPEST) -> Formula:
    """The formula with one branch grown anew, or one constant moved."""
    if isinstance(formula, float) and rng.uniform() < 0.7:
        return formula + float(rng.normal()) / 3
    if not isinstance(formula, tuple) or rng.uniform() < 0.3:
        return grown(rng, min(depth, 2))
    k = int(rng.integers(1, len(formula)))
    return (*formula[:k], mutated(rng, formula[k], depth - 1), *formula[k + 1 :])


def rule_of(formula: Formula) -> admm_rules.Rule:
    """The rule log rho += formula, from rho = 1."""

    def start(numbers: dict[str, Any]) -> Callable[[admm_rules.Look | None], float]:
        def ask(look: admm_rules.Look | None) -> float:
            if look is None:
                return 1.0
            point, dual, q = look.scales
            primal, dual = (max(a, admm_rules.EPS) for a in (look.primal / point, look.dual / max(dual, q)))
            seen = {"primal": np.log(primal), "dual": np.log(dual), "time": look.k / STEPS}
            moved = np.log(look.rho) + value(formula, {**seen, "ratio": seen["primal"] - seen["dual"]})
            return float(np.exp(np.clip(moved, -admm.WIDEST, admm.WIDEST)))

        return ask

    return start


def best_formula(score: Callable[[admm_rules.Rule], float], rng: np.random.Generator, budget: int) -> tuple:
    """(F, rule, text) of the best of `budget` formulas."""
    first: list[Formula] = [("half", "ratio"), *(grown(rng, 3) for _ in range(9))]
    kept = sorted(((score(rule_of(formula)), k, formula) for k, formula in enumerate(first)), key=lambda row: row[:2])
    for k in range(len(first), budget):
        child = mutated(rng, kept[int(rng.integers(len(kept)))][2])
        kept = sorted([*kept, (score(rule_of(child)), k, child)], key=lambda row: row[:2])[:10]
    return kept[0][0], rule_of(kept[0][2]), text(kept[0][2])


def best_numbers(score: Callable[[admm_rules.Rule], float], rng: np.random.Generator, budget: int) -> tuple:
    """(F, rule, text) of the best four numbers of a rule, by a (1 + 1) evolution strategy."""
    low, high = admm.RULE
    x, width, failed = np.array([0.0, 0.5, 0.0, 0.0]), 0.2, 0
    best = score(admm_rules.learnt("rule", x, admm.WIDEST))
    for _ in range(budget - 1):
        tried = np.clip(x + width * (high - low) * rng.normal(size=4), low, high)
        found = score(admm_rules.learnt("rule", tried, admm.WIDEST))
        if found < best:
            x, best, failed = tried, found, 0
        else:
            failed += 1
        if failed == 10:
            width, failed = width / 2, 0
    return best, admm_rules.learnt("rule", x, admm.WIDEST), np.array2string(x, precision=2)


def best_random(score: Callable[[admm_rules.Rule], float], rng: np.random.Generator, budget: int) -> tuple:
    """(F, rule, text) of the best of as many constants."""
    drawn = np.exp(rng.uniform(-admm.WIDEST, admm.WIDEST, budget))
    found = [score(admm_rules.constant(rho)) for rho in drawn]
    k = int(np.argmin(found))
    return found[k], admm_rules.constant(drawn[k]), f"{drawn[k]:.3g}"


def learnt(kind: str, tuned: str, seed: int, budget: int) -> admm_rules.Rule:
    """The rule at the best point that LBFGS measured within the budget."""
    problem = problems.make("admm", kind=kind, tuned=tuned, seed=seed, steps=STEPS, instances=COUNT).problem
    spent, key, solver = 1, jax.random.key(seed), bilevel.LBFGS()
    state = jax.jit(solver.init)(problem, key)
    step = jax.jit(lambda state, k: bilevel.advance(problem, solver, state, key, k, 1))
    best = np.asarray(state.x), np.inf
    for k in range(budget):
        state, info = step(state, k)
        spent += int(np.sum(np.asarray(info.evaluations)))
        if spent > budget:
            break
        F = float(state.value)
        best = (np.asarray(state.x), F) if best[1] > F else best
    return admm_rules.learnt(tuned, best[0], admm.WIDEST)


def one(kind: str, seed: int, budget: int) -> dict[str, tuple[float, float]]:
    """{method: the factor on the instances learnt from, and on the others}."""
    drawn = admm.draw(kind, np.random.default_rng([admm.KINDS.index(kind), seed]), 10, 100.0, 2 * COUNT)
    train, test = ({**drawn, "q": part} for part in np.split(drawn["q"], 2))
    score = lambda rule: float(np.mean(admm_rules.progress(kind, train, rule, STEPS)))  # noqa: E731
    found: dict[str, admm_rules.Rule] = dict(admm_rules.RULES)
    for name in admm.TUNED:
        found[f"learnt {name}"] = learnt(kind, name, seed, budget)
    for name, search in (
        ("random constants", best_random), ("evolved numbers", best_numbers), ("evolved formula", best_formula),
    ):  # fmt: skip
        _, found[name], said = search(score, np.random.default_rng([7, seed]), budget)
        print(f"{kind}, seed {seed}, {name}: {said}", flush=True)
    factor = lambda numbers, rule: float(np.exp(np.mean(admm_rules.progress(kind, numbers, rule, STEPS))))  # noqa: E731
    return {name: (factor(train, rule), factor(test, rule)) for name, rule in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument("--kinds", nargs="+", choices=admm.KINDS, default=["qp", "lasso"])
    args = parser.parse_args()
    use_quick_compilation()
    jax.config.update("jax_enable_x64", True)
    for kind in args.kinds:
        runs = [one(kind, seed, args.evaluations) for seed in range(args.seeds)]
        table = Table(title=f"{kind}: factor per step over {STEPS} steps, {args.seeds} seeds")
        for heading in ("method", "learnt from", "others"):
            table.add_column(heading)
        for name in sorted(runs[0], key=lambda name: np.mean([run[name][1] for run in runs])):
            cells = np.array([run[name] for run in runs])
            spread = cells.std(axis=0, ddof=1) if len(cells) > 1 else np.full(2, np.nan)
            table.add_row(name, *(f"{m:.3f} ± {s:.3f}" for m, s in zip(cells.mean(axis=0), spread, strict=True)))
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
