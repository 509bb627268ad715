"""What a computation leaves behind: how it ended, what it found and cost, who judges it, a record of how it went."""

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend.table import Table
from bilevel.backend.table import text as table_text
from bilevel.backend.tree import poisoned
from bilevel.struct import static, struct

PyTree = Any


class Status(enum.IntEnum):
    """How a computation ended: a number, and a sentence that says what it means and which argument to change.

    Numbers are stored in checkpoints and results. They never change their meaning; new ones are added at the end.
    """

    advice: str
    """The sentence."""

    def __new__(cls, value: int, advice: str) -> "Status":
        """Make a member from its number and sentence."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.advice = advice
        return member

    def __str__(self) -> str:
        """The name. The number is `int(status)`, and what files hold."""
        return self.name

    def __format__(self, spec: str) -> str:
        """The name, as `spec` lays out text; the number where it ends with a type of numbers, as in `{status:d}`."""
        return format(int(self), spec) if spec[-1:] in tuple("bcdeEfFgGnoxX%") else format(self.name, spec)

    CONVERGED = 0, "The referee recomputed every residual, and all are within the tolerance."
    MAX_STEPS = 1, "The step limit came first. Raise max_steps or the step size, or loosen tol."
    TIME_LIMIT = 2, "The time limit came first. Raise time_limit, or loosen tol."
    NONFINITE = (
        3,
        "A value became infinite or NaN; the last finite iterate is returned. Reduce the solver's step sizes.",
    )
    INFEASIBLE_LOWER = (
        4,
        "No y fulfils the lower level's constraints at this x. Restrict x_set, or relax coupling or y_set.",
    )
    WEAKLY_ACTIVE = (
        5,
        "A lower constraint is active with a multiplier near zero: F may have a kink here, and the gradient is that "
        "of one side. Look at active_margin, the distance to a change of the active set; DSBLO and SSIGD smooth F.",
    )
    STALLED = (
        6,
        "Rounding error stopped progress before the tolerance was met. Loosen tol, rescale f and g, or use float64.",
    )
    INTERRUPTED = 7, "Interrupted from the keyboard; everything up to the interruption is returned."
    ESTIMATED = (
        8,
        "Solved to what rounding leaves of a residual, in units of the terms that cancel in it, tr(g_yy) |y| and "
        "|grad_y g|, with an error that is estimated, not proved. Pass constants= of f and g to certify it.",
    )
    STOPPED = 9, "The callback asked to stop; everything up to then is returned."
    SADDLE = (
        10,
        "The lower level stopped where g_yy is not positive definite: g is not strongly convex there, and y may be a "
        "saddle point or a maximum of it. Start y elsewhere, or add a strongly convex term to g.",
    )
    UNSOLVED_LINEAR = (
        11,
        "The adjoint's linear system R_y' v = f_y is not solved to its tolerance, so that the error is unknown. Pass "
        "method=Dense() to hypergradient, or another method with more iterations, as CG(max_iterations=10000); or add "
        "a strongly convex term to g, which improves the condition number of R_y.",
    )
    SATURATED = (
        13,
        "What is learned is saturated: the reward sits at its clamp on most demonstrations, or the discriminator is "
        "right at nearly every step, so that gradients vanish. Lower the upper step size, or raise weight_decay.",
    )
    DIVERGED = (
        14,
        "F ends above its start, or still climbs, by more than noise explains. Reduce the solver's upper step size, or "
        "take solution.best, the best point that was measured.",
    )
    GOLDSTEIN = (
        15,
        "Zero is nearly in the convex hull of gradients near x: x is close to a kink of F, which may be a minimum, but "
        "also a maximum. Reduce the solver's upper step size to come closer; stats has the radius and the distance.",
    )
    UNSOLVED_LOWER = (
        16,
        "The referee came to its own step limit before it had solved the lower level at this x. Pass measure= with a "
        "larger one, as lambda p, x, y: bilevel.diagnostics.measure(p, x, y, lower=bilevel.Newton(max_steps=1000)).",
    )
    UNDETERMINED = (
        17,
        "The lower level has many minimisers, or none: g_yy is singular, and g does not grow along a direction that "
        "the active constraints leave free. Add a strongly convex term to g, or constraints that bound y_set there; "
        "SampledPenalty is for lower levels with many minimisers.",
    )
    NO_FOLLOWER = (
        18,
        "Y(x) is empty where the run ended: x is outside of the leader's domain, and F has no value there. "
        "solution.best has a follower. Restrict x_set, relax coupling or y_set, or reduce the upper step size.",
    )
    INFEASIBLE = 19, "It is proved that no x has an answer y within all constraints. Relax those of either level."
    UNBOUNDED = 20, "F falls for ever along a ray of feasible points. Bound x_set or y_set, or look at the sign of f."
    UNCONFIRMED = (
        21,
        "The referee's searches for the least g(x, .) end in many wells, and v(x) may be lower than all of them. Pass "
        "measure=bilevel.diagnostics.by_value(num_points=16384, num_starts=64), or state blocks by Separable.",
    )
    UNCHECKED = 12, "Solved, but no error was asked for. Use an implicit method with estimate=True, or pass constants=."


SOLVED = (Status.CONVERGED, Status.WEAKLY_ACTIVE, Status.ESTIMATED, Status.UNCHECKED)
"""Good words: `solved`."""


def solved(status: Array | int) -> Array:
    """Whether a lower level or a hypergradient that ended with this status is solved, a boolean shaped like `status`.

    A weakly active one is; a stalled one is not, since nothing says how far it is from a solution.
    """
    found: Array = jnp.asarray(status)  # pyright: ignore[reportUnknownMemberType]  # its device= has no type
    same = [found == word for word in SOLVED]
    return same[0] | same[1] | same[2] | same[3]


@struct
class ConstraintGradients:
    """The upper constraints at x and y(x), G first and then H, and their gradients through y(x); `rows` of them."""

    values: Array
    """[rows]."""
    jacobian: PyTree
    """Of G(x, y(x)) and H(x, y(x)), shaped like x with a leading axis [rows]."""
    error_bound: Array
    """Of each row's gradient in the 2-norm, [rows], as `Hypergradient.error_bound`; never proved."""


