"""NeuralIRL: wide networks for the soft Q function and the reward, in one loop with two timescales."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.backend.tree import norm
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.sets import Ball
from bilevel.solver import Solver
from bilevel.step import Stepper, require_numbers, step_sizes, stepper
from bilevel.struct import invalid, static, struct
from irl.mdp import MDP
from irl.rewards import TwoLayer, one_hot_pairs
from irl.tabular import soft, spec

PyTree = Any


class Mean(NamedTuple):
    """The averages of x and of D."""

    x: PyTree
    D: Array


class State(NamedTuple):
    """x; y = the truncated Q table [S, A] of D; D [2, m/2, d], the Q network's distance from its initialisation.

    network: the initialisation. mean: averages. count: steps so far. visits: [n], states of the agent's n chains. The
    rules for x and D, the state of the demonstrations' source.
    """

    x: PyTree
    y: Array
    D: Array
    network: TwoLayer
    mean: Mean
    count: Array
    visits: Array
    step_x: Stepper
    step_D: Stepper
    upper: PyTree


class Info(NamedTuple):
    """direction: |h(agent) - h(expert)|. td_error: root mean square of delta. distance: |D|."""

    direction: Array
    td_error: Array
    distance: Array


@struct(kw_only=True)
class NeuralIRL(Solver):
    """Two-timescale single-loop IRL with overparameterised networks, for problems of `irl.to_bilevel`. With

        Q(s, a; D) = q + c f(z(s, a); D),    f = `TwoLayer`: m^(-1/2) sum_j b_j ReLU((W_j + D_j) . z), f(.; 0) = 0,

    c = 1/(1 - gamma) and q = gamma c log A, the soft Q of zero reward, one step is

        delta = Q - r(.; x) - gamma E log sum_a exp Qbar(s', a),     Qbar = Q truncated to [lo, hi]
        D <- Proj_{|D| <= B}(D - eta sum over (s, a) of w delta grad_D Q)       fast: one TD step
        pi proportional to exp Qbar
        x <- Proj_X(x - alpha_k (h(agent) - h(expert) + decay x)),  alpha_k = alpha (k + 1)^(-s)      slow

    where lo = (min r + gamma log A)/(1 - gamma) and hi = (max r + gamma log A)/(1 - gamma) for the reward of this step:
    the soft optimum lies between, so that truncation never moves Q away from it. x and D are averaged with weights
    like k^p. With `TwoLayerReward` and x_set = Ball(B_r) the reward is such a network, too, in a ball around its start.

    Assumptions: wide networks near their initialisation, bounded features, every pair has weight w > 0. eta/alpha_k
    grows: D follows x. The paper proves O(eps^-8) steps to an eps-optimal reward and policy.
    Cost per step: 1 upper gradient (in closed form, with one occupancy or one sample), 1 lower gradient (the TD step).

    Args:
        lower_step_size: eta > 0, an optax schedule or transformation. Default: 1/lambda, with lambda the largest
            eigenvalue of the weighted tangent kernel at D = 0; with num_transitions 1/c^2 <= 1/|grad_D Q|^2, since
            one pair may be the whole sample.
        upper_step_size: alpha > 0, an optax schedule or transformation. Default: 1/(curvature of F at x0).
        upper_decay: s >= 0; 1/2 as in the theory. radius: B > 0. weight_decay: >= 0.
        averaging: p >= 0; 0 is the plain average, large p the last iterate.
        width: m, even. inputs: z [S, A, d] of norm 1; default `rewards.one_hot_pairs`.
        num_transitions: default None: expectations over all pairs with equal w, and exact occupancies. Else n chains
            of the agent's policy, restarted from rho with probability 1 - gamma: one transition of each is the
            sample of the TD step and of h(agent).

    Reference: Zhang, Zeng, Li, Garcia, Hong. Understanding inverse reinforcement learning under overparameterization:
        non-asymptotic analysis and global optimality. AISTATS 2025 (PMLR 258), arXiv:2503.17865.
    Differs from the paper: its full text was not at hand. From the abstract: one loop, two timescales, networks near
        their linearisation, truncated neural soft Q-learning. Our reconstruction, after analyses of neural TD: the
        form of f, the interval of the truncation, the ball, the averages, alpha_k, and q and c, which keep |D| small
        against |W|. Expectations are exact by default; weight decay is ours.
    """

    lower_step_size: Any = None
    upper_step_size: Any = None
    upper_decay: Any = 0.5
    radius: Any = 50.0
    weight_decay: Any = 0.0
    averaging: Any = 0.0
    inputs: Any = None
    width: int = static(default=256)
    num_transitions: int | None = static(default=None)

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "lower_step_size", "upper_step_size")
        require_numbers(self, "radius")
        for name in ("upper_decay", "weight_decay", "averaging"):
            number = getattr(self, name)
            if isinstance(number, int | float) and not 0 <= number < float("inf"):
                invalid(f"NeuralIRL.{name}", number, "a finite number >= 0", "Leave it out for the default.")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        key_start, key_upper, key_network, key_visits = jax.random.split(key, 4)
        x, y = problem.init(key_start)
        mdp, _ = problem.lower_data.full()
        z = self._inputs(mdp)
        network = TwoLayer.draw(key_network, self.width, z.shape[-1])
        D = network.origin
        upper = spec.default_step(problem, x, y) if self.upper_step_size is None else None
        lower = None
        if self.lower_step_size is None:
            sampled = self.num_transitions is not None
            lower = 1 / (_scale(mdp) ** 2 if sampled else _largest_eigenvalue(network, z, _scale(mdp)))
        visits = jax.vmap(mdp.sample_start)(jax.random.split(key_visits, self.num_transitions or 1))
        return State(
            x, self._table(mdp, network, D), D, network, Mean(x, D), jnp.zeros((), D.dtype), visits,
            stepper(self.upper_step_size, upper, x), stepper(self.lower_step_size, lower, D),
            problem.upper_data.init(key_upper),
        )  # fmt: skip

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        key_upper, key_agent = jax.random.split(key)
        x, network = state.x, state.network
        batch, upper = problem.upper_data.next(state.upper, key_upper, x, state.y)
        mdp, reward = problem.lower_data.full()
        r = reward.table(x)
        Q, pull = jax.vjp(lambda D: self._table(mdp, network, D), state.D)
        truncated = _truncate(mdp, r, Q)
        c = spec.expert_batch(mdp, batch)

        if self.num_transitions is None:
            visits, sampled = state.visits, None
            weighted = (Q - soft.bellman(mdp, r, truncated)) / Q.size
            td_error = jnp.sqrt(jnp.sum(weighted**2) * Q.size)
        else:
            visits, sampled, following = _transitions(mdp, truncated, state.visits, key_agent)
            delta = Q[sampled] - r[sampled] - mdp.discount * soft.value(truncated)[following]
            weighted = jnp.zeros_like(Q).at[sampled].add(delta / delta.size)
            td_error = jnp.sqrt(jnp.mean(delta**2))
        D, step_D = state.step_D(state.D, pull(weighted)[0])
        D = Ball(self.radius).project(D)

        y = _truncate(mdp, r, self._table(mdp, network, D))
        if sampled is None:
            d = soft.occupancy(mdp, soft.policy(y), spec.agent_start(problem, mdp, c))
        else:
            d = jnp.zeros_like(Q).at[sampled].add(_scale(mdp) / sampled[0].size)
        slope = spec.match(reward, x, d, c)
        slower = (state.count + 1) ** -jnp.asarray(self.upper_decay, D.dtype)
        direction = jax.tree.map(lambda g, at: slower.astype(g.dtype) * (g + self.weight_decay * at), slope, x)
        x, step_x = state.step_x(x, direction)
        x = problem.x_set.project(x)

        part = (self.averaging + 1) / (state.count + 1 + self.averaging)
        mean = jax.tree.map(lambda old, new: old + jnp.asarray(part, old.dtype) * (new - old), state.mean, Mean(x, D))
        info = Info(norm(slope), td_error, norm(D))
        return State(x, y, D, network, mean, state.count + 1, visits, step_x, step_D, upper), info

    def output(self, problem: BilevelProblem, state: State) -> tuple[PyTree, Array]:
        """The averages."""
        mdp, reward = problem.lower_data.full()
        Q = self._table(mdp, state.network, state.mean.D)
        return state.mean.x, _truncate(mdp, reward.table(state.mean.x), Q)

    def _inputs(self, mdp: MDP) -> Array:
        return one_hot_pairs(mdp.num_states, mdp.num_actions) if self.inputs is None else self.inputs

    def _table(self, mdp: MDP, network: TwoLayer, D: Array) -> Array:
        """Q(., .; D), shape [S, A]."""
        scale = _scale(mdp)
        return scale * (mdp.discount * jnp.log(float(mdp.num_actions)) + network(D, self._inputs(mdp)))

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=1)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        reason = spec.refuse_other_problems(self, problem)
        if reason is None and problem.lower_data.full().mdp.horizon is not None:
            return "NeuralIRL needs a discounted MDP; got a horizon."
        if reason is None and self.num_transitions is not None and not spec.is_surrogate(problem):
            return "NeuralIRL with num_transitions starts from rho: make the problem with objective='surrogate'."
        return reason


def _scale(mdp: MDP) -> Array:
    return 1 / (1 - mdp.discount)


def bounds(mdp: MDP, r: Array) -> tuple[Array, Array]:
    """(lo, hi), shape []: lo <= Q* <= hi for the soft optimal Q* of r, and T maps such Q to such Q."""
    entropy = mdp.discount * jnp.log(float(mdp.num_actions))
    return (jnp.min(r) + entropy) * _scale(mdp), (jnp.max(r) + entropy) * _scale(mdp)


def _truncate(mdp: MDP, r: Array, Q: Array) -> Array:
    return jnp.clip(Q, *bounds(mdp, r))


def _transitions(mdp: MDP, Q: Array, visits: Array, key: Array) -> tuple[Array, tuple[Array, Array], Array]:
    """(next visits, (states, actions), next states), each [n]: a step of every chain under the policy of Q."""

    def one(state: Array, key: Array) -> tuple[Array, Array, Array]:
        key_action, key_next, key_stop, key_start = jax.random.split(key, 4)
        action = jax.random.categorical(key_action, Q[state])
        following = mdp.sample_next(key_next, state, action)
        goes_on = jax.random.bernoulli(key_stop, mdp.discount)
        return jnp.where(goes_on, following, mdp.sample_start(key_start)), action, following

    after, actions, following = jax.vmap(one)(visits, jax.random.split(key, visits.size))
    return after, (visits, actions), following


def _largest_eigenvalue(network: TwoLayer, z: Array, scale: Array) -> Array:
    """Of the kernel J J'/(S A) of Q at D = 0, J = dQ/dD, by power iteration: entries are >= 0, so is the vector."""
    _, push = jax.linearize(lambda D: scale * network(D, z), network.origin)
    pull = jax.linear_transpose(push, network.origin)

    def power(_: int, at: tuple[Array, Array]) -> tuple[Array, Array]:
        image = push(pull(at[0])[0]) / at[0].size
        size = jnp.linalg.norm(image)
        return image / size, size

    vector = jnp.full(z.shape[:2], (z.shape[0] * z.shape[1]) ** -0.5, z.dtype)
    return jax.lax.fori_loop(0, 30, power, (vector, jnp.zeros((), z.dtype)))[1]
