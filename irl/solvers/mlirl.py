"""MLIRL: maximum-likelihood inverse reinforcement learning in a single loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel import oracles
from bilevel.backend.tree import norm
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import Solver
from bilevel.step import Stepper, StepSize, step_sizes, stepper
from bilevel.struct import static, struct
from irl import demonstrations
from irl.problem import refuse_others
from irl.tabular import soft, spec, steps
from irl.tabular.spec import TabularImitation

PyTree = Any


class State(NamedTuple):
    """What the next step needs."""

    x: PyTree
    """The reward's parameters."""
    y: Array
    """The soft Q, shaped like `mdp.shape`."""
    step_x: Stepper
    """The rule for x."""
    source: PyTree
    """The state of the demonstrations' source."""


class Info(NamedTuple):
    """What a step of MLIRL shows."""

    direction: Array
    """|h(agent) - h(expert)|, []: the norm of the estimate of grad F."""
    policy_change: Array
    """The largest |log pi_{k+1} - log pi_k| over states and actions, []."""


@struct(kw_only=True)
class MLIRL(Solver):
    """ML-IRL, for problems of `irl.to_bilevel`: with one batch of demonstrations per step,

        Q <- T_x Q (soft Bellman), or one sweep of soft policy evaluation of pi    T = num_lower_steps times
        pi proportional to exp Q
        x <- Proj_X(x - a (h(agent) - h(expert))),    h = sum over (s, a) of the occupancy times grad r(s, a; x).

    The agent's occupancy is exact, from the start measure that `TabularImitation.agent_start` says; then
    h(agent) - h(expert) is grad F wherever Q is the soft optimum. With num_rollouts it is that of sampled trajectories
    from rho, which gives an estimate of the surrogate's gradient.

    Assumptions: bounded rewards, smooth in x; with rewards linear in x the surrogate is convex, else stationary points
    are found. With a ~ K^(-1/2) the mean over k of |log pi_k - log pi_{x_k}| and the mean squared gradient norm fall
    like K^(-1/2).
    Cost per step: 1 upper gradient (in closed form, with one occupancy), T lower gradients.

    Args:
        upper_step_size: a > 0. A number, an optax schedule or an optax transformation. Default: half of 1/(curvature
            of F at x0); then as F's curvature on the way allows, and like k^(-1/2) where directions are sampled:
            see `irl.tabular.steps`.
        num_lower_steps: T >= 1, sweeps in a step. Default: 1.
        policy_evaluation: whether pi is held during the T sweeps, as in an actor-critic; with T = 1 the two are the
            same. Default: False.
        num_rollouts: sampled trajectories of the agent in a step, >= 1. Default: None, for the exact occupancy.
        rollout_length: their number of steps, >= 1; the weight gamma^length/(1 - gamma) of what follows is missing.
            Default: 50.

    Reference: Zeng, Li, Garcia, Hong. Maximum-likelihood inverse reinforcement learning with finite-time guarantees.
        NeurIPS 2022, arXiv:2210.01282, Algorithm 1.
    Differs from the paper: the sweep of soft Q is over all states and actions and exact; occupancies are exact by
        default; x is projected; without num_rollouts and with objective="likelihood", the agent starts from the
        demonstrations' own measure.
    """

    upper_step_size: StepSize | None = None
    num_lower_steps: int = static(default=1)
    policy_evaluation: bool = static(default=False)
    num_rollouts: int | None = static(default=None)
    rollout_length: int = static(default=50)
    guarantees = ("ml-irl", "ml-irl-linear", "finite-sample")

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "upper_step_size")

    def init(self, problem: TabularImitation, key: Array) -> State:
        key_start, key_source, _ = jax.random.split(key, 3)  # three, as runs of earlier versions
        x, y = problem.init(key_start)
        if self.upper_step_size is not None:
            step_x = stepper(self.upper_step_size, None, x)
        elif self.num_rollouts is not None or problem.demonstrations.fraction < 1:
            step_x = steps.decaying(0.5 * spec.default_step(problem, x, y))
        else:
            step_x = steps.watched(0.5 * spec.default_step(problem, x, y), x, share=0.5, reach=10.0)
        return State(x, y, step_x, problem.demonstrations.init(key_source))

    def step(self, problem: TabularImitation, state: State, key: Array) -> tuple[State, Info]:
        key_batch, _, key_agent = jax.random.split(key, 3)  # three, as runs of earlier versions
        x = state.x
        batch, source = problem.demonstrations.next(state.source, key_batch, x, state.y)

        before = soft.log_policy(state.y)
        y = self._sweeps(problem, x, state.y, before)
        log_pi = soft.log_policy(y)

        c = problem.occupancy(batch)
        d = self._agent(problem, jnp.exp(log_pi), c, key_agent)
        direction = spec.match(problem.reward, x, d, c)
        x, step_x = state.step_x(x, direction)
        info = Info(norm(direction), jnp.max(jnp.abs(log_pi - before)))
        return State(problem.x_set.project(x), y, step_x, source), info

    def _sweeps(self, problem: TabularImitation, x: PyTree, y: Array, log_pi: Array) -> Array:
        """The table Q after T sweeps from y: of the Bellman operator, or of the evaluation of the policy log_pi."""
        if self.policy_evaluation and self.num_lower_steps > 1:
            r = problem.reward.table(x)
            sweep = lambda _, Q: soft.evaluate(problem.mdp, r, Q, log_pi)  # noqa: E731
        else:
            batch = problem.lower_data.full()
            sweep = lambda _, Q: Q - oracles.residual(problem, x, Q, batch)  # noqa: E731
        return lax.fori_loop(0, self.num_lower_steps, sweep, y)

    def _agent(self, problem: TabularImitation, pi: Array, c: Array, key: Array) -> Array:
        """The occupancy of the policy pi: the exact one, or that of sampled trajectories."""
        if self.num_rollouts is None:
            return soft.occupancy(problem.mdp, pi, problem.agent_start(c))
        sizes = {"num_trajectories": self.num_rollouts, "length": self.rollout_length}
        return demonstrations.sample(problem.mdp, pi, key, **sizes).occupancy(problem.mdp)

    def cost(self, problem: TabularImitation) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=self.num_lower_steps)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if not isinstance(problem, TabularImitation):
            return refuse_others(self, problem, TabularImitation)
        horizon = problem.mdp.horizon
        if self.num_rollouts is not None and not problem.is_surrogate:
            return "MLIRL with num_rollouts starts the agent from rho: make the problem with objective='surrogate'."
        if horizon is not None and self.policy_evaluation:
            return "MLIRL with policy_evaluation needs a discounted MDP; got a horizon, where sweeps are exact anyway."
        if horizon is not None and self.num_rollouts is not None and self.rollout_length > horizon:
            return f"MLIRL.rollout_length: got {self.rollout_length}; expected at most the horizon {horizon}."
        return None
