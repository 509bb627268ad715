# %% [markdown]
# # A reward from demonstrations
#
# An expert walks through a grid, and nobody says what for. Inverse reinforcement learning looks for the reward under which the walks are most likely: $x$ are its
# parameters, the lower level is the soft Bellman equation with its fixed point $Q_x$, and $F$ is the negative log-likelihood of the actions.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel
import irl

jax.config.update("jax_enable_x64", True)

SIZE, MOVES = 6, ((0, 1), (1, 0), (0, -1), (-1, 0))


def neighbour(cell, move):
    row, column = divmod(cell, SIZE)
    row, column = np.clip([row + move[0], column + move[1]], 0, SIZE - 1)
    return row * SIZE + column


transitions = np.zeros((SIZE**2, 4, SIZE**2))
for cell in range(SIZE**2):
    for action in range(4):
        for other, move in enumerate(MOVES):  # the wind: one step of ten goes anywhere
            transitions[cell, action, neighbour(cell, move)] += 0.9 * (other == action) + 0.1 / 4
mdp = irl.MDP.dense(transitions, start=np.full(SIZE**2, 1 / SIZE**2), discount=0.9)

# %% [markdown]
# The true reward has a goal and a swamp. The expert acts by its soft optimal policy, and 60 walks of 20 steps are seen.

# %%
truth = np.zeros(SIZE**2)
truth[SIZE**2 - 1] = 1.0
truth[[14, 15, 20, 21]] = -1.0
features = np.repeat(np.eye(SIZE**2)[:, None, :], 4, axis=1)  # one parameter for each cell
reward = irl.LinearReward.of(features)
expert = irl.policy(irl.value_iteration(mdp, reward.table(jnp.asarray(truth))).Q)
demonstrations = irl.sample(mdp, expert, jax.random.key(0), num_trajectories=60, length=20)

# %% [markdown]
# `to_bilevel` makes the bilevel problem. Any solver for fixed points runs on it, by implicit differentiation; those of `irl`, as `MLIRL`, have closed forms in its place.

# %%
problem = irl.to_bilevel(mdp, demonstrations, reward)
solution = bilevel.solve(problem, bilevel.LBFGS(), key=jax.random.key(1), max_steps=100, every=5, tol=1e-6)
print(
    f"{solution.status.name}: F = {float(solution.record['value'][-1]):.5f}, from {float(solution.record['value'][0]):.5f}"
)
learned = irl.policy(irl.value_iteration(mdp, reward.table(solution.x)).Q)
print(f"mean difference of the two policies: {float(jnp.abs(learned - expert).mean()):.3f}")
print(f"correlation of the rewards: {np.corrcoef(truth, solution.x)[0, 1]:.3f}")
assert solution.status == bilevel.Status.CONVERGED

# %% [markdown]
# The gradient at any point says how wrong it can be, without a word about occupancies:

# %%
print(bilevel.hypergradient(problem, jnp.asarray(truth)))

figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for ax, values, title in zip(axes, (truth, np.asarray(solution.x)), ("true reward", "learned reward")):
    image = ax.imshow((values - values.mean()).reshape(SIZE, SIZE), cmap="viridis")
    ax.set_title(title)
    figure.colorbar(image, ax=ax)
plt.show()
