"""Inverse reinforcement learning on the same problem spec.

    problem = irl.to_bilevel(mdp, demonstrations, reward)        # a BilevelProblem, for any solver of fixed points

Tabular and exact: `MDP`, soft dynamic programming (`irl.tabular.soft`), rewards, `Demonstrations`. Solvers that know
what an MDP is are in `irl.solvers`; they run under `bilevel.solve` as all others do.

    problem = irl.to_control(irl.make("Pendulum-v1"), demonstrations)      # networks, environments that are stepped

Deep: `environments`, the agent `SAC`, `DeepReward`, `expert`; solvers in `irl.solvers` again, under the same `solve`.
"""

# ruff: noqa: F403
from typing import Any

from irl import demonstrations, mdp, rewards, solvers
from irl.deep import control, environments, expert
from irl.deep.control import ControlImitation, DeepReward, to_control
from irl.deep.environments import Absorbing, Environment, Tabular, make
from irl.deep.sac import SAC
from irl.demonstrations import Demonstrations, sample
from irl.mdp import MDP, Successors
from irl.problem import ImitationProblem
from irl.rewards import LinearReward, NetworkReward, Reward, TableReward, TwoLayerReward
from irl.solvers import *  # every solver found in irl/solvers, by discovery
from irl.tabular import diagnostics, soft, spec
from irl.tabular.diagnostics import EarlyStopping
from irl.tabular.soft import occupancy, policy, value_iteration
from irl.tabular.spec import (
    TabularImitation,
    constants,
    expert_occupancy,
    likelihood_gradient,
    start_measure,
    to_bilevel,
)

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "to_control",
    "make",
    "expert",
    "environments",
    "control",
    "Tabular",
    "Environment",
    "DeepReward",
    "SAC",
    "Absorbing",
    "ControlImitation",
    "ImitationProblem",
    "TabularImitation",
    "MDP",
    "Demonstrations",
    "EarlyStopping",
    "LinearReward",
    "NetworkReward",
    "Reward",
    "Successors",
    "TableReward",
    "TwoLayerReward",
    "constants",
    "demonstrations",
    "diagnostics",
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


def __getattr__(name: str) -> Any:
    """Only reached for names that do not exist; it also tells type checkers that discovery adds names."""
    raise AttributeError(f"module 'irl' has no attribute {name!r}; solvers are {', '.join(solvers.ALL)}.")
