"""The problem: functions, sets, data. One spec for every solver.

    min over x in X of  F(x) = f(x, y(x)),   y(x) = argmin over y in Y(x) of g(x, y)     [Minimize(g)]
                                        or   y(x) = T(x, y(x))                           [FixedPoint(T)]

with Y(x) = {y in Y : coupling}. Functions are static, arrays are leaves: a second instance of the same family (the same
module-level functions, other data) compiles nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend import sharding
from bilevel.backend.checks import (
    check_callable,
    check_dtypes,
    check_map,
    check_point,
    check_value,
    shape_of,
)
from bilevel.backend.functions import WithAux, keep_value, returns_aux
from bilevel.data import Full, Source, check_per_sample
from bilevel.sets import Reals, Set
from bilevel.sets.coupling import (
    LinearCoupling,
    SmoothCoupling,
    UpperConstraints,
    check_coupling,
    check_upper_constraints,
)
from bilevel.struct import InvalidInput, invalid, static, struct

PyTree = Any
Objective = Callable[[PyTree, PyTree, PyTree], Array]


@dataclasses.dataclass(frozen=True)
class Separable:
    """An objective that is a sum of n terms, each of which sees its own block of y and no other:

        f(x, y) = sum_i f_i(x, y_i),        g(x, y) = sum_i g_i(x, y_i).

    Every leaf of y has shape [n, ...], and block y_i is row i of all leaves. Where both objectives are separable, Y is
    a box (or a product of boxes) and nothing is coupled, the lower level falls apart into n small ones,
    min g(x, .) = sum_i min g_i(x, .), however large n is. `SampledPenalty` and `diagnostics.lower_gap` solve them
    block by block: one call of `terms` at one y looks at one point of every block, and the best point of each block is
    kept. Every other solver takes the objective as the function that it is.

        def upper_terms(x, y, batch): ...        # [n], e.g. the defender's losses of n images, each with its own y_i
        def lower_terms(x, y, batch): ...        # [n], e.g. the attacker's
        BilevelProblem(Separable(upper_terms), Minimize(Separable(lower_terms)), y_set=Box(lo, hi), ...)

    Args:
        terms: (x, y, batch) -> [n], a module-level function. For a mean over the blocks it divides by n itself.
    """

    terms: Callable[[PyTree, PyTree, PyTree], Array]

    def __call__(self, x: PyTree, y: PyTree, batch: PyTree) -> Array:
        """The sum of the terms, shape []."""
        return jnp.sum(self.terms(x, y, batch))


@struct
class Minimize:
    """A lower level that minimises: y(x) is a minimiser of g(x, .) over Y(x). Its residual is R(x, y) = grad_y g(x, y).

    Args:
        g: (x, y, batch) -> [].
        diagonal: (x, y, batch) -> positive numbers shaped like y, for a lower level whose Hessian g_yy is diagonal,
            or is to be taken for diagonal ("Hessian-free"). Wherever a method asks for a product with g_yy it gets
            this diagonal times the vector. Where g_yy is something else, the hypergradient and its `error_bound` are
            those of the approximation; gradients of |grad_y g|^2 stay exact.
        has_aux: whether g returns (value, aux), as `jax.grad` has it. The library takes the value.
    """

    g: Objective = static()
    diagonal: Callable[[PyTree, PyTree, PyTree], PyTree] | None = static(default=None)
    has_aux: dataclasses.InitVar[bool] = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self, has_aux: bool) -> None:
        """Keep g's value alone."""
        keep_value(self, "g", has_aux)


@struct
class FixedPoint:
    """A lower level that solves an equation: y(x) = T(x, y(x)). Its residual is R(x, y) = y - T(x, y).

    Args:
        T: (x, y, batch) -> a pytree shaped like y.
    """

    T: Callable[[PyTree, PyTree, PyTree], PyTree] = static()


