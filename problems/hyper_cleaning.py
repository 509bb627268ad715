"""Data hyper-cleaning on digits: learn which training labels to trust from a clean validation set.

    g(x, w) = mean_i sigmoid(x_i) CE_i(w) + ridge |w|^2  on training samples of which a part has wrong labels,
    f(w) = mean CE(w)  on clean validation samples,

x [train]: one logit per training sample, 0 at the start. `model=linear`: w [65, 10]. `model=mlp`: flax, 64-32-10 with
tanh; its lower level is not convex, so that it is measured at the solver's w, where the hypergradient is only formal.

A corrupted label is a uniformly random *other* label. Metrics: accuracies of the solver's w, and the F1 score of
calling a sample corrupted where sigmoid(x_i) < 1/2.

Settings that work, 1000 steps. Linear: SOBA(), or SOBA(lower_step_size=1.0, linear_step_size=0.5,
upper_step_size=optax.adam(0.02)); AID(lower_step_size=1.0, upper_step_size=optax.adam(0.1)), 100 steps.
MLP: SOBA(lower_step_size=0.2, linear_step_size=0.2, upper_step_size=optax.adam(0.05)).
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import CG, BilevelProblem, Full, Minimize
from bilevel import lower as lower_level
from bilevel.backend.tree import norm
from bilevel.diagnostics import IMPLICIT, Measurement, Referee
from bilevel.hypergradient import hypergradient
from bilevel.lower import AsGiven
from bilevel.parts.descent import descend
from bilevel.step import as_step, stepper
from bilevel.struct import invalid
from problems.datasets import accuracy, digits, floats, one_hot, source, split
from problems.instance import Instance
from problems.logistic import cross_entropy

PyTree = Any
TRUSTED = 40.0  # a logit with sigmoid(x) = 1 to rounding


def linear_scores(w: Array, Z: Array) -> Array:
    """Shape [n, 10]; w [65, 10], Z [n, 65]."""
    return Z @ w


@functools.cache
def _network(dtype: Any) -> Any:
    """The flax module 64-32-10. Flax is imported where an MLP is made, not before."""
    from flax import linen

    dense = partial(linen.Dense, param_dtype=dtype, dtype=dtype)
    return linen.Sequential([dense(32), linen.tanh, dense(10)])


def mlp_scores(w: PyTree, Z: Array) -> Array:
    """Shape [n, 10]; w flax parameters. The column of ones is left to the biases."""
    return _network(Z.dtype).apply(w, Z[:, :-1])


def _mean_loss(scores: Callable, x: Array, w: PyTree, batch: tuple[Array, Array]) -> Array:
    """Mean cross-entropy, shape []; batch (Z [n, 65], targets [n, 10])."""
    Z, targets = batch
    return jnp.mean(cross_entropy(scores(w, Z), targets))


def _weighted_loss(scores: Callable, x: Array, w: PyTree, batch: tuple[Array, Array, Array, Array]) -> Array:
    """Weighted cross-entropy plus ridge, shape []; batch (index [n], Z [n, 65], targets [n, 10], ridge [n])."""
    index, Z, targets, ridge = batch
    flat = ravel_pytree(w)[0]
    return jnp.mean(jax.nn.sigmoid(x[index]) * cross_entropy(scores(w, Z), targets)) + jnp.mean(ridge) * (flat @ flat)


SCORES = {"linear": linear_scores, "mlp": mlp_scores}
# Made once: a function is compared by identity, and one made by every call would be compiled by every call.
UPPER = {name: partial(_mean_loss, scores) for name, scores in SCORES.items()}
LOWER = {name: partial(_weighted_loss, scores) for name, scores in SCORES.items()}


@functools.cache
def _init(model: str, train: int) -> Callable[[Array], tuple[Array, PyTree]]:
    """(x0 = 0, w0) of a key: 0 for the linear model, flax's initialiser for the MLP."""

    def init(key: Array) -> tuple[Array, PyTree]:
        x = jnp.zeros(train, float)
        if model == "linear":
            return x, jnp.zeros((65, 10), float)
        return x, _network(x.dtype).init(key, jnp.zeros((1, 64), float))

    return init


def measure_at(problem: BilevelProblem, x: PyTree, y: PyTree) -> Measurement:
    """The value of f and the formal hypergradient, by 50 iterations of CG, at the given y: one of many minimisers."""
    h = hypergradient(problem, x, y, method=CG(tol=1e-3, max_iterations=50), lower=AsGiven(), estimate=False)
    violation = problem.x_set.violation(x) + problem.y_set.violation(y)
    return Measurement(h.value, norm(h.gradient), h.error_bound, h.lower_residual, violation, h.status)


AT_WEIGHTS = Referee("at the solver's weights", measure_at)


def corrupt(rng: np.random.Generator, labels: np.ndarray, corruption: float) -> tuple[np.ndarray, np.ndarray]:
    """(labels with round(corruption n) of them replaced by a uniformly random other one, which they are [n])."""
    wrong = np.zeros(len(labels), bool)
    wrong[rng.permutation(len(labels))[: round(corruption * len(labels))]] = True
    return np.where(wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels), wrong


