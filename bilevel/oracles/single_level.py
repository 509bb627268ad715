"""A bilevel problem with a convex follower as one level, by the follower's KKT conditions, and its derivatives.

    min f(x, y)  with  x in X,  G(x, y) <= 0,  H(x, y) = 0,
                       g_y(x, y) + c_y(x, y)' lam = 0,      c(x, y) <= 0,   lam >= 0,   lam_i c_i(x, y) = 0,

c being the follower's rows: the coupling's, and those of Y. Rows that are equalities have any sign of lam and no
product, and bounds at infinity are no rows. All of it is a function of one vector w = (x, y, lam).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.oracles.calls import coupling_values
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any
NONE, UNEQUAL, EQUAL = range(3)  # kinds of rows


class Values(NamedTuple):
    """The functions at a point w."""

    f: Array
    """[]."""
    E: Array
    """g_y + c_y'lam, [m]."""
    c: Array
    """The follower's rows, [k]; 0 where the kind is NONE."""
    G: Array
    H: Array


class Slopes(NamedTuple):
    """Their derivatives in w, [N]."""

    f: Array
    """[N]."""
    E: Array
    """[m, N]."""
    c: Array
    G: Array
    H: Array


class Sizes(NamedTuple):
    """How w = (x, y, lam) is laid out: n, m and k unknowns."""

    n: int
    m: int
    k: int

    def split(self, w: Array) -> tuple[Array, Array, Array]:
        """(x, y, lam)."""
        return w[: self.n], w[self.n : self.n + self.m], w[self.n + self.m :]


def follower_rows(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Array, Array]:
    """(c [k], kinds [k]) at (x, y); where there are no rows, one of kind NONE."""
    flat_y = ravel_pytree(y)[0]
    values, kinds = [jnp.zeros(1, flat_y.dtype)], [jnp.full(1, NONE)]

    def take(c: Array, kind: int) -> None:
        values.append(c.astype(flat_y.dtype))
        kinds.append(jnp.full(c.shape, kind))

    for part, kind in zip(coupling_values(problem, x, y), (UNEQUAL, EQUAL), strict=True):
        if part.size:
            take(part, kind)
    if problem.y_set.polyhedral:
        for C, lo, hi in problem.y_set.rows(y):
            at, same = C @ flat_y, lo == hi
            above, below = jnp.isfinite(hi), jnp.isfinite(lo) & ~same
            values += [jnp.where(above, at - hi, 0), jnp.where(below, lo - at, 0)]
            kinds += [jnp.where(same, EQUAL, jnp.where(above, UNEQUAL, NONE)), jnp.where(below, UNEQUAL, NONE)]
    elif not problem.y_set.whole:
        take(problem.y_set.values(y), UNEQUAL)
    start = 1 if len(values) > 1 else 0
    return jnp.concatenate(values[start:]), jnp.concatenate(kinds[start:])


def sizes(problem: BilevelProblem, x: PyTree, y: PyTree) -> Sizes:
    """Of w; x and y give shapes only."""
    c = jax.eval_shape(lambda: follower_rows(problem, x, y)[0])
    return Sizes(ravel_pytree(x)[0].size, ravel_pytree(y)[0].size, c.size)


def values(problem: BilevelProblem, x: PyTree, y: PyTree, w: Array) -> Values:
    """The functions at w, on all of the data; x and y give shapes only. Only for Minimize(g)."""
    assert isinstance(problem.lower, Minimize)
    g, below = problem.lower.g, problem.lower_data.full()
    to_x, to_y = ravel_pytree(x)[1], ravel_pytree(y)[1]
    flat_x, flat_y, lam = sizes(problem, x, y).split(w)
    at_x, at_y = to_x(flat_x), to_y(flat_y)

    def lagrangian(flat: Array) -> Array:
        at = to_y(flat)
        return g(at_x, at, below).astype(w.dtype) + lam @ follower_rows(problem, at_x, at)[0]

    none = jnp.zeros(0, w.dtype)
    leader = problem.upper_constraints
    G, H = (none, none) if leader is None else leader.values(at_x, at_y)
    f = problem.upper(at_x, at_y, problem.upper_data.full()).astype(w.dtype)
    return Values(f, jax.grad(lagrangian)(flat_y), follower_rows(problem, at_x, at_y)[0], G, H)


def slopes(problem: BilevelProblem, x: PyTree, y: PyTree, w: Array) -> Slopes:
    """Their derivatives at w."""
    f = jax.grad(lambda w: values(problem, x, y, w).f)(w)
    rows = jax.jacfwd(lambda w: tuple(values(problem, x, y, w)[1:]))(w)
    return Slopes(f, *rows)


def curvature(problem: BilevelProblem, x: PyTree, y: PyTree, w: Array, weights: Values) -> Array:
    """The Hessian [N, N] in w of weights.f f + weights.E'E + weights.c'c + weights.G'G + weights.H'H."""

    def total(w: Array) -> Array:
        at = values(problem, x, y, w)
        return sum((jnp.sum(a * b) for a, b in zip(at, weights, strict=True)), start=jnp.zeros((), w.dtype))

    return jax.jacfwd(jax.grad(total))(w)
