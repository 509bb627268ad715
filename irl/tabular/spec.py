r"""Maximum-likelihood inverse reinforcement learning as a bilevel problem.

    min over x of  F(x) = f(y(x)),    f(y) = -(1/n) sum over trajectories of sum_t gamma^t log pi_y(a_t | s_t),
    y(x) = T_x y(x),    T_x y = r(x) + gamma E V_y(s'),    V_y = log sum_a exp y,    pi_y = exp(y - V_y):

x are the reward's parameters, y = Q [S, A]. With c the demonstrations' discounted occupancy, f = -<c, log pi_y>. At
y = y(x), log pi = r + gamma E V(s') - V(s), and summing by parts

    F(x) = <mu, V> - <c, r(x)>,    mu(s') = sum_a c(s', a) - gamma sum c(s, a) P(s' | s, a),

    grad F(x) = sum over (s, a) of (d_{pi, mu}(s, a) - c(s, a)) grad r(s, a; x),

where d_{pi, mu} is the occupancy of pi = pi_{y(x)} from the start measure mu. This holds for any c >= 0. It is the
textbook's E_pi sum gamma^t grad r - E_expert sum gamma^t grad r, with pi started from rho, where mu = rho: where c
satisfies the flow equations from rho, as the occupancy of every policy does, and that of sampled trajectories does in
the limit of many long ones. With rewards linear in x, F is convex if mu >= 0; sampled demonstrations can break that.

objective="surrogate" starts from rho whatever the demonstrations:

    F(x) = <rho, V> - <c, r(x)>,    grad F(x) = sum over (s, a) of (d_{pi, rho}(s, a) - c(s, a)) grad r(s, a; x),

the paper's -Lhat, convex for linear rewards, with feature matching as its gradient. With L the same for the expert's
own occupancy, and x not chosen by the data, |L - Lhat| <= C_r/(1 - gamma) sqrt(log(2/delta)/(2 n)) with probability 1
- delta for n whole trajectories and 0 <= r <= C_r (Hoeffding).

With a horizon everything holds at each time: y = Q [T, S, A], c [T, S, A], and mu_t enters at time t.

Reference: Zeng, Li, Garcia, Hong. Maximum-likelihood inverse reinforcement learning with finite-time guarantees.
    NeurIPS 2022, arXiv:2210.01282.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, Constants, FixedPoint, Full, Minibatch, Reals
from bilevel.data import Source
from bilevel.parts.tuning import upper_curvature
from bilevel.sets import Set
from bilevel.struct import derived, invalid, static, struct
from irl.demonstrations import Demonstrations, Trajectories
from irl.mdp import MDP
from irl.problem import ImitationProblem
from irl.rewards import LinearReward, Reward
from irl.tabular import soft

PyTree = Any


class Model(NamedTuple):
    """A batch of the lower level: an MDP with a reward."""

    mdp: MDP
    reward: Any


class Scored(NamedTuple):
    """A batch of the surrogate's upper level: `Trajectories` or an occupancy, and the model that prices them."""

    model: Model
    expert: Any


