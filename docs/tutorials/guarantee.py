# %% [markdown]
# # A bound, and an attack on it
#
# A hypergradient is computed at a $y$ that is not quite $y(x)$. How wrong can it be? With constants of the problem bilevax proves a bound; here it is derived for one case, checked on one
# instance, and then attacked on thousands that are drawn to break it.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel

jax.config.update("jax_enable_x64", True)

rng = np.random.default_rng(0)
basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
H = jnp.asarray((basis * np.geomspace(1.0, 20.0, 6)) @ basis.T)
M = jnp.asarray(rng.normal(size=(6, 3)))
target = jnp.asarray(rng.normal(size=6))


def f(x, y, batch):
    return jnp.sum((y - target) ** 2) / 2


def g(x, y, batch):
    return (y - M @ x) @ H @ (y - M @ x) / 2


problem = bilevel.BilevelProblem(upper=f, lower=bilevel.Minimize(g), init=lambda key: (jnp.zeros(3), jnp.zeros(6)))
constants = bilevel.Constants(
    mu=1.0, L_g=20.0, L_fx=0.0, L_fy=1.0, L_gxy=0.0, L_gyy=0.0, C_gxy=float(jnp.linalg.norm(H @ M, 2))
)

# %% [markdown]
# Here $y(x) = M x$ and $\nabla F(x) = M^T (M x - target)$. Take a $y$ at a distance from $y(x)$ that grows, and hold the error against the bound that `hypergradient` proves from
# the residual alone: $|y - y(x)| \le |g_y| / \mu$, and $\nabla F$ moves by at most $L_{fy} \, C_{gxy} / \mu$ times that.

# %%
x = jnp.asarray(rng.normal(size=3))
exact = M.T @ (M @ x - target)
direction = jnp.asarray(rng.normal(size=6))
errors, bounds, distances = [], [], np.geomspace(1e-10, 1.0, 21)
for distance in distances:
    h = bilevel.hypergradient(problem, x, M @ x + distance * direction, lower=bilevel.AsGiven(), constants=constants)
    errors.append(float(jnp.linalg.norm(h.gradient - exact)))
    bounds.append(float(h.error_bound))
print("held at all of them:", all(error <= bound for error, bound in zip(errors, bounds)))
print(f"the bound is {np.median(np.divide(bounds, errors)):.1f} times the error in the middle")
assert all(error <= bound for error, bound in zip(errors, bounds))

# %% [markdown]
# One instance proves little. `bilevax verify` draws instances that fulfil the assumptions, and steers the draws towards a larger ratio of error and bound, by Hypothesis. The same from Python,
# with few draws, for the guarantee of this bound:

# %%
from benchmarks.judge import verify

guarantee = verify.choose(["certified-unsolved"])["certified-unsolved"]
(finding,) = verify.run([guarantee], 5, None, 0)
row = verify.row(finding)
print(row["statement"])
print("source:", row["source"])
print("assumes:", ", ".join(row["assumptions"]))
print(
    f"{row['draws']} draws, {row['instances']} instances, largest measured/bound = {row['tightest']:.3f}: {row['verdict']}"
)
assert finding.counterexample is None

figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
ax.loglog(distances, bounds, label="proved bound")
ax.loglog(distances, errors, "o-", ms=4, label="error")
ax.set(xlabel="distance of y from y(x), in units of a random direction", ylabel="of the hypergradient")
ax.legend()
plt.show()
