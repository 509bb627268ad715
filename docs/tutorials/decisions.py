# %% [markdown]
# # Predictions for decisions
#
# Each morning a shop chooses how much $y$ of five goods to carry, on at most one and a half units of space, before it knows their profits $c$. It predicts $\hat c = W z$ from what it sees,
# $z$, and then solves a small quadratic program. The usual way fits $W$ by least squares. But an error matters only where it changes the decision. So let the upper level be what was
# *earned*, and the program the lower level:
#
# $$
# \min\limits_W F(W) = -\frac{1}{n} \sum\limits_{i} \left( c_i^T y_i - \frac{r}{2} |y_i|^2 \right), \qquad
# y_i = \argmin\limits_{0 \le y \le 1, \; 1^T y \le 3/2} \frac{r}{2} |y|^2 - (W z_i)^T y
# $$
#
# The decisions of all mornings are one $y$, the constraints one `LinearCoupling`; derivatives go through the active constraints.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel

jax.config.update("jax_enable_x64", True)

GOODS, SEEN, DAYS, R = 5, 3, 24, 2.0
rng = np.random.default_rng(3)
A, B = rng.normal(size=(GOODS, SEEN)), rng.normal(size=(GOODS, SEEN))


def mornings(n):
    """What is seen, and the profits: not linear in it, so that no W is right."""
    z = rng.normal(size=(n, SEEN))
    return z, z @ A.T + 1.5 * (z @ B.T) ** 2 - 1.0 + 0.3 * rng.normal(size=(n, GOODS))


z, c = mornings(DAYS)
new_z, new_c = mornings(2000)


# %%
def upper(W, y, batch):
    _, c = batch
    y = y.reshape(c.shape)
    return -jnp.mean(jnp.sum(c * y, axis=1) - R * jnp.sum(y**2, axis=1) / 2)


def lower(W, y, batch):
    z, c = batch
    y = y.reshape(c.shape)
    return jnp.sum(R * y**2 / 2 - (z @ W.T) * y)


space = np.kron(np.eye(DAYS), np.ones((1, GOODS)))  # a row for each morning
least_squares = np.linalg.lstsq(z, c, rcond=None)[0].T
problem = bilevel.BilevelProblem(
    upper=upper,
    lower=bilevel.Minimize(lower),
    x_set=bilevel.Box(-5.0, 5.0),
    y_set=bilevel.Box(0.0, 1.0),
    coupling=bilevel.LinearCoupling(A=jnp.asarray(space), b=1.5 * jnp.ones(DAYS)),
    upper_data=bilevel.Full((jnp.asarray(z), jnp.asarray(c))),
    lower_data=bilevel.Full((jnp.asarray(z), jnp.asarray(c))),
    init=lambda key: (jnp.asarray(least_squares), jnp.zeros(DAYS * GOODS)),
)
solution = bilevel.solve(problem, bilevel.PIGD(upper_step_size=0.05), key=jax.random.key(0), max_steps=200, every=10)
F = np.asarray(solution.record["value"])
print(f"{solution.status.name}: earned {-F[0]:.4f} a morning by least squares, {-F.min():.4f} at best")

# %% [markdown]
# What it earns on mornings that it has not seen, by another algorithm: the program of a single morning is one price away from a clip.


# %%
def decide(prediction):
    """The minimiser of R |y|^2/2 - prediction'y on the set: clip, and lower all by a price where there is too little space."""

    def clipped(price):
        return np.clip((prediction - price) / R, 0, 1)

    low, high = np.zeros(len(prediction)), np.maximum(prediction.max(axis=1), 0)
    for _ in range(60):
        middle = (low + high) / 2
        full = clipped(middle[:, None]).sum(axis=1) > 1.5
        low, high = np.where(full, middle, low), np.where(full, high, middle)
    fits = clipped(0.0).sum(axis=1) <= 1.5
    return np.where(fits[:, None], clipped(0.0), clipped(high[:, None]))


def earned(W):
    y = decide(new_z @ np.asarray(W).T)
    return np.mean(np.sum(new_c * y, axis=1) - R * np.sum(y**2, axis=1) / 2)


best = np.asarray(solution.best.x)
knows = decide(new_c)
most = np.mean(np.sum(new_c * knows, axis=1) - R * np.sum(knows**2, axis=1) / 2)
print(
    f"on 2000 new mornings: least squares {earned(least_squares):.4f}, for decisions {earned(best):.4f}, all-knowing {most:.4f}"
)
print(
    f"error of the prediction: least squares {np.mean((new_z @ least_squares.T - new_c) ** 2):.3f}, for decisions {np.mean((new_z @ best.T - new_c) ** 2):.3f}"
)

figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.plot(solution.record["step"], -F, label="earned on the mornings that were seen")
ax.axhline(-F[0], color="C1", ls="--", label="least squares")
ax.set(xlabel="step", ylabel="earned a morning")
ax.legend()
plt.show()
