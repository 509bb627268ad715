"""Multinomial logistic regression on digits, with one penalty per class, per feature, or one for all.

    g(x, W) = mean CE(Z W, labels) + sum_jk exp(x_jk) W_jk^2/2  on training rows,      f(W) = mean CE(Z W, labels)  on
    others,

W [65, 10]: 64 pixels and a constant. x is [1, 10] (a penalty per class), [65, 1] (per feature) or [1, 1], broadcast
over W, with -8 <= x <= 1.

Settings that work: SOBA(), 2000 steps, or with lower_step_size=0.4, linear_step_size=0.4,
upper_step_size=optax.adam(0.01); AID(lower_step_size=0.4, upper_step_size=optax.adam(0.2)), 150.
"""

import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, Constants, Minimize
from bilevel import lower as lower_level
from bilevel.struct import invalid
from problems.datasets import accuracy, digits, floats, one_hot, source, split
from problems.instance import Instance

LOWEST, HIGHEST = -8.0, 1.0
SHAPES = {"class": (1, 10), "feature": (65, 1), "one": (1, 1)}
Rows = tuple[Array, Array]


def cross_entropy(scores: Array, targets: Array) -> Array:
    """Per sample, shape [n]; scores [n, classes], targets one-hot [n, classes]."""
    return -jnp.sum(targets * jax.nn.log_softmax(scores), axis=1)


def upper(x: Array, W: Array, batch: Rows) -> Array:
    """Mean validation cross-entropy, shape []; batch (Z [n, 65], targets [n, 10])."""
    Z, targets = batch
    return jnp.mean(cross_entropy(Z @ W, targets))


def lower(x: Array, W: Array, batch: Rows) -> Array:
    """Mean training cross-entropy plus the penalty, shape []."""
    Z, targets = batch
    return jnp.mean(cross_entropy(Z @ W, targets)) + jnp.sum(jnp.exp(x) * W**2) / 2


@functools.cache
def _init(shape: tuple[int, int]) -> Callable[[Array], tuple[Array, Array]]:
    """(x0 = 0, W0 = 0) of any key. One function per shape, so that a second seed compiles nothing."""
    return lambda key: (jnp.zeros(shape, float), jnp.zeros((65, 10), float))


def _metrics(parts: dict[str, Rows], x: Array, W: Array) -> dict[str, float]:
    weights = np.asarray(W)
    return {f"{name}_accuracy": accuracy(np.asarray(Z) @ weights, targets) for name, (Z, targets) in parts.items()}


@jax.jit
def _fit(problem: BilevelProblem, x: Array) -> tuple[Array, Array]:
    """(f, W) at the lower-level solution; NaN where it is not solved."""
    W = lower_level.solve(problem, x, problem.init(jax.random.key(0))[1], problem.lower_data.full()).y
    return problem.upper(x, W, problem.upper_data.full()), W


def _common(problem: BilevelProblem, parts: dict[str, Rows], grid: np.ndarray) -> dict[str, float]:
    """One penalty exp(x) for all weights: the best of `grid` by the upper objective.

    NaN where one of the fits is not solved: the best is then not known.
    """
    shape = problem.init(jax.random.key(0))[0].shape
    fits = [_fit(problem, jnp.full(shape, value, float)) for value in grid]
    best = int(np.argmin([float(f) for f, _ in fits]))  # the first NaN, if there is one
    return _metrics(parts, jnp.zeros(shape), fits[best][1])


def make(
    seed: int = 0, penalties: str = "class", batch_size: int | None = None, train: int = 600, val: int = 400
) -> Instance:
    """Hyper-parameter selection on scikit-learn's digits (1797 images).

    Args:
        seed: >= 0, of the split.
        penalties: "class" (10), "feature" (65) or "one".
        batch_size: samples a batch of either level, without replacement; default all of them.
        train: rows of the lower level.
        val: rows of the upper level; the others are the test rows.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    if penalties not in SHAPES:
        invalid("penalties (logistic)", repr(penalties), f"one of {', '.join(SHAPES)}", "Choose what shares a penalty.")
    Z, labels = digits()
    rows = split(seed, len(labels), train, val)
    parts = {
        name: (floats(Z[some]), one_hot(labels[some]))
        for name, some in zip(("train", "val", "test"), rows, strict=True)
    }
    problem = BilevelProblem(
        upper, Minimize(lower), x_set=Box(LOWEST, HIGHEST), init=_init(SHAPES[penalties]),
        upper_data=source(parts["val"], batch_size), lower_data=source(parts["train"], batch_size),
    )  # fmt: skip
    return Instance(
        problem,
        constants=_constants(Z[rows[0]], Z[rows[1]], penalties),
        tags=frozenset({"real-data", "classification", "strongly-convex-lower"}),
        metrics=partial(_metrics, parts),
        baselines={
            "one penalty 1/n": lambda: _common(problem, parts, np.array([-np.log(train)])),
            "one penalty, by validation": lambda: _common(problem, parts, np.linspace(LOWEST, HIGHEST, 21)),
        },
    )


def _constants(Z_train: np.ndarray, Z_val: np.ndarray, penalties: str) -> Constants:
    """Bounds for all x in the box and all W with g(x, W) <= g(x, 0) = log 10; y(x) and the way from W = 0 are among
    them.

    The softmax has Hessian diag(p) - p p', of norm at most 1/2; its third derivative along unit vectors a, b, c is a
    central moment E[(a - Ea)(b - Eb)(c - Ec)], at most sqrt(2)/2, as entries of a unit vector differ by at most
    sqrt(2).
    The penalty's part of R_x has blocks exp(x) W over disjoint entries, and exp(x) |W|^2/2 <= log 10 within each.
    """
    train, val = (float(np.linalg.norm(Z, 2) ** 2 / len(Z)) for Z in (Z_train, Z_val))
    longest = float(np.linalg.norm(Z_train, axis=1).max())
    return Constants(
        mu=float(np.exp(LOWEST)), L_g=train / 2 + float(np.exp(HIGHEST)), L_fx=0.0, L_fy=val / 2,
        L_gxy=float(np.exp(HIGHEST)), L_gyy=float(np.sqrt(0.5)) * longest * train,
        C_gxy=float(np.sqrt(2 * np.log(10) * np.exp(HIGHEST))),
    )  # fmt: skip
