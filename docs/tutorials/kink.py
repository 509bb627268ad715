# %% [markdown]
# # A minimum at a kink
#
# The follower stays within $y \ge 0$, so that $y(x) = \max(x, 0)$ has a kink where that bound begins to hold, and so has $F$:
#
# $$
# y(x) = \argmin\limits_{y \ge 0} \frac{1}{2} |y - x|^2, \qquad f(x, y) = \frac{3}{2} y_1 - \frac{1}{2} x_1 + \frac{1}{2} (x_2 - 3)^2 + \frac{1}{10} y_2^2.
# $$
#
# In $x_1$ it falls with slope $-1/2$ up to zero and rises with slope $1$ from there: its minimum is at a kink, where no gradient vanishes. A plain gradient method jumps from side to side there.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel

jax.config.update("jax_enable_x64", True)


def f(x, y, batch):
    return 1.5 * y[0] - 0.5 * x[0] + (x[1] - 3) ** 2 / 2 + y[1] ** 2 / 10


def g(x, y, batch):
    return jnp.sum((y - x) ** 2) / 2


problem = bilevel.BilevelProblem(
    upper=f,
    lower=bilevel.Minimize(g),
    y_set=bilevel.Box(0.0, jnp.inf),
    init=lambda key: (jnp.array([-0.73, 0.5]), jnp.ones(2)),
)
best = jnp.array([0.0, 2.5])  # of x_2: (x_2 - 3) + x_2/5 = 0
F = jax.jit(bilevel.implicit_objective(problem))
print("F* =", float(F(best)))

# %% [markdown]
# `PIGD` takes implicit gradients as they come; `DSBLO` perturbs the follower a little, which rounds the kink off, and adapts its steps.

# %%
runs = {
    "PIGD(upper_step_size=0.1)": bilevel.PIGD(upper_step_size=0.1),
    "DSBLO(sigma=0.01)": bilevel.DSBLO(sigma=0.01, gamma_1=10.0, gamma_2=10.0),
    "LBFGS()": bilevel.LBFGS(),
}
ends = {}
for name, solver in runs.items():
    steps, every = (60, 1) if name == "LBFGS()" else (2000, 20)
    ends[name] = bilevel.solve(problem, solver, key=jax.random.key(0), max_steps=steps, every=every, tol=1e-5)
for name, end in ends.items():
    print(
        f"{name:26} {end.status.name:14} F - F* = {float(F(end.x) - F(best)):.2e}   x = {np.round(np.asarray(end.x), 4)}"
    )

# %% [markdown]
# GOLDSTEIN says that zero is nearly in the convex hull of the gradients around: a kink is close, and nobody looked further. Where a run stands at the kink itself, the referee asks all branches of the
# follower for the steepest descent of $F$; where no direction leads down, as at the end of `LBFGS`, the run is CONVERGED although the gradient is not small. For the minimum itself:

# %%
kink = bilevel.diagnostics.steepest_descent(problem, best, jnp.array([0.0, 2.5]), 1e-6)
print("rate of the steepest descent at the kink:", float(kink.descent))
h = bilevel.hypergradient(problem, best)
print(h)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
line = np.linspace(-1, 1, 201)
axes[0].plot(line, [float(F(jnp.array([s, 2.5]))) for s in line])
axes[0].set(xlabel="x_1, at x_2 = 2.5", ylabel="F")
for name, end in ends.items():
    excess = np.maximum(np.asarray(end.record["value"]) - float(F(best)), 1e-16)
    axes[1].semilogy(np.asarray(end.record["step"]), excess, label=name)
axes[1].set(xlabel="step", ylabel="F - F*")
axes[1].legend(fontsize=8)
plt.show()
