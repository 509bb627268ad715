"""Branch and bound on complementary pairs: the global minimum of a `Program`, with a tree that proves it.

A node fixes one unknown of some pairs at zero. Its relaxation bounds the objective from below; where a relaxation
fulfils all pairs, or where a guess of all sides does, there is a point. The node of the least bound is split next, on
the pair that its relaxation violates most: no multiplier needs a bound of its own ("big M"), since a pair is branched
on as it is.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bilevel.qp.programs import Program, Relaxed, Warm, relax

ZERO = 1e-7  # up to which an unknown of a pair counts as zero, where all sides are guessed
EVERY = 8  # expansions from one guess by `complete` to the next, once the first ones are done


class Node(NamedTuple):
    """A node of the tree."""

    parent: int
    """The number of the node above; -1 for the root."""
    pair: int
    """The pair that the parent was split on."""
    side: int
    """Which of its unknowns is zero here: 1 or 2."""
    relaxed: Relaxed


class Search:
    """A search that goes on by `run`, and is a function of the program and the number of expansions alone.

    Attributes:
        program: what is minimised.
        nodes: the tree, parents first.
        value, z: the best point so far; infinite and None before there is one.
        expanded: how many nodes were split.
        ray: where the objective falls for ever from `z`, that direction; else None.
        failed: how many relaxations could neither be solved nor split; the bound above them holds there, too.
    """

    def __init__(
        self,
        program: Program,
        gap: tuple[float, float],
        complete: Callable[[np.ndarray], np.ndarray | None] | None = None,
    ) -> None:
        """Solve the root. gap: where to stop, absolute and relative to |value|. complete: a point z -> one near it that
        may fulfil the pairs, or None.
        """
        self.program, self.gap, self.complete = program, gap, complete
        self.nodes: list[Node] = []
        self._warm = Warm.of(program)
        self.value, self.z, self.ray = np.inf, None, None
        self.expanded, self.failed = 0, 0
        self._open: list[tuple[float, int]] = []
        self._fixed: dict[int, np.ndarray] = {}
        self._split: set[int] = set()
        self._visit(-1, -1, 0, np.zeros(len(program.pairs), np.int8))

    @property
    def done(self) -> bool:
        """Whether nothing is left that could be better than `value` by more than the gap."""
        return self.ray is not None or not self._open or self._open[0][0] >= self.cutoff

    @property
    def cutoff(self) -> float:
        """The bound from which a node need not be split."""
        return self.value - self.gap[0] - self.gap[1] * abs(self.value) if np.isfinite(self.value) else np.inf

    @property
    def bound(self) -> float:
        """The proved lower bound: of all leaves, and at most the value of the best point."""
        if self.ray is not None:
            return -np.inf
        return min([self.value, *(node.relaxed.bound for k, node in enumerate(self.nodes) if k not in self._split)])

    @property
    def leaves(self) -> list[int]:
        """The numbers of the nodes that were not split."""
        return [k for k in range(len(self.nodes)) if k not in self._split]

    def run(self, until: int) -> "Search":
        """Split nodes until so many have been, or the search is done."""
        while not self.done and self.expanded < until:
            self._expand(heapq.heappop(self._open)[1])
        return self

    def _expand(self, k: int) -> None:
        fixed, relaxed = self._fixed.pop(k), self.nodes[k].relaxed
        self.expanded += 1
        early = self.expanded <= EVERY or self.expanded % EVERY == 0
        if self.complete is not None and relaxed.word == "solved" and relaxed.z is not None and early:
            guess = self.complete(relaxed.z)
            if guess is not None:
                self._try(self._sides(guess, fixed * 0))
        pair = self._worst(relaxed, fixed)
        self._split.add(k)
        for side in (1, 2):
            below = fixed.copy()
            below[pair] = side
            self._visit(k, pair, side, below)

    def _visit(self, parent: int, pair: int, side: int, fixed: np.ndarray) -> None:
        """Solve a node's relaxation, look whether it is a point of the program, and keep it open where it is not."""
        relaxed = relax(self.program, self.program.fixed(fixed), self._warm)
        if relaxed.word == "failed" and parent >= 0:  # the bound above holds here, too
            above = self.nodes[parent].relaxed
            relaxed = relaxed._replace(bound=above.bound, proof=above.proof)
        number = len(self.nodes)
        self.nodes.append(Node(parent, pair, side, relaxed))
        z = relaxed.z
        if z is not None and relaxed.bound < self.cutoff and self._complementary(z, relaxed.ray):
            self._try(self._sides(z if relaxed.ray is None else np.maximum(np.abs(z), np.abs(relaxed.ray)), fixed))
        if relaxed.bound >= self.cutoff or self.ray is not None:
            return
        if (fixed > 0).all():
            self.failed += relaxed.word == "failed"
            return
        self._fixed[number] = fixed
        heapq.heappush(self._open, (relaxed.bound, number))

    def _try(self, sides: np.ndarray) -> None:
        """Take the best point with one unknown of each pair at zero, where there is one and it is better."""
        found = relax(self.program, self.program.fixed(sides), self._warm)
        if found.word == "unbounded" and found.z is not None:
            self.value, self.z, self.ray = -np.inf, found.z, found.ray
        elif found.word == "solved" and found.z is not None and self.program.value(found.z) < self.value:
            self.value, self.z = self.program.value(found.z), found.z

    def _sides(self, z: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        """For each pair the unknown that is nearer to zero at z, and what is fixed."""
        first, second = z[self.program.pairs].T
        return np.where(fixed > 0, fixed, np.where(first <= second, 1, 2)).astype(np.int8)

    def _complementary(self, z: np.ndarray, ray: np.ndarray | None) -> bool:
        """Whether one unknown of each pair is nearly zero at z, and along the ray from it."""
        pairs = np.abs(z[self.program.pairs])
        if ray is not None:
            pairs = np.maximum(pairs, np.abs(ray[self.program.pairs]))
        return bool((pairs.min(axis=1, initial=np.inf) <= ZERO * (1 + np.abs(z).max(initial=0))).all())

    def _worst(self, relaxed: Relaxed, fixed: np.ndarray) -> int:
        """The pair that is violated most, of those that are not fixed."""
        z = np.zeros(len(self.program.c)) if relaxed.z is None else relaxed.z
        z = z if relaxed.ray is None else z + relaxed.ray * (1 + np.abs(z).max(initial=0))
        first, second = np.abs(z[self.program.pairs]).T
        return int(np.argmax(np.where(fixed > 0, -1.0, first * second)))
