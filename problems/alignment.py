"""Alignment from demonstrations by inverse reinforcement learning, with all sequences enumerated.

    min over x of  -E_D log pi_x(s),      pi_x = argmax over pi of E_pi r_x(s) - beta KL(pi | ref)

A sequence has at most `length` tokens of 1, …, vocab - 1 and then ends (token 0). The lower level has the closed form
log pi = log ref + r_x/beta - log Z, which is its map T; y are the log-probabilities of all sequences. The reward is
linear and additive over transitions, r_x(s) = x . sum_t e(s_{t-1}, s_t), e drawn; ref is a drawn Markov chain. With
E_D over demonstrations

    grad F = -(1/beta) (E_D - E_pi) sum_t e(s_{t-1}, s_t).

With reward=transformer r_x is a small network of the whole sequence, the policy still exact and x its weights. The
expert is pi at a drawn x*; with demonstrations = 0 it is shown as it is, and x* is the optimum of the linear rewards.

`markov` has partition function and expectations by the transfer matrix, which enumerates nothing: an independent
reference. `rounds` is the loop that is used with large models in place of the gradient above, in expectation:

    r_t = argmin over r of E_{s ~ D, s' ~ m_t} -log sigmoid(r(s) - r(s')),     pi_{t+1} prop. to anchor_t exp(r_t/beta),

m_t = pi_t, or the mean of pi_1, …, pi_t where earlier pairs are kept, those of round 0 excepted. For rewards that are
free in each sequence r_t = log(D/m_t) up to a constant, so that without keeping pairs

    anchor_t = ref:   pi_{t+1} prop. to ref (D/pi_t)^(1/beta), whose fixed point is prop. to ref^(b/(1+b)) D^(1/(1+b)),
                      b = beta: never D, unless ref is; it attracts for beta > 1, and for beta = 1 the policy goes to
                      and fro between D and ref;
    anchor_t = pi_t:  pi_{t+1} prop. to pi_t^(1 - 1/beta) D^(1/beta), which comes to D for beta > 1/2, for beta = 1 at
                      once; and r_t to 0, so that the last reward ranks nothing: beta log(pi_t/ref) is what ranks.

For linear rewards the moving anchor comes to rest where r_t = 0, that is where E_pi of the features is E_D of them, at
a pi prop. to ref exp(x . features): the maximum of the likelihood, which is the bilevel problem's solution.

One round from ref is self-play fine-tuning's first (Chen et al. 2024).

Metrics: `true_reward`, E_pi r*, as a part of the way from ref's to the expert's; `expert_kl`, KL(expert | pi);
`ref_kl`, KL(pi | ref); `ranking`, the share of pairs of sequences from ref that r_x and r* order alike.

Settings that work: `LBFGS()`; `ITD(lower_step_size=1.0, num_lower_steps=1)`; `AID()`; of transformers ITD with
upper_step_size=optax.adam(0.002).

Reference: Joint reward and policy learning from demonstrations: arXiv:2503.13538, whose programs run the rounds with
moving anchor, fresh rewards and kept pairs; the formulas of the fixed points are ours. Chen, Deng, Yuan, Ji, Gu.
Self-play fine-tuning converts weak language models to strong language models. ICML 2024, arXiv:2401.01335.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import BilevelProblem, FixedPoint, Full
from bilevel.backend.checks import is_count
from bilevel.diagnostics import IMPLICIT
from bilevel.struct import invalid
from problems import tiny_transformer
from problems.datasets import floats
from problems.instance import Instance, Truth
from problems.tiny_transformer import Size

PyTree = Any
REWARDS = "linear", "transformer"
LARGEST = 300_000
"""The most sequences that are enumerated."""


class World(NamedTuple):
    """The numbers of an instance, in NumPy."""

    sequences: np.ndarray
    """[N, length], tokens, 0 from the end on."""
    features: np.ndarray
    """[N, K], the sums of e over each sequence's transitions."""
    e: np.ndarray
    """[vocab + 1, vocab, K], by the token before (vocab at the start) and the token; 0 once the sequence has ended."""
    chain: np.ndarray
    """[vocab + 1, vocab], the transition probabilities of ref; after an end only ends."""
    log_ref: np.ndarray
    """[N]."""
    x: np.ndarray
    """[K], of the expert."""


