"""The gradient of maximum causal entropy IRL by imitation, as a program of its own: nothing of bilevax in it.

`python imitation_mce.py data.npz`: reads transitions P [S, A, S], start [S], features [S, F] of the states, what the
expert's sum to, expert [F], horizon [] and weights points [n, F]; prints what `torch_ridge.py` does, the gradient being
mu_pi - mu_E. It is what one step of imitation's tabular `MCEIRL` computes: soft values backwards, occupancy forwards.
One thread, float64.
"""

import sys
import warnings

from standalone import report


def main(path: str) -> None:
    """Measure and print JSON."""
    from importlib.metadata import version

    import numpy as np

    warnings.simplefilter("ignore")
    from imitation.algorithms.mce_irl import mce_occupancy_measures, mce_partition_fh
    from seals.base_envs import TabularModelMDP

    with np.load(path) as file:
        P, start, features, expert, horizon, points = (
            file[name] for name in ("P", "start", "features", "expert", "horizon", "points")
        )
    world = TabularModelMDP(
        transition_matrix=P, reward_matrix=np.zeros(len(P)), horizon=int(horizon), initial_state_dist=start
    )

    def call(x):
        reward = features @ x
        pi = mce_partition_fh(world, reward=reward)[2]
        visited = mce_occupancy_measures(world, reward=reward, pi=pi)[0][:-1]  # the last row is after the end
        return visited.sum(axis=0) @ features - expert

    report(call, points, f"imitation {version('imitation')}, NumPy {np.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
