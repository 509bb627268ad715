"""Hypergradients that carry their error.

With R = grad_y g (or y - T), y* = y(x) and v* = R_y(x, y*)^-T f_y(x, y*),

    F(x) = f(x, y*),    grad F(x) = f_x(x, y*) - R_x(x, y*)' v*.

At computed (y, v) with residuals |R(x, y)| and r_v = f_y - R_y' v, and constants `Constants`, in 2-norms:

    delta = |R|/mu  >=  |y - y*|                                              (strong monotonicity of R in y)
    eps_v = (|r_v| + L_fy delta + L_gyy |v| delta)/mu  >=  |v - v*|
    error <= L_fx delta + L_gxy |v| delta + C_gxy eps_v.

This is a proof in exact arithmetic. For rounding, each computed residual is raised to first order by what the constants
show of the sizes involved; data that cancel before they reach f or g (residuals of least squares, say) are not seen.

Without constants the error is estimated: the Newton corrections y + d, d = -R_y^-1 R, and then v + R_y^-T r_v give a
gradient that is right to higher order; the estimate is three times its distance to the one returned, more where R is
noisier than its derivatives tell, plus an allowance for rounding. It is an estimate: status says so. Iterative methods
find the corrections to a relative residual of `ESTIMATE_TOL`: with a condition number beyond 1/ESTIMATE_TOL what soft
directions add to an error may be missed.
"""

import weakref
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.backend.bounded import bounded_jit
from bilevel.backend.precision import full_precision
from bilevel.backend.tracing import under_trace
from bilevel.linear import LinearSolver
from bilevel.lower import (
    ActiveSet,
    Adjoint,
    LowerMethod,
    Newton,
    Unrolled,
    Warm,
    check_lower,
    choose_for_derivatives,
    given_for_none,
)
from bilevel.lower.method import refuse_warm, start_y
from bilevel.lower.upper_rows import with_constraints
from bilevel.problem import BilevelProblem, Constants, check_problem
from bilevel.record import Hypergradient
from bilevel.struct import invalid

PyTree = Any
_checked: weakref.WeakSet[object] = weakref.WeakSet()  # by identity: a loop asks for one problem many times


def hypergradient(
    problem: BilevelProblem,
    x: PyTree,
    y: PyTree = None,
    *,
    method: LinearSolver | Unrolled | None = None,
    lower: LowerMethod | None = Newton(),  # noqa: B008
    v: PyTree = None,
    constants: Constants | None = None,
    estimate: bool = True,
    warm: Warm | None = None,
    batch: tuple[PyTree, PyTree] | None = None,
) -> Hypergradient:
    """The gradient of F at x, with its error. Pure; use it under jit and vmap.

    Args:
        problem: any; with `upper_constraints` the Jacobian of G(x, y(x)) and H(x, y(x)) comes with it, as
            `constraints`. A constrained lower level must be polyhedral (`polyhedral`), or on boxes, balls and simplices
            (`projected`). All of its data is used, unless `batch` says otherwise.
        x: the point, shaped like init's x0, of y's dtype.
        y: warm start of the lower level; default init's y0.
        method: `CG`, `MINRES`, `GMRES`, `Neumann`, `Dense` for the linear system, or `Unrolled`. Default: the lower
            level's last factor, with refinement; where there is none, Dense up to `linear.DENSE_LIMIT` unknowns, then
            CG (Minimize) or GMRES (FixedPoint).
        lower: a `LowerMethod`: `Newton`, `ActiveSet`, `ProjectedNewton`, or `AsGiven` to take y as it is, and the error
            says what that costs. A `Newton` gives its tolerance to the method that `lower.choose` picks in its place
            where there are constraints or many unknowns. None still means `AsGiven()`, with a DeprecationWarning; in
            the next version it will mean the default.
        v: warm start of the adjoint, shaped like y.
        constants: makes `error_bound` rigorous; for constrained lower levels it stays an estimate.
        estimate: without constants, estimate the error (two more linear solves); False gives error_bound = NaN.
        warm: where `ActiveSet` starts beside y, of an earlier solution: its `PolyhedralSolution.warm()`.
        batch: (batch of f, batch of g), as `upper` and g get them: the hypergradient, with its error, of the problem
            that has these for all of its data. It is no unbiased estimate of grad F, since y and v are solved on the
            batch. None stands for a problem's own data.

    Raises:
        NotImplementedError: for a lower level with `SmoothCoupling`, or a `Ball` beside other constraints; for `method`
            with constraints; for `warm` where the lower level is not solved by `ActiveSet`.
        InvalidInput: where x, y or v is not shaped like init's x0, y0; where problem, method or lower is none; where
            batch is no pair, or the problem's data follow from its other fields; where x and y are not of one dtype,
            or of half precision; outside of traces, for constants that prove nothing (mu <= 0, others < 0 or NaN), and
            for a y_set that is empty or has NaN.
        TypeError: where it is differentiated. `implicit_objective` and `solution_map` can be.
    """
    check_problem(problem)
    check_method(method, "hypergradient", Unrolled)
    lower = given_for_none(lower, "hypergradient")
    check_lower(lower, "hypergradient")
    check_constants(constants)
    check_y_set(problem)
    if batch is not None:
        if type(batch) is not tuple or len(batch) != 2:
            expected = "a pair, the batch of f and the batch of g"
            invalid("batch (hypergradient)", type(batch).__name__, expected, "Give None for a level without data.")
        problem = problem.on_batch(*batch)
    return _hypergradient(problem, x, y, lower, Adjoint(method, v, constants, estimate, warm))


