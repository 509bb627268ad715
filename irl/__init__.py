"""Inverse reinforcement learning on the same problem spec.

    problem = irl.to_bilevel(mdp, demonstrations, reward)        # a BilevelProblem, for any solver of fixed points

Tabular and exact: `MDP`, soft dynamic programming (`irl.tabular.soft`), rewards, `Demonstrations`. Solvers that know
what an MDP is are in `irl.solvers`; they run under `bilevel.solve` as all others do.

    problem = irl.to_control(irl.make("Pendulum-v1"), demonstrations)      # networks, environments that are stepped

Deep: `environments`, the agent `SAC`, `DeepReward`, `expert`; solvers in `irl.solvers` again, under the same `solve`.
"""

import typing as _typing

from bilevel.backend import moved as _moved
from irl import demonstrations, mdp, rewards, solvers
from irl.deep import control, environments, expert
from irl.deep.control import ControlImitation, DeepReward, to_control
from irl.deep.environments import Absorbing, Environment, Tabular, make
from irl.deep.sac import SAC
from irl.demonstrations import Demonstrations, sample
from irl.mdp import MDP, Successors
from irl.problem import ImitationProblem
from irl.rewards import LinearReward, NetworkReward, Reward, TableReward, TwoLayerReward
from irl.solvers.airl import AIRL
from irl.solvers.bc import BC
from irl.solvers.deepmlirl import DeepMLIRL
from irl.solvers.firl import FIRL
from irl.solvers.gail import GAIL
from irl.solvers.iqlearn import IQLearn
from irl.solvers.mceirl import MCEIRL
from irl.solvers.mlirl import MLIRL
from irl.solvers.neuralirl import NeuralIRL
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

__all__ = [
    "AIRL",
    "BC",
    "FIRL",
    "GAIL",
    "MCEIRL",
    "MDP",
    "MLIRL",
    "SAC",
    "Absorbing",
    "ControlImitation",
    "DeepMLIRL",
    "DeepReward",
    "Demonstrations",
    "EarlyStopping",
    "Environment",
    "IQLearn",
    "ImitationProblem",
    "LinearReward",
    "NetworkReward",
    "NeuralIRL",
    "Reward",
    "Successors",
    "TableReward",
    "Tabular",
    "TabularImitation",
    "TwoLayerReward",
    "constants",
    "control",
    "demonstrations",
    "diagnostics",
    "environments",
    "expert",
    "expert_occupancy",
    "likelihood_gradient",
    "make",
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
    "to_control",
    "value_iteration",
]

__version__ = _moved.version()

if not _typing.TYPE_CHECKING:  # to a type checker, other names are errors

    def __getattr__(name):
        """A solver that is only a file, a module by its old name, or an error with the nearest name."""
        return _moved.lookup(__name__, name, solvers.ALL, __all__)

    def __dir__():
        return [*__all__, "__version__"]
