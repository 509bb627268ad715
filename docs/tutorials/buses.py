# %% [markdown]
# # When to replace an engine
#
# Rust (1987) watched a man who keeps a fleet of buses: each month he either runs an engine on, at a cost that grows with its mileage, or replaces it at a cost of its own. He looks
# ahead, and some of his reasons nobody sees. With reasons of logistic distribution that is a soft Bellman equation, and the two costs are estimated by maximum likelihood:
# inverse reinforcement learning with two parameters, and "nested fixed point" is another name of a bilevel problem.
#
# The data here are drawn from the model, with his costs in mind, so that the truth is known.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel
import irl

jax.config.update("jax_enable_x64", True)

BINS, DISCOUNT = 60, 0.99  # of 5,000 miles each
more = np.array([0.35, 0.60, 0.05])  # a month's miles: none, one or two bins more
transitions = np.zeros((BINS, 2, BINS))
for mileage in range(BINS):
    for extra, probability in enumerate(more):
        transitions[mileage, 0, min(mileage + extra, BINS - 1)] += probability
        transitions[mileage, 1, extra] += probability  # a new engine, then the month's miles
mdp = irl.MDP.dense(transitions, start=np.eye(BINS)[0], discount=DISCOUNT)

features = np.zeros((BINS, 2, 2))
features[:, 0, 0] = -np.arange(BINS) / 10  # running on: maintenance, in units of ten bins
features[:, 1, 1] = -1.0  # replacing
reward = irl.LinearReward.of(features)
truth = jnp.array([0.6, 8.0])

keeper = irl.policy(irl.value_iteration(mdp, reward.table(truth)).Q)
records = irl.sample(mdp, keeper, jax.random.key(0), num_trajectories=100, length=120)

# %% [markdown]
# One hundred buses, ten years each. Every month counts the same here, so that the likelihood is taken of plain counts, scaled to what an occupancy sums to, $1/(1 - \gamma)$. Newton's method on
# the exact gradient, with the fixed point solved at every point, ends at the estimate:

# %%
counts = np.zeros((BINS, 2))
np.add.at(counts, (np.asarray(records.states).ravel(), np.asarray(records.actions).ravel()), 1.0)
problem = irl.to_bilevel(mdp, counts / counts.sum() / (1 - DISCOUNT), reward)
solution = bilevel.solve(problem, bilevel.TrustRegion(), key=jax.random.key(0), max_steps=100, every=1, tol=1e-7)
print(solution.status.name, "after", solution.stats["steps"], "steps")
assert solution.status == bilevel.Status.CONVERGED

# %% [markdown]
# The likelihood's curvature gives standard errors: $(1 - \gamma) F$ is the mean negative log-likelihood of a month, its Hessian times the number of months is the information. `implicit_objective` is
# $F$ as a function, differences of its gradient are the Hessian.

# %%
gradient = jax.jit(jax.grad(bilevel.implicit_objective(problem)))
step = 1e-4
hessian = np.array(
    [(gradient(solution.x + step * e) - gradient(solution.x - step * e)) / (2 * step) for e in jnp.eye(2)]
)
information = counts.sum() * (1 - DISCOUNT) * (hessian + hessian.T) / 2
errors = np.sqrt(np.diag(np.linalg.inv(information)))
for name, true, found, error in zip(("maintenance", "replacement"), truth, solution.x, errors):
    print(f"{name}: {found:.3f} +- {error:.3f}, true {true:.3f}")
assert np.all(np.abs(np.asarray(solution.x - truth)) < 4 * errors)

# %%
estimated = irl.policy(irl.value_iteration(mdp, reward.table(solution.x)).Q)
figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.plot(5 * np.arange(BINS), keeper[:, 1], label="true")
ax.plot(5 * np.arange(BINS), estimated[:, 1], "--", label="estimated")
ax.set(xlabel="mileage of the engine (1000 miles)", ylabel="probability of replacing it")
ax.legend()
plt.show()

# %% [markdown]
# Reference: Rust. Optimal replacement of GMC bus engines: an empirical model of Harold Zurcher. Econometrica 55, 1987.
