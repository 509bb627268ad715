"""The leader's domain {x in X : Y(x) is not empty}, where the follower's constraints move with x.

Outside of it F has no value, as if it were infinite, and x is moved back: with affine rows to the nearest point, since
the domain is a projection of the polyhedron of all (x, y) that are feasible; else by steps on rows that are linearised.
What is moved ends a little inside.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import constraints
from bilevel.constraints import Rows
from bilevel.sampled.blocks import Blocks
from bilevel.sampled.feasible import STEPS, Feasible, is_affine, set_rows, to_feasible

PyTree = Any


def joint_step(view: Blocks, x: PyTree, y: Array, rounds: int = 1, goal: PyTree = None) -> PyTree:
    """A point of X near the goal, else near x, where Y is not empty: on affine rows exactly, else by a step of
    Newton's.

    That of the nearest (x, y) on all rows of the coupling, of X and of Y, linearised at x and y [1, m], a little inside
    of the coupling's inequalities, to the goal and y, in |x|^2 + |s y|^2 with a small s: x moves as little as it must.
    y draws it less in each further round, which starts from the last one's y.
    """
    (flat, unravel), eps = ravel_pytree(x), float(jnp.finfo(y.dtype).eps)
    c, _, equality = view.coupling_rows(x, y)
    J = view.coupling_derivative(x, y)
    at = jnp.concatenate([flat, y[0]])
    target = at if goal is None else jnp.concatenate([ravel_pytree(goal)[0], y[0]])
    inside = 1e3 * eps * jnp.linalg.norm(J, axis=1) * (1 + jnp.max(jnp.abs(at)))
    hi = J @ at - c - jnp.where(equality, 0, inside)
    blocks = [(J, jnp.where(equality, hi, -jnp.inf), hi)]
    of_x, of_y = set_rows(view.problem.x_set, x if goal is None else goal), set_rows(view.problem.y_set, view.unpack(y))
    blocks += [(jnp.pad(C, ((0, 0), (0, y.size))), lo, hi) for C, lo, hi in of_x]
    blocks += [(jnp.pad(C, ((0, 0), (flat.size, 0))), lo, hi) for C, lo, hi in of_y]
    C, lo, hi = (jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
    is_x = jnp.arange(at.size) < flat.size
    unit = jnp.where(is_x, 1, eps ** (1 / 6)).astype(y.dtype)
    limits = Rows(C / unit[None], lo, hi, jnp.zeros((len(lo), 0), y.dtype))

    def nearest(_: Any, z: Array) -> Array:
        to = jnp.where(is_x, target, z)
        found = constraints.project_on(limits, unit * to, jnp.arange(len(lo)) < len(c)).y / unit
        return jnp.where(jnp.isfinite(found).all(), found, z)

    z = nearest(0, target) if rounds == 1 else lax.fori_loop(0, rounds, nearest, target)
    return view.problem.x_set.project(unravel(z[: flat.size]))


def into_domain(view: Blocks, x: PyTree, y: Array, rounds: int = 1) -> PyTree:
    """The point of X nearest to x, or where affine rows leave Y empty there a point of the domain, by steps of
    `joint_step` from x. y [1, m]: where a point of Y(x) is looked for.
    """
    inside = view.problem.x_set.project(x)
    if view.problem.coupling is None or not is_affine(view):
        return inside

    def step(at: tuple[PyTree, Feasible, Array]) -> tuple[PyTree, Feasible, Array]:
        x = joint_step(view, at[0], at[1].y, rounds)
        return x, to_feasible(view, x, at[1].y), at[2] + 1

    begin = x, to_feasible(view, inside, y), jnp.zeros((), int)
    end = lax.while_loop(lambda at: at[1].failed & (at[2] < most_steps(view)), step, begin)
    return jax.tree.map(partial(jnp.where, end[2] > 0), end[0], inside)


def most_steps(view: Blocks) -> int:
    """How many times `joint_step` is done, at most."""
    return 1 if is_affine(view) and view.problem.x_set.polyhedral else STEPS
