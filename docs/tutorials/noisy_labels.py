# %% [markdown]
# # Which labels can be trusted?
#
# Four of ten labels of a training set are wrong, nobody knows which, and a small clean set is at hand. Each training sample $i$ gets a weight
# $\sigma(x_i)$: the lower level trains a classifier on the weighted samples, the upper level asks how good it is on the clean ones.
#
# $$
# \min\limits_x F(x) = \ell_{clean}(w(x)), \qquad w(x) = \argmin\limits_w \frac{1}{n}\sum\limits_{i} \sigma(x_i) \ell_i(w) + \frac{r}{2} |w|^2
# $$
#
# $x$ has an entry for each sample; a gradient of $F$ costs no more for that.

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
rng = np.random.default_rng(0)
order = rng.permutation(len(Z))
train, clean, test = order[:400], order[400:600], order[600:]
given = labels.copy()
wrong = rng.random(400) < 0.4
given[train[wrong]] = (labels[train[wrong]] + rng.integers(1, 10, wrong.sum())) % 10
print(f"{wrong.sum()} of {len(train)} labels are wrong")


# %%
def losses(w, batch):
    A, t = batch
    return -jnp.sum(t * jax.nn.log_softmax(A @ w), axis=1)


def upper(x, w, batch):
    return jnp.mean(losses(w, batch))


def lower(x, w, batch):
    return jnp.mean(jax.nn.sigmoid(x) * losses(w, batch)) + 1e-3 * jnp.sum(w**2) / 2


def data(rows, t):
    return bilevel.Full((jnp.asarray(Z[rows]), jnp.asarray(np.eye(10)[t[rows]])))


problem = bilevel.BilevelProblem(
    upper=upper,
    lower=bilevel.Minimize(lower),
    upper_data=data(clean, labels),
    lower_data=data(train, given),
    init=lambda key: (jnp.zeros(400), jnp.zeros((65, 10))),
)
solution = bilevel.solve(problem, bilevel.LBFGS(), key=jax.random.key(0), max_steps=30, every=1)
print(
    f"{solution.status.name}: F = {float(solution.record['value'][-1]):.4f}, from {float(solution.record['value'][0]):.4f}"
)

# %% [markdown]
# The weights tell the wrong labels from the right ones, which they have never seen:

# %%
weights = np.asarray(jax.nn.sigmoid(solution.x))


def accuracy(x):
    w = np.asarray(bilevel.hypergradient(problem, x).y)
    return float(np.mean(np.argmax(Z[test] @ w, axis=1) == labels[test]))


print(
    f"below 1/2: {np.mean(weights[wrong] < 0.5):.0%} of the wrong labels, {np.mean(weights[~wrong] < 0.5):.0%} of the right ones"
)
print(f"test accuracy: {accuracy(jnp.zeros(400)):.3f} with all weights equal, {accuracy(solution.x):.3f} with these")
assert np.mean(weights[wrong]) < np.mean(weights[~wrong])

figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
bins = np.linspace(0, 1, 31)
ax.hist(weights[~wrong], bins, alpha=0.6, label="right labels")
ax.hist(weights[wrong], bins, alpha=0.6, label="wrong labels")
ax.set(xlabel="weight of the sample", ylabel="samples")
ax.legend()
plt.show()

# %% [markdown]
# With many samples one takes batches: `bilevel.Minibatch` in place of `Full`, and a stochastic method such as `SOBA` or `SABA`. `bilevax run` compares them on this
# problem (`-p hyper_cleaning`), with ten draws of the wrong labels.
