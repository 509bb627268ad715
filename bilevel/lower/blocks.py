"""Many lower levels of one kind below one x: the problem, and the method that solves them side by side."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.backend import sharding
from bilevel.backend.checks import check_finite
from bilevel.backend.tree import norm
from bilevel.linear import LinearSolver
from bilevel.lower.method import Adjoint, LowerMethod, LowerSolution, Solved, refuse_warm
from bilevel.problem import (
    BilevelProblem,
    FixedPoint,
    Minimize,
    Separable,
    SmoothCoupling,
    no_init,
)
from bilevel.record import Hypergradient, Status, solved
from bilevel.struct import derived, invalid, static, struct

PyTree = Any
STACKED = ("upper_data", "lower_data", "coupling", "y_set")


@dataclasses.dataclass(frozen=True)
class _Each:
    """A block's function, of all blocks at once: y has a leading axis [n], and data that are `stacked` have it, too."""

    function: Callable
    stacked: bool
    mean: bool = False

    def __call__(self, x: PyTree, y: PyTree, data: PyTree) -> PyTree:
        """What the function returns for each block, [n, ...]; divided by n for a `mean`."""
        each = jax.vmap(self.function, in_axes=(None, 0, 0 if self.stacked else None))(x, y, data)
        return each / each.shape[0] if self.mean else each


@dataclasses.dataclass(frozen=True)
class _Side:
    """One side of the blocks' couplings, as `SmoothCoupling` has it: (x, y, coupling) -> [n rows]."""

    side: int
    """0 for inequalities, 1 for equalities."""
    stacked: bool

    def __call__(self, x: PyTree, y: PyTree, coupling: Any) -> Array:
        """The rows of each block, one after the other."""
        return jnp.ravel(jax.vmap(self._of_one, in_axes=(None, 0, 0 if self.stacked else None))(x, y, coupling))

    def _of_one(self, x: PyTree, y: PyTree, coupling: Any) -> Array:
        return coupling.values(x, y)[self.side]


@dataclasses.dataclass(frozen=True)
class _Repeated:
    """The start of one block for all n of them."""

    init: Callable[[Array], tuple[PyTree, PyTree]]
    n: int

    def __call__(self, key: Array) -> tuple[PyTree, PyTree]:
        x, y = self.init(key)
        return x, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.n, *jnp.shape(leaf))), y)


