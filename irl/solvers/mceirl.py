"""MCEIRL: maximum causal entropy inverse reinforcement learning, with exact soft dynamic programming in every step."""

from types import MappingProxyType
from typing import Any, NamedTuple

from jax import Array

from bilevel.backend.tree import norm
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import Solver
from bilevel.step import Stepper, StepSize, step_sizes, stepper
from bilevel.struct import static, struct
from irl.problem import refuse_others
from irl.tabular import soft, spec, steps
from irl.tabular.spec import TabularImitation

PyTree = Any


class State(NamedTuple):
    """What the next step needs."""

    x: PyTree
    """The reward's parameters."""
    y: Array
    """The soft Q of the x before, shaped like `mdp.shape`: where the next sweeps start."""
    step_x: Stepper
    """The rule for x."""


class Info(NamedTuple):
    """What a step of MCEIRL shows."""

    direction: Array
    """|mu_pi - mu_E|, []: how far the expected features are from the expert's; the norm of grad F."""
    soft_error: Array
    """A bound of max |Q - Q*| at the end of the step's sweeps, []: it is large where max_sweeps are too few."""


@struct(kw_only=True)
class MCEIRL(Solver):
    """Maximum causal entropy IRL, on all of the demonstrations, for problems of `irl.to_bilevel`:

        Q_t = r + gamma P V_{t+1},  V_t = log sum_a exp Q_t     from the horizon, or to the fixed point without one
        pi_t = exp(Q_t - V_t)
        x <- Proj_X(x - a (mu_pi - mu_E)),    mu = sum over (s, a) of the occupancy times grad r(s, a; x).

    With rewards linear in x, mu are expected features, and this is gradient descent on F.

    Assumptions: none on the MDP; rewards linear in x for the global optimum. As gradient descent on a smooth convex
    function it then has F - F* falling like 1/k with a <= 1/L.
    Cost per step: 1 upper gradient (in closed form, with one occupancy), `max_sweeps` lower gradients at most.

    Args:
        upper_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: 1/(curvature of F at
            x0); less while F is more curved than there: see `irl.tabular.steps`.
        max_sweeps: the most sweeps of soft value iteration in a step, >= 0, from the last Q; they stop at rounding
            error before. With a horizon T there are always T. Default: 1000.

    Reference: Ziebart, Bagnell, Dey. Modeling interaction via the principle of maximum causal entropy. ICML 2010.
    Differs from the paper: discounted processes are served, too; sweeps start from the last Q; x is projected; with
        objective="likelihood" the agent starts from the demonstrations' own measure, and F is the likelihood itself.
    """

    upper_step_size: StepSize | None = None
    max_sweeps: int = static(default=1000)
    full_batch = True
    renamed = MappingProxyType({"num_sweeps": "max_sweeps"})

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "upper_step_size")

    def init(self, problem: TabularImitation, key: Array) -> State:
        x, y = problem.init(key)
        if self.upper_step_size is not None:
            return State(x, y, stepper(self.upper_step_size, None, x))
        return State(x, y, steps.watched(spec.default_step(problem, x, y), x, share=1.0, reach=1.0))

    def step(self, problem: TabularImitation, state: State, key: Array) -> tuple[State, Info]:
        x, mdp, c = state.x, problem.mdp, problem.occupancy()
        found = soft.value_iteration(mdp, problem.reward.table(x), state.y, max_sweeps=self.max_sweeps)
        y = found.iterate  # the error that is left is shown
        d = soft.occupancy(mdp, soft.policy(y), problem.agent_start(c))
        direction = spec.match(problem.reward, x, d, c)
        x, step_x = state.step_x(x, direction)
        return State(problem.x_set.project(x), y, step_x), Info(norm(direction), found.error)

    def output(self, problem: TabularImitation, state: State) -> tuple[PyTree, Array]:
        """The last x with its own soft Q, not that of the x before; the referee judges it, exact or not."""
        return state.x, soft.value_iteration(problem.mdp, problem.reward.table(state.x), state.y).iterate

    def cost(self, problem: TabularImitation) -> OracleCount:
        horizon = problem.mdp.horizon
        return OracleCount(upper_gradients=1, lower_gradients=self.max_sweeps if horizon is None else horizon)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        return refuse_others(self, problem, TabularImitation)
