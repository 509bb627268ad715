"""Inverse optimisation: the costs nearest to given ones for which an observed plan is a best one.

    min over x of |x - x0|^2/2   with   y(x) = y0,    y in argmin { x'y : A y <= b, 0 <= y <= 1 }.

y0 is a vertex of the polytope, the best plan of hidden costs; x0 are these with noise. y0 is a best plan for x exactly
where -x is a combination, with weights >= 0, of the normals of the rows that hold at y0. So the optimum is the
projection of -x0 on that cone, a non-negative least-squares problem. At the optimum y0 is seldom the only best plan:
the leader chooses among them.

    make(dim=3, rows=4, seed=0)

Settings that work: `BranchAndBound()`.

Reference: Ahuja, Orlin. Inverse optimization. Operations Research 49, 2001.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, Full, LinearCoupling, Minimize, UpperConstraints
from bilevel.backend.checks import is_count
from bilevel.diagnostics import GLOBAL
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

NEAR = 1e-9  # of a row, to hold at a vertex


def upper(x: Array, y: Array, batch: Array) -> Array:
    """|x - x0|^2/2, shape []."""
    return jnp.sum((x - batch) ** 2) / 2


def lower(x: Array, y: Array, batch: None) -> Array:
    """The costs x'y, shape []."""
    return x @ y


def observed(x: Array, y: Array, data: Array) -> Array:
    """y - y0."""
    return y - data


@functools.cache
def _init(dim: int) -> Callable[[Array], tuple[Array, Array]]:
    return lambda key: (jnp.zeros(dim, float), jnp.full(dim, 0.5, float))


def nearest(A: np.ndarray, b: np.ndarray, y0: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """The costs nearest to x0 for which y0 is a best plan."""
    from scipy.optimize import nnls

    rows = np.concatenate([A, np.eye(len(y0)), -np.eye(len(y0))])
    bound = np.concatenate([b, np.ones(len(y0)), np.zeros(len(y0))])
    normals = rows[rows @ y0 >= bound - NEAR]
    return -normals.T @ nnls(normals.T, -x0)[0]


def _drawn(
    dim: int, rows: int, seed: int
) -> tuple[np.random.Generator, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(what draws, A, b, hidden costs, y0), the first whose y0 no dtype rounds: else no row would hold there."""
    from scipy.optimize import linprog

    for k in range(1000):
        rng = np.random.default_rng([dim, rows, seed, k])
        A = rng.integers(-3, 4, (rows, dim)).astype(float)
        b = np.ceil(A @ rng.uniform(0.2, 0.8, dim) + 0.1)  # with room around a point
        hidden = rng.normal(size=dim)
        y0 = np.asarray(linprog(hidden, A, b, bounds=(0, 1)).x)
        near = np.round(y0 * 64) / 64
        if np.abs(y0 - near).max() < NEAR:
            return rng, A, b, hidden, near
    raise AssertionError("1000 draws without such a plan")  # pragma: no cover


def make(dim: int = 3, rows: int = 4, seed: int = 0) -> Instance:
    """The instance with a number.

    Args:
        dim: unknowns of x and of y, >= 1.
        rows: of A, >= 1.
        seed: >= 0.

    Raises:
        InvalidInput: a number out of range.
    """
    for name, value in (("dim", dim), ("rows", rows)):
        if not is_count(value, 1):
            invalid(f"{name} (inverse)", value, "a whole number >= 1", "Give a size.")
    rng, A, b, hidden, y0 = _drawn(dim, rows, seed)
    x0 = hidden + rng.normal(size=dim)
    x = nearest(A, b, y0, x0)
    problem = BilevelProblem(
        upper,
        Minimize(lower),
        y_set=Box(0.0, 1.0),
        coupling=LinearCoupling(A=floats(A), b=floats(b)),
        upper_data=Full(floats(x0)),
        init=_init(dim),
        upper_constraints=UpperConstraints(equality=observed, data=floats(y0)),
    )
    truth = Truth(float(np.sum((x - x0) ** 2) / 2), floats(x), floats(y0))
    tags = frozenset({"known-optimum", "lp-follower", "upper-constraints", "exact"})
    return Instance(problem, truth, tags=tags, referee=GLOBAL)
