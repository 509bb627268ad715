"""Which solver for a problem: what can be seen of it, the rules, and the solvers in their order, each with its reason.

The rules stand in `RULES` and nowhere else; docs/choose-a-solver.md prints them. The first whose condition holds gives
the order. A rank is a claim of how a method compares with others, made by measuring them side by side
(`python -m benchmarks.experiments.recommended`); so no solver ranks itself. One that no rule names, a new one say, is
found all the same: it stands below the list, among those that take the problem, too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array

from bilevel.backend.tracing import under_trace
from bilevel.parts.seen import Seen, look
from bilevel.problem import BilevelProblem, check_problem
from bilevel.solver import KNOWN, Solver, Unsupported, complete, refusal
from bilevel.struct import invalid

MODEST = 40  # unknowns of x and y together up to which branch and bound is worth a try
SMALL = 12  # unknowns of y, or of a block of it, up to which sampling them is worth a try
FEW = 6  # unknowns of x and of y up to which it is worth that even where g is strongly convex


class Rule(NamedTuple):
    """A kind of problem, and the solvers for it in their order."""

    when: str
    """The kind, in words."""
    holds: Callable[[Seen], bool]
    """Whether a problem is of that kind."""
    solvers: Mapping[str, str]
    """Why, by solver, the first the best; "A(B)" is the solver A around B."""
    needs: str = ""
    """A solver that must take the problem, too, for the rule to hold; "" for none."""


FULL = "exact gradients, the lower level solved at each point: few steps, no step sizes, ends at full accuracy"
MATRIX = "the same with a Hessian of x kept: up to some 1,000 unknowns of x"
SAMPLES = "samples Y(x) and sees all minimisers of g; eight starts in x; many oracle calls"

UNRANKED = "no rule ranks the solvers that take this problem, here by their names"

RULES: tuple[Rule, ...] = (
    Rule(
        f"f and g are linear or convex quadratic, y or the leader has constraints, linear ones, and there are at most "
        f"{MODEST} unknowns",
        lambda seen: (seen.constrained or seen.leader) and seen.num_x + seen.num_y <= MODEST,
        {
            "BranchAndBound": "the global optimum, with a proof",
            "SampledPenalty": SAMPLES,
            "LBFGS": f"a local minimum by {FULL}",
            "SQP": MATRIX,
            "PIGD": "implicit gradients through the active rows",
        },
        needs="BranchAndBound",
    ),
    Rule(
        "the leader has constraints that contain y(x)",
        lambda seen: seen.leader,
        {
            "SQP": "holds them to full accuracy at its end, and gives their multipliers",
            "AugmentedLagrangian(LBFGS)": "holds them, too, for x in any set, in more steps",
        },
    ),
    Rule(
        "y has a part of its own for each sample",
        lambda seen: seen.per_sample,
        {
            "SSIGD": "implicit gradients on batches of samples and their rows of y",
            "AT": "for g = -f up to terms without x: gradient steps of the attacker, no implicit term",
            "PerSamplePenalty": "where each y_i has few entries and g_i many minima",
        },
    ),
    Rule(
        f"g is not strongly convex, Y is bounded, and y, or each block of it, has at most {SMALL} unknowns",
        lambda seen: not seen.smooth and seen.bounded and seen.block <= SMALL,
        {
            "SampledPenalty": SAMPLES,
            "ProxF2SA": "cheaper, by gradients alone; stays at local minima of g",
            "BOME": "likewise",
            "LVHBA": "likewise; for flat g, and constraints that tie x and y",
        },
    ),
    Rule(
        f"y is constrained and bounded, x and y have at most {FEW} unknowns each",
        lambda seen: seen.constrained and seen.bounded and max(seen.num_x, seen.num_y) <= FEW,
        {
            "SampledPenalty": f"F has kinks, and often several minima: {SAMPLES}",
            "LBFGS": f"a local minimum by {FULL}",
            "SQP": MATRIX,
            "PIGD": "implicit gradients through the active rows",
        },
    ),
    Rule(
        "curved constraints tie x and y",
        lambda seen: seen.coupling == "SmoothCoupling",
        {
            "BLOCC": "the steadiest where g is strongly convex; by gradients of g and h alone",
            "BiCGAFFA": "where g is flat; many cheap steps",
            "SampledPenalty": "where y has few unknowns",
        },
    ),
    Rule(
        "g is not strongly convex, and y is constrained",
        lambda seen: not seen.smooth and seen.constrained,
        {
            "LVHBA": "by gradients of g alone, feasible at each step; constraints may tie x and y",
            "ProxF2SA": "by gradients alone; y in a set",
            "BiCGAFFA": "for any convex constraints",
            "BLOCC": "likewise",
        },
    ),
    Rule(
        "there is no x: f is to be least among the minimisers of g",
        lambda seen: seen.num_x == 0 and not seen.smooth and not seen.constrained,
        {
            "BOME": "without x dynamic barrier gradient descent: f falls as far as g lets it",
            "VPBGD": "f and a constant weight of g: not at a minimiser of g in the end",
        },
    ),
    Rule(
        "g is flat",
        lambda seen: seen.curvature == "flat",
        {
            "BOME": "by gradients alone; y(x) need not be unique",
            "VPBGD": "likewise, with a constant weight",
            "AID": "follows one minimiser of g from the start, by truncated linear systems",
        },
    ),
    Rule(
        "g is not convex",
        lambda seen: not seen.smooth,
        {
            "LBFGS": f"follows one minimiser of g from the start: {FULL}",
            "AID": "likewise, by some lower steps and a truncated linear system a step",
            "BOME": "by gradients alone",
        },
    ),
    Rule(
        "y is constrained",
        lambda seen: seen.constrained,
        {
            "LBFGS": f"{FULL}, over kinks of F, too",
            "SQP": MATRIX,
            "PIGD": "implicit gradients through the active rows",
            "DSBLO": "where F has a kink at its minimum: smoothed over perturbations",
            "BLOCC": "no second derivatives",
        },
    ),
    Rule(
        "any other smooth lower level that can be solved",
        lambda seen: True,
        {
            "LBFGS": FULL,
            "SQP": MATRIX,
            "AID": "some lower steps and a truncated linear system a step; steady defaults",
            "Implicit": "as LBFGS, by any optax rule",
            "SOBA": "batches: one product a step, a first answer soon on much data",
            "SABA": "batches, and an exact answer: tables of gradients",
            "F2SA": "no second derivatives",
        },
    ),
)
"""The rules, from the most special to the most general."""


class Choice(NamedTuple):
    """A solver of the list."""

    solver: Solver
    """With its defaults."""
    name: str
    """As the rules write it."""
    why: str
    """The reason of its rank."""


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Solvers for a problem, the best first; printing it gives a list. It is a sequence of `Choice`."""

    seen: Seen
    """What was seen of the problem."""
    rule: str
    """The kind of problem that it is, in words."""
    choices: tuple[Choice, ...]
    """Those that are ranked; never none."""
    problem: BilevelProblem
    """Whose solvers they are."""

    @functools.cached_property
    def refused(self) -> Mapping[str, str]:
        """Why, by the names of those that do not take it; looked for when first asked for."""
        return refusals(self.problem)

    @property
    def others(self) -> tuple[str, ...]:
        """Names of those that take the problem, too, and are not ranked."""
        named = {*self.refused, *(choice.name for choice in self.choices)}
        return tuple(name for name, kind in sorted(KNOWN.items()) if complete(kind) and name not in named)

    def __iter__(self) -> Iterator[Choice]:
        """The choices, the best first."""
        return iter(self.choices)

    def __len__(self) -> int:
        """How many are ranked."""
        return len(self.choices)

    def __getitem__(self, k: int) -> Choice:
        """Choice k, from 0."""
        return self.choices[k]

    def __str__(self) -> str:
        """What was seen, the rule, a line for each choice, and the others in a line."""
        width = max(len(choice.name) for choice in self.choices)
        lines = [str(self.seen), f"{self.rule}:"]
        lines += [f"{k:2d}  {choice.name:<{width}}  {choice.why}" for k, choice in enumerate(self.choices, 1)]
        if self.others:
            lines.append(f"not ranked, take it, too: {', '.join(self.others)}")
        return "\n".join(lines)

    __repr__ = __str__

    def as_dict(self) -> dict[str, Any]:
        """The same in words and numbers, for JSON."""
        ranked = [{"solver": choice.name, "why": choice.why} for choice in self.choices]
        seen = dataclasses.asdict(self.seen)
        seen["condition"] = None if math.isnan(self.seen.condition) else self.seen.condition
        return {"seen": seen, "rule": self.rule, "ranked": ranked, "others": list(self.others),
                "refused": dict(self.refused)}  # fmt: skip


