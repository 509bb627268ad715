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
from bilevel.step import Scalar, Stepper, StepSize, require_numbers, step_sizes, stepper
from bilevel.struct import invalid, static, struct
from irl.mdp import MDP
from irl.problem import refuse_others
from irl.rewards import TwoLayer, one_hot_pairs
from irl.tabular import soft, spec
from irl.tabular.spec import TabularImitation

PyTree = Any


class Mean(NamedTuple):
    """The averages that `output` returns."""

    x: PyTree
    """Of the reward's parameters."""
    D: Array
    """Of D."""


class State(NamedTuple):
    """What the next step needs."""

    x: PyTree
    """The reward's parameters."""
    y: Array
    """The truncated Q of D, [S, A]."""
    D: Array
    """The Q network's distance from its initialisation, [2, m/2, d]."""
    network: TwoLayer
    """That initialisation."""
    mean: Mean
    """The averages of x and of D so far."""
    count: Array
    """Steps so far, []."""
    visits: Array
    """The states of the agent's n chains, [n]; one chain that stays where it is, without num_transitions."""
    step_x: Stepper
    """The rule for x."""
    step_D: Stepper
    """The rule for D."""
    source: PyTree
    """The state of the demonstrations' source."""


class Info(NamedTuple):
    """What a step of NeuralIRL shows."""

    direction: Array
    """|h(agent) - h(expert)|, []: the norm of the estimate of grad F, without weight decay."""
    td_error: Array
    """The root mean square of delta over the pairs of the step, []."""
    distance: Array
    """|D| after the step, []; at most the radius B."""


class Learned(NamedTuple):
    """The outcome of one TD step of the Q network."""

    D: Array
    """As in `State`."""
    step_D: Stepper
    """As in `State`."""
    visits: Array
    """The chains' states after the step, [n]."""
    pairs: tuple[Array, Array] | None
    """The (states, actions) that the chains showed, both [n]; None where all pairs were used."""
    td_error: Array
    """As in `Info`."""


