"""Constraints that hold x and y together: of the lower level, and of the upper one."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.checks import check_callable, check_value, shape_of
from bilevel.backend.columns import check_columns, check_shape, columns
from bilevel.struct import invalid, static, struct

PyTree = Any


@struct
class LinearCoupling:
    """Linear constraints of the lower level that may move with x: A y + B x <= b, and A_eq y + B_eq x = b_eq.

    Either kind may be left out, and B alone, which means zero: `LinearCoupling(A_eq=A, b_eq=b)` is A y = b.

    Args:
        A, B, b: the inequalities, shapes [rows, dim y], [rows, dim x] and [rows]. Columns belong to the entries of the
            raveled y and x: their leaves one after the other in one vector, as `jax.flatten_util.ravel_pytree` does.
            Or they have the names of the leaves: A is a pytree like y, and B like x, with a leaf [rows, *shape] for
            each leaf of that shape, and None for one that no row holds.
        A_eq, B_eq, b_eq: the equalities, likewise, with a number of rows of their own.
    """

    A: Any = None
    B: Any = None
    b: Any = None
    A_eq: Any = None
    B_eq: Any = None
    b_eq: Any = None

    @property
    def num_inequalities(self) -> int:
        """How many rows of A y + B x <= b there are."""
        return 0 if self.b is None else jnp.shape(self.b)[0]

    @property
    def num_equalities(self) -> int:
        """How many rows of A_eq y + B_eq x = b_eq there are."""
        return 0 if self.b_eq is None else jnp.shape(self.b_eq)[0]

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether there are inequalities, and equalities."""
        return self.num_inequalities > 0, self.num_equalities > 0

    def values(self, x: PyTree, y: PyTree) -> tuple[Array | None, Array | None]:
        """A y + B x - b and A_eq y + B_eq x - b_eq at (x, y), [rows], of y's dtype; None where there are none."""
        rows, flat_x, flat_y = self.raveled(x, y), ravel_pytree(x)[0], ravel_pytree(y)[0]

        def affine(*parts: Any) -> Array:
            A, B, b = (jnp.asarray(part, flat_y.dtype) for part in parts)
            return A @ flat_y + B @ flat_x - b

        unequal, equal = self.sides
        return (
            affine(rows.A, rows.B, rows.b) if unequal else None,
            affine(rows.A_eq, rows.B_eq, rows.b_eq) if equal else None,
        )

    def raveled(self, x: PyTree, y: PyTree) -> "LinearCoupling":
        """The same rows as arrays with a column for each raveled entry: six of them, with zeros, or no rows, for what
        is left out; x and y give shapes only.
        """
        dtype, parts = ravel_pytree(y)[0].dtype, []
        for A, B, b in ((self.A, self.B, self.b), (self.A_eq, self.B_eq, self.b_eq)):
            b = jnp.zeros(0, dtype) if b is None else b
            parts += [columns(A, y, b, dtype), columns(B, x, b, dtype), b]
        return LinearCoupling(*parts)


class _OfData:
    """Functions of (x, y), or of (x, y, data) where data are given."""

    data: PyTree

    def arguments(self, x: PyTree, y: PyTree) -> tuple[PyTree, ...]:
        """What the functions are called with."""
        return (x, y) if self.data is None else (x, y, self.data)


