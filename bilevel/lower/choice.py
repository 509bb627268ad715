"""Which method solves a lower level: the only place that picks one."""

import warnings
from typing import Any

import jax
from jax.flatten_util import ravel_pytree

from bilevel.backend.checks import check_dtypes, check_value
from bilevel.constraints import refuse
from bilevel.linear import DENSE_LIMIT
from bilevel.lower import polyhedral
from bilevel.lower.active_set import ActiveSet
from bilevel.lower.as_given import AsGiven
from bilevel.lower.blocks import BlockMethod, Blocks, first
from bilevel.lower.method import LowerMethod, LowerSolution, not_supported
from bilevel.lower.newton import Newton
from bilevel.lower.projected_newton import ProjectedNewton
from bilevel.problem import BilevelProblem, Minimize
from bilevel.struct import invalid

PyTree = Any


def choose(problem: BilevelProblem, y: PyTree, lower: object = None, what: str = "lower.solve") -> LowerMethod:
    """The method for this lower level: `lower` itself, or its tolerance where it is for levels of another kind.

    The default is `Newton` without constraints. With sets or linear coupling it is `ActiveSet`; but `ProjectedNewton`
    where there is a ball, where y has more than `linear.DENSE_LIMIT` entries, or where g_yy is given by its diagonal,
    with which that method needs no linear solve. Without constraints it is `ProjectedNewton` for a y that large, too:
    its Newton steps are matrix-free. A `Newton` that says whether it is `dense` stays what it is there.

    The levels of `Blocks` get a `BlockMethod` around what one of them gets.

    Args:
        problem: any.
        y: shaped like the problem's; its values are not used.
        lower: a `LowerMethod`, or None for the default.
        what: the call that asks, for the error.

    Raises:
        NotImplementedError: for a kind of constraint that no method here is for, or not the one asked for.
        InvalidInput: where `lower` is no `LowerMethod`, or one for constraints, and there are none.
    """
    check_lower(lower, what)
    if isinstance(problem, Blocks):
        return lower if isinstance(lower, BlockMethod) else BlockMethod(choose(problem.block, first(y), lower, what))
    if type(lower) is polyhedral.Settings:  # as `PolyhedralSolution.kept` makes them
        lower = ActiveSet(**vars(lower))
    if isinstance(lower, AsGiven) and problem.constrained_lower:
        not_supported(what, "lower=AsGiven() has no meaning for a constrained lower level; pass ActiveSet()")
    if isinstance(lower, ProjectedNewton) and not _projection_suits(problem):
        raise NotImplementedError(
            f"lower=ProjectedNewton(): got y_set = {type(problem.y_set).__name__}, coupling = "
            f"{type(problem.coupling).__name__}; expected Box, Ball, Simplex or a Product of them, "
            "without coupling, and Minimize(g)."
        )
    if isinstance(lower, ActiveSet):
        if not problem.constrained_lower:
            invalid(f"lower ({what})", "ActiveSet", "Newton or ProjectedNewton", "The lower level has no constraints.")
        _refuse(problem, what)
    if lower is not None and not isinstance(lower, Newton):
        return lower  # pyright: ignore[reportReturnType]
    newton = Newton() if lower is None else lower
    if newton.dense is not None and not problem.constrained_lower:
        return newton  # asked for by name
    if _projection_suits(problem) and _projection_pays(problem, y):
        return ProjectedNewton(tol=newton.tol)
    if problem.constrained_lower:
        _refuse(problem, what)
        return ActiveSet(tol=newton.tol)
    return newton


def choose_for_derivatives(problem: BilevelProblem, x: PyTree, y: PyTree, lower: object, what: str) -> LowerMethod:
    """`choose`, for what differentiates y(x).

    Raises:
        InvalidInput: beside what `choose` raises, where x and y are not of one floating-point dtype, or of half
            precision and the method factors a matrix; where f or g is of more precision than they.
    """
    chosen = choose(problem, y, lower, what)
    check_dtypes(what, x, y, dense_up_to=DENSE_LIMIT if isinstance(chosen, Newton | ActiveSet) else 0)
    values = [("upper", problem.upper, problem.upper_data)]
    if isinstance(problem.lower, Minimize):
        values.append(("lower", problem.lower.g, problem.lower_data))
    for name, function, source in values:
        value = jax.eval_shape(function, x, y, source.full())  # pyright: ignore[reportUnknownMemberType]
        check_value(f"{name} ({what})", value, y)
    return chosen


def solve(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, settings: Any = None) -> LowerSolution:
    """The lower-level solution from the warm start y, by the method `settings`, or the one that `choose` picks.

    Pure; for jit and vmap.

    Raises:
        NotImplementedError: for a lower level with `SmoothCoupling`, or a `Ball` beside other constraints.
        InvalidInput: where `settings` is no `LowerMethod`.
    """
    return choose(problem, y, settings).solve(problem, x, y, batch)


def check_lower(lower: object, what: str) -> None:
    """Raise `InvalidInput` for what is neither a `LowerMethod` nor None."""
    if lower is None or isinstance(lower, LowerMethod | polyhedral.Settings):
        return
    got = f"the class {lower.__name__}" if isinstance(lower, type) else f"{lower!r} of type {type(lower).__name__}"
    kinds = "a LowerMethod: Newton(), ActiveSet(), ProjectedNewton() or AsGiven()"
    invalid(f"lower ({what})", got, kinds, "Leave it out to have one chosen.")


def given_for_none(lower: Any, what: str) -> Any:
    """`lower`, or `AsGiven()` for None with a warning, for `hypergradient` and `measure`, where None meant that."""
    if lower is not None:
        return lower
    text = f"{what}: lower=None takes y as given; write lower=AsGiven(). In the next version None means the default."
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return AsGiven()


def unsolvable(problem: BilevelProblem) -> str | None:
    """Why no method here is for this lower level, or None."""
    if isinstance(problem, Blocks):
        return unsolvable(problem.block)
    return refuse(problem) if problem.constrained_lower and not _projection_suits(problem) else None


def _refuse(problem: BilevelProblem, what: str) -> None:
    """Raise where a constrained lower level is not polyhedral."""
    reason = refuse(problem)
    if reason is not None:
        not_supported(what, reason)


def _projection_suits(problem: BilevelProblem) -> bool:
    """Whether `ProjectedNewton` can solve it: any Minimize(g) over boxes, balls, simplices or all of R^n."""
    return problem.coupling is None and isinstance(problem.lower, Minimize) and problem.y_set.faced


def _projection_pays(problem: BilevelProblem, y: PyTree) -> bool:
    """Whether it is the one to take there: see `choose`."""
    diagonal = isinstance(problem.lower, Minimize) and problem.lower.diagonal is not None
    by_diagonal = diagonal and problem.constrained_lower
    return by_diagonal or not problem.y_set.polyhedral or ravel_pytree(y)[0].size > DENSE_LIMIT
