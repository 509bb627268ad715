"""Penalties of ADMM: K steps on drawn problems below, the penalty, a schedule or a rule for it above.

ADMM splits min f(w) + h(z), w = z. With the penalty rho and the dual lam, a step is

    w <- argmin f(w) + rho/2 |w - z + lam/rho|^2,    z <- argmin h(z) + rho/2 |w - z + lam/rho|^2,
    lam <- lam + rho (w - z),

from z = lam = 0. Here f(w) = w'Q w/2 - q'w, the eigenvalues of Q from 1 to `condition`, and

    eigen: h is the indicator of a subspace spanned by eigenvectors of Q, half of them, the least eigenvalue's among
           them and the largest's not; everything is linear, and known in closed form,
    qp:    h is the indicator of the box [-1, 1]^dim,
    lasso: h(z) = weight |z|_1.

All instances share Q and have a q of their own. Those of qp and lasso have a planted solution: z and lam with lam a
subgradient of h at z are drawn, and q = Q z + lam.

The lower level is the whole trajectory, (z, lam, log rho) after each of the K steps. It is the fixed point of the map
that makes one step from each of its points, which depends on K steps and no more: so any solver for fixed points has
the exact derivative of K steps, and `ITD(lower_step_size=1.0, num_lower_steps=K)` is reverse mode through them. The
upper level is the progress per step,

    F(x) = mean over instances of log(|Q z_K - q + lam_K| / |q|) / K.

After each step lam is a subgradient of h at z, so that Q z - q + lam is all that is wrong: (z, lam) solves the instance
with q + (Q z - q + lam), and |z - z*| <= |Q z - q + lam| / lambda_min(Q). exp(F) is the mean contraction factor. A
residual of 1e-6 |q| is solved, and less counts as that: else F could be lowered without end by one instance.

What x is: `constant`, log rho; `schedule`, log rho of each step; `rule`, x = (log rho_0, a, c, d) in

    log rho_{k+1} = log rho_k + a exp(-d k) (log(relative primal / relative dual residual) + c),

which is OSQP's rule for a = 1/2, c = d = 0, applied at every step.

With steps = 0 the lower level is the limit of ADMM, and f = |z|^2/2, a mean over the instances. Neither z* nor lam*
depends on rho, so F is constant and its implicit gradient is 0, everywhere: a penalty cannot be learnt from where ADMM
ends, only from how it gets there.

The best constant. In v = z + lam/rho a step is v <- (v + R_f R_h v)/2, R the reflections 2 prox - 1; R_h is
non-expansive, and R_f has the slopes (rho - l)/(rho + l), l the eigenvalues of Q. So errors shrink by

    q(rho) = 1/2 + max_l |rho - l|/(rho + l)/2,    least at rho = sqrt(lambda_min lambda_max),

and no convex h does worse; h = 0 and the indicator of 0 do as badly, one for rho too large, the other for rho too
small. With A w = z for w = z, Q is to be read as (A Q^-1 A')^-1: rho = 1/sqrt(lambda_min lambda_max) of A Q^-1 A'.
`eigen` attains q(rho), so that its best constant for K steps tends to this one as K grows. With few steps and few
instances F may have a second local minimum; `truth` is the least one.

Settings that work: `LBFGS()`; `ITD(lower_step_size=1.0, num_lower_steps=K, upper_step_size=optax.adam(0.1))`.

Reference: Ghadimi, Teixeira, Shames, Johansson. Optimal parameter selection for the alternating direction method of
multipliers (ADMM): quadratic problems. IEEE Transactions on Automatic Control 60, 2015, arXiv:1306.2454: the best
constants; the short proof here is ours, after Giselsson, Boyd, 2017, arXiv:1410.8479. OSQP's rule: Stellato et al.
2020, arXiv:1711.08013, section 5.2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, FixedPoint, Full
from bilevel.backend.checks import is_count
from bilevel.struct import invalid
from problems import admm_rules
from problems.datasets import floats
from problems.instance import Instance, Truth

PyTree = Any
KINDS = "eigen", "qp", "lasso"
TUNED = "constant", "schedule", "rule"
WIDEST = float(np.log(1e4))
"""The largest |log rho|."""
RULE = np.array([[-WIDEST, -1.0, -3.0, 0.0], [WIDEST, 1.0, 3.0, 1.0]])
"""Where the four numbers of a rule may be: the lowest and the highest."""


def size(a: Array, tiny: float = 0.0) -> Array:
    """The 2-norm over the last axis, not below `tiny`, with a derivative at 0 where tiny > 0."""
    return jnp.sqrt(jnp.sum(a**2, axis=-1) + tiny**2)


def prox_h(kind: str, data: dict[str, Array], v: Array, rho: Array) -> Array:
    """The z that minimises h(z) + rho/2 |z - v|^2, shape [d]."""
    if kind == "eigen":
        return data["U"] @ (data["inside"] * (data["U"].T @ v))
    if kind == "qp":
        return jnp.clip(v, -1, 1)
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - data["weight"] / rho, 0)


def step(kind: str, data: dict[str, Array], q: Array, z: Array, lam: Array, log_rho: Array) -> tuple[Array, ...]:
    """One step of ADMM on the instance with q [d]: the new (z, lam), and log(relative primal/relative dual residual).

    The residuals |w - z| and rho |z - z_old| are relative to max(|w|, |z|) and to max(|lam|, |q|).
    """
    rho, tiny = jnp.exp(log_rho), float(jnp.finfo(z.dtype).eps)
    U = data["U"]
    w = U @ ((U.T @ (q + rho * z - lam)) / (data["l"] + rho))
    new = prox_h(kind, data, w + lam / rho, rho)
    dual = lam + rho * (w - new)
    primal_scale = jnp.maximum(size(w, tiny), size(new, tiny))
    dual_scale = jnp.maximum(size(dual, tiny), size(q, tiny))
    ratio = size(w - new, tiny) / primal_scale / (size(rho * (new - z), tiny) / dual_scale)
    return new, dual, jnp.log(ratio)


def next_log_rho(tuned: str, x: Array, k: Array, log_rho: Array, ratio: Array) -> Array:
    """The logarithm of the penalty of step k + 1, after step k of 0, 1, …, shape []."""
    if tuned == "constant":
        return x[0]
    if tuned == "schedule":
        return x[jnp.minimum(k + 1, len(x) - 1)]
    return jnp.clip(log_rho + x[1] * jnp.exp(-x[3] * k) * (ratio + x[2]), -WIDEST, WIDEST)


@functools.cache
def trajectory(kind: str, tuned: str) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """The map T of the lower level: a step from each point of the trajectories z, lam [n, K, d] and log_rho [n, K]."""

    def after(x: Array, data: dict[str, Array], q: Array, k: Array, z: Array, lam: Array, log_rho: Array) -> PyTree:
        z, lam, ratio = step(kind, data, q, z, lam, log_rho)
        return {"z": z, "lam": lam, "log_rho": next_log_rho(tuned, x, k, log_rho, ratio)}

    def one(x: Array, data: dict[str, Array], q: Array, path: PyTree) -> PyTree:
        first = {"z": jnp.zeros_like(q), "lam": jnp.zeros_like(q), "log_rho": x[0]}
        before = jax.tree.map(lambda start, all: jnp.concatenate([start[None], all[:-1]]), first, path)
        k = jnp.arange(len(path["z"])).astype(q.dtype) if tuned == "rule" else jnp.arange(len(path["z"]))
        steps = jax.vmap(after, in_axes=(None, None, None, 0, 0, 0, 0))
        return steps(x, data, q, k, before["z"], before["lam"], before["log_rho"])

    def T(x: Array, y: PyTree, batch: PyTree) -> PyTree:
        return jax.vmap(one, in_axes=(None, None, 0, 0))(x, batch["shared"], batch["q"], y)

    return T


@functools.cache
def limit(kind: str) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """The map T of the limit: one step from z, lam [n, d] at the penalty exp(x)."""

    def T(x: Array, y: PyTree, batch: PyTree) -> PyTree:
        one = lambda q, z, lam: step(kind, batch["shared"], q, z, lam, x[0])[:2]  # noqa: E731
        z, lam = jax.vmap(one)(batch["q"], y["z"], y["lam"])
        return {"z": z, "lam": lam}

    return T


def progress(x: Array, y: PyTree, batch: PyTree) -> Array:
    """F, the mean of log(|Q z_K - q + lam_K|/|q|)/K, shape []; a residual below 1e-6 |q| counts as that."""
    shared, K = batch["shared"], y["z"].shape[1]

    def one(q: Array, z: Array, lam: Array) -> Array:
        left = shared["U"] @ (shared["l"] * (shared["U"].T @ z)) - q + lam
        return jnp.log(size(left / size(q), admm_rules.SOLVED))

    return jnp.mean(jax.vmap(one)(batch["q"], y["z"][:, -1], y["lam"][:, -1])) / K


def squared(x: Array, y: PyTree, batch: PyTree) -> Array:
    """The mean over the instances of |z|^2/2, shape []: what the limit of ADMM is asked for."""
    return jnp.mean(jnp.sum(y["z"] ** 2, axis=-1)) / 2


def draw(kind: str, rng: np.random.Generator, dim: int, condition: float, count: int) -> dict[str, Any]:
    """The numbers of a family in NumPy: shared U, l, inside, weight; q [count, d]; z, lam [count, d] solve it.

    A third of the coordinates of z are free, one at least, the others at a bound (qp) or 0 (lasso). For `eigen` q is
    normal, and z and lam follow from it.
    """
    U = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    l = np.geomspace(1.0, condition, dim)
    inside, weight = (np.arange(dim) % 2 == 0) & (np.arange(dim) < dim - 1), 1.0
    Q = (U * l) @ U.T
    if kind == "eigen":
        q = rng.normal(size=(count, dim))
        z = (q @ U * inside / l) @ U.T
        lam = q - z @ Q
    else:
        chance = rng.uniform(size=(count, dim))
        free = (chance < 1 / 3) | (chance == chance.min(axis=1, keepdims=True))
        sign, part = rng.choice([-1.0, 1.0], (count, dim)), rng.uniform(size=(count, dim))
        if kind == "qp":
            z = np.where(free, sign * part, sign)
            lam = np.where(free, 0, sign * part * np.sqrt(condition))
        else:
            z = np.where(free, sign * part, 0)
            lam = weight * sign * np.where(free, 1, part)
        q = z @ Q + lam
    return {"U": U, "l": l, "inside": inside * 1.0, "weight": weight, "q": q, "z": z, "lam": lam}


def make(
    seed: int = 0,
    kind: str = "qp",
    tuned: str = "constant",
    steps: int = 15,
    dim: int = 10,
    instances: int = 8,
    condition: float = 100.0,
) -> Instance:
    """Drawn problems for ADMM and what is to be learnt of its penalty.

    Args:
        seed: >= 0, of Q, of the instances and of as many others for the metrics.
        kind: "eigen", "qp" or "lasso".
        tuned: "constant", "schedule" or "rule".
        steps: K >= 1; or 0 for the limit, of a constant penalty.
        dim: >= 2.
        instances: >= 1.
        condition: > 1, the largest eigenvalue of Q; the least is 1.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    for name, value, known in (("kind", kind, KINDS), ("tuned", tuned, TUNED)):
        if value not in known:
            invalid(f"{name} (admm)", repr(value), " or ".join(known), "Choose one.")
    for name, value, least in (("steps", steps, 0), ("dim", dim, 2), ("instances", instances, 1)):
        if not is_count(value, least):
            invalid(f"{name} (admm)", value, f"a whole number >= {least}", "It is a count.")
    if not 1 < condition < np.inf:
        invalid("condition (admm)", condition, "a number > 1", "It is the largest eigenvalue of Q; the least is 1.")
    if steps == 0 and tuned != "constant":
        invalid("tuned (admm)", repr(tuned), "'constant' where steps = 0", "The limit has one penalty.")
    numbers = draw(kind, np.random.default_rng([KINDS.index(kind), seed]), dim, float(condition), 2 * instances)
    train, test = ({**numbers, "q": part} for part in np.split(numbers["q"], 2))
    shared = {name: floats(numbers[name]) for name in ("U", "l", "inside", "weight")}
    data = Full({"shared": shared, "q": floats(train["q"])})
    low, high = RULE if tuned == "rule" else (-WIDEST, WIDEST)
    problem = BilevelProblem(
        progress if steps else squared,
        FixedPoint(trajectory(kind, tuned) if steps else limit(kind)),
        x_set=Box(floats(low), floats(high)),
        upper_data=data,
        lower_data=data,
        init=_init(tuned, steps, dim, instances),
    )
    tags = {"fixed-point", "admm", *(("unrolled",) if steps else ("constant",))}
    if not steps:
        value = float(np.mean(np.sum(numbers["z"][:instances] ** 2, axis=1)) / 2)
        return Instance(problem, Truth(value), tags=frozenset(tags | {"known-optimum"}))
    truth = None
    if kind == "eigen" and tuned == "constant":
        log_rho, value = admm_rules.best_of_eigen(train, steps, WIDEST)
        truth, tags = Truth(value, floats([log_rho])), tags | {"known-optimum"}
    parts = {"train": (kind, train), "test": (kind, test)}
    return Instance(
        problem,
        truth,
        tags=frozenset(tags),
        metrics=functools.partial(_metrics, parts, tuned, steps),
        baselines={name: functools.partial(_baseline, parts, rule, steps) for name, rule in admm_rules.RULES.items()},
    )


