"""NeuralIRL: wide networks for the soft Q function and the reward, in one loop with two timescales."""

from collections.abc import Callable
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
from irl.tabular import soft, spec, steps
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
    """The (states, actions) of the agent's chains, both [n]; None where all pairs were used."""
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
        x <- Proj_X(x - alpha_k (h(agent) - h(expert) + decay x)),  alpha_k = alpha (1 + k/K)^(-s)    slow

    where lo = (min r + gamma log A)/(1 - gamma) and hi = (max r + gamma log A)/(1 - gamma) for the reward of this step:
    the soft optimum lies between, so that truncation never moves Q away from it. Both x and D are averaged, with
    weights like k^p. With `TwoLayerReward` and x_set = Ball(B_r) the reward is such a network, too, in a ball around
    its start.

    With num_transitions = n both expectations are samples. The TD step sees the transitions of n chains that follow the
    agent's policy, and n more from pairs of the expert: where the agent has stopped going Q would stay what it was,
    x would follow it, and the agent would never come back. h(agent) is that of the chains' states s and all of
    pi(.|s).

    Assumptions: wide networks near their initialisation, bounded features, a weight w > 0 of every pair; and
    eta/alpha_k grows, so that D follows x. The paper proves O(eps^-8) steps to an eps-optimal reward and policy.
    Cost per step: 1 upper gradient (in closed form, with one occupancy or one sample), 1 lower gradient (the TD step).

    Args:
        lower_step_size: eta > 0. A number, an optax schedule or an optax transformation. Default: 1/lambda, with lambda
            the largest eigenvalue of the weighted tangent kernel at D = 0; with num_transitions the largest row sum of
            the sample's kernel in each step, which is no less, so that a step takes the pairs that are seen most to
            their targets.
        upper_step_size: alpha > 0, likewise. Default: half of 1/(curvature of F at x0), and less where F turns out to
            be more curved (`irl.tabular.steps`); with num_transitions half of it, times n/(S A) where that is less
            than 1, the share of pairs that a step moves Q at.
        upper_decay: s >= 0. Default: 0 where eta, alpha, inputs and num_transitions have their defaults, so that a TD
            step is a whole sweep without noise; else 1/2, as in the theory.
        upper_delay: K > 0, the steps before alpha_k falls. Default: 10.
        radius: B > 0, of the ball around the initial weights. Default: 50.
        weight_decay: the factor "decay" of x above, >= 0. Default: 0.
        averaging: p >= 0; 0 is the plain average, a large p is close to the last iterate. Default: 2.
        inputs: what the Q network sees, z of shape [S, A, d] with |z(s, a)| = 1. Default: a unit vector for each pair,
            so that the kernel is a multiple of the identity; with num_transitions `rewards.one_hot_pairs`, by which
            what is seen of a pair is told to those of the same state or action.
        width: m, the number of units, even and >= 2. Default: 256.
        num_transitions: n >= 1 chains that follow the agent's policy, restarted from rho with probability 1 - gamma,
            a transition of each a step, and n of the expert's. Default: None, for expectations over all pairs with
            equal w, and exact occupancies.

    Reference: Zhang, Zeng, Li, Garcia, Hong. Understanding inverse reinforcement learning under overparameterization:
        non-asymptotic analysis and global optimality. AISTATS 2025 (PMLR 258), arXiv:2503.17865.
    Differs from the paper: its full text was not at hand. From the abstract are one loop, two timescales, networks near
        their linearisation and truncated neural soft Q-learning. Our reconstruction, after analyses of neural TD, are
        the form of f, the interval of the truncation, the ball, the averages, alpha_k, and q and c, which keep |D|
        small against |W|. Expectations are exact by default; weight decay, the default steps and the expert's
        transitions in the TD step are ours.
    """

    lower_step_size: StepSize | None = None
    upper_step_size: StepSize | None = None
    upper_decay: Scalar | None = None
    upper_delay: Scalar = 10.0
    radius: Scalar = 50.0
    weight_decay: Scalar = 0.0
    averaging: Scalar = 2.0
    inputs: Array | None = None
    width: int = static(default=256)
    num_transitions: int | None = static(default=None)
    experimental = "written from the abstract of arXiv:2503.17865; the full text was not at hand"

    def __post_init__(self) -> None:
        """Accept numbers, schedules and transformations."""
        step_sizes(self, "lower_step_size", "upper_step_size")
        require_numbers(self, "radius", "upper_delay")
        for name in ("upper_decay", "weight_decay", "averaging"):
            number = getattr(self, name)
            if isinstance(number, int | float) and not 0 <= number < float("inf"):
                invalid(f"NeuralIRL.{name}", number, "a finite number >= 0", "Leave it out for the default.")

    def init(self, problem: TabularImitation, key: Array) -> State:
        key_start, key_source, key_network, key_visits = jax.random.split(key, 4)
        x, y = problem.init(key_start)
        mdp = problem.mdp
        network = TwoLayer.draw(key_network, self.width, y.size if self._by_pair else self._inputs(mdp).shape[-1])
        D = network.origin
        visits = jax.vmap(mdp.sample_start)(jax.random.split(key_visits, self.num_transitions or 1))
        return State(
            x, self._table(mdp, network, D), D, network, Mean(x, D), jnp.zeros((), D.dtype), visits,
            self._rule_x(problem, x, y), self._rule_D(network, D, mdp),
            problem.demonstrations.init(key_source),
        )  # fmt: skip

    @property
    def _by_pair(self) -> bool:
        """Whether the Q network sees a unit vector for each pair."""
        return self.inputs is None and self.num_transitions is None

    @property
    def _watches(self) -> bool:
        """Whether steps of x need not fall: no noise, and a TD step that is a whole sweep."""
        return self._by_pair and self.lower_step_size is None and self.upper_step_size is None

    def _rule_x(self, problem: TabularImitation, x: PyTree, y: Array) -> Stepper:
        """The rule for x, before the factor (1 + k/K)^-s."""
        if self.upper_step_size is not None:
            return stepper(self.upper_step_size, None, x)
        size = 0.5 * spec.default_step(problem, x, y)
        if self._watches:
            return steps.watched(size, x, share=0.5, reach=10.0)
        return stepper(None, size * min(1.0, (self.num_transitions or y.size) / y.size), x)

    def _rule_D(self, network: TwoLayer, D: Array, mdp: MDP) -> Stepper:
        """The rule for D; `_learn` divides by the sample's kernel where eta is not given."""
        if self.lower_step_size is not None or self.num_transitions is not None:
            return stepper(self.lower_step_size, jnp.ones((), D.dtype), D)
        return stepper(None, 1 / _largest_eigenvalue(lambda D: self._table(mdp, network, D), D), D)

    def step(self, problem: TabularImitation, state: State, key: Array) -> tuple[State, Info]:
        key_batch, key_agent = jax.random.split(key)
        mdp, x = problem.mdp, state.x
        batch, source = problem.demonstrations.next(state.source, key_batch, x, state.y)
        c, r = problem.occupancy(batch), problem.reward.table(x)

        new = self._learn(mdp, r, c, state, key_agent)
        y = _truncate(mdp, r, self._table(mdp, state.network, new.D))
        slope = spec.match(problem.reward, x, self._agent(problem, y, c, new.pairs), c)
        x, step_x = self._move(problem, state, slope)

        mean = self._average(state, Mean(x, new.D))
        info = Info(norm(slope), new.td_error, norm(new.D))
        count = state.count + 1
        return State(x, y, new.D, state.network, mean, count, new.visits, step_x, new.step_D, source), info

    def _learn(self, mdp: MDP, r: Array, c: Array, state: State, key: Array) -> Learned:
        """One TD step for the reward r, over all pairs with equal weights, or over transitions of agent and expert.

        c: the expert's occupancy, [S, A].
        """
        Q, pull = jax.vjp(lambda D: self._table(mdp, state.network, D), state.D)
        truncated = _truncate(mdp, r, Q)
        if self.num_transitions is None:
            visits, pairs = state.visits, None
            weighted = (Q - soft.bellman(mdp, r, truncated)) / Q.size
            td_error = jnp.sqrt(jnp.sum(weighted**2) * Q.size)
        else:
            key_agent, key_expert = jax.random.split(key)
            visits, pairs, following = transitions(mdp, truncated, state.visits, key_agent)
            shown, after = expert_transitions(mdp, c, visits.size, key_expert)
            seen = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pairs, shown)
            following = jnp.concatenate([following, after])
            delta = Q[seen] - r[seen] - mdp.discount * soft.value(truncated)[following]
            weighted = jnp.zeros_like(Q).at[seen].add(delta / delta.size)
            td_error = jnp.sqrt(jnp.mean(delta**2))
            if self.lower_step_size is None:
                weighted = weighted / _largest_row(self._inputs(mdp)[seen], _scale(mdp))
        D, step_D = state.step_D(state.D, pull(weighted)[0])
        return Learned(Ball(self.radius).project(D), step_D, visits, pairs, td_error)

    def _agent(self, problem: TabularImitation, Q: Array, c: Array, pairs: tuple[Array, Array] | None) -> Array:
        """The occupancy [S, A] of the policy of Q, or an estimate of it by the states that the chains visited."""
        policy = soft.policy(Q)
        if pairs is None:
            return soft.occupancy(problem.mdp, policy, problem.agent_start(c))
        states = pairs[0]
        return jnp.zeros_like(Q).at[states].add(_scale(problem.mdp) / states.size * policy[states])

    def _move(self, problem: TabularImitation, state: State, slope: PyTree) -> tuple[PyTree, Stepper]:
        """(x, its rule) after the step along the slope and the weight decay, both times (1 + k/K)^-s."""
        s = (0.0 if self._watches else 0.5) if self.upper_decay is None else self.upper_decay
        s, delay = (jnp.asarray(number, state.count.dtype) for number in (s, self.upper_delay))
        slower = (1 + state.count / delay) ** -s
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
        pairs = network.at_unit_vectors(D).reshape(mdp.shape) if self._by_pair else network(D, self._inputs(mdp))
        return _scale(mdp) * (mdp.discount * jnp.log(float(mdp.num_actions)) + pairs)

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