@struct
class Blocks(BilevelProblem):
    """n lower levels of one kind below one x: followers, tasks, scenarios, images.

        min over x in X of  F(x) = 1/n sum_i f_i(x, y_i(x)),    y_i(x) = argmin over y_i in Y_i(x) of g_i(x, y_i).

    `block` is the problem of one of them, and says the form of all: what differs from block to block are arrays, with
    a leading axis [n]. y has that axis in every leaf. `hypergradient`, `implicit_objective`, the solvers that use them
    (`LBFGS`, `TrustRegion`, `Implicit`) and the referee solve the blocks one beside the other, each by the method that
    `lower.choose` picks for one block, from a start of its own: time and memory are linear in n. One block without
    a solution leaves F without a value, and the status is that block's.

    All other solvers see one lower level, y = (y_1, ..., y_n), whose g is the sum of the g_i (`Separable`), and
    whose coupling has the functions of all blocks (`SmoothCoupling`).

        one = BilevelProblem(loss, Minimize(risk), y_set=Simplex(), lower_data=Full(scenarios), init=…)
        portfolios = Blocks(block=one, stacked=("lower_data",))

    Args:
        block: the problem of one block. Its `x_set` is the leader's; it has no `upper_constraints`.
        stacked: names of the fields of `block` whose arrays have the leading axis [n]; what else there is, is the same
            for all blocks. Of `upper_data`, `lower_data`, `coupling`, `y_set`.
        init: key -> (x0, y0), y0 of all blocks; default `block.init` for each of them.
    """

    _: dataclasses.KW_ONLY
    block: BilevelProblem
    stacked: tuple[str, ...] = static(default=("upper_data", "lower_data"))

    upper: Callable[..., Array] = derived(lambda self: self._objective(self.block.upper, "upper_data", mean=True))
    lower: Minimize | FixedPoint = derived(lambda self: self._lower())
    x_set: Any = derived(lambda self: self.block.x_set)
    y_set: Any = derived(lambda self: self._y_set())
    coupling: SmoothCoupling | None = derived(lambda self: self._coupling())
    upper_data: Any = derived(lambda self: self.block.upper_data)
    lower_data: Any = derived(lambda self: self.block.lower_data)
    upper_constraints: None = derived(lambda self: None)

    def __post_init__(self, has_aux: bool) -> None:
        """Start all blocks where `block.init` starts one, unless `init` says where."""
        if not isinstance(self.block, BilevelProblem) or isinstance(self.block, Blocks):
            invalid("block (Blocks)", type(self.block).__name__, "a BilevelProblem", "Give the problem of one block.")
        wrong = [name for name in self.stacked if name not in STACKED]
        if wrong or not self.stacked:
            do = "Name the fields of the block whose arrays have a row for each block."
            invalid("stacked (Blocks)", self.stacked, f"names out of {', '.join(STACKED)}", do)
        if self.init is no_init:
            object.__setattr__(self, "init", _Repeated(self.block.init, self.num_blocks))

    @property
    def num_blocks(self) -> int:
        """n."""
        return next(int(np.shape(leaf)[0]) for _, leaf in self._moving())

    def at(self, indices: Array) -> "Blocks":
        """The problem of these blocks alone, `indices` [k]: a batch of blocks; take y at the same ones."""
        return Blocks(block=self._with(lambda leaf: leaf[indices]), stacked=self.stacked)

    def each(self, function: Callable, *args: PyTree) -> PyTree:
        """function(problem of a block, *its args) for every block, [n, ...]; the arrays in args have that axis."""

        def one(rows: list[Array], *args: PyTree) -> PyTree:
            own = iter(rows)
            return function(self._with(lambda _: next(own)), *args)

        return jax.vmap(one)([leaf for _, leaf in self._moving()], *args)

    def on_full_data(self) -> "Blocks":
        """Itself: every step sees all blocks; `at` takes some of them."""
        return self

    def on_mesh(self, mesh: jax.sharding.Mesh | None) -> "Blocks":
        """The same problem, whole on every device of `mesh`; None: itself."""
        return self if mesh is None else sharding.place(self, mesh)

    def plain(self) -> BilevelProblem:
        """The same problem without its blocks, as one lower level."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(BilevelProblem) if field.init}
        return BilevelProblem(**fields)

    def validate(self) -> "Blocks":
        """Check the block, that arrays have one leading axis, and that nothing else stands in the leader's place.

        Raises:
            InvalidInput: as `BilevelProblem.validate`, and for `stacked` names that are none, for a stacked field
                without arrays, for leading axes of different sizes.
        """
        if self.block.upper_constraints is not None:
            do = "Leave them out of the block."
            invalid("block.upper_constraints (Blocks)", "UpperConstraints", "None", do)
        for name in ("upper_data", "lower_data"):
            if getattr(self.block, name).fraction < 1:
                do = "Take batches of blocks by Blocks.at."
                invalid(f"block.{name} (Blocks)", type(getattr(self.block, name)).__name__, "Full(arrays)", do)
        rows = {np.shape(leaf)[:1] for _, leaf in self._moving()}
        if len(rows) != 1 or () in rows or (0,) in rows:
            got = f"leading axes {sorted(rows)}" if rows else "no arrays"
            invalid("stacked (Blocks)", got, "arrays with one leading axis [n], n >= 1", "Stack the blocks' arrays.")
        for name in ("upper_data", "lower_data"):
            check_finite(name, getattr(self.block, name).full())
        self._with(lambda leaf: leaf[0]).validate()
        return self

    def _with(self, take: Callable[[Any], Any]) -> BilevelProblem:
        """The block's problem with take(leaf) for each stacked leaf."""
        leaves = [take(leaf) if stacked else leaf for stacked, leaf in self._leaves()]
        return jax.tree.structure(self.block).unflatten(leaves)

    def _leaves(self) -> list[tuple[bool, Any]]:
        """Of each leaf of the block, whether it is stacked, and itself."""
        found = jax.tree_util.tree_leaves_with_path(self.block)
        return [(path[0].name in self.stacked, leaf) for path, leaf in found]  # pyright: ignore[reportAttributeAccessIssue]

    def _moving(self) -> list[tuple[bool, Any]]:
        found = [pair for pair in self._leaves() if pair[0]]
        if not found:
            do = "Name the fields of the block whose arrays have a row for each block."
            invalid("stacked (Blocks)", self.stacked, "fields with arrays", do)
        return found

    def _objective(self, function: Callable, data: str, mean: bool = False) -> Separable:
        return Separable(_Each(function, data in self.stacked, mean))

    def _lower(self) -> Minimize | FixedPoint:
        below, stacked = self.block.lower, "lower_data" in self.stacked
        if isinstance(below, FixedPoint):
            return FixedPoint(_Each(below.T, stacked))
        diagonal = None if below.diagonal is None else _Each(below.diagonal, stacked)
        return Minimize(self._objective(below.g, "lower_data"), diagonal)

    def _y_set(self) -> Any:
        y = jax.eval_shape(self.block.init, jax.random.key(0))[1]
        like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), y)
        return self.block.y_set.stacked(self.num_blocks, like, "y_set" in self.stacked)

    def _coupling(self) -> SmoothCoupling | None:
        one: Any = jax.eval_shape(lambda: self._with(lambda leaf: leaf[0])).coupling
        if one is None:
            return None
        sides = (_Side(k, "coupling" in self.stacked) if there else None for k, there in enumerate(one.sides))
        return SmoothCoupling(*sides, data=self.block.coupling)


