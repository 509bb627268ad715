# %% [markdown]
# # A lower level with two wells
#
# Where $g(x, \cdot)$ has several minima, $y(x)$ is the lowest one, and it may jump as $x$ moves. A method that follows the minimum at which it began then answers another
# question, without a sign of it in its residuals. Here
#
# $$
# g(x, y) = (y^2 - 1)^2 + \frac{x y}{2}, \qquad f(x, y) = (x - \tfrac{1}{2})^2 + (y + 1)^2,
# $$
#
# so that the follower is near $-1$ for $x > 0$ and near $+1$ for $x < 0$.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel

jax.config.update("jax_enable_x64", True)


def f(x, y, batch):
    return (x - 0.5) ** 2 + (y + 1) ** 2


def g(x, y, batch):
    return (y**2 - 1) ** 2 + x * y / 2


problem = bilevel.BilevelProblem(
    upper=f,
    lower=bilevel.Minimize(g),
    x_set=bilevel.Box(-1.0, 1.0),
    y_set=bilevel.Box(-2.0, 2.0),
    init=lambda key: (jnp.array(-0.8), jnp.array(1.0)),
)

# %% [markdown]
# `PIGD` follows the well at $+1$ in which it starts. Its own referee solves the lower level again *from its $y$*, and agrees. A referee that searches all of $Y$ does not:

# %%
local = bilevel.solve(problem, bilevel.PIGD(), key=jax.random.key(0), max_steps=300)
print("PIGD, judged by the referee that starts at its y:", local.status.name)
print(f"   x = {float(local.x):.4f}, y = {float(local.y):.4f}")
gap = bilevel.diagnostics.lower_gap(problem, local.x, local.y)
print(f"   true lower gap g(x, y) - min g(x, .) = {float(gap.gap):.4f}")

# %% [markdown]
# `SampledPenalty` holds many points of $Y$ against each other, and is judged by values of $g$:

# %%
found = bilevel.solve(problem, bilevel.SampledPenalty(), key=jax.random.key(0), max_steps=60)
print("SampledPenalty:", found.status.name)
print(f"   x = {float(found.x):.4f}, y = {float(found.y):.4f}, F = {float(found.record['value'][-1]):.6f}")
gap = bilevel.diagnostics.lower_gap(problem, found.x, found.y)
print(f"   true lower gap = {float(gap.gap):.1e}")
assert float(found.y) < 0

# %%
xs, ys = np.linspace(-1, 1, 201), np.linspace(-1.6, 1.6, 801)
levels = np.array([[g(x, y, None) for y in ys] for x in xs])
answer = ys[levels.argmin(axis=1)]
F = f(xs, answer, None)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
axes[0].contour(xs, ys, levels.T, np.linspace(-0.6, 1.5, 22), cmap="Greys_r", linewidths=0.7)
axes[0].plot(xs[answer > 0], answer[answer > 0], "C0", lw=2.5)
axes[0].plot(xs[answer < 0], answer[answer < 0], "C0", lw=2.5, label="y(x)")
axes[0].plot(float(local.x), float(local.y), "C3s", label="PIGD")
axes[0].plot(float(found.x), float(found.y), "C2o", label="SampledPenalty")
axes[0].set(xlabel="x", ylabel="y")
axes[0].legend(loc="center left")
axes[1].plot(xs[answer > 0], F[answer > 0], "C0", lw=2.5)
axes[1].plot(xs[answer < 0], F[answer < 0], "C0", lw=2.5)
axes[1].plot(float(found.x), float(found.record["value"][-1]), "C2o")
axes[1].set(xlabel="x", ylabel="F(x)")
plt.show()
