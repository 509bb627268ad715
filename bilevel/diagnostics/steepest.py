"""The steepest descent of a function with kinks and an edge, from values and gradients at points around x.

F'(x; d) <= -1 for a shortest d in the cone of directions that stay in X and in F's domain; 1/|d| is the rate. Around a
kink the gradients g_j of F nearby bound it, F'(x; d) <= max_j g_j'd where F is a maximum of smooth pieces, and

    min |d|  with  g_j'd <= -1 for all j,    n_k'd <= 0 for all k

is a least-distance program. Its d is tried at the distance r: what F does there is a rate that is measured, and either
nearly what was promised, or the gradient there joins the g_j. In turn with it single gradients are followed, for pieces
of which F is a minimum, and at last the coordinates. Where X's projection moves a trial back, or F has no value, the
normal joins the n_k. So no rate is ever promised that was not seen.

Reference: Wolfe. A method of conjugate subgradients for minimizing nondifferentiable functions. Mathematical
Programming Study 3, 1975. Mahdavi-Amiri, Yousefpour. An effective nonsmooth optimization algorithm for locally
Lipschitz functions. Journal of Optimization Theory and Applications 155, 2012.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.backend.tree import norm
from bilevel.qp.least_distance import nearest

PAIRS, COORDINATES = 6, 8  # trials of both kinds of directions; at most so many coordinates, both ways
ENOUGH = 0.95  # of the promised rate: the steepest descent is found


class Look(NamedTuple):
    """F at a point."""

    value: Array
    """[], infinite where F has no value."""
    slope: Array
    """[dim], a gradient of F there."""
    out: Array
    """[dim], where there is no value: n with n'd <= 0 for all d that lead into F's domain; else 0."""


class Steepest(NamedTuple):
    """What the search finds."""

    rate: Array
    """[], max [F(x) - F(x')]/|x' - x| over the trials x', at least 0."""
    at_x: Any
    """What `look` said of x beside its `Look`."""


class _Search(NamedTuple):
    """Carry."""

    count: Array
    value: Array
    """F(x)."""
    at_x: Any
    slopes: Array
    """[trials, dim], unit gradients seen, of which those with a `size` are there."""
    sizes: Array
    """[trials], their lengths; 0 where there is none."""
    normals: Array
    """[2 trials, dim], zero where there is none."""
    rate: Array
    done: Array


def steepest(look: Callable[[Array, Any, Array], tuple[Look, Any]], project: Callable[[Array], Array], x: Array,
             like: Any, radius: Array) -> Steepest:  # fmt: skip
    """The steepest descent around x [dim] in X, on which `project` projects.

    look: (point [dim], what it said beside its `Look` of x, whether this is x) -> (`Look`, what else it says, like
    `like`).
    """
    dim, zero = x.size, jnp.zeros((), x.dtype)
    if dim == 0:  # there is nowhere to go
        return Steepest(zero, look(x, like, jnp.array(True))[1])
    trials = 1 + 2 * min(dim, COORDINATES) + (2 * PAIRS if dim > 1 else 0)
    rows = jnp.zeros((trials, dim), x.dtype)
    begin = _Search(jnp.array(0), zero, like, rows, rows[:, 0], jnp.concatenate([rows, rows]), zero, jnp.array(False))
    end = lax.while_loop(lambda c: (c.count < trials) & ~c.done, partial(_try, look, project, x, radius), begin)
    return Steepest(end.rate, end.at_x)


def _try(look: Callable, project: Callable, x: Array, radius: Array, c: _Search) -> _Search:
    """One trial; the first one looks at x."""
    first = c.count == 0
    promised, d, together = _direction(c)
    aim = x + jnp.where(first, 0, radius) * d
    there = project(aim)
    found, at = look(there, c.at_x, first)
    moved = norm(there - x)
    known = jnp.isfinite(found.value) & jnp.isfinite(found.slope).all()
    rate = (c.value - found.value) / jnp.where(moved > 0, moved, 1)
    rate = jnp.where(~first & jnp.isfinite(found.value) & (moved > 0.1 * radius), rate, 0)
    length = norm(found.slope)
    slope = jnp.where(known, found.slope, 0) / jnp.where(known & (length > 0), length, 1)
    back = aim - there
    back = jnp.where(norm(back) > 1e-6 * radius, back, 0)
    return _Search(
        count=c.count + 1,
        value=jnp.where(first, found.value, c.value),
        at_x=jax.tree.map(partial(jnp.where, first), at, c.at_x),
        slopes=c.slopes.at[c.count].set(slope),
        sizes=c.sizes.at[c.count].set(jnp.where(known, length, 0)),
        normals=c.normals.at[2 * c.count].set(_unit(back)).at[2 * c.count + 1].set(_unit(found.out)),
        rate=jnp.maximum(c.rate, rate),
        done=(together & (moved > 0.9 * radius) & (rate >= ENOUGH * promised)) | ~jnp.isfinite(c.value),
    )


def _direction(c: _Search) -> tuple[Array, Array, Array]:
    """(the rate that is promised, a unit direction [dim], whether it goes down along all gradients that were seen)."""
    trials, dim = c.slopes.shape
    some, before = c.sizes > 0, 2 * PAIRS if dim > 1 else 0
    together = (c.count % 2 == 1) & (c.count <= before)
    last = trials - 1 - jnp.argmax(some[::-1])
    single = jnp.arange(trials) == jnp.where(some[c.count // 2 - 1], c.count // 2 - 1, last)
    used = some & (together | single)
    largest = jnp.max(jnp.where(used, c.sizes, 0))
    largest = jnp.where(largest > 0, largest, 1)
    scaled = (c.sizes / largest)[:, None] * c.slopes
    A = jnp.concatenate([scaled, c.normals])
    slack = jnp.concatenate([jnp.where(used, -1.0, jnp.inf), jnp.zeros(2 * trials)]).astype(A.dtype)
    found = nearest(A, slack)
    goes = jnp.isfinite(found.d).all() & (norm(found.d) > 0)
    k = c.count - before - 1
    axis = jnp.where(jnp.arange(dim) == (k // 2) % dim, 1 - 2 * (k % 2), 0).astype(A.dtype)
    downhill = jnp.where(goes, _unit(jnp.where(goes, found.d, 0)), -c.slopes[last])
    promised = jnp.where(goes, largest / norm(jnp.where(goes, found.d, 1)), jnp.inf)
    return promised, jnp.where(c.count > before, axis, downhill), together & goes


def _unit(v: Array) -> Array:
    length = norm(v)
    return v / jnp.where(length > 0, length, 1)