@struct
class Hypergradient:
    """A hypergradient, and how far to trust it."""

    value: Array
    """f(x, y), shape []: F(x), if y is y(x)."""
    gradient: PyTree
    """The gradient of F at x, shaped like x; NaN where there is none, as below an infeasible lower level."""
    y: PyTree
    """The lower-level point at which it was computed."""
    lower_residual: Array
    """|R(x, y)|, shape []: how far y is from solving the lower level."""
    linear_residual: Array
    """|f_y - R_y' v|, shape []: how far v is from solving the adjoint's linear system; NaN for `Unrolled`."""
    error_bound: Array
    """A bound of |gradient - grad F(x)| in the 2-norm, shape []. Where `constants` were given it is rigorous in exact
    arithmetic, with an allowance for rounding; elsewhere it is estimated. Infinite where it is not known."""
    active_margin: Array
    """The distance to a change of the active set, shape []; infinite without constraints."""
    status: Array
    """A `Status` as an integer array, shape []: CONVERGED (the bound is proved from the constants), ESTIMATED,
    UNCHECKED (no bound was asked for), UNSOLVED_LINEAR, or why the lower level failed."""
    v: PyTree
    """The adjoint, shaped like y: a warm start for the next call."""
    constraints: ConstraintGradients | None = None
    """The upper constraints and their gradients, where the problem has some. `status` is the worst of theirs, too."""

    def checked(self) -> "Hypergradient":
        """The same with its numbers NaN where the status is not one of a solved problem (`solved`).

        For whoever takes the numbers without reading the status.
        """
        numbers = self.value, self.gradient, self.y, self.v, self.constraints
        value, gradient, y, v, constraints = poisoned(numbers, solved(self.status))
        return dataclasses.replace(self, value=value, gradient=gradient, y=y, v=v, constraints=constraints)

    def __str__(self) -> str:
        """The numbers in a line, and the status with its sentence in another; a gradient of which nothing is known is
        no number.
        """
        status, bound = Status(int(self.status)), float(self.error_bound)
        sizes = np.abs(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(self.gradient)]).astype(float))
        unit = np.max(sizes, initial=0) or 1.0  # squares of small numbers underflow
        gradient = unit * np.linalg.norm(sizes / unit)
        known = np.isfinite(bound) or status == Status.UNCHECKED
        return (
            f"F = {float(self.value):.10g}, |gradient| {f'= {gradient:.4e}' if known else 'unknown'}, "
            f"error {f'<= {bound:.1e}' if np.isfinite(bound) else 'unknown'}, "
            f"lower residual {float(self.lower_residual):.1e}\n{status.name}: {status.advice}"
        )