def _accuracies(model: str, parts: dict[str, tuple[Array, Array]], w: PyTree) -> dict[str, float]:
    return {f"{name}_accuracy": accuracy(SCORES[model](w, Z), targets) for name, (Z, targets) in parts.items()}


def _baseline(model: str, parts: dict[str, tuple[Array, Array]], fit: Callable[[], PyTree]) -> dict[str, float]:
    return _accuracies(model, parts, fit())


def _metrics(
    model: str, parts: dict[str, tuple[Array, Array]], wrong: np.ndarray, x: Array, w: PyTree
) -> dict[str, float]:
    called = np.asarray(x) < 0
    f1 = 2 * (called & wrong).sum() / max(called.sum() + wrong.sum(), 1)
    return _accuracies(model, parts, w) | {"corrupted_f1": float(f1)}


@partial(jax.jit, static_argnames="convex")
def _train(problem: BilevelProblem, x: Array, convex: bool) -> PyTree:
    """The lower level at x to convergence: Newton where it is convex, else 1500 steps of Adam, step size 0.01 to 0.

    NaN where Newton does not solve it; what Adam has after its steps is what it is.
    """
    key = jax.random.key(0)
    w, data = problem.init(key)[1], problem.lower_data.full()
    if convex:
        return lower_level.solve(problem, x, w, data).y
    rule = as_step(optax.adam(optax.cosine_decay_schedule(0.01, 1500)))
    return descend(problem, x, w, stepper(rule, None, w), problem.lower_data.init(key), key, 1500).y


def make(
    seed: int = 0,
    model: str = "linear",
    corruption: float = 0.5,
    batch_size: int | None = None,
    train: int = 800,
    val: int = 200,
    ridge: float = 1e-3,
) -> Instance:
    """Hyper-cleaning on scikit-learn's digits (1797 images).

    Args:
        seed: >= 0, of the split and of the corruption.
        model: "linear" or "mlp".
        corruption: in [0, 1), the part of training labels that is wrong: round(corruption train) of them exactly.
        batch_size: samples a batch of either level, without replacement; default all of them.
        train: samples of the lower level.
        val: samples of the upper level; the others are the test samples.
        ridge: > 0, weight of |w|^2; the linear model's lower level is 2 ridge strongly convex.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    if model not in SCORES:
        invalid("model (hyper_cleaning)", repr(model), "linear or mlp", "Choose a model.")
    if not 0 <= corruption < 1:
        invalid("corruption (hyper_cleaning)", corruption, "a number in [0, 1)", "It is the part of wrong labels.")
    if not 0 < ridge < np.inf:
        invalid("ridge (hyper_cleaning)", ridge, "a finite number > 0", "It makes the lower level strongly convex.")
    Z, labels = digits()
    rows = split(seed, len(labels), train, val)
    given, wrong = corrupt(np.random.default_rng((seed, 1)), labels[rows[0]], corruption)
    clean = {name: (floats(Z[some]), one_hot(labels[some])) for name, some in (("val", rows[1]), ("test", rows[2]))}
    samples = (jnp.arange(train), floats(Z[rows[0]]), one_hot(given), jnp.full(train, ridge, float))

    problem = BilevelProblem(
        UPPER[model], Minimize(LOWER[model]), init=_init(model, train),
        upper_data=source(clean["val"], batch_size), lower_data=source(samples, batch_size),
    )  # fmt: skip

    def train_on(arrays: Any) -> PyTree:
        """The same model, with the arrays' ridge, trained on `arrays` with weights one."""
        plain = dataclasses.replace(problem, upper_data=Full(), lower_data=Full(arrays))
        return _train(plain, jnp.full(train, TRUSTED, float), model == "linear")

    def best_ridge() -> PyTree:
        """Everything, with the ridge of the best validation accuracy: a careful user's answer without cleaning.

        NaN where one of the fits is not solved: the best is then not known.
        """
        fits = [train_on((*samples[:3], jnp.full(train, value, float))) for value in np.geomspace(1e-4, 1e-1, 7)]
        return fits[np.argmax([_accuracies(model, clean, w)["val_accuracy"] for w in fits])]  # the first NaN, if any

    trained = {
        "train on everything": lambda: train_on(samples),
        "train on the clean subset": lambda: train_on(jax.tree.map(lambda leaf: leaf[~wrong], samples)),
        "train on the validation set": lambda: train_on(
            (jnp.zeros(val, int), *clean["val"], jnp.full(val, ridge, float))
        ),
    }
    if model == "linear":
        trained["train on everything, ridge by validation"] = best_ridge
    kind = {"strongly-convex-lower"} if model == "linear" else {"nonconvex-lower"}
    return Instance(
        problem,
        tags=frozenset({"real-data", "classification", "hyper-cleaning"} | kind),
        metrics=partial(_metrics, model, clean, wrong),
        baselines={name: partial(_baseline, model, clean, fit) for name, fit in trained.items()},
        referee=IMPLICIT if model == "linear" else AT_WEIGHTS,
    )