@struct
class BlockMethod(LowerMethod):
    """`method` for each block, all side by side. F's gradient is the mean of the blocks', and so is its error bound.

    grad F(x) = 1/n sum_i grad F_i(x),    |grad - grad F(x)| <= 1/n sum_i |grad_i - grad F_i(x)|.
    """

    method: LowerMethod

    def solve(self, problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> LowerSolution:
        """The solutions of all blocks on their data, which must be all of it: `batch` is looked at by nobody."""
        own = lambda block, y: self.method.solve(block, x, y, block.lower_data.full())  # noqa: E731
        found = _blocks(problem).each(own, y)
        return LowerSolution(found.iterate, norm(found.residual), jnp.max(found.steps), worst(found.status), ())

    def hypergradient(self, problem: BilevelProblem, x: PyTree, y: PyTree, adjoint: Adjoint) -> Hypergradient:
        """The mean of the blocks' hypergradients."""
        blocks = _blocks(problem)
        refuse_warm(adjoint.warm, self)
        n, asked = blocks.num_blocks, dataclasses.replace(adjoint, v=None)

        def own(block: BilevelProblem, y: PyTree, v: PyTree) -> Hypergradient:
            return self.method.hypergradient(block, x, y, dataclasses.replace(asked, v=v))

        v = None if adjoint.v is None else jax.tree.map(lambda leaf: n * leaf, adjoint.v)
        each = blocks.each(own, y, v)
        mean = lambda leaf: jnp.mean(leaf, axis=0)  # noqa: E731
        return Hypergradient(
            value=mean(each.value), gradient=jax.tree.map(mean, each.gradient), y=each.y,
            lower_residual=norm(each.lower_residual), linear_residual=norm(each.linear_residual) / n,
            error_bound=mean(each.error_bound), active_margin=jnp.min(each.active_margin), status=worst(each.status),
            v=jax.tree.map(lambda leaf: leaf / n, each.v),
        )  # fmt: skip

    def solved(self, problem: BilevelProblem, x: PyTree, y: PyTree, method: LinearSolver | None) -> Solved:
        """y(x), block by block, differentiable likewise."""
        found = _blocks(problem).each(lambda block, y: self.method.solved(block, x, y, method), y)
        return Solved(found.y, worst(found.status))


def first(y: PyTree) -> PyTree:
    """The y of the first block."""
    return jax.tree.map(lambda leaf: leaf[0], y)


def worst(status: Array) -> Array:
    """One word for those of all blocks, [n]: the first that is no good word, else the weakest, []."""
    bad = ~solved(status)
    weakest = jnp.array(Status.CONVERGED)
    for word in (Status.ESTIMATED, Status.UNCHECKED, Status.WEAKLY_ACTIVE):
        weakest = jnp.where(jnp.any(status == word), word, weakest)
    return jnp.where(jnp.any(bad), status[jnp.argmax(bad)], weakest)


def _blocks(problem: BilevelProblem) -> Blocks:
    assert isinstance(problem, Blocks)
    return problem
