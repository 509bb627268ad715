# %% [markdown]
# # Prices with a budget
#
# A government subsidises three producers by $x_i$ a unit. They answer with the quantities that pay best,
#
# $$
# y(x) = \argmin\limits_{0 \le y \le cap} \frac{1}{2} y^T Q y - (p + x)^T y,
# $$
#
# and the government wants the quantities near its targets $t$, but may spend at most $B$ in all: $x^T y(x) \le B$. That is a constraint of the leader in which the follower's
# answer stands, `UpperConstraints`; its multiplier says what one more unit of budget is worth.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel

jax.config.update("jax_enable_x64", True)

Q = jnp.array([[2.0, 0.6, 0.2], [0.6, 1.5, 0.4], [0.2, 0.4, 1.0]])
prices = jnp.array([1.0, 0.8, 0.2])
targets = jnp.array([1.2, 1.0, 1.5])


def upper(x, y, batch):
    return jnp.sum((y - targets) ** 2) / 2


def lower(x, y, batch):
    return y @ Q @ y / 2 - (prices + x) @ y


def spent(x, y, budget):
    return x @ y - budget


def start(key):
    return 0.1 * jnp.ones(3), jnp.ones(3)


def with_budget(budget):  # module-level functions and the budget as data: another one compiles nothing
    return bilevel.BilevelProblem(
        upper=upper,
        lower=bilevel.Minimize(lower),
        x_set=bilevel.Box(0.0, 10.0),
        y_set=bilevel.Box(0.0, 1.4),
        upper_constraints=bilevel.UpperConstraints(inequality=spent, data=jnp.asarray(budget)),
        init=start,
    )


solution = bilevel.solve(with_budget(2.0), bilevel.SQP(), key=jax.random.key(0), max_steps=100)
print(solution.status.name, "F =", round(float(solution.record["value"][-1]), 6))
print("subsidies ", np.round(np.asarray(solution.x), 4))
print("quantities", np.round(np.asarray(solution.y), 4))
print("spent     ", round(float(solution.x @ solution.y), 6), "of 2")
assert solution.status == bilevel.Status.CONVERGED

# %% [markdown]
# The multiplier of the budget is $-dF/dB$. Solving for other budgets shows that it is so.

# %%
budgets = np.linspace(0.25, 4.5, 12)
runs = [bilevel.solve(with_budget(B), bilevel.SQP(), key=jax.random.key(0), max_steps=200) for B in budgets]
values = np.array([float(run.record["value"][-1]) for run in runs])
prices_of_budget = np.array(
    [
        float(bilevel.diagnostics.multipliers(with_budget(B), run.x, run.y).inequality[0])
        for B, run in zip(budgets, runs)
    ]
)
slopes = -np.gradient(values, budgets)
print({name: sum(run.status.name == name for run in runs) for name in sorted({run.status.name for run in runs})})
print("largest difference of multiplier and slope inside:", f"{np.abs(prices_of_budget - slopes)[2:-2].max():.3f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
axes[0].plot(budgets, values, "o-")
axes[0].set(xlabel="budget B", ylabel="F, the distance from the targets")
axes[1].plot(budgets, prices_of_budget, "o-", label="multiplier")
axes[1].plot(budgets, slopes, "x--", label="- dF/dB, by differences")
axes[1].set(xlabel="budget B", ylabel="worth of one more unit")
axes[1].legend()
plt.show()