def no_init(key: Array) -> tuple[PyTree, PyTree]:
    """What stands for an `init` that nobody gave."""
    invalid("init", "nothing", "a function key -> (x0, y0)", "Pass init=lambda key: (x0, y0).")


@struct
class BilevelProblem:
    """A bilevel problem: two objectives, the sets and constraints of x and y, the data, and where to start.

    Args:
        upper: f(x, y, batch) -> [], the upper objective; a mean over the batch where there is data.
        lower: `Minimize(g)` or `FixedPoint(T)`.
        x_set, y_set: closed convex sets; default the whole space.
        coupling: `LinearCoupling` or `SmoothCoupling`, constraints of the lower level in x and y; default None.
        upper_data, lower_data: sources; the batch is None where there is no data.
        init: key -> (x0, y0), pytrees of float arrays. It fixes all shapes and dtypes; x0 is jnp.zeros(0) without x.
        upper_constraints: `UpperConstraints`, constraints of the upper level in x and y(x); default None.
        has_aux: whether `upper` returns (value, aux), as `jax.grad` has it: `solve` gives the aux of the end as
            `solution.aux`, and `problem.aux(x, y)` that of any point.
    """

    upper: Objective = static()
    lower: Minimize | FixedPoint
    x_set: Set = Reals()
    y_set: Set = Reals()
    coupling: LinearCoupling | SmoothCoupling | None = None
    upper_data: Source = Full()
    lower_data: Source = Full()
    init: Callable[[Array], tuple[PyTree, PyTree]] = static(default=no_init)
    upper_constraints: UpperConstraints | None = None
    has_aux: dataclasses.InitVar[bool] = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self, has_aux: bool) -> None:
        """Keep the value of f alone."""
        keep_value(self, "upper", has_aux)

    def aux(self, x: PyTree, y: PyTree) -> PyTree:
        """What f returns beside its value at (x, y), on all of the data; None without `has_aux`. Pure."""
        f = self.upper
        return f.function(x, y, self.upper_data.full())[1] if isinstance(f, WithAux) else None

    def on_batch(self, upper: PyTree, lower: PyTree) -> "BilevelProblem":
        """The same problem with one batch of either source for all of its data.

        Raises:
            InvalidInput: the data follow from other fields, as those of imitation problems do.
        """
        if any("derived" in field.metadata for field in dataclasses.fields(self) if field.name.endswith("_data")):
            got, do = f"{type(self).__name__}, whose data follow from its fields", "Replace these fields."
            invalid("batch", got, "a problem with sources of data", do)
        return dataclasses.replace(self, upper_data=Full(upper), lower_data=Full(lower))

    @property
    def constrained_lower(self) -> bool:
        """Whether the lower level has a set or a coupling."""
        return not self.y_set.whole or self.coupling is not None

    @property
    def separable(self) -> bool:
        """Whether both objectives are `Separable`, Y is a product of intervals, and nothing is coupled."""
        lower = isinstance(self.lower, Minimize) and isinstance(self.lower.g, Separable)
        return lower and isinstance(self.upper, Separable) and self.coupling is None and self.y_set.intervals

    def on_full_data(self) -> "BilevelProblem":
        """The same problem with all of the data in every batch: what solvers that are not stochastic run on."""
        upper, lower = Full(self.upper_data.full()), Full(self.lower_data.full())
        return dataclasses.replace(self, upper_data=upper, lower_data=lower)

    def on_mesh(self, mesh: jax.sharding.Mesh | None) -> "BilevelProblem":
        """The same problem with its data split over the devices of `mesh`, the rest whole on each; None: itself."""
        if mesh is None:
            return self
        upper, lower = sharding.place_data((self.upper_data, self.lower_data), mesh)
        rest = sharding.place(dataclasses.replace(self, upper_data=Full(), lower_data=Full()), mesh)
        return dataclasses.replace(rest, upper_data=upper, lower_data=lower)

    def plain(self) -> "BilevelProblem":
        """The problem as f, g, sets and data that stand for themselves, where they follow from something else."""
        return self

    def without(self, part: str) -> "BilevelProblem":
        """The problem as if `part`, "y_set", "coupling" or "upper_constraints", had not been given."""
        left_out = next(field.default for field in dataclasses.fields(BilevelProblem) if field.name == part)
        return dataclasses.replace(self.plain(), **{part: left_out})

    def refuses(self, solver: object) -> str | None:
        """Why `solver` cannot take this kind of problem, a sentence, or None: for kinds that f and g do not define."""
        return None

    def validate(self) -> "BilevelProblem":
        """Check everything that can be checked without solving; return self.

        Raises:
            InvalidInput: naming the argument, what was got, what was expected and what to do, for functions
                that are not callable, wrong shapes or dtypes, a non-scalar objective, an empty set, lo > hi, a
                non-finite datum.
        """
        _check_kinds(self)
        self.upper_data.validate("upper_data")
        self.lower_data.validate("lower_data")
        key = jax.random.key(0)
        try:
            start = self.init(key)
        except InvalidInput:
            raise
        except Exception as error:
            invalid("init", f"{type(error).__name__}: {error}", "a function key -> (x0, y0)", "Call it with a key.")
        if not isinstance(start, tuple) or len(start) != 2:
            invalid("init", type(start).__name__, "a function key -> (x0, y0)", "Return a tuple of two pytrees.")
        x, y = start
        for name, point in (("x0", x), ("y0", y)):
            check_point(f"init: {name}", point, may_be_empty=name == "x0")
        check_dtypes("init", x, y)
        check_per_sample(self.upper_data, self.lower_data, y)
        self.x_set.validate("x_set", x)
        self.y_set.validate("y_set", y)
        batches = {}
        for name, source in (("upper_data", self.upper_data), ("lower_data", self.lower_data)):
            try:
                batches[name] = jax.eval_shape(lambda s=source: s.next(s.init(key), key, x, y)[0])
            except InvalidInput:
                raise
            except Exception as error:
                got = f"{type(error).__name__}: {error}"
                invalid(name, got, "a source whose next() gives a batch", "Check the source.")
        shape_x, shape_y = jax.eval_shape(lambda: (x, y))
        _check_scalar("upper", self.upper, shape_x, shape_y, batches["upper_data"])
        if isinstance(self.lower, Minimize):
            _check_scalar("lower (Minimize)", self.lower.g, shape_x, shape_y, batches["lower_data"])
            if self.lower.diagonal is not None:
                check_map("lower.diagonal", self.lower.diagonal, shape_x, shape_y, batches["lower_data"])
        else:
            check_map("lower (FixedPoint)", self.lower.T, shape_x, shape_y, batches["lower_data"])
        check_coupling(self.coupling, x, y)
        check_upper_constraints(self.upper_constraints, x, y)
        return self