def recommend(problem: BilevelProblem, key: Array | None = None) -> Recommendation:
    """Solvers for `problem`, the best first, each with its reason.

    It looks at sizes, sets, coupling, data, and at R_y on all of the data at init's point and five points around it; of
    more than 512 unknowns of y, at thirty products with g_yy at init's point. What holds there may not hold elsewhere:
    the verdict of a run is the referee's, whatever was seen here.

    Args:
        problem: any.
        key: of init's point and of those around it. Default: `jax.random.key(0)`.

    Raises:
        InvalidInput: as `problem.validate()`, and inside of `jax.jit`, `grad` or `vmap`.
        Unsupported: no solver takes the problem.
    """
    check_problem(problem)
    if under_trace(problem, key):
        got, expected = "a call inside of jax.jit, grad or vmap", "numbers, since it looks at them"
        invalid("recommend", got, expected, "Call it outside.")
    problem.validate()
    seen = look(problem, jax.random.key(0) if key is None else key)
    for rule in RULES:
        if rule.holds(seen) and (not rule.needs or refusal(build(rule.needs), problem) is None):
            built = [Choice(build(name), name, why) for name, why in rule.solvers.items()]
            choices = tuple(choice for choice in built if refusal(choice.solver, problem) is None)
            if choices:
                return Recommendation(seen, rule.when, choices, problem)
    refused = refusals(problem)
    left = [name for name, kind in sorted(KNOWN.items()) if complete(kind) and name not in refused]
    if not left:
        raise Unsupported(f"no solver takes this problem: {seen}. Each has its reason, as {refused['LBFGS']}")
    return Recommendation(seen, UNRANKED, tuple(Choice(build(name), name, "takes it") for name in left), problem)


def refusals(problem: BilevelProblem) -> dict[str, str]:
    """Why, by the names of the solvers that do not take the problem."""
    plain = {name: kind() for name, kind in sorted(KNOWN.items()) if complete(kind)}
    return {name: reason for name, one in plain.items() if (reason := refusal(one, problem)) is not None}


def build(name: str) -> Solver:
    """The solver that a rule writes as `name`, with its defaults."""
    outer, _, inside = name.removesuffix(")").partition("(")
    return KNOWN[outer](*([build(inside)] if inside else []))
