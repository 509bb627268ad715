"""Token-level rewards: weights over attributions of a sequence's reward above, training of the policy below.

A sequence s has `length` tokens of 0, …, vocab - 1, all enumerated, and one reward r(s) when it is complete, a drawn
sum of terms in one token and in pairs of them. With token 0 for "not there", r(s_S) is the reward with the tokens
outside of the places S replaced by 0. Four attributions spread r(s) - r(empty) over the tokens, sum_t e_t(s) the same
for all:

    shapley   e_t = sum over S without t of |S|! (n - |S| - 1)!/n! (r(s_{S + t}) - r(s_S)),    n = length
    left-out  r(s) - r(s without t), and what is missing of r(s) - r(empty) in equal shares; for rewards that are
              linear in each token, as these, it is gradient times input, too
    prefix    r(s_1 … s_t 0 … 0) - r(s_1 … s_{t-1} 0 … 0): a difference of potentials (Ng, Harada, Russell 1999)
    sparse    all of it at the last token

x are weights on the simplex, the token rewards sum_j x_j e^j_t. They add up to r(s) - r(empty) whatever x is. So the
undiscounted return of every sequence is r(s) up to a constant, and no x changes which policy is best: `credit=return`,
which trains on whole returns, has F constant in x and an implicit gradient of 0. x matters for how it is learnt:

    y_k = y_{k-1} + eta E_pi sum_t grad log pi(s_t | s_1 … s_{t-1}) G_t(s),   G_t = sum_{u >= t} gamma^(u-t) x . e_u(s)

is a step of policy gradient with rewards to go (`credit=to-go`), in expectation, on the logits y of a policy with one
row for each prefix. The lower level is the trajectory of K steps from y = 0, as in `problems.admm`; f = -E r at its
end.

Rewards to go leave out what tokens before t were given. That is unbiased where these do not depend on later tokens,
prefix and sparse, and biased for shapley and left-out, even for gamma = 1: they know the sequence's end.

Metrics: `reward`, E r as a part of the way from the uniform policy's to the largest reward.

Settings that work: `LBFGS()`; `ITD(lower_step_size=1.0, num_lower_steps=K, upper_step_size=0.5)`.

Reference: weights over attributions, a simplex and a search above, RLHF below: arXiv:2504.16272, from a summary of it.
Shapley. A value for n-person games. Contributions to the theory of games 2, 1953. Ng, Harada, Russell. Policy
invariance under reward transformations. ICML 1999.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, FixedPoint, Full, Simplex
from bilevel.backend.checks import is_count
from bilevel.struct import invalid
from problems.datasets import floats
from problems.instance import Instance

PyTree = Any
ATTRIBUTIONS = "shapley", "left-out", "prefix", "sparse"
CREDITS = "to-go", "return"
LARGEST = 5000
"""The most sequences that are enumerated."""


class World(NamedTuple):
    """The numbers of an instance, in NumPy."""

    sequences: np.ndarray
    """[N, length], in the order of counting: the last token moves first."""
    reward: np.ndarray
    """[N]."""
    tokens: np.ndarray
    """[4, N, length], the attributions in the order of ATTRIBUTIONS."""


def number(sequences: np.ndarray, vocab: int) -> np.ndarray:
    """The places of sequences [..., length] among all, shape [...]."""
    return sequences @ vocab ** np.arange(sequences.shape[-1])[::-1]


def shapley(sequences: np.ndarray, reward: np.ndarray, vocab: int) -> np.ndarray:
    """Shapley values of the tokens, shape [N, length], over all 2^length sets of places."""
    n, found = sequences.shape[1], np.zeros(sequences.shape)
    for there in itertools.product((0, 1), repeat=n):
        mask, size = np.array(there), sum(there)
        without = reward[number(sequences * mask, vocab)]
        for t in np.flatnonzero(mask == 0):
            mask[t] = 1
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            found[:, t] += weight * (reward[number(sequences * mask, vocab)] - without)
            mask[t] = 0
    return found


def draw(seed: int, vocab: int, length: int) -> World:
    """The world of a seed; rewards have mean 0 and deviation 1 over all sequences."""
    rng = np.random.default_rng(seed)
    sequences = np.array(list(itertools.product(range(vocab), repeat=length)))
    reward: Any = sum(rng.normal(size=vocab)[sequences[:, t]] for t in range(length))
    for a, b in itertools.combinations(range(length), 2):
        reward = reward + rng.normal(size=(vocab, vocab))[sequences[:, a], sequences[:, b]]
    reward = (reward - np.mean(reward)) / np.std(reward)

    total, place = (reward - reward[0])[:, None], np.arange(length)
    left_out = np.stack([reward - reward[number(sequences * (place != t), vocab)] for t in place], axis=1)
    left_out = left_out + (total - left_out.sum(axis=1, keepdims=True)) / length
    begun = np.stack([reward[number(sequences * (place < t), vocab)] for t in range(length + 1)], axis=1)
    sparse = total * (place == length - 1)
    parts = shapley(sequences, reward, vocab), left_out, np.diff(begun, axis=1), sparse
    return World(sequences, reward, np.stack(parts))


def policy(y: Array, vocab: int, length: int) -> list[Array]:
    """The policy's log-probabilities by place, [vocab^t, vocab] at place t; y [prefixes, vocab] in their order."""
    ends = np.cumsum([0, *(vocab**t for t in range(length))])
    return [jax.nn.log_softmax(y[a:b]) for a, b in itertools.pairwise(ends)]


