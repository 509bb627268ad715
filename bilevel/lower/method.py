"""The protocol of a lower-level method: solve the lower level, and differentiate F through its solution."""

from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import oracles
from bilevel.backend.checks import check_like
from bilevel.backend.tree import poisoned
from bilevel.linear import LinearSolver
from bilevel.linear.nystrom import Nystrom
from bilevel.lower.polyhedral_level import Warm
from bilevel.problem import BilevelProblem, Constants
from bilevel.record import Hypergradient, solved
from bilevel.struct import static, struct

PyTree = Any


class LowerSolution(NamedTuple):
    """What a lower-level method returns. To take `y` is to look at the status: it is NaN where y(x) was not found."""

    iterate: PyTree
    """Where the method stopped, whatever the status, shaped like the problem's y."""
    residual: Array
    """|R(x, y)|_2 at the iterate, [], recomputed."""
    steps: Array
    """[], taken."""
    status: Array
    """[], CONVERGED, WEAKLY_ACTIVE, or why there is no solution: MAX_STEPS, STALLED, SADDLE, INFEASIBLE_LOWER,
    NONFINITE.
    """
    factor: PyTree
    """Of R_y at the iterate or close to it, for `apply_inverse`; () where none was made."""
    R: Any = ()
    """R at the iterate, [n], raveled; () from `ActiveSet`."""
    sketch: Nystrom | None = None
    """Of R_y near the iterate, from `ProjectedNewton`, a preconditioner for CG."""

    @property
    def y(self) -> PyTree:
        """The lower-level solution: the iterate where the status says that it is one (`record.solved`), else NaN."""
        return poisoned(self.iterate, solved(self.status))


@struct
class Unrolled:
    """Differentiate `num_steps` steps y <- y - step_size R(x, y) instead of using the implicit function theorem."""

    step_size: Any
    num_steps: int = static(default=100)


@struct
class Adjoint:
    """What is asked about the derivative: by which linear solver, from where, and how its error is judged.

    Args:
        method: for R_y' v = f_y, or `Unrolled`; default: what suits the lower level's own method.
        v: warm start of the adjoint, shaped like y; default 0.
        constants: make the error a proof.
        estimate: without constants, estimate the error.
        warm: of an earlier solution by `ActiveSet`, the active set and factors to start from, beside y.
    """

    method: LinearSolver | Unrolled | None = None
    v: PyTree = None
    constants: Constants | None = None
    estimate: bool = static(default=True)
    warm: Warm | None = None


class Solved(NamedTuple):
    """y(x) as a function of x that has derivatives, by the implicit function theorem."""

    y: PyTree
    """Shaped like the problem's y; it need not be a solution, the status says."""
    status: Array
    """[], as `LowerSolution.status`."""


class LowerMethod:
    """How a lower level is solved, and F differentiated through its solution. Settings are the fields of subclasses.

    All are pure, for jit and vmap. `choose` says which method a problem gets.
    """

    def solve(self, problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> LowerSolution:
        """The lower-level solution on `batch` from the warm start y."""
        raise NotImplementedError

    def hypergradient(self, problem: BilevelProblem, x: PyTree, y: PyTree, adjoint: Adjoint) -> Hypergradient:
        """The gradient of F at x on all data, with its error, from the warm start y."""
        raise NotImplementedError

    def solved(self, problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None) -> Solved:
        """y(x) on all data, differentiable in x in both modes and again.

        y is a warm start; `method` solves the linear systems of the derivatives.
        """
        raise NotImplementedError

    def objective(self, problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None) -> Array:
        """F(x) = f(x, y(x)) on all data, shape [], differentiable likewise; NaN where y(x) is not solved for."""
        found = self.solved(problem, x, y, method)
        return spoilt(oracles.upper_value(problem, x, found.y, problem.upper_data.full()), found.status)


def spoilt(value: Array, status: Array) -> Array:
    """`value`, f(x, y) or a part of y; NaN, as its derivatives, where y is not solved for. f may not depend on y."""
    return value * jnp.where(solved(status), 1.0, jnp.nan)


def refuse_solver(what: str, method: object) -> None:
    """Methods for constraints bring their own linear solver.

    Raises:
        NotImplementedError: for any other.
    """
    if method is not None:
        not_supported(what, f"method must be None where the lower level is constrained; got {type(method).__name__}")


def refuse_warm(warm: Warm | None, method: object) -> None:
    """Only `ActiveSet` starts from an active set.

    Raises:
        NotImplementedError: for any other method.
    """
    if warm is not None:
        not_supported("hypergradient", f"warm is for ActiveSet(); the lower level is solved by {type(method).__name__}")


def not_supported(what: str, reason: str) -> NoReturn:
    """Raise `NotImplementedError` for the call `what`."""
    raise NotImplementedError(f"{what}: {reason}.")


def start_y(problem: BilevelProblem, x: PyTree, y: PyTree) -> PyTree:
    """y, or init's y0 where y is None; x and y are held against init's shapes."""
    start = jax.eval_shape(lambda: problem.init(jax.random.key(0)))  # pyright: ignore[reportUnknownMemberType]
    x0, y0 = start
    check_like("x", x, x0, "init's x0")
    if y is None:
        return problem.init(jax.random.key(0))[1]
    check_like("y", y, y0, "init's y0")
    return y
