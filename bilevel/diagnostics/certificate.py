"""Certificates of global optima below linear and convex quadratic followers, and the referee that asks for them.

A branch-and-bound tree (`qp.branching`) proves a lower bound of F: every split has both of its sides, and every leaf a
proof by weak duality. Here that is computed again, by matrix products that share no code with the search; that y is a
minimiser of the follower is asked of a linear program of its own, with g's gradient from the user's function.
"""

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel import oracles
from bilevel.backend.bounded import bounded_jit
from bilevel.backend.host import on_host
from bilevel.backend.precision import full_precision
from bilevel.backend.tree import norm
from bilevel.diagnostics.checks import check_by_value
from bilevel.oracles import polynomial
from bilevel.parts import kkt
from bilevel.parts.pessimistic import pessimistic
from bilevel.parts.reduced import upper_violation
from bilevel.problem import BilevelProblem, Minimize, SmoothCoupling
from bilevel.qp.branching import Search
from bilevel.qp.programs import Program
from bilevel.record import Measurement, Referee, Status
from bilevel.struct import invalid

PyTree = Any
MAX_NODES = 20_000
CLOSED = 1e-6  # gap that is none, relative to 1 + |F|, in the user's units and where f's largest coefficient is 1
EXPONENT = 0.4  # of eps: the default tolerance, 5e-7 in float64


class Certificate(NamedTuple):
    """What is known of a problem's global optimum; printing it says so in words."""

    status: Status
    """CONVERGED: F(x, y) and the proved bound agree; MAX_STEPS: the nodes did not suffice; INFEASIBLE; UNBOUNDED; or
    STALLED, where rounding kept a proof from being one."""
    x: PyTree
    """The leader's choice; NaN where there is none."""
    y: PyTree
    """The follower's answer, of several the best for the leader."""
    value: float
    """f(x, y)."""
    lower_bound: float
    """No feasible (x, y) with y a minimiser of the follower has a smaller f; computed again from the tree."""
    gap: float
    """value - lower_bound."""
    multipliers: np.ndarray
    """Of the follower's two-sided rows, the coupling's first (equalities before inequalities), then those of y_set, at
    last a smooth coupling's: positive where the upper end holds, negative where the lower one does."""
    follower_gap: float
    """How much g(x, .), linearised at y, falls on Y(x) within a distance of 1 + |y|: 0 at a minimiser."""
    violation: float
    """Of X, Y, the coupling and the upper constraints."""
    nodes: int
    """How many nodes the tree has."""

    def __str__(self) -> str:
        """A sentence for each number."""
        return (
            f"F = {self.value:.10g}, proved to be at least {self.lower_bound:.10g} by a tree of {self.nodes} nodes\n"
            f"follower's gap {self.follower_gap:.1e}, violation {self.violation:.1e}\n"
            f"{self.status.name}: {self.status.advice}"
        )


@bounded_jit
@full_precision
def _numbers(problem: BilevelProblem) -> tuple[kkt.Numbers, Array]:
    """(the problem's numbers, how far it is from them)."""
    problem = problem.on_full_data()
    x, y = problem.init(jax.random.key(0))
    found = kkt.numbers(problem, x, y)
    return found, polynomial.deviations(problem, x, y, found.model)


def refusal(problem: BilevelProblem, optimistic: bool = True) -> str | None:
    """Why the problem has no certificate of this kind, the end of a sentence that begins with a name, or None. The
    problem's arrays must be numbers. optimistic: whether the leader decides ties of the follower.
    """
    if not isinstance(problem.lower, Minimize):
        return f"needs a lower level Minimize(g); got {type(problem.lower).__name__}"
    for name, one in (("x_set", problem.x_set), ("y_set", problem.y_set)):
        curved = next((type(part).__name__ for part in one.simple() if not part.polyhedral), None)
        if curved is not None:
            return f"needs an {name} described by linear rows; got {curved}"
    if not optimistic:
        if problem.upper_constraints is not None:
            return "with optimistic=False needs a problem without upper constraints; got some"
        reason = refusal(pessimistic(problem))
        return reason and f"with optimistic=False {reason}"
    found, deviations = _numbers(problem)
    reason = kkt.reason(found, deviations) or kkt.lacks(found)
    if reason is None or "f convex" not in reason:
        return reason
    parts = ("y_set", problem.y_set), ("coupling", problem.coupling)
    return ", ".join([reason, *(f"{name} = {type(part).__name__}" for name, part in parts if part is not None)])


