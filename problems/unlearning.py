"""Unlearning as simple bilevel optimisation: of all weights that have forgotten, those that retain the most.

    min over y of f(y), the loss on rows to retain,     y in argmin g, the loss of forgetting.

There is no x, and g has many minimisers. The weights are theta = base + y, y = 0 at first, base being those of a model
trained on everything: so it is data, and another seed compiles nothing.

    least-squares: f = |Z_r theta - t_r|^2/(2 n_r), g = |Z_f theta|^2/(2 n_f) with fewer rows to forget than weights.
                   argmin g is the null space of Z_f, and with a basis N of it y* + base = N u*, u* the least squares
                   of Z_r N: the optimum is known.
    digits:        scikit-learn's digits, a network 64-32-10 with tanh, all training rows of one digit to be forgotten;
                   f = CE + l2 |theta|^2/2 on the other rows, and g one of
                       uniform: KL(uniform | model), 0 where the model says nothing of the rows,
                       npo: the mean of -(2/b) log sigmoid(-b log(p/p_base)), p the probability of the row's label,
                            b = `sharpness`; it falls without end, to 0, so that argmin g is empty in the strict sense.
                   The truth is retraining from the same start on the rows to retain: no minimiser of g, and nothing
                   that f and g know of.

Metrics of digits, on test rows: `forget_accuracy` and `retain_accuracy`, of the digit's rows and the others, and
`kl_to_retrained`, the mean of KL(retrained | model) over all of them, the honest distance to the truth.

Settings that work: `BOME(num_lower_steps=1)`, dynamic barrier gradient descent; BLUR is the same with `equality=True`.

Reference: Reisizadeh, Jia, Bu, Vinzamuri, Ramakrishna, Chang, Cevher, Liu, Hong. BLUR: a bi-level optimization approach
for LLM unlearning. EACL 2026, arXiv:2506.08164. npo: Zhang, Lin, Bai, Mei, 2024, arXiv:2404.05868.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import BilevelProblem, Full, Minimize, Status, oracles
from bilevel.backend.checks import is_count
from bilevel.diagnostics import Measurement, Referee
from bilevel.struct import invalid
from problems.datasets import accuracy, digits, floats, one_hot, split
from problems.instance import Instance, Truth
from problems.logistic import cross_entropy

PyTree = Any
KINDS = "least-squares", "digits"
LOSSES = "uniform", "npo"
HIDDEN, TRAIN, VAL, L2 = 32, 1000, 300, 1e-3
EPOCHS = 400  # steps of Adam, on all rows, of training and of retraining


def residuals(x: PyTree, y: Array, batch: PyTree) -> Array:
    """|Z (base + y) - t|^2/(2 n), shape []: both levels of least-squares; t = 0 below."""
    return jnp.mean((batch["Z"] @ (batch["base"] + y) - batch["t"]) ** 2) / 2


def scores(theta: PyTree, Z: Array) -> Array:
    """The network's logits, shape [n, 10]; Z [n, 64]."""
    return jnp.tanh(Z @ theta["W"] + theta["b"][None]) @ theta["V"] + theta["c"][None]


def penalty(theta: PyTree) -> Any:
    """L2/2 times the squared norm of the weights, shape []."""
    return L2 * (sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(theta)) / 2)


def moved(y: PyTree, batch: PyTree) -> PyTree:
    """The weights base + y."""
    return jax.tree.map(jnp.add, batch["base"], y)