@jax.custom_jvp
def _never_differentiated(inputs: PyTree) -> PyTree:
    """The inputs themselves. A derivative of a search leaves out how y(x) moves: from an exact warm start it is 0."""
    return inputs


@_never_differentiated.defjvp
def _refuse_derivative(_: PyTree, __: PyTree) -> NoReturn:
    raise TypeError(
        "hypergradient cannot be differentiated: it searches for y(x), and a derivative would leave out how y(x) "
        "moves. Use bilevel.implicit_objective(problem), which is F with all its derivatives, or "
        "bilevel.solution_map(problem), which is y; or lax.stop_gradient(x) where none is wanted."
    )


@bounded_jit
@full_precision
def _hypergradient(
    problem: BilevelProblem, x: PyTree, y: PyTree, lower: LowerMethod | None, adjoint: Adjoint
) -> Hypergradient:
    problem, x, y, adjoint = _never_differentiated((problem, x, y, adjoint))
    y = start_y(problem, x, y)
    x, y = jax.tree.map(jnp.asarray, (x, y))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    chosen = choose_for_derivatives(problem, x, y, lower, "hypergradient")
    if not isinstance(chosen, ActiveSet):
        refuse_warm(adjoint.warm, chosen)
    return with_constraints(problem, x, y, chosen, adjoint)


def check_constants(constants: Constants | None) -> None:
    """Raise `InvalidInput` for constants that prove nothing; traced ones give an infinite bound instead."""
    for name, value in ({} if constants is None else vars(constants)).items():
        if isinstance(value, Tracer):
            continue
        number = np.asarray(value)
        if not np.all(number > 0 if name == "mu" else number >= 0):
            wanted = "a number > 0" if name == "mu" else "a number >= 0"
            invalid(f"constants.{name} (hypergradient)", value, wanted, "Leave constants out for an estimate.")


def check_y_set(problem: BilevelProblem) -> None:
    """Raise `InvalidInput` for a y_set that is empty or has NaN; under a trace nothing is looked at."""
    if problem in _checked:
        return
    y_set = problem.y_set  # of some problems made anew each time
    if y_set.whole or y_set in _checked or under_trace(y_set):
        return
    y0: PyTree = problem.init(jax.random.key(0))[1]
    y_set.validate("y_set", y0)
    _checked.update((problem, y_set))


def check_method(method: object, what: str, *others: type) -> None:
    """Raise `InvalidInput` for what is neither a linear solver, nor one of the `others`, nor None."""
    if method is None or isinstance(method, (LinearSolver, *others)):
        return
    got = f"the class {method.__name__}" if isinstance(method, type) else f"{method!r} of type {type(method).__name__}"
    solvers = "a linear solver, as CG(), MINRES(), GMRES(), Neumann() or Dense()"
    expected = ", or ".join([solvers, *(other.__name__ for other in others)])
    invalid(f"method ({what})", got, expected, "Leave it out for the default.")