@functools.cache
def _init(tuned: str, steps: int, dim: int, instances: int) -> Callable[[Array], tuple[Array, PyTree]]:
    def init(key: Array) -> tuple[Array, PyTree]:
        """The penalty is 1 at first, and a rule is OSQP's; all points of the trajectory are 0."""
        x = {"constant": floats([0.0]), "schedule": jnp.zeros(steps, float), "rule": floats([0.0, 0.5, 0.0, 0.0])}
        if not steps:
            return x[tuned], {name: jnp.zeros((instances, dim), float) for name in ("z", "lam")}
        z = jnp.zeros((instances, steps, dim), float)
        return x[tuned], {"z": z, "lam": z, "log_rho": jnp.zeros((instances, steps), float)}

    return init


def _metrics(parts: dict[str, Any], tuned: str, steps: int, x: Array, y: PyTree) -> dict[str, float]:
    """The contraction factor per step, exp(F), on the instances and on as many that were not trained on."""
    return _baseline(parts, admm_rules.learnt(tuned, np.asarray(x, np.float64), WIDEST), steps)


def _baseline(parts: dict[str, Any], rule: Callable, steps: int) -> dict[str, float]:
    return {
        f"{name}_factor": float(np.exp(np.mean(admm_rules.progress(kind, numbers, rule, steps))))
        for name, (kind, numbers) in parts.items()
    }