@struct
class Beside(Source):
    """The batches of `source`, each as `Scored` with the model."""

    model: Model
    source: Source

    @property
    def fraction(self) -> float:
        return self.source.fraction

    @property
    def num_blocks(self) -> int:
        return self.source.num_blocks

    def init(self, key: Array) -> PyTree:
        return self.source.init(key)

    def next(self, state: PyTree, key: Array, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        batch, state = self.source.next(state, key, x, y)
        return Scored(self.model, batch), state

    def full(self) -> PyTree:
        return Scored(self.model, self.source.full())

    def block(self, index: Array) -> PyTree:
        return Scored(self.model, self.source.block(index))

    def validate(self, name: str) -> None:
        self.source.validate(name)


def upper_of_occupancy(x: PyTree, y: Array, c: Array) -> Array:
    """The upper objective f = -<c, log pi_y>, shape []; c and y of one shape."""
    return -jnp.sum(c * soft.log_policy(y))


def upper_of_trajectories(x: PyTree, y: Array, batch: Trajectories) -> Array:
    """The mean over b trajectories of -sum_t weights log pi_y(a_t | s_t), shape []: unbiased for f."""
    return -jnp.sum(batch.weights * batch.pick(soft.log_policy(y))) / batch.states.shape[0]


def upper_surrogate(x: PyTree, y: Array, batch: Scored) -> Array:
    """<rho, V_y> - <c, r(x)>, shape []: the upper objective of objective="surrogate"."""
    mdp, reward = batch.model
    V, r = soft.value(y), reward.table(x)
    c = _pairs(occupancy_of(mdp, batch.expert))
    return jnp.sum(mdp.start * (V if mdp.horizon is None else V[0])) - jnp.sum(c * r)


def occupancy_of(mdp: MDP, expert: PyTree) -> Array:
    """The occupancy c, shaped `mdp.shape`, of a batch of demonstrations: `Trajectories`, or c itself."""
    return expert.occupancy(mdp) if isinstance(expert, Trajectories) else expert


def lower_map(x: PyTree, y: Array, batch: Model) -> Array:
    """The soft Bellman operator T_x y, shaped like y."""
    return soft.bellman(batch.mdp, batch.reward.table(x), y)


def _upper(problem: "TabularImitation") -> Callable[..., Array]:
    if problem.is_surrogate:
        return upper_surrogate
    return upper_of_trajectories if isinstance(problem.demonstrations.arrays, Trajectories) else upper_of_occupancy


def _upper_data(problem: "TabularImitation") -> Source:
    source = problem.demonstrations
    return Beside(Model(problem.mdp, problem.reward), source) if problem.is_surrogate else source


@struct
class TabularImitation(ImitationProblem):
    """The bilevel problem of this module's docstring, as `to_bilevel` makes it.

    Args:
        mdp: with S states and A actions, discounted or with a horizon T.
        reward: r(s, a; x), with the two members of `rewards.Reward`.
        demonstrations: the source of what the expert did. Its batches are the occupancy c, shaped `mdp.shape`, or
            `Trajectories`.
        objective: "likelihood" or "surrogate".
    """

    _: dataclasses.KW_ONLY
    mdp: MDP
    reward: Any
    demonstrations: Full | Minibatch
    objective: Literal["likelihood", "surrogate"] = static(default="likelihood")
    upper: Callable[..., Array] = derived(_upper)
    lower: FixedPoint = derived(lambda problem: FixedPoint(lower_map))
    upper_data: Source = derived(_upper_data)
    lower_data: Source = derived(lambda problem: Full(Model(problem.mdp, problem.reward)))

    made_by = "irl.to_bilevel"
    parts = ("mdp", "reward", "demonstrations")

    @property
    def is_surrogate(self) -> bool:
        """Whether the agent of F starts from rho, whatever the demonstrations."""
        return self.objective == "surrogate"

    def on_full_data(self) -> "TabularImitation":
        """The same problem with all of the demonstrations in every batch."""
        return dataclasses.replace(self, demonstrations=Full(self.demonstrations.full()))

    def occupancy(self, batch: PyTree = None) -> Array:
        """The occupancy c, shaped `mdp.shape`, of a batch of `demonstrations`; of all of them by default."""
        return occupancy_of(self.mdp, self.demonstrations.full() if batch is None else batch)

    def agent_start(self, c: Array) -> Array:
        """What the agent starts from, so that `match` is grad F for c: rho, or `start_measure`."""
        return self.mdp.start if self.is_surrogate else start_measure(self.mdp, c)


def start(mdp: MDP, reward: Reward) -> Callable[[Array], tuple[PyTree, Array]]:
    """The start as `BilevelProblem.init`: key -> (the reward's x0, Q = 0)."""
    return _start(reward.init, mdp.shape)


@functools.cache
def _start(reward_init: Callable, shape: tuple[int, ...]) -> Callable[[Array], tuple[PyTree, Array]]:
    """`start`: one function for equal rewards and sizes, so that another instance compiles nothing."""
    return lambda key: (reward_init(key), jnp.zeros(shape, float))


def to_bilevel(
    mdp: MDP,
    demonstrations: Demonstrations | Any,
    reward: Reward,
    *,
    objective: Literal["likelihood", "surrogate"] = "likelihood",
    batch_size: int | None = None,
    x_set: Set = Reals(),  # noqa: B008
) -> TabularImitation:
    """The bilevel problem of this module's docstring, for every solver that takes fixed points.

    Args:
        mdp: with S states and A actions, discounted or with a horizon T.
        demonstrations: `Demonstrations`, or an expert's discounted occupancy [S, A] (or [T, S, A]) where it is known
            exactly.
        reward: `LinearReward`, `TableReward`, `NetworkReward`, or anything with their two members.
        objective: "likelihood", or "surrogate", whose agent starts from rho.
        batch_size: trajectories a batch; default all of them, summed up in one array [S, A] once.
        x_set: where x may be. Demonstrations that never take some action can push its reward to minus infinity: a
            `Ball` or `Box` keeps x finite.

    Raises:
        InvalidInput: naming what does not fit together.
    """
    if not isinstance(mdp, MDP):
        do = "Make one: irl.MDP.of; for an environment there is irl.to_control."
        invalid("mdp (to_bilevel)", _kind(mdp), "an MDP", do)
    if isinstance(reward, type) or not (hasattr(reward, "table") and hasattr(reward, "init")):
        invalid("reward (to_bilevel)", _kind(reward), "a reward", "Make one: irl.TableReward, irl.LinearReward.of.")
    mdp.validate()
    shape = (mdp.num_states, mdp.num_actions)
    table = jax.eval_shape(lambda: reward.table(reward.init(jax.random.key(0)))).shape
    if objective not in ("likelihood", "surrogate"):
        invalid("objective (to_bilevel)", repr(objective), '"likelihood" or "surrogate"', "See its docstring.")
    if table != shape:
        do = "Build the reward for the states and actions of this MDP."
        invalid("reward (to_bilevel)", f"a table of shape {table}", f"shape {shape}, [S, A] of the MDP", do)
    if batch_size is None:
        source = Full(expert_occupancy(mdp, demonstrations))
    elif isinstance(demonstrations, Demonstrations):
        source = Minibatch(demonstrations.validate(mdp).batch(mdp.discount), batch_size)
    else:
        do = "Leave out batch_size, or give Demonstrations."
        invalid("batch_size (to_bilevel)", batch_size, "None for a known occupancy", do)
    return TabularImitation(
        mdp=mdp, reward=reward, demonstrations=source, objective=objective, x_set=x_set, init=start(mdp, reward)
    )


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def expert_occupancy(mdp: MDP, demonstrations: Demonstrations | Any) -> Array:
    """The discounted occupancy c, shaped `mdp.shape`, of `Demonstrations`, or the array itself.

    Raises:
        InvalidInput: for states or actions that the MDP does not have, or an array that is no occupancy.
    """
    if isinstance(demonstrations, Demonstrations):
        return demonstrations.validate(mdp).occupancy(mdp)
    shape, c = mdp.shape, np.asarray(demonstrations)
    expected = f"Demonstrations, or an occupancy of shape {shape} with finite numbers >= 0"
    do = "Use Demonstrations.of, Demonstrations.load, irl.sample, or irl.occupancy of a policy."
    if c.shape != shape or c.dtype.kind not in "fiu":
        got = f"{type(demonstrations).__name__} of shape {c.shape}, dtype {c.dtype}"
        invalid("demonstrations (to_bilevel)", got, expected, do)
    if not (c >= 0).all() or not np.isfinite(c).all():
        got = f"{c[~((c >= 0) & np.isfinite(c))][0]} as an entry"
        invalid("demonstrations (to_bilevel)", got, expected, do)
    return jnp.asarray(c, float)


def start_measure(mdp: MDP, c: Array) -> Array:
    """The measure mu(s') = sum_a c(s', a) - gamma sum c(s, a) P(s' | s, a), shape [S], for c [S, A].

    It is rho where c is the occupancy of a policy from rho; its sum is (1 - gamma) times that of c. With a horizon:
    mu_t(s') = sum_a c_t(s', a) - gamma sum c_{t-1}(s, a) P(s' | s, a), shape [T, S]; there it is rho at 0, then 0.
    """
    if mdp.horizon is None:
        return jnp.sum(c, axis=1) - mdp.discount * mdp.flow(c)
    arriving = jax.vmap(mdp.flow)(c[:-1])
    return jnp.sum(c, axis=2).at[1:].add(-mdp.discount * arriving)


def _pairs(d: Array) -> Array:
    """An occupancy summed over the times, where it has any, shape [S, A]."""
    return d if d.ndim == 2 else jnp.sum(d, axis=0)


def match(reward: Reward, x: PyTree, d: Array, c: Array) -> PyTree:
    """The sum over (s, a) of (d - c) grad r(s, a; x), shaped like x: what IRL solvers descend along."""
    return jax.vjp(reward.table, x)[1](_pairs(d - c))[0]


@jax.jit
def likelihood_gradient(mdp: MDP, c: Array, reward: Reward, x: PyTree, start: Array | None = None) -> PyTree:
    """(d_{pi, start} - c) . grad r, shaped like x, by dynamic programming alone: soft Q, its policy, its occupancy.

    It is grad F of `to_bilevel` for start = `start_measure(mdp, c)`, the default; with start = rho it is the textbook's
    gradient, that of objective="surrogate", equal to the default's where c is the occupancy of a policy.
    """
    start = start_measure(mdp, c) if start is None else start
    pi = soft.policy(soft.value_iteration(mdp, reward.table(x)).Q)
    return match(reward, x, soft.occupancy(mdp, pi, start), c)


def default_step(problem: BilevelProblem, x: PyTree, y: Array) -> Array:
    """1/L with L the estimated curvature of F at x: F is flatter where the policy is more certain; else 1e-2."""
    size = 1 / upper_curvature(problem.on_full_data(), x, y)
    return jnp.where(jnp.isfinite(size) & (size > 0), size, 1e-2)


def constants(mdp: MDP, c: Array, reward: LinearReward) -> Constants:
    """Constants of `to_bilevel` for a linear reward, valid for all x and y: they certify `bilevel.hypergradient`.

    With R = y - T_x y: |R_x| = |features|; f_yy has blocks c(s) (diag pi - pi pi') of norm <= c(s)/2, with c(s) the sum
    over a; R_y = I - gamma P Pi with rows pi in Pi, and pi is 1/2-Lipschitz in y; |P|^2 <= its largest column sum.
    """
    size = mdp.num_states * mdp.num_actions
    if mdp.horizon is not None:
        invalid("mdp (irl.constants)", f"horizon {mdp.horizon}", "a discounted MDP", "Certify without constants.")
    gamma, reach = float(mdp.discount), float(jnp.sqrt(jnp.max(mdp.flow(jnp.ones_like(c)))))
    features = np.asarray(reward.features).reshape(size, -1)
    return Constants(
        mu=(1 - gamma) / size**0.5, L_fx=0.0, L_fy=float(jnp.max(jnp.sum(c, axis=1))) / 2, L_gxy=0.0,
        L_gyy=gamma * reach / 2, C_gxy=float(np.linalg.norm(features, 2)), L_g=1 + gamma * reach,
    )  # fmt: skip
