"""Adversarial training of an image classifier: attacks within an l-infinity ball; Hessian-free bilevel methods.

x: the parameters of a small convolutional network; y = delta [n, h, w, c]: an attack on each training image Z_i,

    Y:  |delta_i|_inf <= eps,  0 <= Z_i + delta_i <= 1,
    g(x, delta) = sum_i -CE(x, Z_i + delta_i) + (lam/2) |delta_i|^2,     lam I taken for g_yy (`Minimize.diagonal`),
    f(x, delta) = mean_i CE(x, Z_i + delta_i) + (decay/2) |x|^2,

so that the implicit term needs no solve: it is (1/lam) d/dx (m_i' grad_delta CE(x, Z_i + delta_i)) at m_i = grad_delta
CE on the coordinates strictly inside of the box, and 0 on the others. lam I is the Hessian where CE is linear in delta.
`loss=trades`: f = mean_i CE(x, Z_i) + beta KL(p(Z_i) | p(Z_i + delta_i)) + decay, and g attacks that KL.

F is measured on the first 500 training images, at the delta that 20 steps Proj(delta - R/lam) reach from 0. Metrics, on
test images that no method sees: accuracy without attack, and under an attack of 50 steps from 10 random starts.
"""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import BilevelProblem, Box, Minimize, PerSample, oracles
from bilevel.backend.tree import norm
from bilevel.diagnostics import Measurement, Referee
from bilevel.oracles import per_sample
from bilevel.parts import tracking
from bilevel.record import Status
from bilevel.struct import invalid
from problems.datasets import accuracy
from problems.images import Split, load, parameters, scores, split
from problems.instance import Instance
from problems.logistic import cross_entropy

PyTree = Any
MEASURED, MEASURED_STEPS = 500, 20
PGD_STEPS, PGD_STARTS = 50, 10  # of the reported attack
DTYPES = ("float32", "float64")


@functools.cache
def _objectives(loss: str, lam: float, decay: float, beta: float) -> tuple[Any, Any, Any]:
    """(f, g, the diagonal of g_yy). Made once for each setting: functions are compared by identity."""

    def penalties(x: PyTree, rows: Array, Z: Array, targets: Array) -> tuple[Array, Array]:
        """(what f adds up, what the attack raises), each [b]."""
        attacked = scores(x, Z + rows)
        if loss == "ce":
            both = cross_entropy(attacked, targets)
            return both, both
        clean = scores(x, Z)
        p, q = jax.nn.log_softmax(clean), jax.nn.log_softmax(attacked)
        divergence = jnp.sum(jnp.exp(p) * (p - q), axis=1)
        return cross_entropy(clean, targets) + beta * divergence, divergence

    def upper(x: PyTree, y: Array, batch: PyTree) -> Array:
        index, (Z, targets) = batch
        flat = ravel_pytree(x)[0]
        return jnp.mean(penalties(x, y[index], Z, targets)[0]) + decay / 2 * (flat @ flat)

    def lower(x: PyTree, y: Array, batch: PyTree) -> Array:
        index, (Z, targets) = batch
        return lam / 2 * jnp.sum(y[index] ** 2) - jnp.sum(penalties(x, y[index], Z, targets)[1])

    def diagonal(x: PyTree, y: Array, batch: PyTree) -> Array:
        return jnp.full_like(y, lam)

    return upper, lower, diagonal


def measure_first(problem: BilevelProblem, x: PyTree, y: Array) -> Measurement:
    """F and its Hessian-free gradient on the first MEASURED samples; lower_residual: |y - Proj(y - R/lam)| there."""
    assert isinstance(problem.upper_data, PerSample)
    samples = problem.upper_data.take(jnp.arange(min(MEASURED, problem.upper_data.num_samples)))
    here = per_sample.view(problem, jnp.zeros_like(y), samples)
    start = here.problem.y_set.project(here.y)
    active = tracking.no_rows_active(here.problem, x, start)
    nothing = jnp.zeros_like(start)
    found = tracking.track(here.problem, x, start, active, nothing, here.lower, MEASURED_STEPS)
    gradient = tracking.gradient(here.problem, x, found, here.upper, here.lower)
    reached = found.solution.y
    again = tracking.track(here.problem, x, reached, active, nothing, here.lower, 1).solution.y
    value = oracles.upper_value(here.problem, x, reached, here.upper)
    unknown, violation = jnp.full_like(value, jnp.nan), problem.y_set.violation(y)
    return Measurement(value, norm(gradient), unknown, norm(reached - again), violation, jnp.array(Status.UNCHECKED))


FIRST = Referee(f"at the first {MEASURED} samples", measure_first)