def probabilities(y: Array, vocab: int, length: int) -> Array:
    """The probabilities of all sequences, shape [N]."""
    total = jnp.zeros((1,), y.dtype)
    for log_p in policy(y, vocab, length):
        total = (total[:, None] + log_p).reshape(-1)
    return jnp.exp(total)


@functools.cache
def training(vocab: int, length: int, credit: str) -> Callable[[Array, Array, PyTree], Array]:
    """The map T: a step of policy gradient from each point of the trajectory y [K, prefixes, vocab]."""

    def step(gains: Array, size: Array, y: Array) -> Array:
        """One step; gains [N, length], the credit of each sequence's tokens, held constant."""
        weighted = probabilities(y, vocab, length)[:, None] * gains
        rows = []
        for t, log_p in enumerate(policy(y, vocab, length)):
            got = weighted[:, t].reshape(vocab**t, vocab, -1).sum(axis=2)
            rows.append(got - jnp.exp(log_p) * got.sum(axis=1, keepdims=True))
        return y + size * jnp.concatenate(rows)

    def T(x: Array, y: Array, batch: PyTree) -> Array:
        each = jnp.einsum("j,jnt->nt", x, batch["tokens"])
        if credit == "return":
            gains = jnp.broadcast_to(each.sum(axis=1, keepdims=True), each.shape)
        else:
            gains = each @ batch["to_go"]
        before = jnp.concatenate([jnp.zeros_like(y[:1]), y[:-1]])
        return jax.vmap(step, in_axes=(None, None, 0))(gains, batch["size"], before)

    return T


@functools.cache
def upper(vocab: int, length: int) -> Callable[[Array, Array, PyTree], Array]:
    """The objective f = -E r of the last policy."""

    def f(x: Array, y: Array, batch: PyTree) -> Array:
        return -probabilities(y[-1], vocab, length) @ batch["reward"]

    return f


@functools.cache
def _init(vocab: int, length: int, steps: int) -> Callable[[Array], tuple[Array, Array]]:
    prefixes = sum(vocab**t for t in range(length))
    return lambda key: (jnp.full(4, 0.25, float), jnp.zeros((steps, prefixes, vocab), float))


def _metrics(reward: np.ndarray, vocab: int, length: int, x: PyTree, y: Array) -> dict[str, float]:
    got = float(np.asarray(probabilities(jnp.asarray(y)[-1], vocab, length), np.float64) @ reward)
    return {"reward": float((got - reward.mean()) / (reward.max() - reward.mean()))}


def trained(problem: BilevelProblem, x: Array) -> Array:
    """The trajectory y(x), by the steps themselves: T from 0, as often as there are steps."""
    y, batch = problem.init(jax.random.key(0))[1], problem.lower_data.full()
    return jax.lax.fori_loop(0, len(y), lambda _, y: problem.lower.T(x, y, batch), y)  # pyright: ignore[reportAttributeAccessIssue]


def make(
    seed: int = 0, vocab: int = 3, length: int = 4, steps: int = 8, size: float = 4.0, discount: float = 0.7,
    credit: str = "to-go",
) -> Instance:  # fmt: skip
    """A reward of sequences, four attributions of it, and a policy in training.

    Args:
        seed: >= 0, of the reward.
        vocab: tokens, >= 2.
        length: of sequences, >= 2.
        steps: K >= 1, of training.
        size: eta > 0, of its steps.
        discount: gamma in [0, 1].
        credit: "to-go", or "return" for whole undiscounted returns.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    for name, value, least in (("vocab", vocab, 2), ("length", length, 2), ("steps", steps, 1)):
        if not is_count(value, least):
            invalid(f"{name} (shaping)", value, f"a whole number >= {least}", "It is a count.")
    if min(length, 60) * math.log(vocab) > math.log(LARGEST):
        invalid(
            "vocab, length (shaping)", (vocab, length), f"at most {LARGEST} sequences", "Take fewer or shorter ones."
        )
    if credit not in CREDITS:
        invalid("credit (shaping)", repr(credit), " or ".join(CREDITS), "Choose one.")
    if not 0 < size < np.inf:
        invalid("size (shaping)", size, "a number > 0", "It is a step.")
    if not 0 <= discount <= 1:
        invalid("discount (shaping)", discount, "a number in [0, 1]", "It is gamma.")
    world = draw(seed, vocab, length)
    ahead = np.arange(length)[:, None] - np.arange(length)[None]  # u - t
    to_go = np.where(ahead >= 0, float(discount) ** np.maximum(ahead, 0), 0)
    problem = BilevelProblem(
        upper(vocab, length),
        FixedPoint(training(vocab, length, credit)),
        x_set=Simplex(),
        upper_data=Full({"reward": floats(world.reward)}),
        lower_data=Full({"tokens": floats(world.tokens), "to_go": floats(to_go), "size": floats(size)}),
        init=_init(vocab, length, steps),
    )
    metrics = functools.partial(_metrics, world.reward, vocab, length)
    run = jax.jit(trained)

    def alone(k: int) -> dict[str, float]:
        x = floats(np.eye(4)[k])
        return metrics(x, run(problem, x))

    return Instance(
        problem,
        tags=frozenset({"fixed-point", "unrolled", "shaping"}),
        metrics=metrics,
        baselines={f"{name} alone": functools.partial(alone, k) for k, name in enumerate(ATTRIBUTIONS)},
    )
