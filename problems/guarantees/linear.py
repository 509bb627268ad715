"""Linear solvers on symmetric positive definite systems: Neumann, CG, MINRES and GMRES against their bounds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import CG, GMRES, MINRES, Neumann, theory
from bilevel.guarantees import Guarantee
from bilevel.theory import assumptions
from problems import strategies
from problems.guarantees.instances import DIM, EPS, basis, mask, normal, of_length, spectrum


class KnownSystem(NamedTuple):
    """Eigenvalues in [mu, L]; Neumann's step; |v0 - v*|, its energy norm and |b - M v0|; the size of the numbers."""

    mu: Array
    L: Array
    step: Array
    distance: Array
    energy: Array
    residual: Array
    size: Array


class System(NamedTuple):
    """M v = b from v0, with the solution v_star; root'root = M."""

    M: Array
    root: Array
    b: Array
    v_star: Array
    v0: Array
    constants: KnownSystem


def system(
    key: Array, dim: Array, condition: Array, spread: Array, flip: Array, cosine: Array, tilt: Array, scale: Array,
    step: Array, offset: Array,
) -> System:  # fmt: skip
    """Eigenvalues spread geometrically, or at the extremal points of a Chebyshev polynomial (cosine), times scale.

    The first error has weights |eigenvalue|^-tilt on `dim` eigenvectors. step is Neumann's, in units of 1/L.
    """
    key_basis, key_error, key_solution = jax.random.split(key, 3)
    U = basis(key_basis)
    extremal = 1 / condition + (1 - 1 / condition) * (1 + jnp.cos(jnp.linspace(0.0, jnp.pi, DIM))) / 2
    eigen = scale * jnp.where(cosine, extremal, spectrum(condition, spread, flip))
    weights = normal(key_error, DIM) * mask(dim) * (eigen / scale) ** -tilt
    error = U @ of_length(weights, jnp.ones(()))
    v_star = offset * normal(key_solution, DIM)
    M, root = U @ jnp.diag(eigen) @ U.T, jnp.diag(jnp.sqrt(eigen)) @ U.T
    length = jnp.linalg.norm
    known = KnownSystem(
        scale / condition, scale, step / scale, length(error), length(root @ error), length(M @ error),
        1 + length(v_star),
    )  # fmt: skip
    return System(M, root, M @ v_star, v_star, v_star + error, known)


def positive_definite(instance: System) -> Array:
    """Assumption: M >= mu."""
    return assumptions.strongly_convex(instance.M, instance.constants.mu)


def bounded(instance: System) -> Array:
    """Assumption: |M| <= L."""
    return assumptions.smooth(instance.M, instance.constants.L)


systems = strategies.recipes(
    system, dim=strategies.dims(DIM), condition=strategies.conditions(6), spread=strategies.sizes(),
    flip=strategies.booleans, cosine=strategies.booleans, tilt=strategies.sizes(), scale=strategies.scales(),
    step=strategies.fractions(0.25, 2.0), offset=strategies.switches,
)  # fmt: skip
HORIZON = (1, 2, 3, 4, 5, 8)


def _distance(instance: System, v: Array) -> Array:
    return jnp.linalg.norm(v - instance.v_star)


def _energy(instance: System, v: Array) -> Array:
    return jnp.linalg.norm(instance.root @ (v - instance.v_star))


def _residual(instance: System, v: Array) -> Array:
    return jnp.linalg.norm(instance.b - instance.M @ v)


def iterations(
    name: str, make: Callable[[KnownSystem, int], Any], look: Callable, first: str, factor: Callable, source: str,
    statement: str,
) -> Guarantee:  # fmt: skip
    """The norm `look` of the error after k iterations is at most factor(constants, k) times the first one."""
    unit = {"distance": lambda c: 1.0, "energy": lambda c: jnp.sqrt(c.L), "residual": lambda c: c.L}[first]

    def measure(instance: System, horizon: tuple[int, ...]) -> Array:
        product = lambda v: instance.M @ v  # noqa: E731
        runs = [make(instance.constants, k).iterate(product, instance.b, instance.v0)[0] for k in horizon]
        return jnp.stack([look(instance, v) for v in runs])

    def bound(constants: KnownSystem, k: int) -> Array:
        return factor(constants, k) * getattr(constants, first)

    def rounding(constants: KnownSystem) -> Array:
        return 1e2 * EPS * constants.size * constants.L / constants.mu * unit(constants)

    return Guarantee(
        name, source, (positive_definite, bounded), systems, measure, bound, HORIZON, rounding, statement, "geometric"
    )


def neumann(make: Callable[..., Any] = Neumann) -> Guarantee:
    """The Neumann series with step s: (max |1 - s lambda|)^k."""
    return iterations(
        "neumann", lambda c, k: make(step_size=c.step, tol=0.0, max_iterations=k), _distance, "distance",
        lambda c, k: theory.contraction(c.step, c.mu, c.L) ** k, "Saad 2003, 4.2",
        "|v_k - v*| <= max(|1 - s mu|, |1 - s L|)^k |v_0 - v*|, 0 < s <= 2/L",
    )  # fmt: skip


def cg(make: Callable[..., Any] = CG) -> Guarantee:
    """CG in the energy norm."""
    return iterations(
        "cg", lambda c, k: make(tol=0.0, max_iterations=k), _energy, "energy",
        lambda c, k: theory.chebyshev(c.L / c.mu, k), "Saad 2003, 6.11",
        "energy norm of v_k - v* <= 2 p^k/(1 + p^2k) of the first, p = (sqrt(L/mu) - 1)/(sqrt(L/mu) + 1)",
    )  # fmt: skip


def residuals(name: str, make: Callable[..., Any]) -> Guarantee:
    """MINRES and GMRES minimise the residual over the same polynomials."""
    return iterations(
        name, lambda c, k: make(tol=0.0, max_iterations=k), _residual, "residual",
        lambda c, k: theory.chebyshev(c.L / c.mu, k), "Saad 2003, 6.11",
        "|b - M v_k| <= 2 p^k/(1 + p^2k) |b - M v_0|",
    )  # fmt: skip


NEUMANN = neumann()
CONJUGATE_GRADIENTS = cg()
MINIMAL_RESIDUALS = residuals("minres", MINRES)
GENERALISED_MINIMAL_RESIDUALS = residuals("gmres", GMRES)