# Whether a function has an aux is seen in the function; so `dataclasses.replace` keeps it, as it does with a field.
Minimize.has_aux = property(lambda lower: returns_aux(lower, "g"))  # pyright: ignore[reportAttributeAccessIssue]
BilevelProblem.has_aux = property(  # pyright: ignore[reportAttributeAccessIssue]
    lambda problem: returns_aux(problem, "upper")
)


def _check_kinds(problem: BilevelProblem) -> None:
    check_callable("upper", problem.upper, "f(x, y, batch) -> []")
    check_callable("init", problem.init, "key -> (x0, y0)")
    if not isinstance(problem.lower, Minimize | FixedPoint):
        do = "Wrap the function: lower=Minimize(g)."
        invalid("lower", type(problem.lower).__name__, "Minimize(g) or FixedPoint(T)", do)
    if isinstance(problem.lower, Minimize):
        check_callable("lower (Minimize)", problem.lower.g, "g(x, y, batch) -> []")
        if problem.lower.diagonal is not None:
            check_callable("lower.diagonal (Minimize)", problem.lower.diagonal, "h(x, y, batch) shaped like y")
    else:
        check_callable("lower (FixedPoint)", problem.lower.T, "T(x, y, batch) shaped like y")
    for name, kind in (("x_set", Set), ("y_set", Set), ("upper_data", Source), ("lower_data", Source)):
        value = getattr(problem, name)
        if not isinstance(value, kind):
            sets = "Use one of bilevel.Reals, Box, Ball, Simplex, Polyhedron, Product, Intersection, SmoothSet."
            do = sets if kind is Set else "Wrap the arrays: Full(arrays)."
            invalid(name, type(value).__name__, f"a {kind.__name__.lower()}", do)
    if not isinstance(problem.coupling, LinearCoupling | SmoothCoupling | None):
        got = type(problem.coupling).__name__
        invalid("coupling", got, "LinearCoupling, SmoothCoupling or None", "Wrap the constraint.")
    if not isinstance(problem.upper_constraints, UpperConstraints | None):
        got, do = type(problem.upper_constraints).__name__, "Wrap the functions: UpperConstraints(inequality=G)."
        invalid("upper_constraints", got, "UpperConstraints or None", do)
    curved = next((type(one).__name__ for one in problem.x_set.simple() if not one.polyhedral), None)
    if problem.upper_constraints is not None and curved is not None:  # who judges x knows X by its rows
        do = "Write its functions as rows of the inequality."
        invalid("x_set (with upper_constraints)", curved, "Reals, Box, Simplex, Polyhedron or a Product of them", do)


