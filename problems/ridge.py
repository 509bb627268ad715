"""Ridge regression with one penalty per feature, on the diabetes data.

    g(x, w) = |Z w - t|^2/(2 n) + sum_i exp(x_i) w_i^2/2  on n training rows,     f(w) = |Z w - t|^2/(2 n_val)  on
    others,

-8 <= x_i <= 2. Features and target are standardised with the training rows' means and deviations.

Settings that work: AID(), 200 steps; AID or ITD(lower_step_size=0.1, upper_step_size=optax.adam(0.05)), 300;
SOBA(lower_step_size=0.1, linear_step_size=0.1, upper_step_size=optax.adam(0.01)), 2000.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Box, Constants, Full, Minimize
from bilevel.struct import invalid
from problems.datasets import diabetes, floats, split
from problems.instance import Instance

LOWEST, HIGHEST = -8.0, 2.0
NUM_FEATURES = 10
Rows = tuple[Array, Array]


def upper(x: Array, w: Array, batch: Rows) -> Array:
    """Half the mean squared validation error, shape []; x [10], w [10], batch (Z [n, 10], t [n])."""
    Z, t = batch
    return jnp.mean((Z @ w - t) ** 2) / 2


def lower(x: Array, w: Array, batch: Rows) -> Array:
    """Half the mean squared training error plus the penalty, shape []."""
    Z, t = batch
    return jnp.mean((Z @ w - t) ** 2) / 2 + jnp.sum(jnp.exp(x) * w**2) / 2


def init(key: Array) -> tuple[Array, Array]:
    """x0 = 1, near the strongest penalty, so that step sizes chosen at the start stay stable; w0 = 0."""
    return jnp.ones(NUM_FEATURES, float), jnp.zeros(NUM_FEATURES, float)


def _metrics(parts: dict[str, Rows], x: Array, w: Array | np.ndarray) -> dict[str, float]:
    w = np.asarray(w)
    return {f"{name}_mse": float(np.mean((np.asarray(Z) @ w - np.asarray(t)) ** 2)) for name, (Z, t) in parts.items()}


def _fit(train: Rows, penalty: float) -> np.ndarray:
    Z, t = (np.asarray(part, np.float64) for part in train)
    return np.linalg.solve(Z.T @ Z / len(t) + penalty * np.eye(Z.shape[1]), Z.T @ t / len(t))


def _one_penalty(parts: dict[str, Rows]) -> dict[str, float]:
    """The best of 49 common penalties by validation error."""
    fits = [_metrics(parts, jnp.zeros(0), _fit(parts["train"], p)) for p in np.exp(np.linspace(LOWEST, HIGHEST, 49))]
    return min(fits, key=lambda numbers: numbers["val_mse"])


def make(seed: int = 0, train: int = 200, val: int = 120) -> Instance:
    """Per-feature ridge penalties on diabetes (442 rows, 10 features).

    Args:
        seed: >= 0, of the split.
        train: rows of the lower level, >= 20.
        val: rows of the upper level; the others are the test rows.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    if train < 20:
        invalid("train (ridge)", train, "at least 20 rows", "Fewer do not determine the ten weights.")
    Z, t = diabetes()
    rows = split(seed, len(t), train, val)
    centre, scale = (Z[rows[0]].mean(axis=0), t[rows[0]].mean()), (Z[rows[0]].std(axis=0), t[rows[0]].std())
    Z, t = (Z - centre[0]) / scale[0], (t - centre[1]) / scale[1]
    parts = {
        name: (floats(Z[some]), floats(t[some])) for name, some in zip(("train", "val", "test"), rows, strict=True)
    }

    # mean t^2 = 1 on the training rows, so exp(x_i) w_i^2 <= 2 g(x, w) <= 2 g(x, 0) = 1 for the w that beat w = 0:
    # |R_x| = max exp(x_i) |w_i| <= exp(HIGHEST/2) for them, y(x) included.
    on_train, on_val = (np.linalg.eigvalsh(Z[some].T @ Z[some] / len(some)) for some in rows[:2])
    constants = Constants(
        mu=float(on_train[0] + np.exp(LOWEST)), L_g=float(on_train[-1] + np.exp(HIGHEST)), L_fx=0.0,
        L_fy=float(on_val[-1]), L_gxy=float(np.exp(HIGHEST)), L_gyy=0.0, C_gxy=float(np.exp(HIGHEST / 2)),
    )  # fmt: skip
    problem = BilevelProblem(
        upper, Minimize(lower), x_set=Box(LOWEST, HIGHEST),
        upper_data=Full(parts["val"]), lower_data=Full(parts["train"]), init=init,
    )  # fmt: skip
    return Instance(
        problem,
        constants=constants,
        tags=frozenset({"real-data", "regression", "strongly-convex-lower"}),
        metrics=partial(_metrics, parts),
        baselines={
            "least squares": lambda: _metrics(parts, jnp.zeros(0), _fit(parts["train"], 0.0)),
            "one penalty, by validation": partial(_one_penalty, parts),
        },
    )
