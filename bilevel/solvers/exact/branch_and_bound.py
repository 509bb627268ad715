"""BranchAndBound: global optima below linear and convex quadratic followers, with a proof."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.host import on_host
from bilevel.backend.tree import distance
from bilevel.diagnostics import certificate
from bilevel.parts import kkt
from bilevel.parts.pessimistic import pessimistic
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, Referee, Status
from bilevel.solver import About, Solver
from bilevel.step import require_counts
from bilevel.struct import invalid, static, struct

PyTree = Any


class State(NamedTuple):
    """What a step of BranchAndBound needs."""

    x: PyTree
    """The upper iterate: before the search the start."""
    y: PyTree
    """The follower's answer."""
    lower_bound: Array
    """Proved: no feasible (x, y) has a smaller f, shape []; the least number of the dtype where nothing is proved, the
    largest where there is no feasible (x, y)."""
    nodes: Array
    """How many nodes the tree has, shape []; 0 before the search."""
    word: Array
    """How the search ended, a `Status`, shape []."""


class Info(NamedTuple):
    """What a step of BranchAndBound shows."""

    lower_bound: Array
    """As in the state, shape []."""
    nodes: Array
    """As in the state, shape []."""
    feasible: Array
    """False where it is proved that no (x, y) fulfils all constraints, shape []."""
    bounded: Array
    """False where F falls for ever along a ray of feasible points, shape []."""
    finished: Array
    """False where max_nodes did not suffice, or where rounding spoilt a proof, shape []."""


@struct(kw_only=True)
class BranchAndBound(Solver):
    """Branch and bound on the follower's complementarity: the follower's KKT conditions stand for it,

        min f(x, y)  with  x in X, G <= 0, H = 0,    g_y + C'lam + C_eq'mu = 0,    (x, y) in the follower's rows,
                           lam_i = 0 or row i holds with equality, for each row i of C y + B x <= h,    lam >= 0.

    A node has decided some rows, one way or the other; its relaxation, which leaves the rest open, is a linear program
    (HiGHS, in SciPy) or a convex quadratic one (Clarabel, which comes with the extra `reference`). The node of the
    least bound is split on the row that is violated most. No multiplier is given a bound of any kind. At times the
    follower is solved at a relaxation's x, and the best point of the same decisions is a candidate.

    The whole search is the first step, on the host, and `time_limit` does not interrupt it; the steps after it do
    nothing. Each leaf keeps a proof of its bound, and all are computed again before a word is said;
    `bilevel.diagnostics.certify` returns the certificate.

    Assumptions: f affine or convex quadratic in (x, y); g(x, .) affine or convex quadratic, g_y affine in (x, y): terms
        x'K y are fine in g, and in f where g has the same but for a factor and no row of the follower moves with x, as
        in what a buyer pays; the coupling, X, Y, G and H affine. Others are refused by name.
    Cost per step: two linear or quadratic programs a node, and at worst 2^(rows of the follower) nodes.

    Args:
        max_nodes: how many nodes are split at most, >= 1. Default: 20,000.
        optimistic: whether the leader chooses among several answers of the follower; False: the worst one for him
            counts (`bilevel.pessimistic`), for f and g linear in y, costs in g without x. Default: True.

    Reference: Bard, Moore. A branch and bound algorithm for the bilevel programming problem. SIAM Journal on Scientific
        and Statistical Computing 11, 1990. Edmunds, Bard. Algorithms for nonlinear bilevel mathematical programs. IEEE
        Transactions on Systems, Man, and Cybernetics 21, 1991.
    Differs from the papers: the node of the least bound first, not depth first; the bounds are proved by weak duality.
    """

    max_nodes: int = static(default=certificate.MAX_NODES)
    optimistic: bool = static(default=True)
    full_batch = adaptive = upper_constraints = True
    about = About(
        idea="branch and bound on the follower's complementarity, with a proof",
        reference="Bard and Moore 1990",
        calls="Hessians of f and g, once",
        memory="a tree of linear programs",
        lower="linear or convex quadratic, with linear rows, coupled ones too",
        stops="the global optimum",
    )
    assumptions = {  # noqa: RUF012
        "feasible": "some (x, y) fulfils all constraints of both levels",
        "bounded": "F is bounded from below",
        "finished": "max_nodes suffice",
    }
    warnings = {"feasible": Status.INFEASIBLE, "bounded": Status.UNBOUNDED}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Check the count and the switch."""
        require_counts(self, max_nodes=1)
        if not isinstance(self.optimistic, bool | np.bool_):
            invalid("BranchAndBound.optimistic", repr(self.optimistic), "True or False", "Leave it out for True.")

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        x = problem.x_set.project(x)
        dtype = ravel_pytree(x)[0].dtype
        nothing = jnp.asarray(jnp.finfo(dtype).min, dtype)
        return State(x, y, nothing, jnp.array(0), jnp.array(int(Status.MAX_STEPS)))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        def search(state: State) -> State:
            return self._searched(problem, state)

        state = jax.lax.cond(state.nodes == 0, search, lambda state: state, state)
        said = lambda *words: jnp.isin(state.word, jnp.array([int(word) for word in words]))  # noqa: E731
        info = Info(
            state.lower_bound,
            state.nodes,
            ~said(Status.INFEASIBLE),
            ~said(Status.UNBOUNDED),
            ~said(Status.MAX_STEPS, Status.STALLED),
        )
        return state, info

    def _searched(self, problem: BilevelProblem, state: State) -> State:
        """The state after the search; x and y stay where it found no point."""
        problem = problem.on_full_data()
        (flat_x, to_x), (flat_y, to_y) = ravel_pytree(state.x), ravel_pytree(state.y)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                              (flat_x, flat_y, state.lower_bound, state.nodes, state.word))  # fmt: skip
        stated = problem if self.optimistic else pessimistic(problem)
        args = kkt.numbers(stated, *stated.init(jax.random.key(0))), flat_x, flat_y
        x, y, bound, nodes, word = on_host(_Host(self.max_nodes), shapes, *args)
        x, y = to_x(x), to_y(y)
        inside = problem.x_set.project(x)  # x is there but for rounding
        near = distance(x, inside) <= 1e-6 * (1 + distance(x, jax.tree.map(jnp.zeros_like, x)))
        return State(jax.tree.map(lambda a, b: jnp.where(near, a, b), inside, x), y, bound, nodes, word)

    def referee(self, problem: BilevelProblem) -> Referee:
        return dataclasses.replace(certificate.GLOBAL, measure=certificate.Globally(self.max_nodes, self.optimistic))

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount()

    def unsupported(self, problem: BilevelProblem) -> str | None:
        reason = certificate.refusal(problem, self.optimistic)
        return None if reason is None else f"BranchAndBound {reason}."


@dataclasses.dataclass(frozen=True)
class _Host:
    """The search as a function of arrays."""

    max_nodes: int

    def __call__(self, found: kkt.Numbers, x: Any, y: Any) -> tuple[Any, ...]:
        """(x, y, lower bound, nodes, word)."""
        program, search = kkt.searched(found, self.max_nodes)
        told = certificate.judged(program, search)
        ends = np.finfo(x.dtype)
        if search.z is not None:
            best, y = kkt.point(program, search.z)
            x = best[: len(x)]  # without z, where ties are against the leader
        bound = np.clip(told.bound, float(ends.min), float(ends.max))
        return x, y, bound, len(search.nodes), int(told.status)
