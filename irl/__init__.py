"""Inverse reinforcement learning on the same problem spec.

    problem = irl.to_bilevel(mdp, demonstrations, reward)        # a BilevelProblem, for any solver of fixed points

Tabular and exact: `MDP`, soft dynamic programming (`irl.soft`), rewards, `Demonstrations`. Solvers that know what an
MDP is are in `irl.solvers`; they run under `bilevel.solve` as all others do.
"""

# ruff: noqa: F403
from irl import demonstrations, mdp, rewards, soft, solvers, spec
from irl.demonstrations import Demonstrations, sample
from irl.mdp import MDP, Successors
from irl.rewards import LinearReward, NetworkReward, Reward, TableReward, TwoLayerReward
from irl.soft import occupancy, policy, value_iteration
from irl.solvers import *  # every solver found in irl/solvers, by discovery
from irl.spec import constants, expert_occupancy, likelihood_gradient, start_measure, to_bilevel

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "MDP",
    "Demonstrations",
    "LinearReward",
    "NetworkReward",
    "Reward",
    "Successors",
    "TableReward",
    "TwoLayerReward",
    "constants",
    "demonstrations",
    "expert_occupancy",
    "likelihood_gradient",
    "mdp",
    "occupancy",
    "policy",
    "rewards",
    "sample",
    "soft",
    "solvers",
    "spec",
    "start_measure",
    "to_bilevel",
    "value_iteration",
    *solvers.ALL,
]