@struct
class OracleCount:
    """Numbers of oracle calls by kind.

    An HVP is a product R_y v or R_y' v, and a JVP a product with R_x or R_x'; R_y is g_yy or I - T_y, R_x is g_yx or
    -T_x.
    """

    upper_values: int = static(default=0)
    upper_gradients: int = static(default=0)
    lower_values: int = static(default=0)
    lower_gradients: int = static(default=0)
    hvps: int = static(default=0)
    jvps: int = static(default=0)

    def as_dict(self) -> dict[str, int]:
        """The numbers by the name of their kind."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def total(self) -> int:
        """Calls of all kinds, each counted once."""
        return sum(self.as_dict().values())

    def passes(self, upper_fraction: float, lower_fraction: float) -> float:
        """Calls weighted by the fraction of the data that each touches: 1 is one call on all of the data.

        In this unit stochastic and full-batch solvers can be compared.
        """
        upper = self.upper_values + self.upper_gradients
        return upper * upper_fraction + (self.total - upper) * lower_fraction


class Measurement(NamedTuple):
    """What the referee finds at a solver's (x, y), all of shape []."""

    value: Array
    """F(x) = f(x, y(x)), with y(x) solved by the referee."""
    hypergradient: Array
    """The norm of the gradient mapping of F at x; with upper constraints the distance to a KKT point's equations
    (`parts.reduced`)."""
    error_bound: Array
    """A bound or an estimate of the error of the gradient behind it."""
    lower_residual: Array
    """|R(x, y)| at the solver's y; for a constrained lower level |y - Proj(y - grad_y g)| on its feasible set."""
    violation: Array
    """The distance of x to X, plus that of y to Y, plus the norm of the coupling's violations, plus that of the upper
    constraints' at y(x)."""
    status: Array
    """The status of the hypergradient."""
    lower_distance: Array | float = 0.0
    """|y - y(x)|/(1 + |y(x)|) at the solver's y."""
    margin: Array | float = math.inf
    """The distance to a change of the lower level's active set, over 1 + |y(x)|; infinite where there is none."""
    multiplier: Array | float = math.nan
    """The largest |multiplier| of the upper constraints; NaN without."""


class Row(TypedDict):
    """One measurement of a run, a row of its record.

    Beside these stand the numbers of the solver's own `info`, by their names there.
    """

    step: int
    """Steps done, >= 0."""
    value: float
    """F(x), with the lower level solved again by the referee."""
    hypergradient: float
    """The norm of the projected gradient mapping of F at x."""
    lower_residual: float
    """The norm of R(x, y) at the *solver's* y."""
    violation: float
    """The distance of (x, y) to the sets, and the norms of the violations of the coupling and the upper constraints."""
    oracles: float
    """Oracle calls so far, in passes over the data (`OracleCount.passes`)."""
    time: float
    """Seconds that the solver took, without compiling and measuring."""
    error_bound: float
    """A bound or an estimate of the error of the measured hypergradient."""
    status: int
    """The `Status` of the measured hypergradient."""
    kink: NotRequired[float]
    """The rate of the steepest descent of F at x, where x was tested for a kink (`diagnostics.kinks`)."""


class Stats(TypedDict):
    """What a run was, and what it cost."""

    solver: str
    """The solver's class."""
    referee: str
    """Who measured: the referee's name, which says how."""
    steps: int
    """Steps done, >= 0."""
    tol: float
    """The tolerance that was in force."""
    setup_time: float
    """Seconds of set-up, most of them compilation."""
    solve_time: float
    """Seconds that the solver took."""
    measure_time: float
    """Seconds that the referee took."""
    oracles: float
    """Oracle calls in passes over the data (`OracleCount.passes`)."""
    cost: dict[str, int]
    """Oracle calls of one step, by kind."""
    best_step: int
    """After how many steps the best point was measured."""
    best_value: float
    """F there."""
    end_is_worse: bool
    """Whether the end is worse than it by more than rounding (`run.verdicts.worse`)."""
    kink: float | None
    """The rate of the steepest descent at the end, where that was tested for a kink; None elsewhere."""
    goldstein: dict[str, float] | None
    """The radius and distance behind the word GOLDSTEIN; None elsewhere."""
    recommended: str
    """The solver and the reason, where `bilevel.recommend` chose it; "" where it was named."""
    failed: dict[str, int]
    """An assumption of the method that steps saw fail, as a sentence: at how many of them."""


