"""Image classifiers robust to rotation and shift: for each image the worst of a box of three numbers; non-convex.

x: the parameters of a small convolutional network; y [n, 3] in [-1, 1]^3: for each training image Z_i an angle, a shift
to the right and one down, in units of `angle` and of `shift`; W(Z, y) the image turned around its centre and shifted,

    g(x, y) = sum_i  s_{t_i} - max_{j != t_i} s_j,    s = scores of W(Z_i, y_i), t_i the label: the attacker's margin,
    f(x, y) = mean_i CE(scores of W(Z_i, y_i), t_i) + (decay/2) |x|^2:                         the defender's loss.

W is bilinear interpolation with zeros outside, differentiable in y but for kinks where a pixel crosses another's
centre. F is measured on the first 300 training images, at the least g of a grid of 5 x 3 x 3. Metrics, on test images:
accuracy as they are, and where all of a finer grid (GRID) must be told right, an attack that no method trains on.
"""

import functools
import itertools
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
from bilevel.record import Status
from bilevel.struct import invalid
from problems.adversarial import DTYPES
from problems.datasets import accuracy
from problems.images import Split, load, parameters, scores, split
from problems.instance import Instance
from problems.logistic import cross_entropy

PyTree = Any
GRID = (31, 5, 5)  # angles and shifts of the exhaustive search, ends included
MEASURED, MEASURED_GRID = 300, (5, 3, 3)


def warp(Z: Array, angle: Array, right: Array, down: Array) -> Array:
    """The image Z [h, w, c] turned by `angle` (radians, counter-clockwise as seen) and shifted, in pixels: [h, w, c].

    Pixel (r, c) of the result is Z at the place that goes there, interpolated bilinearly; zeros outside of Z.
    """
    h, w, _ = Z.shape
    rows, columns = (jnp.arange(size, dtype=Z.dtype) - (size - 1) / 2 for size in (h, w))
    v, u = rows[:, None] - down, columns[None, :] - right
    r = jnp.cos(angle) * v + jnp.sin(angle) * u + (h - 1) / 2
    c = -jnp.sin(angle) * v + jnp.cos(angle) * u + (w - 1) / 2
    top, left = jnp.floor(r), jnp.floor(c)
    total = jnp.zeros_like(Z)
    for i, j in itertools.product((0, 1), (0, 1)):
        weight = jnp.abs(1 - i - (r - top)) * jnp.abs(1 - j - (c - left))
        row, column = top.astype(int) + i, left.astype(int) + j
        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        pixel = Z[jnp.clip(row, 0, h - 1), jnp.clip(column, 0, w - 1)]
        total = total + jnp.where(inside, weight, 0)[..., None] * pixel
    return total


def warp_all(Z: Array, y: Array, angle: float, shift: float) -> Array:
    """Images [n, h, w, c] by y [n, 3] in units of `angle` degrees and `shift` pixels."""
    units = jnp.asarray([np.deg2rad(angle), shift, shift], Z.dtype)
    return jax.vmap(lambda image, y: warp(image, *(units * y)))(Z, y)


def margin(values: Array, targets: Array) -> Array:
    """The label's score less the best other one, [n]: negative where the label is missed."""
    return jnp.sum(values * targets, axis=1) - jnp.max(jnp.where(targets > 0, -jnp.inf, values), axis=1)


@functools.cache
def _objectives(angle: float, shift: float, decay: float) -> tuple[Any, Any]:
    """(f, g). Made once for each setting: functions are compared by identity."""

    def upper(x: PyTree, y: Array, batch: PyTree) -> Array:
        index, (Z, targets) = batch
        flat = ravel_pytree(x)[0]
        loss = cross_entropy(scores(x, warp_all(Z, y[index], angle, shift)), targets)
        return jnp.mean(loss) + decay / 2 * (flat @ flat)

    def lower(x: PyTree, y: Array, batch: PyTree) -> Array:
        index, (Z, targets) = batch
        return jnp.sum(margin(scores(x, warp_all(Z, y[index], angle, shift)), targets))

    return upper, lower


def box_grid(sizes: tuple[int, int, int], dtype: Any) -> Array:
    """All points of a grid on [-1, 1]^3, [points, 3]."""
    axes = (np.linspace(-1, 1, size) for size in sizes)
    return jnp.asarray(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3), dtype)