@struct
class SmoothCoupling(_OfData):
    """Constraints h(x, y) <= 0 of the lower level, in every row, and equality(x, y) = 0; one of them may be left out.

    Args:
        h: (x, y) -> [rows], or [] for one row, differentiable; (x, y, data) -> the same where data are given.
        equality: likewise.
        data: arrays that both take, leaves: with module-level functions another instance compiles nothing. Default:
            None, they take x and y alone.
    """

    h: Callable[..., Array] | None = static(default=None)
    equality: Callable[..., Array] | None = static(default=None)
    data: PyTree = None

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether there are inequalities, and equalities."""
        return self.h is not None, self.equality is not None

    def values(self, x: PyTree, y: PyTree) -> tuple[Array | None, Array | None]:
        """h and equality at (x, y), shapes [rows]; None for one that was left out."""
        args = self.arguments(x, y)
        h, equality = (None if part is None else jnp.atleast_1d(part(*args)) for part in (self.h, self.equality))
        return h, equality


@struct
class UpperConstraints(_OfData):
    """Constraints of the leader in which the follower's answer stands: G(x, y) <= 0 and H(x, y) = 0 at y = y(x).

    They restrict the x that may be chosen; the follower does not see them. (The follower's own constraints are
    `BilevelProblem.coupling`; those of x alone may be an `x_set`.)

        min over x in X of f(x, y(x))   with   G(x, y(x)) <= 0,   H(x, y(x)) = 0.

    Args:
        inequality: G, (x, y) -> a pytree of float arrays of any shapes, each number of which is a row; (x, y, data) ->
            the same where data are given. Differentiable. Default: None, no rows.
        equality: H, likewise.
        data: arrays that both take, leaves: with module-level functions another instance compiles nothing. Default:
            None, they take x and y alone.
    """

    inequality: Callable[..., PyTree] | None = static(default=None)
    equality: Callable[..., PyTree] | None = static(default=None)
    data: PyTree = None

    def values(self, x: PyTree, y: PyTree) -> tuple[Array, Array]:
        """G and H at (x, y), raveled, shapes [rows of G] and [rows of H]; [0] for one that was left out."""
        args, none = self.arguments(x, y), jnp.zeros(0, ravel_pytree(y)[0].dtype)
        parts = (self.inequality, self.equality)
        G, H = (none if part is None else ravel_pytree(part(*args))[0] for part in parts)
        return G, H


def check_coupling(coupling: LinearCoupling | SmoothCoupling | None, x: PyTree, y: PyTree) -> None:
    """Raise `InvalidInput` for rows that do not fit x and y."""
    if coupling is None:
        return
    if isinstance(coupling, SmoothCoupling):
        _check_smooth(coupling, x, y)
        return
    if all(part is None for part in vars(coupling).values()):
        invalid("coupling (LinearCoupling)", "nothing", "A and b, or A_eq and b_eq", "Leave the coupling out: None.")
    for suffix in ("", "_eq"):
        A, B, b = (getattr(coupling, name + suffix) for name in ("A", "B", "b"))
        if A is None and B is None and b is None:
            continue
        label = f"coupling.%s{suffix} (LinearCoupling)"
        rows = np.shape(b) if b is not None else None
        check_shape(label % "b", b, rows if rows and len(rows) == 1 else "(rows,)")
        rows = rows or ()
        for name, part, like in (("A", A, y), ("B", B, x)):
            check_columns(label % name, part, like, rows, optional=name == "B")


def _shapes(
    given: SmoothCoupling | UpperConstraints, what: str, labels: dict[str, str], returns: str, x: PyTree, y: PyTree
) -> Iterator[tuple[str, str, PyTree]]:
    """(name, label, what it returns at (x, y)) of each function that is given, of the `labels`' names; one at least."""
    functions = {name: getattr(given, name) for name in labels if getattr(given, name) is not None}
    if not functions:
        invalid(what, "nothing", ", or ".join(labels), "Leave the constraints out: None.")
    for name, function in functions.items():
        check_callable(labels[name], function, f"{name}(x, y) -> {returns}")
        yield name, labels[name], shape_of(labels[name], function, *given.arguments(x, y))


def _check_smooth(coupling: SmoothCoupling, x: PyTree, y: PyTree) -> None:
    labels = {"h": "coupling (SmoothCoupling)", "equality": "coupling.equality (SmoothCoupling)"}
    for name, text, out in _shapes(coupling, "coupling (SmoothCoupling)", labels, "[rows]", x, y):
        if not isinstance(out, jax.ShapeDtypeStruct) or len(out.shape) > 1:
            got = jax.tree.map(lambda leaf: f"shape {list(leaf.shape)}", out)
            invalid(text, got, f"{name}(x, y) of shape [rows] or []", "Stack the constraints in one vector.")


def check_upper_constraints(given: UpperConstraints | None, x: PyTree, y: PyTree) -> None:
    """Raise `InvalidInput` unless each function that is given returns float arrays at (x, y), with a row at least."""
    if given is None:
        return
    labels = {name: f"upper_constraints.{name}" for name in ("inequality", "equality")}
    for _, label, out in _shapes(given, "upper_constraints", labels, "a pytree of arrays", x, y):
        leaves = jax.tree.leaves(out)
        if not sum(np.prod(leaf.shape, dtype=int) for leaf in leaves):
            invalid(label, "no rows", "at least one number", "Leave out what has none.")
        for leaf in leaves:
            check_value(label, leaf, y)
