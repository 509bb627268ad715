"""Branch and bound on complementary pairs against looking at all sides of all pairs, and proofs that are spoilt."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from bilevel.diagnostics.certificate import judged, proved
from bilevel.oracles.polynomial import Affine, Model
from bilevel.parts import kkt
from bilevel.qp.programs import relax
from bilevel.record import Status


def drawn(seed):
    """A bilevel program with a linear or convex quadratic follower, in small whole numbers; x may be unbounded."""
    rng = np.random.default_rng(seed)
    n, m, k = rng.integers(1, 3), rng.integers(1, 3), rng.integers(1, 6)
    whole = lambda *shape: rng.integers(-3, 4, shape).astype(float)  # noqa: E731
    M = whole(m, m) * (seed % 2)
    C, B = whole(k, m), whole(k, n)
    inside = rng.uniform(-2, 2, n + m)
    hi = C @ inside[n:] + B @ inside[:n] + rng.integers(0, 3, k)
    lo = np.where(rng.random(k) < 0.3, hi - rng.integers(0, 4, k), -np.inf)
    ends = np.where(rng.random(n) < 0.7, 4.0, np.inf)
    G, none = whole(1, n + m), Affine(np.zeros((0, n + m)), np.zeros(0))
    slope, residual = (
        Affine(np.zeros((n + m, n + m)), whole(n + m)),
        Affine(np.hstack([whole(m, n), M @ M.T]), whole(m)),
    )
    model = Model(np.float64(0.3), slope, residual, Affine(G, -(G @ inside)), none, none, none)
    return kkt.Numbers(model, (C, lo, hi, B), (np.eye(n), -ends, ends))


def by_all_sides(numbers):
    """(word, value): the least of the linear programs with one unknown of each pair at zero."""
    found = kkt.conditions(numbers)
    program, best, word = found.program, np.inf, Status.INFEASIBLE
    for sides in itertools.product((1, 2), repeat=len(program.pairs)):
        hi = program.fixed(np.array(sides))
        args = program.A, program.b, program.E, program.e, np.stack([program.lo, hi], axis=1)
        if linprog(program.c * 0, *args).status == 2:
            continue
        solved = linprog(program.c, *args)
        if solved.status != 0:
            return Status.UNBOUNDED, -np.inf
        word, best = Status.CONVERGED, min(best, solved.fun)
    return word, found.scale * best + found.constant


def test_the_least_of_all_sides():
    """Feasible, infeasible and unbounded ones are among them."""
    words = []
    for seed in range(30):
        word, value = by_all_sides(drawn(seed))
        found, search = kkt.searched(drawn(seed), 1000)
        told = judged(found, search)
        assert told.status == word, seed
        if word == Status.CONVERGED:
            np.testing.assert_allclose(found.scale * search.value + found.constant, value, atol=1e-7)
            np.testing.assert_allclose(told.bound, value, atol=1e-7)
        words.append(word)
    assert set(words) == {Status.CONVERGED, Status.INFEASIBLE, Status.UNBOUNDED}


def a_tree():
    for seed in range(100, 200):
        found, search = kkt.searched(drawn(seed), 1000)
        if search.z is not None and search.ray is None and len(search.nodes) >= 7:
            return found.program, search
    raise AssertionError("no tree of seven nodes")


def test_a_tree_that_lacks_a_side_or_a_proof_proves_nothing():
    program, search = a_tree()
    nodes, bound = search.nodes, proved(program, search)
    np.testing.assert_allclose(bound, search.value, atol=1e-7)
    leaf = search.leaves[-1]
    try:
        search.nodes = [node for k, node in enumerate(nodes) if k != leaf] if leaf == len(nodes) - 1 else nodes[:-1]
        assert proved(program, search) == -np.inf
        for changed in (nodes[leaf]._replace(side=3 - nodes[leaf].side), nodes[leaf]._replace(parent=leaf)):
            search.nodes = [*nodes[:leaf], changed, *nodes[leaf + 1 :]]
            assert proved(program, search) == -np.inf
        blank = nodes[leaf].relaxed._replace(proof=None)
        search.nodes = [*nodes[:leaf], nodes[leaf]._replace(relaxed=blank), *nodes[leaf + 1 :]]
        assert proved(program, search) == -np.inf
    finally:
        search.nodes = nodes


def test_wrong_multipliers_prove_less():
    """Whatever the multipliers are, what they prove is below the optimum."""
    rng, (program, search) = np.random.default_rng(3), a_tree()
    nodes = search.nodes
    try:
        for k in search.leaves:
            proof = nodes[k].relaxed.proof
            wrong = proof._replace(nu=proof.nu + rng.normal(size=proof.nu.shape))
            changed = nodes[k]._replace(relaxed=nodes[k].relaxed._replace(proof=wrong))
            search.nodes = [*nodes[:k], changed, *nodes[k + 1 :]]
            assert proved(program, search) <= search.value + 1e-7
    finally:
        search.nodes = nodes


@pytest.mark.parametrize("quadratic", [False, True])
def test_relaxations_that_are_empty_or_fall_for_ever(quadratic):
    """x >= 1 against x <= 0, and -x over x >= 0: with a proof, and with a ray."""
    Q = np.diag([0.0, 1.0]) * quadratic
    base = kkt.Program(Q, np.array([-1.0, 0.0]), 0.0, np.zeros((0, 2)), np.zeros(0), np.zeros((0, 2)), np.zeros(0),
                       np.zeros(2), np.full(2, np.inf), np.zeros((0, 2), int))  # fmt: skip
    falls = relax(base, base.hi)
    assert falls.word == "unbounded"
    assert falls.ray is not None
    np.testing.assert_allclose(falls.ray, [1, 0], atol=1e-9)
    empty = base._replace(A=np.array([[-1.0, 0.0], [1.0, 1.0]]), b=np.array([-1.0, 0.0]))
    found = relax(empty, empty.hi)
    assert found.word == "empty"
    assert found.bound == np.inf
