"""Inverse reinforcement learning on the same problem spec.

    problem = irl.to_bilevel(mdp, demonstrations, reward)        # a BilevelProblem, for any solver of fixed points

Tabular and exact: `MDP`, soft dynamic programming (`irl.soft`), rewards, `Demonstrations`.
"""

from irl import demonstrations, mdp, rewards, soft, spec
from irl.demonstrations import Demonstrations, sample
from irl.mdp import MDP, Successors
from irl.rewards import LinearReward, Reward, TableReward
from irl.soft import occupancy, policy, value_iteration
from irl.spec import constants, expert_occupancy, likelihood_gradient, start_measure, to_bilevel

__all__ = [
    "MDP",
    "Demonstrations",
    "LinearReward",
    "Reward",
    "Successors",
    "TableReward",
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
    "spec",
    "start_measure",
    "to_bilevel",
    "value_iteration",
]
