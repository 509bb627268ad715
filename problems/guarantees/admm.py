"""ADMM with one penalty: how fast it comes to a planted solution, and what the residual says of the distance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.guarantees import Guarantee
from bilevel.theory import assumptions
from problems import admm, strategies
from problems.guarantees.instances import DIM, EPS, basis, normal, spectrum


class KnownSplit(NamedTuple):
    """Eigenvalues of Q in [mu, L]; rho; |v_0 - v*| in v = z + lam/rho; the size of the numbers."""

    mu: Array
    L: Array
    rho: Array
    distance: Array
    size: Array


class Split(NamedTuple):
    """A box or l1 problem (`boxed`) of `problems.admm` and its solution z*, lam*."""

    data: dict[str, Array]
    boxed: Array
    q: Array
    z: Array
    lam: Array
    constants: KnownSplit


def split(
    key: Array, condition: Array, spread: Array, flip: Array, free: Array, pull: Array, relative: Array, boxed: Array
) -> Split:
    """Planted: `free` is the share of coordinates that no kink holds, rho = relative sqrt(mu L)."""
    keys = jax.random.split(key, 4)
    l = condition * spectrum(condition, spread, flip)
    signs = jnp.sign(normal(keys[0], DIM))
    parts, loose = jax.random.uniform(keys[1], (DIM,)), jax.random.uniform(keys[2], (DIM,)) < free
    z = jnp.where(boxed, signs * jnp.where(loose, parts, 1), jnp.where(loose, signs * parts, 0))
    lam = jnp.where(boxed, jnp.where(loose, 0, signs * parts * pull), signs * jnp.where(loose, 1, parts))
    U, rho = basis(keys[3]), relative * jnp.sqrt(condition)
    q = U @ (l * (U.T @ z)) + lam
    norm = jnp.linalg.norm
    known = KnownSplit(jnp.ones(()), condition, rho, norm(z + lam / rho), norm(z) + (norm(lam) + norm(q)) / rho)
    return Split({"U": U, "l": l, "weight": jnp.ones(())}, boxed, q, z, lam, known)


def within(instance: Split) -> Array:
    """Assumption: the eigenvalues of Q are in [mu, L]."""
    Q = instance.data["U"] @ jnp.diag(instance.data["l"]) @ instance.data["U"].T
    known = instance.constants
    return jnp.minimum(assumptions.strongly_convex(Q, known.mu), assumptions.smooth(Q, known.L))


splits = strategies.recipes(
    split, condition=strategies.conditions(3), spread=strategies.sizes(), flip=strategies.booleans,
    free=strategies.fractions(0.0, 1.0), pull=strategies.scales(), relative=strategies.scales(),
    boxed=strategies.booleans,
)  # fmt: skip
HORIZON = (1, 2, 3, 5, 10, 20)


def path(instance: Split, steps: int) -> tuple[Array, Array]:
    """The z and lam [steps, DIM] after each step from 0."""
    log_rho = jnp.log(instance.constants.rho)

    def one(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        box, l1 = (admm.step(kind, instance.data, instance.q, *carry, log_rho)[:2] for kind in ("qp", "lasso"))
        new = jax.tree.map(lambda a, b: jnp.where(instance.boxed, a, b), box, l1)
        return new, new

    start = jnp.zeros_like(instance.q)
    return jax.lax.scan(one, (start, start), length=steps)[1]


def distances(instance: Split, horizon: tuple[int, ...]) -> Array:
    """|v_k - v*|, v = z + lam/rho, shape [len(horizon)]."""
    z, lam = path(instance, horizon[-1])
    apart = jnp.linalg.norm(z - instance.z[None] + (lam - instance.lam[None]) / instance.constants.rho, axis=1)
    return apart[jnp.array(horizon) - 1]


def beyond_residual(instance: Split, horizon: tuple[int, ...]) -> Array:
    """mu |z_k - z*| - |Q z_k - q + lam_k|, shape [len(horizon)]."""
    z, lam = path(instance, horizon[-1])
    U, l = instance.data["U"], instance.data["l"]
    left = jnp.linalg.norm(z @ (U * l[None]) @ U.T - instance.q[None] + lam, axis=1)
    apart = instance.constants.mu * jnp.linalg.norm(z - instance.z[None], axis=1)
    return (apart - left)[jnp.array(horizon) - 1]


def factor(known: KnownSplit) -> Array:
    """q(rho) = 1/2 + max |rho - l|/(rho + l)/2 over l in [mu, L]."""
    return jnp.maximum(known.rho / (known.rho + known.mu), known.L / (known.rho + known.L))


def rounding(known: KnownSplit) -> Array:
    """A hundred units of the numbers, which an ill-conditioned x-step magnifies by 1 + L/rho at most."""
    return 100 * EPS * known.size * (1 + known.L / known.rho)


ADMM = Guarantee(
    "admm", "ours, in problems.admm, after Giselsson and Boyd 2017; the best rho: Ghadimi et al. 2015", (within,),
    splits, distances, lambda known, k: factor(known) ** k * known.distance, HORIZON, rounding,
    "ADMM in v = z + lam/rho contracts by 1/2 + max |rho - l|/(rho + l)/2 a step", "geometric",
)  # fmt: skip
ADMM_RESIDUAL = Guarantee(
    "admm-residual", "ours: problems.admm, since lam is a subgradient of h at z", (within,),
    splits, beyond_residual, lambda known, k: jnp.zeros(()), HORIZON,
    lambda known: rounding(known) * known.rho * (1 + known.L),
    "the distance to the solution is at most the residual over lambda_min(Q)",
)  # fmt: skip