def _check_scalar(name: str, function: Objective, x: PyTree, y: PyTree, batch: PyTree) -> None:
    if isinstance(function, Separable):
        out, rows = shape_of(f"{name} (Separable)", function.terms, x, y, batch), jax.tree.map(np.shape, y)
        if {shape[:1] for shape in jax.tree.leaves(rows, is_leaf=_is_shape)} != {getattr(out, "shape", None)}:
            got = f"terms shaped {jax.tree.map(np.shape, out)} for y shaped {rows}"
            invalid(f"{name} (Separable)", got, "n terms, and n rows in every leaf of y", "Give each block a row.")
    out = shape_of(name, function.function if isinstance(function, WithAux) else function, x, y, batch)
    pair = isinstance(out, tuple) and len(out) == 2
    if isinstance(function, WithAux):
        if not pair:
            got, do = type(out).__name__, "Return a pair, or leave has_aux out."
            invalid(name, got, "(value, aux), as has_aux=True says", do)
        out = out[0]
    if not isinstance(out, jax.ShapeDtypeStruct) or out.shape != ():
        got = jax.tree.map(lambda leaf: f"shape {list(leaf.shape)}", out)
        do = "Of (value, aux) say has_aux=True." if pair else "Take the mean over the batch."
        invalid(name, got, "a scalar, shape []", do)
    check_value(name, out, y)


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) for size in value)


def check_problem(problem: object) -> None:
    """Raise `InvalidInput` for anything that is not a problem."""
    if not isinstance(problem, BilevelProblem):
        invalid("problem", type(problem).__name__, "a BilevelProblem", "Of a problems.Instance it is .problem.")


@struct
class Constants:
    """Constants of a problem that somebody has proved, in 2-norms, for y between the computed y and the true y*.

    Args:
        mu: |y1 - y2| <= |R(x, y1) - R(x, y2)|/mu. For Minimize it is the constant of strong convexity; for a
            q-contraction T it is 1 - q in the 2-norm, and (1 - q)/sqrt(dim y) in the maximum norm.
        L_fx, L_fy: Lipschitz constants of f_x and f_y in y.
        L_gxy, L_gyy: Lipschitz constants of R_x and R_y in y; 0 for quadratics.
        C_gxy: a bound of |R_x|.
        L_g: the Lipschitz constant of R in y, for the allowance for rounding and for step sizes by theory.
    """

    mu: Any
    L_fx: Any
    L_fy: Any
    L_gxy: Any
    L_gyy: Any
    C_gxy: Any
    L_g: Any
