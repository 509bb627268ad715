"""Finite Markov decision processes: states 0, …, S - 1, actions 0, …, A - 1, no reward; discounted, or with an end.

Transitions are dense, P [S, A, S], or successor lists with at most K next states for each pair: time and memory then
grow with S A K, and no S x S matrix is formed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.struct import invalid, static, struct

UNROLLED = 16  # successor lists up to this length are summed term by term


@struct
class Successors:
    """Lists of next states, at most K for each pair; a state that is listed twice has the sum of its probabilities.

    Numbers outside of [0, S) are undefined behaviour in compiled code: `MDP.sparse` checks them.
    """

    next_states: Any
    """Whole numbers in [0, S), [S, A, K]."""
    probabilities: Any
    """[S, A, K]."""


@struct
class MDP:
    """A Markov decision process without reward; a pytree, so that another one of the same sizes compiles nothing.

    Build it with `MDP.dense` or `MDP.sparse`, which convert and check; the bare constructor does neither.

    Attributes:
        transitions: P [S, A, S], or `Successors`.
        start: rho [S], the distribution of the first state.
        discount: gamma [], in [0, 1); with a horizon in [0, 1].
        horizon: None, or the number T of steps after which everything ends; policies then depend on the time, and Q,
            policies and occupancies have the shape [T, S, A] in place of [S, A].
    """

    transitions: Any
    start: Any
    discount: Any
    horizon: int | None = static(default=None)

    @classmethod
    def dense(cls, transitions: Any, start: Any, discount: float, horizon: int | None = None) -> "MDP":
        """From P [S, A, S] with P[s, a, s'] the probability of s' after a in s.

        Raises:
            InvalidInput: for wrong shapes, rows that are no distributions, a discount or horizon out of its range.
        """
        return cls(_floats(transitions), _floats(start), _floats(discount), horizon).validate()

    @classmethod
    def sparse(
        cls, next_states: Any, probabilities: Any, start: Any, discount: float, horizon: int | None = None
    ) -> "MDP":
        """From successor lists, both [S, A, K]; pad short lists with probability 0.

        Raises:
            InvalidInput: as `dense`, and for next states that are not whole numbers in [0, S).
        """
        next_states = jnp.asarray(whole_numbers("next_states (MDP)", next_states), jnp.int32)
        successors = Successors(next_states, _floats(probabilities))
        return cls(successors, _floats(start), _floats(discount), horizon).validate()

    @property
    def num_states(self) -> int:
        """The number S of states."""
        return self._rows.shape[0]

    @property
    def num_actions(self) -> int:
        """The number A of actions."""
        return self._rows.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of Q, policies and occupancies: (S, A), or (T, S, A) with a horizon."""
        pair = self.num_states, self.num_actions
        return pair if self.horizon is None else (self.horizon, *pair)

    @property
    def _rows(self) -> Any:
        """The probabilities, [S, A, S] or [S, A, K]: each row over the last axis is a distribution."""
        return self.transitions.probabilities if isinstance(self.transitions, Successors) else self.transitions

    def expect(self, V: Array) -> Array:
        """E[V(s') | s, a], shape [S, A], for V [S]."""
        if not isinstance(self.transitions, Successors):
            return self.transitions @ V
        p = self.transitions.probabilities
        following = self.transitions.next_states
        if p.shape[-1] > UNROLLED:
            return jnp.sum(p * at(V, following), axis=-1)
        parts = (p[..., k] * at(V, following[..., k]) for k in range(p.shape[-1]))
        return functools.reduce(jnp.add, parts)  # XLA fuses this on a CPU, not the sum: twice as fast

    def flow(self, d: Array) -> Array:
        """The sum over (s, a) of d(s, a) P(. | s, a), shape [S], for d [S, A]: the adjoint of `expect`."""
        if isinstance(self.transitions, Successors):
            moved = d[..., None] * self.transitions.probabilities
            return jnp.zeros(self.num_states, moved.dtype).at[self.transitions.next_states].add(moved)
        return jnp.einsum("sa,sat->t", d, self.transitions)

    def sample_start(self, key: Array) -> Array:
        """A first state, shape []."""
        return jax.random.categorical(key, jnp.log(self.start))

    def sample_next(self, key: Array, state: Array, action: Array) -> Array:
        """A next state of (state, action), shape []."""
        chosen = jax.random.categorical(key, jnp.log(self._rows[state, action]))
        if not isinstance(self.transitions, Successors):
            return chosen
        return self.transitions.next_states[state, action, chosen].astype(chosen.dtype)

    @property
    def is_sparse(self) -> bool:
        """Whether the transitions are successor lists."""
        return isinstance(self.transitions, Successors)

    def to_dense(self) -> "MDP":
        """The same process with P [S, A, S]."""
        if not isinstance(self.transitions, Successors):
            return self
        S, A, _ = self._rows.shape
        index = jnp.arange(S)[:, None, None], jnp.arange(A)[None, :, None], self.transitions.next_states
        P = jnp.zeros((S, A, S), self._rows.dtype).at[index].add(self._rows)
        return dataclasses.replace(self, transitions=P)

    def validate(self) -> "MDP":
        """Check the arrays, which must not be traced; return self.

        Raises:
            InvalidInput: naming the array, and the state and action at fault.
        """
        rows, start, discount = np.asarray(self._rows), np.asarray(self.start), np.asarray(self.discount)
        name = "probabilities (MDP)" if self.is_sparse else "transitions (MDP)"
        shape = "[S, A, K]" if self.is_sparse else "[S, A, S]"
        if rows.ndim != 3 or rows.size == 0 or (not self.is_sparse and rows.shape[0] != rows.shape[2]):
            invalid(name, f"shape {rows.shape}", f"shape {shape}, all at least 1", "Index it by state, action, next.")
        _check_distributions(name, rows)
        if start.shape != rows.shape[:1]:
            invalid("start (MDP)", f"shape {start.shape}", f"shape {rows.shape[:1]}", "Give one number per state.")
        _check_distributions("start (MDP)", start)
        whole = isinstance(self.horizon, int) and not isinstance(self.horizon, bool)
        if self.horizon is not None and not (whole and self.horizon >= 1):
            invalid("horizon (MDP)", self.horizon, "a whole number >= 1, or None", "It counts the steps.")
        ends = self.horizon is not None
        if discount.shape != () or not (0 <= discount < 1 or (ends and discount == 1)):
            do = "Without discounting and without an end values are infinite."
            invalid("discount (MDP)", discount, "a number in [0, 1), or in [0, 1] with a horizon", do)
        if isinstance(self.transitions, Successors):
            following = np.asarray(self.transitions.next_states)
            if following.shape != rows.shape:
                do = "Pad short lists with probability 0."
                invalid("next_states (MDP)", f"shape {following.shape}", f"{rows.shape} as the probabilities", do)
            check_range("next_states (MDP)", following, len(start), "states")
        return self


def at(V: Array, states: Array) -> Array:
    """The entries V[states], shaped like states, not checked again: `MDP.sparse` did, and it is a third of a sweep."""
    return V.at[states].get(mode="promise_in_bounds")


def _floats(array: Any) -> Array:
    return jnp.asarray(array, float)


def whole_numbers(name: str, array: Any) -> Array:
    """`array` as JAX integers.

    Raises:
        InvalidInput: for any other kind of number, integral floats included; for one that JAX's integers do not hold.
    """
    given = np.asarray(array)
    if not np.issubdtype(given.dtype, np.integer):
        invalid(name, f"dtype {given.dtype}", "whole numbers", "Convert indices to integers.")
    largest = jnp.iinfo(jnp.asarray(0, int).dtype).max
    if given.size and (int(given.max()) > largest or int(given.min()) < -largest):
        got = f"numbers from {given.min()} to {given.max()}"
        invalid(name, got, f"at most {largest} in size", "Count states and actions from 0.")
    return jnp.asarray(array, int)


def check_range(name: str, array: Any, size: int, what: str) -> None:
    """Raise `InvalidInput` where an entry is not in [0, size)."""
    wrong = np.argwhere((np.asarray(array) < 0) | (np.asarray(array) >= size))
    if len(wrong):
        where = tuple(wrong[0].tolist())
        got = f"{np.asarray(array)[where]} at index {where}"
        invalid(name, got, f"whole numbers in [0, {size})", f"There are {size} {what}, counted from 0.")


def _check_distributions(name: str, rows: np.ndarray) -> None:
    """Every row over the last axis is >= 0 and sums to one, up to rounding."""
    slack = rows.shape[-1] * 1e-6
    bad = ~((np.abs(rows.sum(axis=-1) - 1) <= slack) & (rows >= 0).all(axis=-1))
    if bad.any():
        where = tuple(np.argwhere(bad)[0].tolist()) if bad.ndim else ()
        row = f"row {where}" if where else "it"
        got = f"{row} has the sum {rows[where].sum():.6g} and the smallest entry {rows[where].min():.3g}"
        invalid(name, got, "probabilities that sum to one", "Normalise over the last axis.")