def expert_transitions(mdp: MDP, c: Array, count: int, key: Array) -> tuple[tuple[Array, Array], Array]:
    """((states, actions), next states), each [count]: pairs drawn in proportion to the occupancy c [S, A]."""
    key_pairs, key_next = jax.random.split(key)
    drawn = jax.random.categorical(key_pairs, jnp.log(c.ravel()), shape=(count,))
    states, actions = jnp.divmod(drawn, jnp.asarray(c.shape[1], drawn.dtype))
    following = jax.vmap(mdp.sample_next)(jax.random.split(key_next, count), states, actions)
    return (states, actions), following


def _largest_row(z: Array, scale: Array) -> Array:
    """The largest row sum of the kernel J J'/n of n samples with unit inputs z [n, d], in the limit of wide networks.

    A unit W with W . z > 0 and W . z' > 0, which (pi - angle(z, z'))/(2 pi) of them are, adds z . z'/m to the entry
    of z and z': Cho, Saul. Kernel methods for deep learning. NeurIPS 2009, n = 0.
    """
    cosine = jnp.clip(z @ z.T, -1, 1)
    kernel = cosine * (jnp.pi - jnp.arccos(cosine)) / (2 * jnp.pi)
    return scale**2 * jnp.max(jnp.sum(jnp.abs(kernel), axis=1)) / z.shape[0]


def _largest_eigenvalue(table: Callable[[Array], Array], D: Array) -> Array:
    """Of the kernel J J'/(S A) of Q = table(D), J = dQ/dD, by power iteration: entries are >= 0, so is the vector."""
    Q, push = jax.linearize(table, D)
    pull = jax.linear_transpose(push, D)

    def power(_: int, at: tuple[Array, Array]) -> tuple[Array, Array]:
        image = push(pull(at[0])[0]) / Q.size
        size = jnp.linalg.norm(image)
        return image / size, size

    return jax.lax.fori_loop(0, 30, power, (jnp.full_like(Q, Q.size**-0.5), jnp.zeros((), Q.dtype)))[1]