def certify(problem: BilevelProblem, max_nodes: int = MAX_NODES, *, optimistic: bool = True) -> Certificate:
    """The global optimum below a linear or convex quadratic follower, all constraints affine, with its proof.

        print(bilevel.diagnostics.certify(problem))

    `BranchAndBound` is the solver of the same search.

    Args:
        problem: f affine or convex quadratic in (x, y); g(x, .) convex quadratic or affine with a gradient affine in
            (x, y), so that a term x'K y is fine in g, and a multiple of it in f where no row of the follower moves with
            x; all constraints of both levels affine.
        max_nodes: how many nodes are split at most.
        optimistic: True: of several answers of the follower the leader has the choice. False: the worst for him counts,
            by `bilevel.pessimistic`; f and g are then linear in y, the costs in g without x, and there are no upper
            constraints. The multipliers are those of the restated follower, the last one that of g(x, y) <= g(x, z).

    Raises:
        InvalidInput: for a problem that is not of this kind, saying what is not.
    """
    problem = problem.validate().on_full_data()
    reason = refusal(problem, optimistic)
    if reason is not None:
        got = reason.partition("; got ")
        invalid("problem (certify)", got[2] or got[0], got[0].removeprefix("needs "), "Use another solver.")
    if not optimistic:
        return _against(problem, certify(pessimistic(problem), max_nodes))
    x, y = problem.init(jax.random.key(0))
    found, search = kkt.searched(jax.tree.map(np.asarray, _numbers(problem)[0]), max_nodes)
    told = judged(found, search)
    (flat_x, to_x), (flat_y, to_y) = ravel_pytree(x), ravel_pytree(y)
    z = np.full(len(found.program.c), np.nan) if search.z is None else search.z
    own_x, own_y = kkt.point(found, z)
    x, y = to_x(jnp.asarray(own_x, flat_x.dtype)), to_y(jnp.asarray(own_y, flat_y.dtype))
    point = None if search.z is None else jax.device_get(jax.jit(_at_point)(problem, x, y))
    value, fall, outside = (np.nan,) * 3 if point is None else map(float, point)
    bound = told.bound
    if told.status == Status.CONVERGED and not max(fall, outside) <= _tol(flat_x.dtype):
        told = told._replace(status=Status.STALLED)
    return Certificate(
        told.status, x, y, value, bound, value - bound, kkt.multipliers(found, z), fall, outside, len(search.nodes)
    )


def _against(problem: BilevelProblem, told: Certificate) -> Certificate:
    """The certificate of a problem from that of `pessimistic(problem)`: y is a minimiser of g, too."""
    x, _ = told.x
    if not np.isfinite(told.value):
        return told._replace(x=x)
    fall = float(jax.device_get(jax.jit(_at_point)(problem, x, told.y))[1])
    status = told.status
    if status == Status.CONVERGED and not fall <= _tol(ravel_pytree(told.y)[0].dtype):
        status = Status.STALLED
    return told._replace(x=x, status=status, follower_gap=max(told.follower_gap, fall))


class Judged(NamedTuple):
    """What a search says once its tree has been looked through."""

    status: Status
    bound: float
    """Of F, in the problem's units."""


_judged: "weakref.WeakKeyDictionary[Search, Judged]" = weakref.WeakKeyDictionary()


def judged(found: kkt.Conditions, search: Search) -> Judged:
    """The word for a search, by the tree's proofs, which are multiplied out at the first call."""
    if search not in _judged:
        _judged[search] = _judge(found, search)
    return _judged[search]


def _judge(found: kkt.Conditions, search: Search) -> Judged:
    program = found.program
    bound = proved(program, search)
    in_units = found.scale * bound + found.constant
    if search.ray is not None and search.z is not None:
        falls = _falls_for_ever(program, search.z, search.ray)
        return Judged(Status.UNBOUNDED if falls else Status.STALLED, -np.inf)
    if search.z is None:
        return Judged(Status.INFEASIBLE if bound == np.inf else Status.STALLED if search.done else Status.MAX_STEPS,
                      in_units)  # fmt: skip
    gap, value = search.value - bound, found.scale * search.value + found.constant
    if gap <= CLOSED * (1 + abs(search.value)) and found.scale * gap <= CLOSED * (1 + abs(value)):
        return Judged(Status.CONVERGED, in_units)
    return Judged(Status.STALLED if search.done else Status.MAX_STEPS, in_units)


