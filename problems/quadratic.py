"""Random quadratics with closed-form hypergradient and optimum, deterministic or as a finite sum.

    f(x, y) = y'P y/2 + x'Q y + x'S x/2 + p'y + s'x,        g(x, y) = y'H y/2 + x'G y + h'y,        H positive definite.

Then y(x) = A x + c with A = -H^-1 G', c = -H^-1 h, and F(x) = x'M x/2 + q'x + r with

    M = A'P A + Q A + A'Q' + S,   q = A'(P c + p) + Q c + s,   r = c'P c/2 + p'c,   grad F = M x + q,   x* = -M^-1 q.

M is drawn positive definite and S set to match, so that F is strongly convex though f need not be convex; h and s are
set so that c and x* are standard normal.

With num_samples > 1 every matrix and vector is a mean over samples of perturbed copies; those of H, P and M stay
positive
definite (relative perturbation `noise` < 1), and the means are the ones above: stochastic solvers have the same truth.

Settings that work: every solver's defaults; ITD and StocBiO stop at their bias. With batches SABA() converges, while
SOBA, StocBiO and AmIGO need decreasing steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Constants, Minimize
from bilevel.backend.checks import is_count
from bilevel.struct import invalid
from problems.datasets import floats, source
from problems.instance import Instance, Truth


class Upper(NamedTuple):
    """Samples of f: P [n, dim_y, dim_y], Q [n, dim_x, dim_y], S [n, dim_x, dim_x], p [n, dim_y], s [n, dim_x]."""

    P: Any
    Q: Any
    S: Any
    p: Any
    s: Any


class Lower(NamedTuple):
    """Samples of g: H [n, dim_y, dim_y], G [n, dim_x, dim_y], h [n, dim_y]."""

    H: Any
    G: Any
    h: Any


class ClosedForm(NamedTuple):
    """F(x) = x'M x/2 + q'x + r and y(x) = A x + c, in NumPy.

    M [dim_x, dim_x], q [dim_x], r [], A [dim_y, dim_x], c [dim_y].
    """

    M: np.ndarray
    q: np.ndarray
    r: float
    A: np.ndarray
    c: np.ndarray


def upper(x: Array, y: Array, batch: Upper) -> Array:
    """f(x, y), shape []: the mean over the batch."""
    P, Q, S, p, s = (leaf.mean(axis=0) for leaf in batch)
    return y @ P @ y / 2 + x @ Q @ y + x @ S @ x / 2 + p @ y + s @ x


def lower(x: Array, y: Array, batch: Lower) -> Array:
    """g(x, y), shape []: the mean over the batch."""
    H, G, h = (leaf.mean(axis=0) for leaf in batch)
    return y @ H @ y / 2 + x @ G @ y + h @ y


@functools.cache
def _init(dim_x: int, dim_y: int) -> Callable[[Array], tuple[Array, Array]]:
    """(x0 ~ N(0, I), y0 = 0) of a key. One function per pair of sizes, so that a second seed compiles nothing."""
    return lambda key: (jax.random.normal(key, (dim_x,), float), jnp.zeros(dim_y, float))


def _matrix(rng: np.random.Generator, dim: int, condition: float) -> np.ndarray:
    """A random symmetric matrix with eigenvalues spread geometrically over [1/condition, 1], ends included."""
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    values = np.geomspace(1 / condition, 1.0, dim) if dim > 1 else np.ones(1)
    return (basis * values) @ basis.T


def _around(rng: np.random.Generator, mean: np.ndarray, num_samples: int, noise: float) -> np.ndarray:
    """num_samples copies of `mean` plus noise of size about noise |mean|, whose mean is zero."""
    spread = rng.normal(size=(num_samples, *mean.shape)) * noise * np.linalg.norm(mean) / np.sqrt(mean.size)
    return mean + spread - spread.mean(axis=0)


def _around_definite(rng: np.random.Generator, mean: np.ndarray, num_samples: int, noise: float) -> np.ndarray:
    """Copies C (I + E_i) C' of mean = C C', symmetric |E_i| <= noise of mean zero: definite where `mean` is."""
    C = np.linalg.cholesky(mean)
    E = rng.normal(size=(num_samples, *mean.shape))
    E = E + E.transpose(0, 2, 1)
    E = E - E.mean(axis=0)
    E = E * (noise / max(np.linalg.norm(E, 2, axis=(1, 2)).max(), 1e-300))
    return mean + C @ E @ C.T


def closed_form(f: Upper, g: Lower) -> ClosedForm:
    """The coefficients of F and y(x), from the means over all samples, in float64."""
    P, Q, S, p, s = (np.asarray(leaf, np.float64).mean(axis=0) for leaf in f)
    H, G, h = (np.asarray(leaf, np.float64).mean(axis=0) for leaf in g)
    A, c = -np.linalg.solve(H, G.T), -np.linalg.solve(H, h)
    M = A.T @ P @ A + Q @ A + A.T @ Q.T + S
    return ClosedForm((M + M.T) / 2, A.T @ (P @ c + p) + Q @ c + s, float(c @ P @ c / 2 + p @ c), A, c)


def make(
    seed: int = 0,
    dim_x: int = 10,
    dim_y: int = 10,
    condition_x: float = 10.0,
    condition_y: float = 10.0,
    coupling: float = 0.5,
    num_samples: int = 1,
    batch_size: int | None = None,
    noise: float = 0.5,
) -> Instance:
    """A random strongly convex quadratic problem with |H| = |M| = |P| = 1.

    Args:
        seed: >= 0; fixes everything.
        dim_x: size of x, >= 1.
        dim_y: size of y, >= 1.
        condition_x: condition number of M = grad^2 F, >= 1.
        condition_y: condition number of H, >= 1.
        coupling: |A| = |Q|, > 0: how strongly the levels depend on each other; single-loop methods feel it.
        num_samples: >= 1; 1 is the deterministic problem.
        batch_size: samples a batch, in [1, num_samples]; default all of them in every batch.
        noise: in [0, 1), relative size of the samples' deviation.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    for name, value in (("dim_x", dim_x), ("dim_y", dim_y), ("num_samples", num_samples)):
        if not is_count(value, 1):
            invalid(f"{name} (quadratic)", value, "a whole number >= 1", "Give a size.")
    for name, value in (("condition_x", condition_x), ("condition_y", condition_y)):
        if not 1 <= value < np.inf:
            invalid(f"{name} (quadratic)", value, "a finite number >= 1", "It is a largest over a smallest eigenvalue.")
    if not 0 < coupling < np.inf:
        invalid("coupling (quadratic)", coupling, "a finite number > 0", "It is the norm of dy/dx.")
    if not 0 <= noise < 1:
        invalid("noise (quadratic)", noise, "a number in [0, 1)", "From 1 on, samples of g need not be convex.")

    rng = np.random.default_rng(seed)
    H, P, M = _matrix(rng, dim_y, condition_y), _matrix(rng, dim_y, 10.0), _matrix(rng, dim_x, condition_x)
    G, Q = rng.normal(size=(2, dim_x, dim_y))
    G, Q = G * (coupling / np.linalg.norm(np.linalg.solve(H, G.T), 2)), Q * (coupling / np.linalg.norm(Q, 2))
    x, c, p = rng.normal(size=dim_x), rng.normal(size=dim_y), rng.normal(size=dim_y)
    A, h = -np.linalg.solve(H, G.T), -H @ c
    S = M - A.T @ P @ A - Q @ A - A.T @ Q.T
    s = -(M @ x + A.T @ (P @ c + p) + Q @ c)  # so that x* = x is of size one

    n = num_samples
    S_all = S + (_around_definite(rng, M, n, noise) - M)  # M, not S, is definite
    f = Upper(
        _around_definite(rng, P, n, noise), _around(rng, Q, n, noise), (S_all + S_all.transpose(0, 2, 1)) / 2,
        _around(rng, p, n, noise), _around(rng, s, n, noise),
    )  # fmt: skip
    g = Lower(_around_definite(rng, H, n, noise), _around(rng, G, n, noise), _around(rng, h, n, noise))
    f, g = Upper(*map(floats, f)), Lower(*map(floats, g))

    exact = closed_form(f, g)
    x = -np.linalg.solve(exact.M, exact.q)
    truth = Truth(float(exact.q @ x / 2) + exact.r, floats(x), floats(exact.A @ x + exact.c))
    H, P, Q, G = (np.asarray(part, np.float64).mean(axis=0) for part in (g.H, f.P, f.Q, g.G))
    eigenvalues = np.linalg.eigvalsh(H)
    constants = Constants(
        mu=float(eigenvalues[0]), L_g=float(eigenvalues[-1]), L_fx=float(np.linalg.norm(Q, 2)),
        L_fy=float(np.linalg.norm(P, 2)), L_gxy=0.0, L_gyy=0.0, C_gxy=float(np.linalg.norm(G, 2)),
    )  # fmt: skip
    problem = BilevelProblem(
        upper,
        Minimize(lower),
        upper_data=source(f, batch_size),
        lower_data=source(g, batch_size),
        init=_init(dim_x, dim_y),
    )
    tags = {"quadratic", "strongly-convex", "known-optimum"} | ({"stochastic"} if batch_size is not None else set())
    return Instance(problem, truth, constants, frozenset(tags))