def enumerate_all(vocab: int, length: int) -> np.ndarray:
    """All sequences, shape [N, length]: those with fewer tokens first."""
    parts = []
    for k in range(length + 1):
        words = np.array(list(itertools.product(range(1, vocab), repeat=k)), int).reshape((vocab - 1) ** k, k)
        parts.append(np.pad(words, ((0, 0), (0, length - k))))
    return np.concatenate(parts)


def started(sequences: np.ndarray, vocab: int) -> np.ndarray:
    """The sequences with the token before the start, `vocab`, in front, [N, length + 1]: what a network sees."""
    return np.concatenate([np.full((len(sequences), 1), vocab), sequences], axis=1)


def along(table: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Sums over each sequence's transitions of table[before, token], shape [N, ...]."""
    return table[started(sequences, len(table) - 1)[:, :-1], sequences].sum(axis=1)


def draw(seed: int, vocab: int, length: int, num_features: int, beta: float) -> World:
    """The world of a seed; rewards are scaled so that they have the deviation 2 beta under ref."""
    rng, sequences = np.random.default_rng(seed), enumerate_all(vocab, length)
    chain = rng.dirichlet(np.ones(vocab), vocab + 1)
    chain[0] = np.eye(vocab)[0]
    e = rng.normal(size=(vocab + 1, vocab, num_features))
    e[0] = 0
    with np.errstate(divide="ignore"):
        log_ref = along(np.nan_to_num(np.log(chain), neginf=-1e9), sequences)
    features, ref = along(e, sequences), np.exp(log_ref)
    x = rng.normal(size=num_features)
    mean = ref @ features
    x *= 2 * beta / np.sqrt(ref @ ((features - mean) @ x) ** 2)
    return World(sequences, features, e, chain, log_ref, x)


def tilted(log_ref: np.ndarray, r: np.ndarray, beta: float) -> np.ndarray:
    """Log-probabilities of the policy prop. to ref exp(r/beta), shape [N]."""
    logits = log_ref + r / beta
    top = logits.max()
    return logits - top - np.log(np.sum(np.exp(logits - top)))


def markov(chain: np.ndarray, e: np.ndarray, x: np.ndarray, beta: float, length: int) -> tuple[float, np.ndarray]:
    """(log Z, E_pi of the features [K]) of pi prop. to ref exp(x . features/beta), by the transfer matrix.

    Z is a product of matrices; its derivative in x/beta is the expectation, carried forward beside it.
    """
    weights = chain * np.exp(e @ x / beta)
    vocab = chain.shape[1]
    mass, moment = weights[vocab], weights[vocab][:, None] * e[vocab]
    for _ in range(length - 1):
        steps = weights[:vocab]
        moment = steps.T @ moment + np.einsum("a,ab,abk->bk", mass, steps, e[:vocab])
        mass = steps.T @ mass
    return float(np.log(mass.sum())), moment.sum(axis=0) / mass.sum()


def upper(x: Array, y: Array, batch: PyTree) -> Array:
    """Minus the demonstrations' mean log-probability, shape []."""
    return -jnp.sum(batch["demonstrations"] * y)


def policy(x: Array, y: Array, batch: PyTree) -> Array:
    """The map T: log-probabilities of the soft-optimal policy, shape [N], whatever y is."""
    return jax.nn.log_softmax(batch["log_ref"] + batch["features"] @ x / batch["beta"])


@functools.cache
def network(vocab: int, length: int) -> Size:
    """The transformer that is a reward: one number, read off at the last place."""
    return Size(vocab + 1, length + 1, 1)


@functools.cache
def policy_by_network(size: Size) -> Callable[[PyTree, Array, PyTree], Array]:
    """The map T for rewards that a transformer makes of the sequences."""

    def policy(x: PyTree, y: Array, batch: PyTree) -> Array:
        r = tiny_transformer.apply(size, x, batch["tokens"])[:, -1, 0]
        return jax.nn.log_softmax(batch["log_ref"] + r / batch["beta"])

    return policy


class Round(NamedTuple):
    """What a round of `rounds` leaves."""

    log_pi: np.ndarray
    """[N]."""
    reward: np.ndarray
    """[N], the one that was fitted in this round."""


def rounds(
    log_ref: np.ndarray, demonstrations: np.ndarray, fit: Callable[[np.ndarray, np.ndarray], np.ndarray], beta: float,
    count: int, *, moving: bool, kept: bool,
) -> list[Round]:  # fmt: skip
    """The loop of the module's docstring from pi = ref.

    Args:
        log_ref: [N], of the first policy.
        demonstrations: D, [N].
        fit: (D, m) -> r [N], the reward that tells D from m.
        beta: > 0.
        count: rounds, >= 1.
        moving: whether the anchor is the last policy.
        kept: whether earlier rounds' pairs are, but for those of round 0.
    """
    log_pi, seen, done = log_ref, [], []
    for _ in range(count):
        seen = [*(seen if kept and len(done) > 1 else []), np.exp(log_pi)]
        r = fit(demonstrations, np.mean(seen, axis=0))
        log_pi = tilted(log_pi if moving else log_ref, r, beta)
        done.append(Round(log_pi, r))
    return done


def ranking(r: np.ndarray, true: np.ndarray, log_ref: np.ndarray, pairs: int = 4000) -> float:
    """The share of pairs from ref, of different true rewards, that both rewards order alike."""
    drawn = np.random.default_rng(0).choice(len(true), (2, pairs), p=np.exp(log_ref) / np.exp(log_ref).sum())
    a, b = true[drawn[0]] - true[drawn[1]], r[drawn[0]] - r[drawn[1]]
    different = np.abs(a) > 1e-12
    return float(np.mean((a * b > 0)[different] + 0.5 * (b == 0)[different]))


def judge(world: World, beta: float, log_pi: np.ndarray, r: np.ndarray | None) -> dict[str, float]:
    """The metrics of a policy [N], and of a reward [N] where there is one."""
    true = world.features @ world.x
    log_expert = tilted(world.log_ref, true, beta)
    pi, expert, ref = np.exp(log_pi), np.exp(log_expert), np.exp(world.log_ref)
    seen = pi > 0
    found = {
        "true_reward": float((pi @ true - ref @ true) / (expert @ true - ref @ true)),
        "expert_kl": float(expert @ (log_expert - log_pi)),
        "ref_kl": float(pi[seen] @ (log_pi - world.log_ref)[seen]),
    }
    return found if r is None else {**found, "ranking": ranking(r, true, world.log_ref)}


def fitted_chain(world: World, demonstrations: np.ndarray, smoothing: float = 0.5) -> np.ndarray:
    """Log-probabilities [N] of the Markov chain of greatest likelihood: what supervised fine-tuning is here.

    Each transition is counted `smoothing` times more, as a chain that ends at once after an end.
    """
    vocab, length = world.chain.shape[1], world.sequences.shape[1]
    before = started(world.sequences, vocab)[:, :-1]
    counts = np.full((vocab + 1, vocab), smoothing)
    np.add.at(counts, (before.ravel(), world.sequences.ravel()), np.repeat(demonstrations, length))
    counts[0] = np.eye(vocab)[0]
    with np.errstate(divide="ignore"):
        return along(np.nan_to_num(np.log(counts / counts.sum(axis=1, keepdims=True)), neginf=-1e9), world.sequences)


def shown(world: World, beta: float, demonstrations: int, seed: int) -> np.ndarray:
    """The demonstrations' distribution D [N]: the expert's, or that of so many samples of it."""
    log_expert = tilted(world.log_ref, world.features @ world.x, beta)
    expert = np.exp(log_expert) / np.exp(log_expert).sum()
    if demonstrations == 0:
        return expert
    return np.random.default_rng([1, seed]).multinomial(demonstrations, expert) / demonstrations


def _metrics(world: World, beta: float, size: Size | None, x: PyTree, y: Array) -> dict[str, float]:
    if size is None:
        r = world.features @ np.asarray(x, np.float64)
    else:
        r = np.asarray(
            tiny_transformer.apply(size, x, jnp.asarray(started(world.sequences, world.chain.shape[1])))[:, -1, 0],
            np.float64,
        )
    return judge(world, beta, np.asarray(y, np.float64), r)


@functools.cache
def _init(size: Size | int, count: int) -> Callable[[Array], tuple[PyTree, Array]]:
    def init(key: Array) -> tuple[PyTree, Array]:
        x = tiny_transformer.initial(size, key) if isinstance(size, Size) else jnp.zeros(size, float)
        return x, jnp.zeros(count, float)

    return init


def make(
    seed: int = 0,
    vocab: int = 8,
    length: int = 4,
    features: int = 6,
    beta: float = 1.0,
    demonstrations: int = 0,
    reward: str = "linear",
) -> Instance:
    """A world of sequences, an expert in it and its demonstrations.

    Args:
        seed: >= 0, of ref, features, expert and demonstrations.
        vocab: tokens, >= 2, the end among them.
        length: the most tokens of a sequence, >= 1; at most `LARGEST` sequences in all.
        features: of the reward, >= 1.
        beta: > 0, the price of KL(pi | ref).
        demonstrations: sampled from the expert, >= 0; 0 shows its distribution.
        reward: "linear", or "transformer" for some 26,000 weights in place of x . features; the expert stays as it is.

    Raises:
        InvalidInput: a parameter outside of its range.
    """
    counts = (
        ("vocab", vocab, 2),
        ("length", length, 1),
        ("features", features, 1),
        ("demonstrations", demonstrations, 0),
    )
    for name, number, least in counts:
        if not is_count(number, least):
            invalid(f"{name} (alignment)", number, f"a whole number >= {least}", "It is a count.")
    if reward not in REWARDS:
        invalid("reward (alignment)", repr(reward), " or ".join(REWARDS), "Choose one.")
    if not 0 < beta < np.inf:
        invalid("beta (alignment)", beta, "a number > 0", "It is the price of KL(pi | ref).")
    if sum((vocab - 1.0) ** k for k in range(min(length, 60) + 1)) > LARGEST:
        invalid(
            "vocab, length (alignment)", (vocab, length), f"at most {LARGEST} sequences", "Take fewer or shorter ones."
        )
    world = draw(seed, vocab, length, features, beta)
    data = shown(world, beta, demonstrations, seed)
    size = network(vocab, length) if reward == "transformer" else None
    lower = {"log_ref": floats(world.log_ref), "beta": floats(beta)}
    seen = (
        {"features": floats(world.features)}
        if size is None
        else {"tokens": jnp.asarray(started(world.sequences, world.chain.shape[1]))}
    )
    problem = BilevelProblem(
        upper,
        FixedPoint(policy if size is None else policy_by_network(size)),
        upper_data=Full({"demonstrations": floats(data)}),
        lower_data=Full(lower | seen),
        init=_init(features if size is None else size, len(data)),
    )
    truth, log_expert = None, tilted(world.log_ref, world.features @ world.x, beta)
    if demonstrations == 0 and size is None:
        truth = Truth(float(-data @ log_expert), floats(world.x), floats(log_expert))
    # The reference differentiates every entry of y in every weight at once: gigabytes for a network.
    referee = IMPLICIT if size is None else dataclasses.replace(IMPLICIT, check=None)
    judged = functools.partial(judge, world, beta)
    return Instance(
        problem,
        truth,
        tags=frozenset({"irl", "fixed-point", "alignment", "known-optimum" if truth else "sampled"}),
        metrics=functools.partial(_metrics, world, beta, size),
        referee=referee,
        baselines={
            "reference": lambda: judged(world.log_ref, None),
            "supervised": lambda: judged(fitted_chain(world, data * (demonstrations or 1e6)), None),
            "expert": lambda: judged(log_expert, world.features @ world.x),
        },
    )