def proved(program: Program, search: Search) -> float:
    """The lower bound that a tree proves, at most the value of its point: minus infinity where it is no tree, or where
    a leaf has no proof.
    """
    nodes = search.nodes
    below: list[list[int]] = [[] for _ in nodes]
    hi = [program.hi]
    for k, node in enumerate(nodes[1:], 1):
        if not 0 <= node.parent < k:
            return -np.inf
        below[node.parent].append(k)
        end = hi[node.parent].copy()
        end[program.pairs[node.pair, node.side - 1]] = 0.0
        hi.append(end)
    bound = search.value
    for k, children in enumerate(below):
        if children:
            pair = nodes[children[0]].pair
            if sorted((nodes[child].pair, nodes[child].side) for child in children) != [(pair, 1), (pair, 2)]:
                return -np.inf
        else:
            bound = min(bound, _weak_duality(program, hi[k], nodes[k].relaxed.proof))
    return float(bound)


def _weak_duality(program: Program, hi: np.ndarray, proof: Any) -> float:
    """A lower bound of the convex program on [lo, hi], from the multipliers of a proof; infinite for one of emptiness.

    The objective is at least q'z - w'Q w/2 + constant with q = Q w + c, and for E z = e, A z <= b and lam <= 0
    q'z = (q - E'nu - A'lam)'z + nu'E z + lam'A z >= min over the box of (q - E'nu - A'lam)'z + nu'e + lam'b.
    """
    if proof is None:
        return -np.inf
    q = np.zeros(len(program.c)) if proof.empty else program.c + program.Q @ proof.w
    if (hi < program.lo).any():
        return np.inf
    nu, lam = proof.nu, np.minimum(proof.lam, 0.0)
    reduced = q - nu @ program.E - lam @ program.A
    noise = 1e-8 * (1 + np.abs(q) + np.abs(nu) @ np.abs(program.E) + np.abs(lam) @ np.abs(program.A))
    ends = np.where(reduced > 0, program.lo, hi)
    open_end = np.isinf(ends)
    if (np.abs(reduced) > noise)[open_end].any():
        return -np.inf
    terms = [program.e * nu, program.b * lam, (reduced * np.where(open_end, 0, ends))]
    total, rounding = (sum(float(part.sum()) for part in parts) for parts in (terms, [1e-12 * abs(t) for t in terms]))
    if proof.empty:
        return np.inf if total > rounding + 1e-9 * (1 + np.abs(nu).max(initial=0)) else -np.inf
    return total - float(proof.w @ program.Q @ proof.w) / 2 + program.constant


def _falls_for_ever(program: Program, z: np.ndarray, ray: np.ndarray) -> bool:
    """Whether z + t ray fulfils everything for t = 0, 1 and 1e3, with an objective that falls."""
    values = []
    for t in (0.0, 1.0, 1e3):
        at = z + t * ray
        size = 1e-6 * (1 + np.abs(at).max(initial=0))
        outside = [np.abs(program.E @ at - program.e), program.A @ at - program.b, program.lo - at, at - program.hi]
        if np.abs(at[program.pairs]).min(axis=1).max(initial=0) > 0:  # what is decided is so exactly
            return False
        if max(part.max(initial=0) for part in outside) > size:
            return False
        values.append(program.value(at))
    return values[2] < values[1] < values[0] and values[0] - values[2] > 100 * (values[0] - values[1])


