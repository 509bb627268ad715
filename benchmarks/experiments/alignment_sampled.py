"""Alignment from demonstrations with transformers and samples; the judge knows all sequences.

    python -m benchmarks.experiments.alignment_sampled [--seeds 3] [--demonstrations 300] [--beta 2] [--rounds 3]

Family `alignment`, 8 tokens, up to 4 of them. Policies and rewards are transformers of some 26,000 numbers each
(`problems.tiny_transformer`), in float32; nothing that trains sees the expert, ref or an expectation. SFT is likelihood
on the demonstrations, 300 steps of Adam. From there, with the KL price beta and 128 samples of the policy a step:

    1 round, rounds   a fresh reward from 80 steps on pairs of a demonstration and a sample of the policy, then 80
                      policy steps (REINFORCE on r - beta log(pi/anchor), the mean as baseline); the anchor is SFT
                      (fixed) or the last round's policy (moving); kept: earlier rounds' samples are among the pairs
    IRL               one loop: a step of the reward along E_D grad r - E_pi grad r, then one of the policy, as many of
                      both as all rounds together; anchor SFT
    SFT, longer       as many more steps of likelihood

Judged exactly over the 2801 sequences, as in `benchmarks.experiments.alignment`.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from benchmarks.experiments.alignment import show
from benchmarks.study.compilation import use_quick_compilation
from problems import alignment, tiny_transformer
from problems.tiny_transformer import Size

PyTree = Any
VOCAB, LENGTH, SAMPLES, INNER, SFT_STEPS = 8, 4, 128, 80, 300
POLICY, REWARD = Size(VOCAB + 1, LENGTH + 1, VOCAB), Size(VOCAB + 1, LENGTH + 1, 1)
RULE = optax.adam(1e-3)


def started(tokens: Array) -> Array:
    """The sequences with the token before the start in front, [n, length + 1]."""
    return jnp.concatenate([jnp.full((len(tokens), 1), VOCAB), tokens], axis=1)


def log_pi(policy: PyTree, tokens: Array) -> Array:
    """Log-probabilities of sequences [n, length], shape [n]; after an end only ends, with probability one."""
    logits = jax.nn.log_softmax(tiny_transformer.apply(POLICY, policy, started(tokens)[:, :-1]))
    each = jnp.take_along_axis(logits, tokens[:, :, None], axis=2)[:, :, 0]
    going = jnp.cumprod(started(tokens)[:, :-1] != 0, axis=1)
    return jnp.sum(each * going, axis=1)


def reward(x: PyTree, tokens: Array) -> Array:
    """The rewards [n] of sequences, read off at the last place."""
    return tiny_transformer.apply(REWARD, x, started(tokens))[:, -1, 0]


def sample(policy: PyTree, key: Array, count: int = SAMPLES) -> Array:
    """Sequences of the policy, [count, length]."""
    tokens = jnp.zeros((count, LENGTH), int)
    for k, key_k in enumerate(jax.random.split(key, LENGTH)):
        drawn = jax.random.categorical(key_k, tiny_transformer.apply(POLICY, policy, started(tokens)[:, :-1])[:, k])
        tokens = tokens.at[:, k].set(jnp.where(tokens[:, k - 1] == 0, 0, drawn) if k else drawn)
    return tokens


def moved(loss: Any, at: PyTree, state: Any, *rest: Any) -> tuple[PyTree, Any]:
    """One step of Adam."""
    updates, state = RULE.update(jax.grad(loss)(at, *rest), state)
    return optax.apply_updates(at, updates), state


def policy_loss(policy: PyTree, tokens: Array, advantage: Array) -> Array:
    """The score function's surrogate."""
    return -jnp.mean(jax.lax.stop_gradient(advantage) * log_pi(policy, tokens))


def policy_step(carry: Any, anchor: PyTree, x: PyTree, beta: float, key: Array) -> tuple[Any, Array]:
    """A step of REINFORCE: ((policy, state), the samples)."""
    policy, state = carry
    tokens = sample(policy, key)
    gain = reward(x, tokens) - beta * (log_pi(policy, tokens) - log_pi(anchor, tokens))
    return moved(policy_loss, policy, state, tokens, gain - jnp.mean(gain)), tokens


@functools.partial(jax.jit, static_argnames="steps")
def fine_tuned(policy: PyTree, shown: Array, steps: int) -> PyTree:
    """Likelihood on the demonstrations [m, length]."""
    loss = lambda policy: -jnp.mean(log_pi(policy, shown))  # noqa: E731
    return jax.lax.scan(lambda c, _: (moved(loss, *c), None), (policy, RULE.init(policy)), length=steps)[0][0]


