"""Whether the functions of a problem are affine or quadratic, and their coefficients: derivatives at one point, held
against values and gradients at others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.problem import BilevelProblem, Minimize, SmoothCoupling

PyTree = Any
FAR = (0.1, 1.0, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)  # distances of the points that are compared, times 1 + |(x0, y0)|


class Affine(NamedTuple):
    """J z + c for z = (x, y) raveled."""

    J: Array
    """[rows, n + m]."""
    c: Array
    """[rows]."""


class Model(NamedTuple):
    """The functions of a problem that are looked at, as if the derivatives at one point were those at all."""

    value: Array
    """f at z = 0, shape []."""
    slope: Affine
    """The gradient of f in z, [n + m] rows: f is z'J z/2 + c'z + value."""
    residual: Affine
    """grad_y g."""
    G: Affine
    H: Affine
    h: Affine
    """Of a `SmoothCoupling`; no rows where there is none."""
    h_eq: Affine


def _functions(
    problem: BilevelProblem, x: PyTree, y: PyTree
) -> tuple[Array, Callable[[Array], Array], Callable[[Array], list[Array]]]:
    """(z, f as a function of z, all that should be affine in z as a list of vectors)."""
    assert isinstance(problem.lower, Minimize)
    z, unravel = ravel_pytree((x, y))
    upper, lower = problem.upper_data.full(), problem.lower_data.full()
    g: Callable[..., Array] = problem.lower.g
    upper_objective: Callable[..., Array] = problem.upper
    n, none = ravel_pytree(x)[0].size, jnp.zeros(0, z.dtype)
    smooth = problem.coupling if isinstance(problem.coupling, SmoothCoupling) else None

    def f(z: Array) -> Array:
        return upper_objective(*unravel(z), upper).astype(z.dtype)

    def affine(z: Array) -> list[Array]:
        found = [jax.grad(f)(z), jax.grad(lambda z: g(*unravel(z), lower).astype(z.dtype))(z)[n:]]
        for given in (problem.upper_constraints, smooth):
            values = (None, None) if given is None else given.values(*unravel(z))
            found += [none if part is None else part for part in values]
        return found

    return z, f, affine


def model(problem: BilevelProblem, x: PyTree, y: PyTree) -> Model:
    """The coefficients on all of the data, from derivatives at (x, y). Pure. Only for Minimize(g)."""
    z, f, affine = _functions(problem, x, y)
    c, J = jnp.concatenate(affine(z)), jax.jacfwd(lambda z: jnp.concatenate(affine(z)))(z)
    c = c - J @ z
    sizes = [part.size for part in jax.eval_shape(affine, z)]
    ends = np.cumsum(sizes)
    parts = [Affine(J[end - size : end], c[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    slope = Affine((parts[0].J + parts[0].J.T) / 2, parts[0].c)
    return Model(f(z) - z @ (slope.J @ z) / 2 - slope.c @ z, slope, *parts[1:])


def deviations(problem: BilevelProblem, x: PyTree, y: PyTree, found: Model) -> Array:
    """How far the functions are from the model at points around (x, y), relative to the terms that are added there, in
    the order of the model's fields, shape [7]: rounding, where they are what the model takes them for; infinite where
    one of them has no value.
    """
    z, f, affine = _functions(problem, x, y)
    far = (1 + jnp.max(jnp.abs(z), initial=0)) * jnp.asarray(FAR, z.dtype)
    directions = np.random.default_rng(22).normal(size=(len(FAR), z.size))
    points = z[None] + far[:, None] * jnp.asarray(directions, z.dtype)

    def off(here: Array, there: Array, terms: Array) -> Array:
        ratio = jnp.abs(here - there) / (terms + 1e-30)
        return jnp.max(jnp.where(jnp.isfinite(ratio), ratio, jnp.inf), initial=0)

    def at(there: Array) -> Array:
        size, (J, c) = jnp.abs(there), found.slope
        terms = size @ (jnp.abs(J) @ size) / 2 + jnp.abs(c) @ size + jnp.abs(found.value)
        worst = [off(f(there), there @ (J @ there) / 2 + c @ there + found.value, terms)]
        for values, (J, c) in zip(affine(there), found[1:], strict=True):
            terms = jnp.abs(J) @ size + jnp.abs(c)
            worst.append(off(values, J @ there + c, jnp.broadcast_to(jnp.max(terms, initial=0), terms.shape)))
        return jnp.stack(worst)

    return jnp.max(jax.lax.map(at, points), axis=0)