@partial(jax.jit, static_argnames=("steps", "starts"))
def attack(x: PyTree, Z: Array, targets: Array, eps: Any, key: Array, steps: int, starts: int) -> Array:
    """Which images [n] the network still tells right: step eps/10 sign grad CE, random starts, right at every end."""
    lo, hi = jnp.maximum(-eps, -Z), jnp.minimum(eps, 1 - Z)

    def one(key: Array) -> Array:
        def body(_: int, delta: Array) -> Array:
            slope = jax.grad(lambda delta: jnp.sum(cross_entropy(scores(x, Z + delta), targets)))(delta)
            return jnp.clip(delta + eps / 10 * jnp.sign(slope), lo, hi)

        start = lo + (hi - lo) * jax.random.uniform(key, Z.shape, Z.dtype)
        delta = jax.lax.fori_loop(0, steps, body, start)
        return jnp.argmax(scores(x, Z + delta), axis=1) == jnp.argmax(targets, axis=1)

    return jnp.all(jax.lax.map(one, jax.random.split(key, starts)), axis=0)


def _metrics(parts: Split, eps: float, x: PyTree, y: PyTree) -> dict[str, float]:
    """On the test images; the validation ones, under a weaker attack, are for choosing settings."""
    (Z, targets), (val, val_targets) = parts.test, parts.val
    reach = np.asarray(eps, Z.dtype)
    robust = attack(x, Z, targets, reach, jax.random.key(0), PGD_STEPS, PGD_STARTS)
    chosen = attack(x, val, val_targets, reach, jax.random.key(1), 20, 1)
    return {
        "clean_accuracy": accuracy(scores(x, Z), targets),
        "robust_accuracy": float(np.mean(robust)),
        "val_robust_accuracy": float(np.mean(chosen)),
    }


@functools.cache
def _init(shape: tuple[int, ...], dtype: str) -> Any:
    def init(key: Array) -> tuple[PyTree, Array]:
        return parameters(key, jnp.zeros((1, *shape[1:]), dtype)), jnp.zeros(shape, dtype)

    return init


def make(
    seed: int = 0,
    data: str = "digits",
    loss: str = "ce",
    eps: float = 0.15,
    lam: float = 1.0,
    batch_size: int = 100,
    train: int = 1000,
    val: int = 297,
    test: int = 500,
    decay: float = 5e-4,
    beta: float = 6.0,
    dtype: str = "float32",
) -> Instance:
    """Adversarial training on images.

    Args:
        seed: >= 0, of the split.
        data: "digits", "mnist5000" (extra `data`), or a folder with MNIST's IDX files or CIFAR-10's binary batches.
        loss: "ce" or "trades".
        eps: > 0, the attack's reach in a pixel, pixels being in [0, 1].
        lam: > 0, the curvature of g.
        batch_size: samples a batch.
        train: samples of the training part.
        val: samples of the validation part.
        test: samples of the test part, which no method sees.
        decay: >= 0, weight decay.
        beta: > 0, TRADES's weight of the KL divergence.
        dtype: of everything: "float32" or, for tests, "float64".

    Raises:
        InvalidInput: a parameter outside of its range; data that are absent or malformed.
    """
    if loss not in ("ce", "trades"):
        invalid("loss (adversarial)", repr(loss), "ce or trades", "Choose a loss.")
    if dtype not in DTYPES:
        invalid("dtype (adversarial)", repr(dtype), "float32 or float64", "float32 is what networks are trained in.")
    for name, value in (("eps", eps), ("lam", lam), ("beta", beta)):
        if not 0 < value < np.inf:
            invalid(f"{name} (adversarial)", value, "a finite number > 0", "Leave it out for the default.")
    if not 0 <= decay < np.inf:
        invalid("decay (adversarial)", decay, "a finite number >= 0", "0 is no weight decay.")
    parts = split(load(data), seed, train, val, test, dtype)
    Z = parts.train[0]
    upper, lower, diagonal = _objectives(loss, float(lam), float(decay), float(beta))
    source = PerSample(parts.train, batch_size)
    problem = BilevelProblem(
        upper, Minimize(lower, diagonal), init=_init(Z.shape, dtype),
        y_set=Box(jnp.maximum(-eps, -Z).astype(dtype), jnp.minimum(eps, 1 - Z).astype(dtype)),
        upper_data=source, lower_data=source,
    )  # fmt: skip
    return Instance(
        problem,
        tags=frozenset({"real-data", "classification", "adversarial", "nonconvex-lower", "per-sample"}),
        metrics=partial(_metrics, parts, float(eps)),
        referee=FIRST,
    )