@struct(kw_only=True)
class NeuralIRL(Solver):
    """Experimental: written from the abstract of arXiv:2503.17865; the full text was not at hand.

    Two-timescale single-loop IRL with overparameterised networks, for problems of `irl.to_bilevel`. The soft Q is a
    wide network near its initialisation W, at the distance D from it:

        Q(s, a; D) = q + c f(z(s, a); D),    f = `TwoLayer`: m^(-1/2) sum_j b_j ReLU((W_j + D_j) . z), f(.; 0) = 0,

    with c = 1/(1 - gamma) and q = gamma c log A, the soft Q of zero reward. One step is

        delta = Q - r(.; x) - gamma E log sum_a exp Qbar(s', a),     Qbar = Q truncated to [lo, hi]
        D <- Proj_{|D| <= B}(D - eta sum over (s, a) of w delta grad_D Q)       fast: one TD step
        pi proportional to exp Qbar
        x <- Proj_X(x - alpha_k (h(agent) - h(expert) + decay x)),  alpha_k = alpha (k + 1)^(-s)      slow

    where lo = (min r + gamma log A)/(1 - gamma) and hi = (max r + gamma log A)/(1 - gamma) for the reward of this step:
    the soft optimum lies between, so that truncation never moves Q away from it. Both x and D are averaged, with
    weights like k^p. With `TwoLayerReward` and x_set = Ball(B_r) the reward is such a network, too, in a ball around
    its start.

    Assumptions: wide networks near their initialisation, bounded features, a weight w > 0 of every pair; and
    eta/alpha_k grows, so that D follows x. The paper proves O(eps^-8) steps to an eps-optimal reward and policy.
    Cost per step: 1 upper gradient (in closed form, with one occupancy or one sample), 1 lower gradient (the TD step).

    Args:
        lower_step_size: eta > 0. A number, an optax schedule or an optax transformation. Default: 1/lambda, with lambda
            the largest eigenvalue of the weighted tangent kernel at D = 0; with num_transitions 1/c^2 <= 1/|grad_D
            Q|^2, since one pair may be the whole sample.
        upper_step_size: alpha > 0, likewise. Default: 1/(curvature of F at x0).
        upper_decay: s >= 0. Default: 1/2, as in the theory.
        radius: B > 0, of the ball around the initial weights. Default: 50.
        weight_decay: the factor "decay" of x above, >= 0. Default: 0.
        averaging: p >= 0; a large p is close to the last iterate. Default: 0, the plain average.
        inputs: what the Q network sees, z of shape [S, A, d] with |z(s, a)| = 1. Default: `rewards.one_hot_pairs`.
        width: m, the number of units, even and >= 2. Default: 256.
        num_transitions: n >= 1 chains that follow the agent's policy, restarted from rho with probability 1 - gamma;
            one transition of each is the sample of the TD step and of h(agent). Default: None, for expectations over
            all pairs with equal w, and exact occupancies.

    Reference: Zhang, Zeng, Li, Garcia, Hong. Understanding inverse reinforcement learning under overparameterization:
        non-asymptotic analysis and global optimality. AISTATS 2025 (PMLR 258), arXiv:2503.17865.
    Differs from the paper: its full text was not at hand. From the abstract are one loop, two timescales, networks near
        their linearisation and truncated neural soft Q-learning. Our reconstruction, after analyses of neural TD, are
        the form of f, the interval of the truncation, the ball, the averages, alpha_k, and q and c, which keep |D|
        small against |W|. Expectations are exact by default; weight decay is ours.
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    upper_decay: Scalar = 0.5
    radius: Scalar = 50.0
    weight_decay: Scalar = 0.0
    averaging: Scalar = 0.0
    inputs: Array | None = None
    width: int = static(default=256)
    num_transitions: int | None = static(default=None)
    experimental = "written from the abstract of arXiv:2503.17865; the full text was not at hand"

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "lower_step_size", "upper_step_size")
        require_numbers(self, "radius")
        for name in ("upper_decay", "weight_decay", "averaging"):
            number = getattr(self, name)
            if isinstance(number, int | float) and not 0 <= number < float("inf"):
                invalid(f"NeuralIRL.{name}", number, "a finite number >= 0", "Leave it out for the default.")

    def init(self, problem: TabularImitation, key: Array) -> State:
        key_start, key_source, key_network, key_visits = jax.random.split(key, 4)
        x, y = problem.init(key_start)
        mdp = problem.mdp
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
            problem.demonstrations.init(key_source),
        )  # fmt: skip

    def step(self, problem: TabularImitation, state: State, key: Array) -> tuple[State, Info]:
        key_batch, key_agent = jax.random.split(key)
        mdp, x = problem.mdp, state.x
        batch, source = problem.demonstrations.next(state.source, key_batch, x, state.y)
        c, r = problem.occupancy(batch), problem.reward.table(x)

        new = self._learn(mdp, r, state, key_agent)
        y = _truncate(mdp, r, self._table(mdp, state.network, new.D))
        slope = spec.match(problem.reward, x, self._agent(problem, y, c, new.pairs), c)
        x, step_x = self._move(problem, state, slope)

        mean = self._average(state, Mean(x, new.D))
        info = Info(norm(slope), new.td_error, norm(new.D))
        count = state.count + 1
        return State(x, y, new.D, state.network, mean, count, new.visits, step_x, new.step_D, source), info

    def _learn(self, mdp: MDP, r: Array, state: State, key: Array) -> Learned:
        """One TD step for the reward r, over all pairs with equal weights or over one transition of each chain."""
        Q, pull = jax.vjp(lambda D: self._table(mdp, state.network, D), state.D)
        truncated = _truncate(mdp, r, Q)
        if self.num_transitions is None:
            visits, pairs = state.visits, None
            weighted = (Q - soft.bellman(mdp, r, truncated)) / Q.size
            td_error = jnp.sqrt(jnp.sum(weighted**2) * Q.size)
        else:
            visits, pairs, following = transitions(mdp, truncated, state.visits, key)
            delta = Q[pairs] - r[pairs] - mdp.discount * soft.value(truncated)[following]
            weighted = jnp.zeros_like(Q).at[pairs].add(delta / delta.size)
            td_error = jnp.sqrt(jnp.mean(delta**2))
        D, step_D = state.step_D(state.D, pull(weighted)[0])
        return Learned(Ball(self.radius).project(D), step_D, visits, pairs, td_error)

    def _agent(self, problem: TabularImitation, Q: Array, c: Array, pairs: tuple[Array, Array] | None) -> Array:
        """The occupancy [S, A] of the policy of Q, or an estimate of it by the pairs that the chains visited."""
        if pairs is None:
            return soft.occupancy(problem.mdp, soft.policy(Q), problem.agent_start(c))
        return jnp.zeros_like(Q).at[pairs].add(_scale(problem.mdp) / pairs[0].size)

    def _move(self, problem: TabularImitation, state: State, slope: PyTree) -> tuple[PyTree, Stepper]:
        """(x, its rule) after the step along the slope and the weight decay, both times (k + 1)^-s."""
        slower = (state.count + 1) ** -jnp.asarray(self.upper_decay, state.count.dtype)
        decayed = lambda g, at: slower.astype(g.dtype) * (g + self.weight_decay * at)  # noqa: E731
        x, step_x = state.step_x(state.x, jax.tree.map(decayed, slope, state.x))
        return problem.x_set.project(x), step_x

    def _average(self, state: State, new: Mean) -> Mean:
        """The averages with the k-th point weighted like k^p."""
        part = (self.averaging + 1) / (state.count + 1 + self.averaging)
        return jax.tree.map(lambda old, new: old + jnp.asarray(part, old.dtype) * (new - old), state.mean, new)

    def output(self, problem: TabularImitation, state: State) -> tuple[PyTree, Array]:
        """The averages."""
        Q = self._table(problem.mdp, state.network, state.mean.D)
        return state.mean.x, _truncate(problem.mdp, problem.reward.table(state.mean.x), Q)

    def _inputs(self, mdp: MDP) -> Array:
        return one_hot_pairs(mdp.num_states, mdp.num_actions) if self.inputs is None else self.inputs

    def _table(self, mdp: MDP, network: TwoLayer, D: Array) -> Array:
        """Q(., .; D), shape [S, A]."""
        scale = _scale(mdp)
        return scale * (mdp.discount * jnp.log(float(mdp.num_actions)) + network(D, self._inputs(mdp)))

    def cost(self, problem: TabularImitation) -> OracleCount:
        return OracleCount(upper_gradients=1, lower_gradients=1)

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if not isinstance(problem, TabularImitation):
            return refuse_others(self, problem, TabularImitation)
        if problem.mdp.horizon is not None:
            return "NeuralIRL needs a discounted MDP; got a horizon."
        if self.num_transitions is not None and not problem.is_surrogate:
            return "NeuralIRL with num_transitions starts from rho: make the problem with objective='surrogate'."
        return None


def _scale(mdp: MDP) -> Array:
    return 1 / (1 - mdp.discount)


def bounds(mdp: MDP, r: Array) -> tuple[Array, Array]:
    """(lo, hi), shape []: lo <= Q* <= hi for the soft optimal Q* of r, and T maps such Q to such Q."""
    entropy = mdp.discount * jnp.log(float(mdp.num_actions))
    return (jnp.min(r) + entropy) * _scale(mdp), (jnp.max(r) + entropy) * _scale(mdp)


def _truncate(mdp: MDP, r: Array, Q: Array) -> Array:
    return jnp.clip(Q, *bounds(mdp, r))


def transitions(mdp: MDP, Q: Array, visits: Array, key: Array) -> tuple[Array, tuple[Array, Array], Array]:
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
