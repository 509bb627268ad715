# %% [markdown]
# # Hyperparameters of a logistic regression
#
# A classifier of handwritten digits has a weight for each pixel and class, and each class may want its own penalty. The lower level trains the weights $w$ with
# penalties $e^{x_c}$, the upper level chooses $x$ by the loss on a validation set:
#
# $$
# \min\limits_x F(x) = \ell_{val}(w(x)), \qquad w(x) = \argmin\limits_w \ell_{train}(w) + \frac{1}{2}\sum\limits_{c} e^{x_c} |w_c|^2
# $$
#
# Ten penalties are too many for a grid. Their gradient costs one linear system more than the training.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import bilevel

jax.config.update("jax_enable_x64", True)

Z, labels = load_digits(return_X_y=True)
Z = np.hstack([Z / 16.0, np.ones((len(Z), 1))])
order = np.random.default_rng(0).permutation(len(Z))
train, val, test = order[:300], order[300:600], order[600:]
one_hot = np.eye(10)[labels]


def data(rows):
    return bilevel.Full((jnp.asarray(Z[rows]), jnp.asarray(one_hot[rows])))


# %% [markdown]
# $f$ and $g$ are plain functions of $(x, w, batch)$. What is written here is the whole model.


# %%
def loss(w, batch):
    A, t = batch
    return -jnp.mean(jnp.sum(t * jax.nn.log_softmax(A @ w), axis=1))


def upper(x, w, batch):
    return loss(w, batch)


def lower(x, w, batch):
    return loss(w, batch) + jnp.sum(jnp.exp(x) * jnp.sum(w**2, axis=0)) / 2


problem = bilevel.BilevelProblem(
    upper=upper,
    lower=bilevel.Minimize(lower),
    x_set=bilevel.Box(-12.0, 2.0),
    upper_data=data(val),
    lower_data=data(train),
    init=lambda key: (-3.0 * jnp.ones(10), jnp.zeros((65, 10))),
)
print(bilevel.recommend(problem))

# %% [markdown]
# The first of these is a quasi-Newton method on the exact gradient. Every number in its report is measured by a referee that solves the lower level again.

# %%
solution = bilevel.solve(problem, bilevel.LBFGS(), key=jax.random.key(0), max_steps=60, every=1)
print(solution.status.name, solution.status.advice)
print(f"F = {float(solution.record['value'][-1]):.6f} after {solution.stats['steps']} steps")
print("log-penalties:", np.round(np.asarray(solution.x), 2))
assert solution.status == bilevel.Status.CONVERGED

# %% [markdown]
# How good is it? One penalty for all classes, found on a grid, is the usual practice. It is solved here by the same lower level: `implicit_objective` is $F$ as a plain function.

# %%
F = jax.jit(bilevel.implicit_objective(problem))
grid = np.linspace(-10.0, 0.0, 21)
values = np.array([float(F(jnp.full(10, s))) for s in grid])


def accuracy(x):
    w = bilevel.hypergradient(problem, x).y
    return float(np.mean(np.argmax(Z[test] @ np.asarray(w), axis=1) == labels[test]))


best = jnp.full(10, grid[np.argmin(values)])
print(f"one penalty:  validation loss {values.min():.4f}, test accuracy {accuracy(best):.4f}")
print(f"ten:          validation loss {float(F(solution.x)):.4f}, test accuracy {accuracy(solution.x):.4f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
axes[0].plot(grid, values, "o-", label="one penalty for all")
axes[0].axhline(float(solution.record["value"][-1]), color="C3", label="ten penalties")
axes[0].set(xlabel="log of the one penalty", ylabel="validation loss")
axes[0].legend()
axes[1].semilogy(solution.record["step"], solution.record["hypergradient"])
axes[1].set(xlabel="step", ylabel="|grad F|, by the referee")
plt.show()

# %% [markdown]
# The gradient carries its error, so that one knows when to stop believing it:

# %%
h = bilevel.hypergradient(problem, solution.x)
print(h)
