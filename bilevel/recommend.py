"""Which solver for a problem: what can be seen of it, the rules, and the solvers in their order, each with its reason.

The rules stand in `RULES` and nowhere else; docs/choose-a-solver.md prints them. The first whose condition holds gives
the order. A rank is a claim of how a method compares with others, made by measuring them side by side
(`python -m benchmarks.experiments.recommended`); so no solver ranks itself. One that no rule names, a new one say, is
found all the same: it stands below the list, among those that take the problem, too.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.bounded import Flat, bounded_jit
from bilevel.backend.precision import full_precision
from bilevel.backend.tracing import under_trace
from bilevel.parts.spectrum import spectrum
from bilevel.problem import BilevelProblem, Minimize, check_problem
from bilevel.solver import KNOWN, Solver, Unsupported, complete, refusal
from bilevel.struct import invalid

PyTree = Any
POINTS = 6  # at which R_y is looked at
LARGEST = 512  # unknowns of y beyond which R_y is not formed
SINGULAR = 1e-8  # part of the largest eigenvalue of g_yy up to which one counts as zero
BENT = 1e-4  # part of it below zero from which an estimated least one is negative
SMALL = 12  # unknowns of y, or of a block of it, up to which sampling them is worth a try
FEW = 6  # unknowns of x and of y up to which it is worth that even where g is strongly convex


@dataclasses.dataclass(frozen=True)
class Seen:
    """What can be seen of a problem without solving it."""

    num_x: int
    """Unknowns of x."""
    num_y: int
    """Unknowns of y."""
    block: int
    """Unknowns of y that belong together: fewer than `num_y` where the problem is `separable`."""
    dtype: str
    """The floats of x and y."""
    fixed_point: bool
    """Whether the lower level is a `FixedPoint`."""
    curvature: str
    """Of the lower level, on all of the data at init's point and a few around it: "strongly convex", "flat" (g_yy is
    singular somewhere), "not convex", "contraction", "no contraction". Where y is large thirty products at init's point
    say "not convex" or "not seen to bend down"; of a large fixed point nothing: "not looked at"."""
    condition: float
    """The largest condition number of R_y seen there; NaN where none was."""
    x_set: str
    """The kind of X."""
    y_set: str
    """The kind of Y."""
    bounded: bool
    """Whether Y is bounded."""
    coupling: str
    """The kind of coupling; "" for none."""
    leader: bool
    """Whether there are upper constraints."""
    batches: bool
    """Whether a level has its data in batches."""
    per_sample: bool
    """Whether y has a part of its own for each sample."""

    @property
    def constrained(self) -> bool:
        """Whether the lower level is."""
        return self.coupling != "" or self.y_set != "Reals"

    @property
    def smooth(self) -> bool:
        """Whether nothing speaks against y(x) being unique."""
        return self.curvature not in ("flat", "not convex")

    def __str__(self) -> str:
        """One line."""
        level = "FixedPoint" if self.fixed_point else "g"
        known = "" if math.isnan(self.condition) else f" (condition {self.condition:.0e})"
        where = "" if self.curvature == "not looked at" else " where probed"
        parts = [f"{self.num_x} + {self.num_y} unknowns, {self.dtype}", f"{level} {self.curvature}{where}{known}"]
        parts += [f"x in {self.x_set}"] if self.x_set != "Reals" else []
        parts += [f"y in {self.y_set}"] if self.y_set != "Reals" else []
        parts += [f"y in blocks of {self.block}"] if self.block < self.num_y else []
        parts += [self.coupling] if self.coupling else []
        parts += ["upper constraints"] if self.leader else []
        parts += ["a y for each sample"] if self.per_sample else ["batches"] if self.batches else []
        return "; ".join(parts)


class Rule(NamedTuple):
    """A kind of problem, and the solvers for it in their order."""

    when: str
    """The kind, in words."""
    holds: Callable[[Seen], bool]
    """Whether a problem is of that kind."""
    solvers: Mapping[str, str]
    """Why, by solver, the first the best; "A(B)" is the solver A around B."""


FULL = "exact gradients, the lower level solved at each point: few steps, no step sizes, ends at full accuracy"
MATRIX = "the same with a Hessian of x kept: up to some 1,000 unknowns of x"
SAMPLES = "samples Y(x) and sees all minimisers of g; eight starts in x; many oracle calls"

RULES: tuple[Rule, ...] = (
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
        "nothing of this",
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
    others: tuple[str, ...]
    """Names of those that take the problem, too, and are not ranked."""
    refused: Mapping[str, str]
    """Why, by the names of those that do not take it."""

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
    plain = {name: kind() for name, kind in sorted(KNOWN.items()) if complete(kind)}
    refused = {name: reason for name, one in plain.items() if (reason := refusal(one, problem)) is not None}
    for rule in RULES:
        if not rule.holds(seen):
            continue
        built = [Choice(build(name), name, why) for name, why in rule.solvers.items()]
        choices = tuple(choice for choice in built if refusal(choice.solver, problem) is None)
        if choices:
            ranked = {choice.name for choice in choices}
            others = tuple(name for name in plain if name not in refused and name not in ranked)
            return Recommendation(seen, rule.when, choices, others, refused)
    raise Unsupported(f"no solver takes this problem: {seen}. " + " ".join(refused.values()))


def build(name: str) -> Solver:
    """The solver that a rule writes as `name`, with its defaults."""
    outer, _, inside = name.removesuffix(")").partition("(")
    return KNOWN[outer](*([build(inside)] if inside else []))


def look(problem: BilevelProblem, key: Array) -> Seen:
    """What can be seen of a problem that is valid."""
    x, y = problem.init(key)
    curvature, condition = _curvature(problem, x, y, key)
    num_y, coupling = ravel_pytree(y)[0].size, problem.coupling
    rows = len(jax.tree.leaves(y)[0]) if problem.separable else 1
    sources = problem.upper_data, problem.lower_data
    return Seen(
        num_x=ravel_pytree(x)[0].size,
        num_y=num_y,
        block=num_y // rows,
        dtype=str(ravel_pytree(y)[0].dtype),
        fixed_point=not isinstance(problem.lower, Minimize),
        curvature=curvature,
        condition=condition,
        x_set=type(problem.x_set).__name__,
        y_set=type(problem.y_set).__name__,
        bounded=problem.y_set.bounded,
        coupling="" if coupling is None else type(coupling).__name__,
        leader=problem.upper_constraints is not None,
        batches=any(source.fraction < 1 for source in sources),
        per_sample=any(hasattr(source, "rows") for source in sources),
    )


def _curvature(problem: BilevelProblem, x: PyTree, y: PyTree, key: Array) -> tuple[str, float]:
    """What is seen of R_y, and its largest condition number."""
    flat: Any = Flat(problem)
    if ravel_pytree(y)[0].size > LARGEST:
        return _of_many(problem, flat, x, y), math.nan
    matrices = np.asarray(_matrices(flat, x, y, key))
    if not np.isfinite(matrices).all():
        return "not looked at", math.nan
    if not isinstance(problem.lower, Minimize):
        radius = max(np.abs(np.linalg.eigvals(np.eye(len(R)) - R)).max() for R in matrices)
        return "contraction" if radius < 1 else "no contraction", float(max(np.linalg.cond(R) for R in matrices))
    values = np.linalg.eigvalsh((matrices + matrices.transpose(0, 2, 1)) / 2)
    least, most = values[:, 0], np.abs(values).max(axis=1)
    zero = max(SINGULAR, 100 * float(np.finfo(matrices.dtype).eps)) * most
    if (least < -zero).any():
        return "not convex", math.nan
    if (least <= zero).any():
        return "flat", math.inf
    return "strongly convex", float((most / least).max())


def _of_many(problem: BilevelProblem, flat: Any, x: PyTree, y: PyTree) -> str:
    """The same of more unknowns than R_y is formed for."""
    if not isinstance(problem.lower, Minimize):
        return "not looked at"
    most, least = (float(part) for part in _ends(flat, x, y))
    if not (math.isfinite(most) and math.isfinite(least)):
        return "not looked at"
    return "not convex" if least < -BENT * abs(most) else "not seen to bend down"


@bounded_jit
@full_precision
def _ends(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Array, Array]:
    """Estimates of the largest and least eigenvalue of g_yy at (x, y), by thirty products."""
    return spectrum(problem, x, y, problem.lower_data.full())


@bounded_jit
@full_precision
def _matrices(problem: BilevelProblem, x: PyTree, y: PyTree, key: Array) -> Array:
    """R_y [POINTS, n, n] on all of the data, at (x, y) and around it."""
    batch, (flat, unravel) = problem.lower_data.full(), ravel_pytree(y)

    def at(number: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, number))
        first = lambda a, b: jnp.where(number == 0, a, b)  # noqa: E731
        x_at = jax.tree.map(first, x, problem.x_set.around(keys[0], x))
        y_at = jax.tree.map(first, y, problem.y_set.around(keys[1], y))
        product = oracles.hvp_operator(problem, x_at, y_at, batch)
        column = lambda v: ravel_pytree(product(unravel(v)))[0]  # noqa: E731
        return jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))

    return jax.lax.map(at, jnp.arange(POINTS))
