# %% [markdown]
# # Few-shot learning with flax
#
# A new sine wave is to be learned from five points. That works if the features fit: they are learned from many other waves. The features are a network, its weights $x$; each task $i$ has a last
# layer of its own, $y_i$, which is ridge regression on its five points:
#
# $$
# \min\limits_x F(x) = \frac{1}{m} \sum\limits_{i} \ell_{query, i}(x, y_i(x)), \qquad y_i(x) = \argmin\limits_y \ell_{support, i}(x, y) + \frac{r}{2} |y|^2
# $$
#
# The lower level is strongly convex although the network is not, so that all of the library holds; $x$ is the pytree of a `flax.nnx` module.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import bilevel

jax.config.update("jax_enable_x64", True)

TASKS, SHOTS, FEATURES, R = 24, 5, 12, 1e-2


class Features(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(1, 32, rngs=rngs, param_dtype=float)
        self.second = nnx.Linear(32, FEATURES, rngs=rngs, param_dtype=float)

    def __call__(self, t):
        return jnp.tanh(self.second(jnp.tanh(self.first(t))))


graph, weights = nnx.split(Features(nnx.Rngs(0)))
weights = nnx.to_pure_dict(weights)


def features(x, t):
    """[..., 1] -> [..., FEATURES + 1], with a constant."""
    model = nnx.merge(graph, nnx.State(x))
    return jnp.concatenate([model(t), jnp.ones_like(t)], axis=-1)


def waves(seed, tasks, points):
    rng = np.random.default_rng(seed)
    height, phase = rng.uniform(0.5, 2.0, (tasks, 1)), rng.uniform(0, np.pi, (tasks, 1))
    t = rng.uniform(-4, 4, (tasks, points))
    return jnp.asarray(t[..., None]), jnp.asarray(height * np.sin(t + phase))


# %%
def error(x, y, batch):
    t, target = batch
    return jnp.mean((jnp.einsum("ipf,if->ip", features(x, t), y) - target) ** 2)


def lower(x, y, batch):
    return TASKS * error(x, y, batch) + R * jnp.sum(y**2) / 2


t, target = waves(0, TASKS, SHOTS + 15)
problem = bilevel.BilevelProblem(
    upper=error,
    lower=bilevel.Minimize(lower),
    upper_data=bilevel.Full((t[:, SHOTS:], target[:, SHOTS:])),
    lower_data=bilevel.Full((t[:, :SHOTS], target[:, :SHOTS])),
    init=lambda key: (weights, jnp.zeros((TASKS, FEATURES + 1))),
)

# %% [markdown]
# `Implicit` takes any optax rule along the exact gradient of $F$:

# %%
solution = bilevel.solve(problem, bilevel.Implicit(optax.adam(0.01)), key=jax.random.key(0), max_steps=400, every=20)
F = np.asarray(solution.record["value"])
print(f"{solution.status.name}: F = {F[-1]:.4f}, from {F[0]:.4f} with random features")
print(bilevel.hypergradient(problem, solution.x))

# %% [markdown]
# On waves that it has not seen:

# %%
new_t, new_target = waves(1, 200, SHOTS + 50)


def fitted(x):
    """(the last layers, the errors on 50 more points) of the new tasks."""
    A = features(x, new_t)
    K, Q = A[:, :SHOTS], A[:, SHOTS:]
    gram = 2 / SHOTS * jnp.einsum("ipf,ipg->ifg", K, K) + R * jnp.eye(FEATURES + 1)
    y = jnp.linalg.solve(gram, 2 / SHOTS * jnp.einsum("ipf,ip->if", K, new_target[:, :SHOTS])[..., None])[..., 0]
    return y, jnp.mean((jnp.einsum("ipf,if->ip", Q, y) - new_target[:, SHOTS:]) ** 2, axis=1)


for name, x in (("random features", weights), ("learned features", solution.best.x)):
    y, errors = fitted(x)
    print(f"{name}: median error {float(jnp.median(errors)):.4f} after five points")
assert jnp.median(fitted(solution.best.x)[1]) < jnp.median(fitted(weights)[1])

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
line = jnp.linspace(-4, 4, 200)[:, None]
for name, x in (("random", weights), ("learned", solution.best.x)):
    y, _ = fitted(x)
    axes[0].plot(line[:, 0], features(x, line) @ y[0], label=f"{name} features")
axes[0].plot(new_t[0, :SHOTS, 0], new_target[0, :SHOTS], "ko", label="five points")
axes[0].plot(new_t[0, SHOTS:, 0], new_target[0, SHOTS:], "k.", ms=2, label="the wave")
axes[0].set_ylim(-3, 3)
axes[0].legend(fontsize=8)
axes[1].semilogy(solution.record["step"], F)
axes[1].set(xlabel="step", ylabel="F")
plt.show()