def retain(x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """Mean cross-entropy and the penalty on the weights, shape []."""
    theta = moved(y, batch)
    return jnp.mean(cross_entropy(scores(theta, batch["Z"]), batch["targets"])) + penalty(theta)


def uniform(x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """Mean KL(uniform | model), shape [], 0 at its least."""
    log_p = jax.nn.log_softmax(scores(moved(y, batch), batch["Z"]))
    return -jnp.mean(log_p) - float(np.log(10))


def npo(x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """Negative preference optimisation, shape [], > 0."""
    now, before = (-cross_entropy(scores(theta, batch["Z"]), batch["targets"]) for theta in (
        moved(y, batch), batch["base"]))  # fmt: skip
    return jnp.mean(jax.nn.softplus(batch["sharpness"] * (now - before))) * 2 / batch["sharpness"]


def _look(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Array, Array, Array]:
    """(f, f_y, g_y), the gradients raveled."""
    value, (_, fy) = oracles.upper_value_and_gradients(problem, x, y, problem.upper_data.full())
    return value, ravel_pytree(fy)[0], ravel_pytree(oracles.residual(problem, x, y, problem.lower_data.full()))[0]


def _measured(value: Array, gradient: Array, residual: Array) -> Measurement:
    finite = jnp.isfinite(value) & jnp.isfinite(gradient) & jnp.isfinite(residual)
    status = jnp.where(finite, int(Status.ESTIMATED), int(Status.NONFINITE))
    zero = jnp.zeros_like(value)
    return Measurement(value, gradient, zero, residual, zero, status)


def within(problem: BilevelProblem, x: PyTree, y: PyTree) -> Measurement:
    """f(y), |f_y| within the null space of g_yy, and |g_y|: for quadratic g the last two are 0 at the optimum alone."""
    value, fy, gy = _look(problem, x, y)
    eigenvalues, vectors = jnp.linalg.eigh(oracles.lower_hessian(problem, x, y, problem.lower_data.full()))
    flat = eigenvalues < 1e3 * float(jnp.finfo(fy.dtype).eps) * jnp.max(eigenvalues)
    return _measured(value, jnp.linalg.norm(jnp.where(flat, vectors.T @ fy, 0)), jnp.linalg.norm(gy))


def across(problem: BilevelProblem, x: PyTree, y: PyTree) -> Measurement:
    """f(y), the part of f_y across g_y, and |g_y|: f cannot be lowered while g stays to first order where it is 0."""
    value, fy, gy = _look(problem, x, y)
    square = gy @ gy
    part = fy - gy * jnp.where(square > 0, fy @ gy / jnp.where(square > 0, square, 1), 0)
    return _measured(value, jnp.linalg.norm(part), jnp.linalg.norm(gy))


def check_within(problem: BilevelProblem, x: PyTree, y: PyTree, rows: list[Any]) -> tuple[dict[str, float], list[str]]:
    """The same numbers in NumPy, the null space from a singular value decomposition of the rows to forget: (found, the
    names of those that disagree with the last row).
    """
    parts = [{k: np.asarray(v, np.float64) for k, v in source.full().items()} for source in (
        problem.upper_data, problem.lower_data)]  # fmt: skip
    left = [part["Z"] @ (part["base"] + np.asarray(y, np.float64)) - part["t"] for part in parts]
    fy, gy = (part["Z"].T @ r / len(r) for part, r in zip(parts, left, strict=True))
    forget = parts[1]["Z"]
    null = np.linalg.svd(forget)[2][len(forget) :]
    found = {
        "value": float(np.mean(left[0] ** 2) / 2),
        "hypergradient": float(np.linalg.norm(null @ fy)),
        "lower_residual": float(np.linalg.norm(gy)),
    }
    largest = {name: max(abs(row[name]) for row in rows) for name in found}
    return found, [name for name in found if not abs(found[name] - rows[-1][name]) <= 1e-6 * largest[name] + 1e-12]


WITHIN = Referee("y as it is: f within the minimisers of g", within, check=check_within, at_y=True)
ACROSS = Referee("y as it is: f across the gradient of g", across, at_y=True)


@functools.partial(jax.jit, static_argnames="steps")
def train(start: PyTree, Z: Array, targets: Array, weights: Array, steps: int = EPOCHS) -> PyTree:
    """Weights after `steps` of Adam on f with row i counted weights_i times, from `start`."""
    rule = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def loss(theta: PyTree) -> Array:
        return jnp.sum(weights * cross_entropy(scores(theta, Z), targets)) / jnp.sum(weights) + penalty(theta)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        theta, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(jax.grad(loss)(theta), state)
        return (jax.tree.map(jnp.add, theta, updates), state), None

    return jax.lax.scan(step, (start, rule.init(start)), length=steps)[0][0]


def network(rng: np.random.Generator) -> PyTree:
    """Untrained weights."""
    W, V = rng.normal(size=(64, HIDDEN)) / 8, rng.normal(size=(HIDDEN, 10)) / np.sqrt(HIDDEN)
    return {"W": floats(W), "b": jnp.zeros(HIDDEN, float), "V": floats(V), "c": jnp.zeros(10, float)}


def _metrics(test: Any, forget: np.ndarray, retrained: Array, base: PyTree, x: PyTree, y: PyTree) -> dict[str, float]:
    Z, targets = test
    found = scores(jax.tree.map(jnp.add, base, y), Z)
    kl = jnp.sum(jnp.exp(retrained) * (retrained - jax.nn.log_softmax(found)), axis=1)
    return {
        "forget_accuracy": accuracy(found[forget], targets[forget]),
        "retain_accuracy": accuracy(found[~forget], targets[~forget]),
        "kl_to_retrained": float(jnp.mean(kl)),
    }


def _digits(seed: int, loss: str, sharpness: float) -> Instance:
    rng, (Z, labels) = np.random.default_rng(seed), digits()
    rows, digit, Z = split(seed, len(labels), TRAIN, VAL), seed % 10, Z[:, :64]
    train_Z, targets = floats(Z[rows[0]]), one_hot(labels[rows[0]])
    out = labels[rows[0]] == digit
    start = network(rng)
    base, retrained = (train(start, train_Z, targets, floats(w)) for w in (np.ones(TRAIN), ~out * 1.0))
    parts = ({"base": base, "Z": train_Z[some], "targets": targets[some]} for some in (~out, out))
    upper, lower = (Full(part | {"sharpness": floats(sharpness)}) for part in parts)
    problem = BilevelProblem(
        retain, Minimize(uniform if loss == "uniform" else npo), upper_data=upper, lower_data=lower, init=_start_network
    )
    test = floats(Z[rows[2]]), one_hot(labels[rows[2]])
    truth = jax.nn.log_softmax(scores(retrained, test[0]))
    metrics = functools.partial(_metrics, test, labels[rows[2]] == digit, truth, base)
    difference = jax.tree.map(jnp.subtract, retrained, base)
    return Instance(
        problem,
        tags=frozenset({"simple-bilevel", "real-data", "unlearning", "nonconvex-lower"}),
        metrics=metrics,
        baselines={
            "before": lambda: metrics(None, jax.tree.map(jnp.zeros_like, base)),
            "retrained": lambda: metrics(None, difference),
        },
        referee=ACROSS,
    )


def _start_network(key: Array) -> tuple[Array, PyTree]:
    """No x, and y = 0."""
    zeros = {"W": (64, HIDDEN), "b": (HIDDEN,), "V": (HIDDEN, 10), "c": (10,)}
    return jnp.zeros(0, float), {name: jnp.zeros(shape, float) for name, shape in zeros.items()}


@functools.cache
def _start_vector(dim: int) -> Callable[[Array], tuple[Array, Array]]:
    return lambda key: (jnp.zeros(0, float), jnp.zeros(dim, float))


def _least_squares(seed: int, dim: int, rows: int, forget: int) -> Instance:
    rng = np.random.default_rng(seed)
    Z, w = rng.normal(size=(rows + forget, dim)), rng.normal(size=dim)
    t = Z @ w + 0.3 * rng.normal(size=rows + forget)
    base = np.linalg.lstsq(Z, t, rcond=None)[0]
    basis = np.linalg.svd(Z[rows:])[2][forget:].T  # of the null space of the rows to forget
    theta = basis @ np.linalg.lstsq(Z[:rows] @ basis, t[:rows], rcond=None)[0]
    value = np.mean((Z[:rows] @ theta - t[:rows]) ** 2) / 2
    parts = (Z[:rows], t[:rows]), (Z[rows:], np.zeros(forget))
    upper, lower = (Full({"base": floats(base), "Z": floats(a), "t": floats(b)}) for a, b in parts)
    problem = BilevelProblem(
        residuals, Minimize(residuals), upper_data=upper, lower_data=lower, init=_start_vector(dim)
    )
    truth = Truth(float(value), jnp.zeros(0, float), floats(theta - base))
    tags = frozenset({"simple-bilevel", "known-optimum", "unlearning", "quadratic"})
    return Instance(problem, truth, tags=tags, referee=WITHIN)


def make(
    seed: int = 0,
    kind: str = "least-squares",
    loss: str = "uniform",
    sharpness: float = 0.15,
    dim: int = 10,
    rows: int = 40,
    forget: int = 4,
) -> Instance:
    """A model and what it is to forget.

    Args:
        seed: >= 0, of data, split and start; of digits, seed modulo 10 is forgotten.
        kind: "least-squares" or "digits".
        loss: of digits, "uniform" or "npo".
        sharpness: of npo, b > 0.
        dim: of least-squares, weights, >= 2.
        rows: of least-squares, rows to retain, >= dim.
        forget: of least-squares, rows to forget, in [1, dim).

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    for name, given, known in (("kind", kind, KINDS), ("loss", loss, LOSSES)):
        if given not in known:
            invalid(f"{name} (unlearning)", repr(given), " or ".join(known), "Choose one.")
    if not 0 < sharpness < np.inf:
        invalid("sharpness (unlearning)", sharpness, "a number > 0", "It multiplies log-probabilities.")
    for name, number, low, high in (
        ("dim", dim, 2, np.inf),
        ("rows", rows, dim, np.inf),
        ("forget", forget, 1, dim - 1),
    ):
        if not (is_count(number, low) and number <= high):
            invalid(f"{name} (unlearning)", number, f"a whole number in [{low}, {high}]", "It is a count.")
    return _digits(seed, loss, sharpness) if kind == "digits" else _least_squares(seed, dim, rows, forget)