def _at_point(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Array, Array, Array]:
    """(f, the follower's gap, the violation) at (x, y), shapes []."""
    rows = kkt.constraints.rows(problem, x, y)
    flat = ravel_pytree(y)[0]
    slope = ravel_pytree(oracles.residual(problem, x, y, problem.lower_data.full()))[0]
    C, lo, hi = rows.C, rows.lo, rows.hi
    if isinstance(problem.coupling, SmoothCoupling):
        unequal, equal = oracles.coupling_values(problem, x, y)
        J = oracles.coupling_derivative(problem, x, y)[:, -flat.size :]
        ends = J @ flat - jnp.concatenate([unequal, equal])
        C, hi = jnp.concatenate([C, J]), jnp.concatenate([hi, ends])
        lo = jnp.concatenate([lo, jnp.full_like(unequal, -jnp.inf), ends[unequal.size :]])
    shape = jax.ShapeDtypeStruct((), flat.dtype)
    fall = on_host(_fall, shape, slope, flat, C, lo, hi)
    outside = problem.x_set.violation(x) + problem.y_set.violation(y) + norm(oracles.coupling_residual(problem, x, y))
    outside = outside + upper_violation(problem, x, y)
    return oracles.upper_value(problem, x, y, problem.upper_data.full()), fall, outside


def _fall(slope: Any, y: Any, C: Any, lo: Any, hi: Any) -> float:
    """max over Y(x), within 1 + |y| of y, of slope'(y - w), over max(1, |slope|); infinite where there is no w."""
    from scipy.optimize import linprog

    slope, y, C, lo, hi = (np.asarray(part, float) for part in (slope, y, C, lo, hi))
    if not (np.isfinite(y).all() and np.isfinite(slope).all()):
        return np.inf
    size = np.maximum(np.abs(C).max(axis=1, initial=0), 1e-300)
    C, lo, hi = C / size[:, None], lo / size, hi / size
    lo, hi = np.minimum(lo, C @ y), np.maximum(hi, C @ y)  # y's own violation is judged elsewhere
    reach, unit = 1 + np.abs(y).max(initial=0), max(1.0, np.abs(slope).max(initial=0))
    A = np.concatenate([C[np.isfinite(hi)], -C[np.isfinite(lo)]])
    b = np.concatenate([hi[np.isfinite(hi)], -lo[np.isfinite(lo)]])
    ends: Any = np.stack([y - reach, y + reach], axis=1)
    found = linprog(slope / unit, A, b, bounds=ends, options={"dual_feasibility_tolerance": 1e-10})
    return np.inf if found.fun is None else max(float(slope @ y / unit - found.fun), 0.0)


def _tol(dtype: Any) -> float:
    return 10 * float(jnp.finfo(dtype).eps) ** EXPONENT


@dataclass(frozen=True)
class Globally:
    """A measure: f at (x, y), the follower's gap there, and by how much f is above the bound that a tree proves.

    hypergradient: (f - bound)/(1 + |f|), and infinite where (x, y) is not feasible, y not a minimiser, so that nothing
    is searched there. lower_residual: how much g(x, .), linearised at y, falls on Y(x) within 1 + |y|, over |g_y|.
    """

    max_nodes: int = MAX_NODES
    optimistic: bool = True
    """Whether the leader decides ties. Where not, y has to be the worst minimiser of g, too."""

    def __call__(self, problem: BilevelProblem, x: PyTree, y: PyTree) -> Measurement:
        """Pure; for problems without a `refusal`."""
        problem = problem.on_full_data()
        value, fall, outside = _at_point(problem, x, y)
        if not self.optimistic:
            problem = pessimistic(problem)
            fall = jnp.maximum(fall, _at_point(problem, (x, y), y)[1])
        x0, y0 = problem.init(jax.random.key(0))
        near = jnp.maximum(fall, outside) <= _tol(value.dtype)
        args = kkt.numbers(problem, x0, y0), near, value
        shape = jax.ShapeDtypeStruct((), value.dtype)
        above = on_host(self._above, shape, *args)
        return Measurement(
            value=value, hypergradient=above, error_bound=jnp.zeros_like(value), lower_residual=fall,
            violation=outside, status=jnp.asarray(Status.ESTIMATED),
        )  # fmt: skip

    def _above(self, found: kkt.Numbers, near: Any, value: Any) -> float:
        """|f - bound|/(1 + |f|)."""
        if not bool(near):
            return np.inf
        bound = judged(*kkt.searched(found, self.max_nodes)).bound
        return abs(float(value) - bound) / (1 + abs(float(value)))


GLOBAL = Referee("the follower by a linear program, F by the bound that a tree proves", Globally(), EXPONENT,
                 check_by_value, at_y=True)  # fmt: skip
"""Where `certify` takes the problem: CONVERGED is said of global optima alone."""