@jax.jit
def told_apart(x: PyTree, shown: Array, others: Array, key: Array) -> PyTree:
    """Bradley-Terry on random pairs of the demonstrations and the others."""

    def body(carry: Any, key: Array) -> tuple[Any, None]:
        pairs = [
            jax.random.choice(k, rows, (SAMPLES,))
            for k, rows in zip(jax.random.split(key), (shown, others), strict=True)
        ]
        loss = lambda x: jnp.mean(jax.nn.softplus(reward(x, pairs[1]) - reward(x, pairs[0])))  # noqa: E731
        return moved(loss, *carry), None

    return jax.lax.scan(body, (x, RULE.init(x)), jax.random.split(key, INNER))[0][0]


@jax.jit
def improved(policy: PyTree, anchor: PyTree, x: PyTree, beta: float, key: Array) -> PyTree:
    """The policy after a round's steps."""
    body = lambda carry, key: (policy_step(carry, anchor, x, beta, key)[0], None)  # noqa: E731
    return jax.lax.scan(body, (policy, RULE.init(policy)), jax.random.split(key, INNER))[0][0]


@functools.partial(jax.jit, static_argnames="steps")
def irl(policy: PyTree, x: PyTree, shown: Array, beta: float, key: Array, steps: int) -> tuple[PyTree, PyTree]:
    """(policy, reward) of the single loop."""
    anchor = policy
    contrast = lambda x, tokens: (jnp.mean(reward(x, tokens)) - jnp.mean(reward(x, shown))) / beta  # noqa: E731

    def body(carry: Any, key: Array) -> tuple[Any, None]:
        pi, (x, state) = carry
        pi, tokens = policy_step(pi, anchor, x, beta, key)
        return (pi, moved(contrast, x, state, tokens)), None

    start = (policy, RULE.init(policy)), (x, RULE.init(x))
    (pi, found), _ = jax.lax.scan(body, start, jax.random.split(key, steps))
    return pi[0], found[0]


def one(seed: int, demonstrations: int, beta: float, rounds: int) -> dict[str, dict[str, float]]:
    """{row: its numbers}."""
    world = alignment.draw(seed, VOCAB, LENGTH, 6, beta)
    D = alignment.shown(world, beta, demonstrations, seed)
    everything = jnp.asarray(world.sequences)
    shown = jnp.asarray(np.repeat(world.sequences, np.rint(D * demonstrations).astype(int), axis=0))
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    on_all = jax.jit(log_pi), jax.jit(reward)

    def judged(policy: PyTree, x: PyTree | None) -> dict[str, float]:
        r = None if x is None else np.asarray(on_all[1](x, everything), np.float64)
        found = np.asarray(on_all[0](policy, everything), np.float64)
        numbers = alignment.judge(world, beta, found, r)
        return {**numbers, "start_kl": float(np.exp(found) @ (found - log_sft))}

    sft = fine_tuned(tiny_transformer.initial(POLICY, next(keys)), shown, SFT_STEPS)
    log_sft = np.asarray(on_all[0](sft, everything), np.float64)
    found = {"SFT": judged(sft, None), "SFT, longer": judged(fine_tuned(sft, shown, rounds * INNER), None)}
    found["IRL"] = judged(
        *irl(sft, tiny_transformer.initial(REWARD, next(keys)), shown, beta, next(keys), rounds * INNER)
    )
    for name in ("fixed", "moving", "moving, kept"):
        policy, others = sft, []
        for k in range(rounds):
            others = [*(others if name.endswith("kept") and k > 1 else []), sample(policy, next(keys))]
            mixed = jax.random.choice(next(keys), jnp.concatenate(others), (SAMPLES,), replace=False)
            x = told_apart(tiny_transformer.initial(REWARD, next(keys)), shown, mixed, next(keys))
            policy = improved(policy, policy if name.startswith("moving") else sft, x, beta, next(keys))
            if k == 0 and name == "fixed":
                found["1 round"] = judged(policy, x)
        found[f"{rounds} rounds, {name}"] = judged(policy, x)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--demonstrations", type=int, default=300)
    parser.add_argument("--beta", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    use_quick_compilation()
    runs = []
    for seed in range(args.seeds):
        runs.append(one(seed, args.demonstrations, args.beta, args.rounds))
        print(
            f"seed {seed}: " + ", ".join(f"{name} {row['expert_kl']:.3f}" for name, row in runs[-1].items()), flush=True
        )
    title = f"{args.demonstrations} demonstrations, beta {args.beta:g}, {args.seeds} seeds, transformers"
    show(title, runs, ("true_reward", "expert_kl", "start_kl", "ranking"))


if __name__ == "__main__":
    main()
