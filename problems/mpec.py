"""Convex quadratic followers below convex quadratic leaders, with chosen active sets at a known global optimum.

    min f(z),   z = (x, y),   y in argmin { y'H y/2 + y'G x + q'y : A y + B x <= b },
    f(z) = |D (z - z*)|^2/2 + d'(z - z*).

At z* = (x*, y*) `strong` rows hold with a multiplier, `weak` ones hold without one, and the others have slack. With
lam* the follower's multipliers, E z + A'lam + q = 0 his stationarity, E = (G, H), and c = A y + B x - b, numbers a, xi
and eta = A a are drawn with xi >= 0 on the rows that hold, 0 elsewhere, eta >= 0, 0 on strong ones, and

    d = -E'a - (B, A)'xi.

For any x, an answer y and its multipliers lam >= 0, d'(z - z*) = eta'lam - xi'c >= 0 then. So z* is the optimum, with
F* = 0, and since D is regular the only one; as a point of the single level it is strongly stationary, by these
multipliers. For a = 0 the follower would not matter. Independent rows of A, at most as many as y has entries, make eta
free to choose.

    make(dim_x=3, dim_y=6, rows=5, strong=2, weak=1, seed=0)

Settings that work: `BranchAndBound()`, `MPEC()`.

Reference: Jiang, Ralph. QPECgen, a MATLAB generator for mathematical programs with quadratic objectives and affine
variational inequality constraints. Computational Optimization and Applications 13, 1999: the idea of drawing a point
and its multipliers first. That the optimum is global is by the argument above.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Full, LinearCoupling, Minimize
from bilevel.backend.checks import is_count
from bilevel.diagnostics import GLOBAL
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth


class Drawn(NamedTuple):
    """An instance's numbers, as in the module's docstring."""

    H: np.ndarray
    G: np.ndarray
    q: np.ndarray
    A: np.ndarray
    B: np.ndarray
    b: np.ndarray
    D: np.ndarray
    """[n + m], a diagonal."""
    d: np.ndarray
    x: np.ndarray
    y: np.ndarray
    lam: np.ndarray
    strong: np.ndarray
    """Numbers of rows."""
    weak: np.ndarray


def upper(x: Array, y: Array, batch: dict[str, Array]) -> Array:
    """f at (x, y), shape []."""
    away = jnp.concatenate([x, y]) - batch["z"]
    return jnp.sum((batch["D"] * away) ** 2) / 2 + batch["d"] @ away


def lower(x: Array, y: Array, batch: dict[str, Array]) -> Array:
    """The follower's y'H y/2 + y'G x + q'y, shape []."""
    return y @ batch["H"] @ y / 2 + y @ (batch["G"] @ x + batch["q"])


@functools.cache
def _init(n: int, m: int) -> Callable[[Array], tuple[Array, Array]]:
    def init(key: Array) -> tuple[Array, Array]:
        z = jax.random.normal(key, (n + m,), float)
        return z[:n], z[n:]

    return init


def draw(dim_x: int, dim_y: int, rows: int, strong: int, weak: int, rng: np.random.Generator) -> Drawn:
    """Numbers with a known optimum."""
    n, m = dim_x, dim_y
    Z = rng.normal(size=(m, m)) / np.sqrt(m)
    H, G = Z @ Z.T + 0.5 * np.eye(m), rng.normal(size=(m, n)) / np.sqrt(m)
    A, B = rng.normal(size=(rows, m)) / np.sqrt(m), rng.normal(size=(rows, n)) / np.sqrt(n)
    x, y = rng.normal(size=n), rng.normal(size=m)
    order = rng.permutation(rows)
    with_price, without, idle = order[:strong], order[strong : strong + weak], order[strong + weak :]
    lam, slack, xi, eta = np.zeros((4, rows))
    lam[with_price], slack[idle] = rng.uniform(0.1, 1, strong), rng.uniform(0.1, 1, len(idle))
    xi[order[: strong + weak]] = rng.uniform(0.1, 1, strong + weak)
    eta[order[strong:]] = rng.uniform(0.1, 1, rows - strong)
    a = np.linalg.lstsq(A, eta, rcond=None)[0]
    d = -np.concatenate([G, H], axis=1).T @ a - np.concatenate([B, A], axis=1).T @ xi
    q = -(H @ y + G @ x + A.T @ lam)
    return Drawn(
        H, G, q, A, B, A @ y + B @ x + slack, rng.uniform(0.5, 1.5, n + m), d, x, y, lam, with_price, without
    )  # fmt: skip


def make(dim_x: int = 3, dim_y: int = 6, rows: int = 5, strong: int = 2, weak: int = 1, seed: int = 0) -> Instance:
    """An instance with a number.

    Args:
        dim_x: unknowns of the leader, >= 1.
        dim_y: unknowns of the follower, >= 1.
        rows: of the follower, in [1, dim_y].
        strong: how many hold with a multiplier.
        weak: how many hold without one; strong + weak <= rows.
        seed: >= 0.

    Raises:
        InvalidInput: a number out of range.
    """
    given = {"dim_x": (dim_x, 1), "dim_y": (dim_y, 1), "rows": (rows, 1), "strong": (strong, 0), "weak": (weak, 0)}
    for name, (value, least) in given.items():
        if not is_count(value, least):
            invalid(f"{name} (mpec)", value, f"a whole number >= {least}", "Give a number of rows or unknowns.")
    if rows > dim_y or strong + weak > rows:
        do = "Independent rows make the optimum known."
        invalid("rows, strong + weak (mpec)", (rows, strong + weak), f"at most ({dim_y}, rows)", do)
    drawn = draw(dim_x, dim_y, rows, strong, weak, np.random.default_rng([dim_x, dim_y, rows, strong, weak, seed]))
    above = {"z": np.concatenate([drawn.x, drawn.y]), "D": drawn.D, "d": drawn.d}
    below = {"H": drawn.H, "G": drawn.G, "q": drawn.q}
    problem = BilevelProblem(
        upper,
        Minimize(lower),
        coupling=LinearCoupling(*map(floats, (drawn.A, drawn.B, drawn.b))),
        upper_data=Full({name: floats(part) for name, part in above.items()}),
        lower_data=Full({name: floats(part) for name, part in below.items()}),
        init=_init(dim_x, dim_y),
    )
    tags = {"known-optimum", "coupled", "qp-follower", "exact"} | ({"weakly-active"} if weak else set())
    return Instance(problem, Truth(0.0, floats(drawn.x), floats(drawn.y)), tags=frozenset(tags), referee=GLOBAL)
