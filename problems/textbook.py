"""Small bilevel programs of the literature, linear and quadratic, each as its numbers and with its optimum.

    min z'H z/2 + c'z + c0  over x in [lo, hi] with U z <= u,  y in argmin { z'G z/2 + d'z : A z <= b, y in [lo, hi] },

z = (x, y). Numbers and optima are from memory of the papers that the cases are named after. That each optimum is one is
proved by `certify`, and of those with two unknowns seen on a grid, too.

    make(case="candler_townsley")

Settings that work: `BranchAndBound()`.

Reference: Bard. Practical bilevel optimization. Kluwer, 1998. Floudas, Pardalos et al. Handbook of test problems in
local and global optimization. Kluwer, 1999, chapter 9.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import BilevelProblem, Box, Full, LinearCoupling, Minimize, UpperConstraints
from bilevel.diagnostics import GLOBAL
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

PyTree = Any
INF = np.inf


class Case(NamedTuple):
    """The numbers of a case, as in the module's docstring; but H and G are lists of (i, j, number), i <= j, terms
    number z_i z_j of their objectives.
    """

    n: int
    value: float
    c: tuple[float, ...]
    d: tuple[float, ...]
    A: tuple[tuple[float, ...], ...] = ()
    b: tuple[float, ...] = ()
    H: tuple[tuple[int, int, float], ...] = ()
    G: tuple[tuple[int, int, float], ...] = ()
    U: tuple[tuple[float, ...], ...] = ()
    u: tuple[float, ...] = ()
    c0: float = 0.0
    x_ends: tuple[float, float] = (0.0, INF)
    y_ends: tuple[float, float] = (0.0, INF)


CASES = {
    "liu_hart": Case(1, -16, (-1, -3), (0, 1), ((-1, 1), (1, 2), (4, -1)), (3, 12, 12)),
    "anandalingam_white": Case(
        1, -49, (-1, -3), (-1, 3), ((-1, -2), (1, -2), (2, -1), (1, 2), (-1, 2)), (-10, 6, 21, 38, 18)
    ),
    "candler_townsley": Case(
        2, -29.2, (-8, -4, 4, -40, -4), (1, 2, 1, 1, 2),
        ((0, 0, -1, 1, 1), (2, 0, -1, 2, -0.5), (0, 2, 2, -1, -0.5)), (1, 1, 1),
    ),
    "bard_falk": Case(
        2, -3.25, (-2, 1, 0.5, 0), (1, 1, -4, 1), ((-2, 0, 1, -1), (1, -3, 0, 1)), (-2.5, 2), U=((1, 1, 0, 0),), u=(2,)
    ),
    "ben_ayed_blair": Case(
        1, -2.5, (-1.5, -6, -1), (0, -1, -5), ((1, 3, 1), (2, 1, 3)), (5, 5), x_ends=(0, 1)
    ),
    "bard_tie": Case(
        1, 2, (1, 0, 1), (0, 2, 0), ((1, -1, -1),), (-4,), G=((0, 2, 1),), x_ends=(2, 4)
    ),
    "shimizu_aiyoshi": Case(
        1, 100, (0, -20), (-60, -120), ((1, 1),), (20,), H=((0, 0, 1), (1, 1, 1)), G=((0, 0, 1), (0, 1, 4), (1, 1, 4)),
        U=((-1, 1),), u=(0,), c0=100, x_ends=(0, 15), y_ends=(0, 20),
    ),
    "bard_quadratic": Case(
        1, 17, (-10, 4), (0, -2), ((-3, 1), (1, -0.5), (1, 1)), (-3, 4, 7), H=((0, 0, 1), (1, 1, 4)),
        G=((1, 1, 1), (0, 1, -1.5)), c0=26,
    ),
    "aiyoshi_shimizu": Case(
        2, 0, (2, 2, -3, -3), (0, 0, 40, 40), ((-1, 0, 2, 0), (0, -1, 0, 2)), (-10, -10),
        G=((2, 2, 1), (3, 3, 1), (0, 2, -2), (1, 3, -2)), U=((1, 1, 1, -2),), u=(40,), c0=-60,
        x_ends=(0, 50), y_ends=(-10, 20),
    ),
    "falk_liu": Case(
        2, -1, (-2, -2, 0, 0), (0, 0, 0, 0), H=((0, 0, 1), (1, 1, 1), (2, 2, 1), (3, 3, 1)),
        G=((2, 2, 1), (3, 3, 1), (0, 2, -2), (1, 3, -2)), x_ends=(-10, 10), y_ends=(0.5, 1.5),
    ),
}  # fmt: skip


def objective(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """z'H z/2 + c'z + c0, of either level."""
    z = jnp.concatenate([x, y])
    return z @ batch["H"] @ z / 2 + batch["c"] @ z + batch["c0"]


def leader_rows(x: PyTree, y: PyTree, data: PyTree) -> Any:
    """U z - u."""
    return data["U"] @ jnp.concatenate([x, y]) - data["u"]


@functools.cache
def _init(n: int, m: int) -> Any:
    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.random.uniform(key, (n,)), jnp.ones(m)

    return init


def make(case: str = "candler_townsley", seed: int = 0) -> Instance:
    """A case by its name; the seed counts for the start alone.

    Raises:
        InvalidInput: another name.
    """
    if case not in CASES:
        invalid("case (textbook)", repr(case), " or ".join(CASES), "Choose one.")
    given = CASES[case]
    n, size = given.n, len(given.c)
    A = np.array(given.A, float).reshape(-1, size)
    coupling = LinearCoupling(floats(A[:, n:]), floats(A[:, :n]), floats(np.array(given.b, float))) if len(A) else None
    leader = None
    if given.U:
        data = {"U": floats(np.array(given.U, float)), "u": floats(np.array(given.u, float))}
        leader = UpperConstraints(inequality=leader_rows, data=data)
    problem = BilevelProblem(
        objective,
        Minimize(objective),
        x_set=Box(*(floats(np.asarray(end)) for end in given.x_ends)),
        y_set=Box(*(floats(np.asarray(end)) for end in given.y_ends)),
        coupling=coupling,
        upper_data=_numbers(given.H, given.c, given.c0),
        lower_data=_numbers(given.G, given.d, 0.0),
        init=_init(n, size - n),
        upper_constraints=leader,
    )
    kind = "qp-follower" if any(min(i, j) >= n for i, j, _ in given.G) else "lp-follower"
    tags = frozenset({"known-optimum", "textbook", "exact", kind})
    return Instance(problem, Truth(float(given.value)), tags=tags, referee=GLOBAL)


def _numbers(terms: tuple[tuple[int, int, float], ...], c: tuple[float, ...], c0: float) -> Full:
    H = np.zeros((len(c), len(c)))
    for i, j, number in terms:
        H[i, j] += number
        H[j, i] += number
    return Full({"H": floats(H), "c": floats(np.array(c, float)), "c0": floats(np.asarray(c0, float))})