Check = Callable[[Any, PyTree, PyTree, list[Row]], tuple[dict[str, float], list[str]]]


@dataclass(frozen=True)
class Referee:
    """Who judges a run: how (x, y) is measured, to what tolerance, and how the measurement is itself checked.

    `bilevel.diagnostics` has the two that serve most problems, IMPLICIT and BY_VALUE; `bilevel.run.referee_of` says
    which one a run has. Two referees are equal where all their fields are; they can be hashed.
    """

    name: str
    """What the referee does, in a few words."""
    measure: Callable[[Any, PyTree, PyTree], Measurement]
    """A function (problem, x, y) -> `Measurement` on all data; pure. It sees neither the solver nor its state."""
    exponent: float = 0.5
    """Where `solve` is given no tol it takes eps^exponent, with eps of the dtype of x."""
    check: Check | None = None
    """A function (problem, x, y, rows), rows being those of the run's record, that computes again what `measure` found
    by another algorithm. It returns the numbers that it finds, by name, and the names of those that disagree with the
    last row. None where there is no second way."""
    at_y: bool = False
    """Whether F is taken at the solver's own y, so that a lower residual counts as a violation beside F."""
    kink: Callable[[Any, PyTree, PyTree, float], Any] | None = None
    """A function (problem, x, y, near) -> `diagnostics.kinks.Kink`: the steepest descent of F where its gradient jumps.
    None where nothing is known of kinks."""
    multipliers: Callable[[Any, PyTree, PyTree], Any] | None = None
    """A function (problem, x, y) -> the multipliers of the upper constraints at x; None where it knows of none."""
    hull: Callable[[Any, PyTree, float], float] | None = None
    """A function (problem, x, radius) -> the distance of zero to the convex hull of gradients of F around x."""

    def default_tol(self, x: PyTree) -> float:
        """The tol of a run whose upper variable is `x`; the finest of its dtypes counts."""
        finfo: Any = jnp.finfo  # whose fields have no types
        eps = min(finfo(leaf.dtype).eps for leaf in jax.tree.leaves(x))
        return float(np.power(eps, self.exponent))


class Record(Table):
    """The measurements of a run: `rows`, a `Row` for each measured step, and `record["value"]`, its columns by name.

    It is a mapping of columns, with `keys()`, `in` and iteration over names, and a `to_pandas()`. As with a data frame
    its length is the number of rows. A column that nobody measured is an error; the columns of the solver's own info
    begin after the first step, with NaN before.
    """

    rows: list[Row]
    expected = tuple(Row.__annotations__)

    def __init__(self, rows: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Start from `rows`, one mapping of numbers by column each."""
        self.rows = [cast(Row, row) for row in rows or ()]

    def append(self, **row: float) -> None:
        """Add a row."""
        self.rows.append(cast(Row, row))

    def __repr__(self) -> str:
        """The number of rows and the columns, then the first and last rows of what every run has."""
        count = f"{len(self)} row{'' if len(self) == 1 else 's'}"
        shown = [name for name in self.expected if name in self]
        return f"Record of {count}; columns: {', '.join(self)}\n{table_text(self.rows, shown)}"

    def encode(self) -> list[dict[str, str]]:
        """The rows with each number as hexadecimal text: exact, and JSON has no word for NaN."""
        rows = cast(list[dict[str, float]], self.rows)
        return [{name: float(value).hex() for name, value in row.items()} for row in rows]

    @classmethod
    def decode(cls, rows: list[dict[str, str]]) -> "Record":
        """The record that `encode` wrote."""
        whole = ("step", "status")
        numbers = [{name: float.fromhex(text) for name, text in row.items()} for row in rows]
        return cls([{name: int(value) if name in whole else value for name, value in row.items()} for row in numbers])
