"""Real data that ship inside scikit-learn, and disjoint splits of them. Nothing is downloaded."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.data import Full, Minibatch, Source
from bilevel.struct import invalid


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """(Z [1797, 65], labels [1797]): 8 x 8 images of handwritten digits, pixels in [0, 1], and a column of ones."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    return np.hstack([raw.data / 16.0, np.ones((len(raw.data), 1))]), raw.target


@functools.cache
def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """(Z [442, 10], t [442]): ten measurements of a patient, and the disease's progression a year later."""
    from sklearn.datasets import load_diabetes

    raw: Any = load_diabetes(scaled=False)
    return raw.data, raw.target


def split(seed: int, num_samples: int, train: int, val: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint index sets (train, val, test): a permutation drawn with `seed`, cut; test is what train and val leave.

    Raises:
        InvalidInput: where one of the three would be empty.
    """
    if min(train, val) < 1 or train + val >= num_samples:
        invalid(
            "train, val", (train, val), f"sizes >= 1 with train + val < {num_samples}, the number of samples",
            "Leave samples for the test set.",
        )  # fmt: skip
    order = np.random.default_rng(seed).permutation(num_samples)
    return order[:train], order[train : train + val], order[train + val :]


def source(arrays: Any, batch_size: int | None) -> Source:
    """All of `arrays` in every batch, or batches of `batch_size` samples, without replacement."""
    return Full(arrays) if batch_size is None else Minibatch(arrays, batch_size)


def floats(array: Any) -> Array:
    """`array` in JAX's default float, float64 or float32 as jax is configured."""
    return jnp.asarray(array, float)


def one_hot(labels: np.ndarray, num_classes: int = 10) -> Array:
    """Shape [n, num_classes], in JAX's default float."""
    return floats(np.eye(num_classes)[labels])


def accuracy(scores: Array | np.ndarray, targets: Array) -> float:
    """The part of samples whose largest score, in [n, classes], is the target's, one-hot [n, classes].

    NaN where a score is not finite: weights that were not solved for classify nothing.
    """
    if not np.isfinite(scores).all():
        return float("nan")
    return float(np.mean(np.argmax(scores, axis=1) == np.argmax(targets, axis=1)))
