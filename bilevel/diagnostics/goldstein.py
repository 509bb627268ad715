"""Goldstein stationarity: how far zero is from the convex hull of gradients near a point.

x is (e, r)-Goldstein-stationary where dist(0, conv{grad F(z) : |z - x| <= r}) <= e. With z_1, …, z_m drawn uniformly
from the ball and exact gradients g_i = grad F(z_i), the distance is bounded from above by

    min over w in the simplex of |sum_i w_i g_i|,

and this minimum-norm point p is found exactly: d = p/|p|^2 is the shortest d with g_i'd >= 1 for all i, and where there
is no such d, zero is in the hull (`least_distance`). The bound falls with m: take m >= dim x + 1, better twice that,
and look at the whole `curve`.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel.backend.bounded import Flat, bounded_jit
from bilevel.backend.draws import check_distribution, perturbation
from bilevel.backend.extras import extra
from bilevel.backend.precision import full_precision
from bilevel.backend.tree import poisoned
from bilevel.hypergradient import hypergradient
from bilevel.parts import tracking
from bilevel.problem import BilevelProblem
from bilevel.qp.least_distance import nearest
from bilevel.report import save_figure
from bilevel.struct import invalid

PyTree = Any
LARGEST = 100  # unknowns of x up to which a run asks for the distance: two gradients for each


class Goldstein(NamedTuple):
    """distance []: the bound; NaN where a gradient is not solved for. weights [samples], of the minimum-norm point."""

    distance: Array
    weights: Array


def minimum_norm(gradients: Array, used: Array | None = None) -> Goldstein:
    """The point of least norm in the convex hull of the rows of `gradients` [m, n], of those in `used` [m] if given.

    Distances below eps^(2/3) of the longest row count as zero, and have zero weights: no plane separates.
    """
    kept: Array = jnp.ones(len(gradients), bool) if used is None else used
    if not gradients.shape[1]:  # of a problem without x
        return Goldstein(jnp.zeros((), gradients.dtype), jnp.zeros_like(gradients, shape=len(gradients)))
    size = jnp.max(jnp.where(kept, jnp.linalg.norm(gradients, axis=1), 0))
    size = jnp.where(size > 0, size, 1)
    found = nearest(-gradients / size, jnp.where(kept, -jnp.ones_like(gradients[:, 0]), jnp.inf))
    total = jnp.sum(found.multipliers)
    weights = jnp.where(found.empty, 0, found.multipliers / jnp.where(total > 0, total, 1))
    distance = jnp.where(found.empty, 0, jnp.linalg.norm(weights @ gradients))
    bad = ~jnp.isfinite(jnp.where(kept[:, None], gradients, 0)).all() | (jnp.isnan(found.d).any() & ~found.empty)
    return Goldstein(jnp.where(bad, jnp.nan, distance), jnp.where(bad, jnp.nan, weights))


def _ball(key: Array, x: PyTree, radius: Array | float, samples: int) -> Array:
    """Points [samples, dim x], uniform in the ball around x."""
    flat, _ = ravel_pytree(x)
    draw = lambda key: perturbation(key, flat, "ball", radius)  # noqa: E731
    return flat[None] + jax.vmap(draw)(jax.random.split(key, samples))


def _check(radius: Any, samples: int) -> None:
    if not isinstance(samples, int) or samples < 1:
        invalid("samples (goldstein)", samples, "a whole number >= 1", "Take at least dim x + 1.")
    if isinstance(radius, int | float) and not 0 < radius < float("inf"):
        invalid("radius (goldstein)", radius, "a finite number > 0", "It is the ball's radius around x.")


def _gradients(problem: BilevelProblem, x: PyTree, points: Array) -> Array:
    """Gradients of F at each point, raveled; each lower solution starts the next."""
    unravel = ravel_pytree(x)[1]

    def one(y: PyTree, z: Array) -> tuple[PyTree, Array]:
        h = hypergradient(problem, unravel(z), y, estimate=False)
        found = jnp.isfinite(ravel_pytree(h.y)[0]).all()
        y = jax.tree.map(lambda new, old: jnp.where(found, new, old), h.y, y)
        return y, ravel_pytree(h.checked().gradient)[0]

    return lax.scan(one, problem.init(jax.random.key(0))[1], points)[1]


def goldstein(problem: BilevelProblem, x: PyTree, radius: Any, samples: int, key: Array) -> Goldstein:
    """The bound above for F at x, from `samples` exact gradients in the ball of `radius` around x. Pure, for jit.

    Gradients at weakly active points are one-sided, and still in the Clarke subdifferential almost surely.

    Raises:
        InvalidInput: samples < 1, or a radius that is not positive and finite.
        NotImplementedError: as `hypergradient`.
    """
    _check(radius, samples)
    return minimum_norm(_gradients(problem, x, _ball(key, x, radius, samples)))


@bounded_jit(num_static=1)
@full_precision
def _distance(problem: BilevelProblem, x: PyTree, radius: Array, samples: int) -> Array:
    return goldstein(problem, x, radius, samples, jax.random.key(23)).distance


def distance_to_hull(problem: BilevelProblem, x: PyTree, radius: float) -> float:
    """The bound at x from 2 dim x + 2 gradients of the same draws always; NaN for more than `LARGEST` unknowns."""
    dim, flat = ravel_pytree(x)[0].size, Flat(problem)
    return math.nan if dim > LARGEST else float(_distance(flat, x, jnp.asarray(radius), 2 * dim + 2))  # pyright: ignore


def curve(problem: BilevelProblem, x: PyTree, radii: Array, samples: tuple[int, ...], key: Array) -> Array:
    """Distances [len(radii), len(samples)]: nested samples, so that each row falls from left to right."""
    for number in samples:
        _check(1.0, number)
    counts = jnp.asarray(samples)

    def one(radius: Array) -> Array:
        gradients = _gradients(problem, x, _ball(key, x, radius, max(samples)))
        prefix = lambda count: minimum_norm(gradients, jnp.arange(max(samples)) < count).distance  # noqa: E731
        return lax.map(prefix, counts)

    return lax.map(one, jnp.asarray(radii, ravel_pytree(x)[0].dtype))


def plot_curve(radii: Array, samples: tuple[int, ...], distances: Array, path: str | Path, title: str = "") -> Path:
    """A PNG of `curve`: distance over radius, one line per number of samples."""
    with extra("cli"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for number, line in zip(samples, np.asarray(distances).T, strict=True):
        ax.plot(np.asarray(radii), line, marker="o", label=f"{number} gradients")
    ax.set(
        xscale="log", xlabel="radius of the ball, in units of x", ylabel="distance of 0 to the hull of gradients of F"
    )
    ax.set_title(title)
    ax.grid(alpha=0.3)
    ax.legend()
    return save_figure(figure, path)


def smoothed_goldstein(
    problem: BilevelProblem,
    x: PyTree,
    radius: Any,
    samples: int,
    key: Array,
    sigma: Any,
    num_perturbations: int = 100,
    distribution: str = "gaussian",
) -> Array:
    """The same for the mean of F_q over q (`tracking`), estimated with two independent batches of perturbations.

    The weights are fitted to gradients averaged over the first batch, and the norm is taken of the second batch's
    average with these weights: fitting and evaluating on one batch would look too small. The estimate is not a bound.
    For a polyhedral lower level; a quadratic g is solved exactly. Returns a scalar, shape [].
    """
    _check(radius, samples)
    check_distribution("distribution (smoothed_goldstein)", distribution)
    key_ball, *keys = jax.random.split(key, 3)
    unravel = ravel_pytree(x)[1]
    upper, lower = problem.upper_data.full(), problem.lower_data.full()
    y = problem.init(jax.random.key(0))[1]
    active = tracking.no_rows_active(problem, x, y)

    def mean(point: Array, key: Array) -> Array:
        def one(key: Array) -> Array:
            q = perturbation(key, y, distribution, sigma)
            found = tracking.track(problem, unravel(point), y, active, q, lower, 3)
            end = found.solution
            g = ravel_pytree(tracking.gradient(problem, unravel(point), found, upper, lower))[0]
            return poisoned(g, end.feasible & end.definite & end.independent)

        return jnp.mean(lax.map(one, jax.random.split(key, num_perturbations)), axis=0)

    points = _ball(key_ball, x, radius, samples)
    average = lambda key: lax.map(lambda pair: mean(*pair), (points, jax.random.split(key, samples)))  # noqa: E731
    fitted, fresh = lax.map(average, jnp.stack(keys))
    found = minimum_norm(fitted)
    return jnp.where(found.distance > 0, jnp.linalg.norm(found.weights @ fresh), found.distance)
