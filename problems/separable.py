"""Problems of any size with a known optimum: small ones side by side, hidden behind rotations.

After the construction of Calamai and Vicente, with blocks of our own. In block i, for u = u_i in [0, r] and v = v_i,

    linear:     min c u - v,             v in argmin { v : v >= u - p, v >= s (p - u), v <= 2 r }
    quadratic:  min (u - a)^2/2 + b v,   v in argmin { (v - u)^2/2 : v <= r - u }

with 0 < p < r, s > 0 and b > 0. The follower of a linear block has v = max(u - p, s (p - u)), so that c u - v is
concave and least at an end,

    F* = min(-s p, c r - (r - p));

that of a quadratic block has v = min(u, r - u), so that there is a minimum on either side of r/2, at a - b and at a + b
where these are inside, and F* is the lesser of the two. A problem has the sum of its blocks' optima, at u* and v*. The
leader's variable is x = M u and the follower's y = W v, M and W orthogonal: all rows are dense, and no block shows.

The number of local minima, and of nodes that a branch and bound needs, grows like 2^blocks.

    make(kind="linear", blocks=3, seed=0)

Settings that work: `BranchAndBound()` up to some ten blocks.

Reference: Calamai, Vicente. Generating linear and linear-quadratic bilevel programming problems. SIAM Journal on
Scientific Computing 14, 1993; Generating quadratic bilevel programming test problems. ACM Transactions on Mathematical
Software 20, 1994: the idea, from memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import BilevelProblem, Full, LinearCoupling, Minimize, Polyhedron
from bilevel.diagnostics import GLOBAL
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance, Truth

PyTree = Any
KINDS = "linear", "quadratic"


class Blocks(NamedTuple):
    """The numbers of the blocks, as in the module's docstring, each of shape [blocks]; those of the other kind idle."""

    r: np.ndarray
    c: np.ndarray
    p: np.ndarray
    s: np.ndarray
    a: np.ndarray
    b: np.ndarray


def upper_linear(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """The sum of c u - v."""
    return batch["c"] @ (x @ batch["M"]) - jnp.sum(y @ batch["W"])


def lower_linear(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """The sum of v."""
    return jnp.sum(y @ batch["W"])


def upper_quadratic(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """The sum of (u - a)^2/2 + b v."""
    return jnp.sum((x @ batch["M"] - batch["a"]) ** 2) / 2 + batch["b"] @ (y @ batch["W"])


def lower_quadratic(x: PyTree, y: PyTree, batch: PyTree) -> Any:
    """The sum of (v - u)^2/2."""
    return jnp.sum((y @ batch["W"] - x @ batch["M"]) ** 2) / 2


FUNCTIONS = {"linear": (upper_linear, lower_linear), "quadratic": (upper_quadratic, lower_quadratic)}


@functools.cache
def _init(blocks: int) -> Any:
    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.random.uniform(key, (blocks,)), jnp.zeros(blocks)

    return init


def make(kind: str = "linear", blocks: int = 3, seed: int = 0) -> Instance:
    """The problem of a kind and size with a number.

    Args:
        kind: "linear" or "quadratic".
        blocks: how many, >= 1; x and y have as many entries each.
        seed: >= 0.

    Raises:
        InvalidInput: another kind, or no block.
    """
    if kind not in KINDS:
        invalid("kind (separable)", repr(kind), " or ".join(KINDS), "Choose one.")
    if blocks < 1:
        invalid("blocks (separable)", blocks, ">= 1", "Take more.")
    rng = np.random.default_rng([KINDS.index(kind), blocks, seed])
    numbers = draw(blocks, rng)
    M, W = (np.linalg.qr(rng.normal(size=(blocks, blocks)))[0] for _ in range(2))
    value, u, v = (linear if kind == "linear" else quadratic)(numbers)
    C, B, h = rows(kind, numbers)
    batch = {"M": floats(M), "W": floats(W), **{name: floats(getattr(numbers, name)) for name in ("c", "a", "b")}}
    both = np.concatenate([M.T, -M.T]), np.concatenate([numbers.r, np.zeros(blocks)])
    upper, lower = FUNCTIONS[kind]
    problem = BilevelProblem(
        upper,
        Minimize(lower),
        x_set=Polyhedron(*map(floats, both)),
        coupling=LinearCoupling(floats(C @ W.T), floats(B @ M.T), floats(h)),
        upper_data=Full(batch),
        lower_data=Full(batch),
        init=_init(blocks),
    )
    tags = frozenset({"known-optimum", "coupled", "exact", f"{'lp' if kind == 'linear' else 'qp'}-follower"})
    return Instance(problem, Truth(float(value.sum()), floats(M @ u), floats(W @ v)), tags=tags, referee=GLOBAL)


def draw(blocks: int, rng: np.random.Generator) -> Blocks:
    """Random numbers, no two optima of a block as good as each other."""
    r = rng.uniform(2, 4, blocks)
    p, s, c = r * rng.uniform(0.3, 0.7, blocks), rng.uniform(0.5, 1.5, blocks), rng.uniform(-0.3, 0.3, blocks)
    a, b = r * rng.uniform(0.3, 0.7, blocks), rng.uniform(0.2, 1, blocks)
    return Blocks(r, c, p, s, a, b)


def rows(kind: str, n: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C v + B u <= h, the follower's."""
    eye, none = np.eye(len(n.r)), np.zeros((len(n.r),) * 2)
    if kind == "linear":
        parts = (-eye, eye, n.p), (-eye, -np.diag(n.s), -n.s * n.p), (eye, none, 2 * n.r)
    else:
        parts = ((eye, eye, n.r),)
    C, B, h = (np.concatenate(part) for part in zip(*parts, strict=True))
    return C, B, h


def linear(n: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(F*, u*, v*) of the blocks."""
    low, high = -n.s * n.p, n.c * n.r - (n.r - n.p)
    u = np.where(low < high, 0, n.r)
    return np.minimum(low, high), u, np.maximum(u - n.p, n.s * (n.p - u))


def quadratic(n: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(F*, u*, v*) of the blocks."""
    left, right = np.clip(n.a - n.b, 0, n.r / 2), np.clip(n.a + n.b, n.r / 2, n.r)
    F = lambda u: (u - n.a) ** 2 / 2 + n.b * np.minimum(u, n.r - u)  # noqa: E731
    u = np.where(F(left) < F(right), left, right)
    return F(u), u, np.minimum(u, n.r - u)