@partial(jax.jit, static_argnames=("angle", "shift", "sizes"))
def search(
    x: PyTree, Z: Array, targets: Array, angle: float, shift: float, sizes: tuple[int, int, int]
) -> tuple[Array, Array]:
    """(least margin on the grid [n], where [n, 3]) for each image, by trying all of the grid."""
    points = box_grid(sizes, Z.dtype)

    def look(best: tuple[Array, Array], y: Array) -> tuple[tuple[Array, Array], None]:
        found = margin(scores(x, warp_all(Z, jnp.broadcast_to(y, (len(Z), 3)), angle, shift)), targets)
        lower = found < best[0]
        return (jnp.where(lower, found, best[0]), jnp.where(lower[:, None], y[None], best[1])), None

    start = jnp.full(len(Z), jnp.inf, Z.dtype), jnp.zeros((len(Z), 3), Z.dtype)
    return jax.lax.scan(look, start, points)[0]


def _measure(angle: float, shift: float, problem: BilevelProblem, x: PyTree, y: PyTree) -> Measurement:
    """F and f_x at the grid's worst y of the first MEASURED samples; lower_residual: by how much g, a mean over these
    samples, is above that at the given y (negative where y is worse than the grid).
    """
    assert isinstance(problem.upper_data, PerSample)
    batch = problem.upper_data.take(jnp.arange(min(MEASURED, problem.upper_data.num_samples)))
    here, (Z, targets) = per_sample.view(problem, y, batch), batch[1]
    least, worst = search(x, Z, targets, angle, shift, MEASURED_GRID)
    value, (fx, _) = oracles.upper_value_and_gradients(here.problem, x, worst, here.upper)
    gap = oracles.lower_value(here.problem, x, here.y, here.lower) / len(least) - jnp.mean(least)
    unknown = jnp.full_like(value, jnp.nan)
    return Measurement(value, norm(fx), unknown, gap, problem.y_set.violation(y), jnp.array(Status.UNCHECKED))


def _metrics(parts: Split, angle: float, shift: float, x: PyTree, y: PyTree) -> dict[str, float]:
    """On the test images; the validation ones, by a coarse grid, are for choosing settings."""
    (Z, targets), (val, val_targets), coarse = parts.test, parts.val, (11, 3, 3)
    return {
        "clean_accuracy": accuracy(scores(x, Z), targets),
        "grid_accuracy": float(np.mean(search(x, Z, targets, angle, shift, GRID)[0] > 0)),
        "val_grid_accuracy": float(np.mean(search(x, val, val_targets, angle, shift, coarse)[0] > 0)),
    }


@functools.cache
def _init(shape: tuple[int, ...], dtype: str) -> Any:
    def init(key: Array) -> tuple[PyTree, Array]:
        return parameters(key, jnp.zeros((1, *shape[1:]), dtype)), jnp.zeros((shape[0], 3), dtype)

    return init


@functools.cache
def _referee(angle: float, shift: float) -> Referee:
    """The same one for the same settings, so that nothing compiles twice."""
    return Referee(f"at the first {MEASURED} samples, on a grid", partial(_measure, angle, shift))


def make(
    seed: int = 0,
    data: str = "digits",
    angle: float = 30.0,
    shift: float = 1.0,
    batch_size: int = 100,
    train: int = 1000,
    val: int = 297,
    test: int = 500,
    decay: float = 5e-4,
    dtype: str = "float32",
) -> Instance:
    """Training against the worst rotation and shift.

    Args:
        seed: >= 0, of the split.
        data: "digits", "mnist5000" (extra `data`), or a folder with MNIST's IDX files or CIFAR-10's binary batches.
        angle: degrees, in (0, 180], either way.
        shift: pixels, >= 0, each way.
        batch_size: samples a batch.
        train: samples of the training part.
        val: samples of the validation part.
        test: samples of the test part, which no method sees.
        decay: >= 0, weight decay.
        dtype: of everything: "float32" or, for tests, "float64".

    Raises:
        InvalidInput: a parameter outside of its range; data that are absent or malformed.
    """
    if dtype not in DTYPES:
        invalid("dtype (rotation)", repr(dtype), "float32 or float64", "float32 is what networks are trained in.")
    if not 0 < angle <= 180:
        invalid("angle (rotation)", angle, "degrees in (0, 180]", "It is the largest angle, either way.")
    for name, value in (("shift", shift), ("decay", decay)):
        if not 0 <= value < np.inf:
            invalid(f"{name} (rotation)", value, "a finite number >= 0", "0 leaves it out.")
    parts = split(load(data), seed, train, val, test, dtype)
    upper, lower = _objectives(float(angle), float(shift), float(decay))
    source = PerSample(parts.train, batch_size)
    problem = BilevelProblem(
        upper, Minimize(lower), init=_init(parts.train[0].shape, dtype), y_set=Box(-1.0, 1.0),
        upper_data=source, lower_data=source,
    )  # fmt: skip
    return Instance(
        problem,
        tags=frozenset({"real-data", "classification", "rotation", "nonconvex-lower", "per-sample"}),
        metrics=partial(_metrics, parts, float(angle), float(shift)),
        referee=_referee(float(angle), float(shift)),
    )
