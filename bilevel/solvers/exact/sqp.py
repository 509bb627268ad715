"""SQP: sequential quadratic programming on the exact gradients of F and of the upper constraints."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.tree import norm
from bilevel.parts import reduced
from bilevel.parts.domain import project_upper
from bilevel.parts.evaluation import LEAST, Evaluation, evaluate, refuse_unsolvable
from bilevel.parts.reduced import Way
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount
from bilevel.solver import About, Solver
from bilevel.step import require_counts
from bilevel.struct import static, struct

PyTree = Any
DESCENT = 1e-4  # part of the fall of the model that the merit must fall
START = 0.1  # the first step's length, in units of 1 + |x|
DAMPED = 0.2  # Powell's: the least curvature of a pair, in parts of the model's


class Here(NamedTuple):
    """F and the constraints at a point."""

    x: Array
    """Raveled, shape [n]."""
    value: Array
    """F(x), shape []; infinite where the lower level is not solved; 0 before the first step."""
    gradient: Array
    """Of F, shape [n]."""
    c: Array
    """G and H, shape [rows]."""
    J: Array
    """Their gradients, shape [rows, n]."""
    y: PyTree
    """y(x)."""
    v: PyTree
    """The adjoint."""


class State(NamedTuple):
    """What a step of SQP needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """y(x); before the first step the start."""
    here: Here
    """What is known at x."""
    d: Array
    """The quadratic program's step from x, shape [n]."""
    t: Array
    """The part of it that is tried next, shape []."""
    B: Array
    """The Lagrangian's Hessian, shape [n, n], positive definite."""
    multipliers: Array
    """Of the upper constraints' rows, shape [rows], G first."""
    weight: Array
    """nu, of violations in the merit, shape []."""
    values: Array
    """F at the last points, shape [memory], newest first."""
    violations: Array
    """|max(G, 0)|_1 + |H|_1 there."""
    points: Array
    """How many there were so far, shape []: none before the first step."""
    reach: Array
    """The longest step that is tried, shape []."""
    fresh: Array
    """Whether B has seen no curvature yet, shape []."""


class Info(NamedTuple):
    """What a step of SQP shows."""

    direction: Array
    """|d|, of the quadratic program's step from x, shape []."""
    objective: Array
    """F at x, shape []."""
    constraint_violation: Array
    """|max(G, 0)|_1 + |H|_1 at x, shape []."""
    step_length: Array
    """t, the part of d that this step tried, shape []."""
    accepted: Array
    """Whether x went there, shape []."""


@struct(kw_only=True)
class SQP(Solver):
    """Sequential quadratic programming on the reduced problem, with the lower level solved at every point:

        min over d of  grad F'd + d'B d/2   with   G + J_G d <= 0,   H + J_H d = 0,   x + d in X,        x <- x + t d.

    B is the damped BFGS matrix of the Lagrangian F + lam'G + mu'H. A step tries one t, the first of 1, 1/2, ... not to
    exceed the reach; x goes there if the merit F + nu (|max(G, 0)|_1 + |H|_1) falls below the largest of the last
    `memory` points', and else stays, for half of t. nu exceeds the multipliers; the reach grows and shrinks with
    success. F is infinite where the lower level has no solution. Where the linear rows contradict each other, d is the
    shortest step to where they are violated least. Without upper constraints it is a quasi-Newton method on X.

    Assumptions: g(x, .) strongly convex, or as the lower level's method needs it (`bilevel.lower`); F, G(x, y(x)) and
        H(x, y(x)) differentiable; X a polyhedron; at most some 1,000 unknowns of x, since B is dense.
    Cost per step: one evaluation of F, G, H and their gradients, with an adjoint for each row, and as many steps of the
        lower level's method as its tolerance takes, from the last y.

    Args:
        memory: points, >= 1, over whose merits a step may rise; 1 makes the merit fall at every step. Default: 5.

    Reference: Powell. A fast algorithm for nonlinearly constrained optimization calculations. Lecture Notes in
        Mathematics 630, 1978: damping. Nocedal, Wright. Numerical Optimization, 2nd ed., 2006, section 18.3 and
        Algorithm 18.3. Panier, Tits. Avoiding the Maratos effect by means of a nonmonotone line search I. SIAM Journal
        on Numerical Analysis 28, 1991.
    Differs from the papers: the merit is compared with those of the last points at the present weight; rows that
        contradict each other are met by a projection; steps have a reach.
    """

    memory: int = static(default=5)
    full_batch = adaptive = upper_constraints = True
    about = About(
        idea="quadratic programs along exact gradients, with upper constraints",
        reference="Powell 1978",
        calls="as many as the lower level needs",
        memory="a Hessian of x",
        lower="what `bilevel.lower` solves: strongly convex; boxes, balls, simplices, linear rows, coupled ones",
        stops="a KKT point of the reduced problem",
    )

    def __post_init__(self) -> None:
        """Check the count."""
        require_counts(self, memory=1)

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        x = project_upper(problem, x, y)
        flat = ravel_pytree(x)[0]
        n, dtype, zero = flat.size, flat.dtype, jnp.zeros((), flat.dtype)
        rows = jnp.zeros(_num_rows(problem, x, y), dtype)
        unknown = Here(flat, zero, flat * 0, rows, jnp.zeros((rows.size, n), dtype), y,
                       optax.tree.zeros_like(y))  # fmt: skip
        none = jnp.zeros(self.memory, dtype)
        reach = START * (1 + norm(flat))
        return State(
            x, y, unknown, flat * 0, zero, jnp.eye(n, dtype=dtype), rows, zero, none, none, jnp.array(0), reach,
            jnp.array(True),
        )  # fmt: skip

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        unravel, old, eps = ravel_pytree(state.x)[1], state.here, float(jnp.finfo(state.d.dtype).eps)
        target = problem.x_set.project(unravel(old.x + state.t * state.d))  # x + t d is in X but for rounding
        there = _here(ravel_pytree(target)[0], evaluate(problem, target, old.y, old.v, "SQP"))
        accepted = _accepted(problem, state, there)
        new = optax.tree.where(accepted, there, old)

        size = _size(problem, state, new)
        push = lambda last, number: jnp.concatenate([number[None], last[:-1]])  # noqa: E731
        values = jnp.where(accepted, push(state.values, new.value), state.values)
        violations = jnp.where(accepted, push(state.violations, size), state.violations)
        B, seen = _updated(state.B, old, new, state.multipliers, state.fresh)
        lost = ~accepted & (state.t * norm(state.d) <= 10 * eps * (1 + norm(old.x)))  # no step leads down: begin again
        fresh = (state.fresh & ~seen) | lost
        length = norm(new.gradient) / (START * (1 + norm(new.x)))
        B = jnp.where(fresh, jnp.where(length > 0, length, 1) * jnp.eye(len(B), dtype=B.dtype), B)

        way = reduced.quadratic_step(problem, unravel(new.x), state.y, new.gradient, new.c, new.J, B, state.multipliers)
        renew = accepted | lost
        d, multipliers = (jnp.where(renew, *both) for both in zip(way, (state.d, state.multipliers), strict=True))
        weight = jnp.where(renew, _weight(problem, state, new, size, way, B), state.weight)
        moved = norm(state.t * state.d)
        foreseen = _agreement(problem, state, there)
        longer = jnp.where(
            foreseen > 0.5, jnp.maximum(state.reach, 2 * moved), jnp.where(foreseen < 0.1, moved / 2, moved)
        )
        longer = jnp.where(state.points == 0, state.reach, longer)
        reach = jnp.where(accepted, longer, moved / 2)
        most = jnp.minimum(1, reach / jnp.maximum(norm(d), eps * reach))
        t = jnp.where(renew, most, state.t / 2)
        info = Info(norm(d), new.value, size, state.t, accepted)
        return State(
            unravel(new.x),
            new.y,
            new,
            d,
            t,
            B,
            multipliers,
            weight,
            values,
            violations,
            state.points + jnp.where(accepted, 1, 0),
            reach,
            fresh,
        ), info

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return LEAST

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if not problem.x_set.polyhedral:
            return f"SQP needs an x_set described by linear rows; got {type(problem.x_set).__name__}."
        return refuse_unsolvable(self, problem)


def _agreement(problem: BilevelProblem, state: State, there: Here) -> Array:
    """The fall of the merit over that of its model, []; 1 where the model's is no more than rounding."""
    t, d, here = state.t, state.d, state.here
    before, after = _size(problem, state, here), _size(problem, state, there)
    model = t * (here.gradient @ d - state.weight * before) + t**2 * (d @ state.B @ d) / 2
    fall = there.value - here.value + state.weight * (after - before)
    told = model < -1e3 * _rounding(here)
    return jnp.where(told, fall / jnp.where(told, model, 1), 1)


def _rounding(here: Here) -> Array:
    """What rounding may add to F, []."""
    return 10 * float(jnp.finfo(here.x.dtype).eps) * (jnp.abs(here.value) + norm(here.gradient) * norm(here.x))


def _accepted(problem: BilevelProblem, state: State, there: Here) -> Array:
    """Whether x goes to the point that was tried, []: always to the first."""
    known = jnp.arange(len(state.values)) < state.points
    highest = jnp.max(jnp.where(known, state.values + state.weight * state.violations, -jnp.inf))
    size, before = _size(problem, state, there), _size(problem, state, state.here)
    fall = jnp.minimum(state.here.gradient @ state.d - state.weight * before, 0)
    enough = there.value + state.weight * size <= highest + DESCENT * state.t * fall + _rounding(state.here)
    return jnp.isfinite(there.value) & (enough | ~known[0])


def _num_rows(problem: BilevelProblem, x: PyTree, y: PyTree) -> int:
    return 0 if problem.upper_constraints is None else sum(part.size for part in problem.upper_constraints.values(x, y))


def _here(x: Array, found: Evaluation) -> Here:
    gradient = ravel_pytree(found.gradient)[0]
    if found.constraints is None:
        c, J = jnp.zeros(0, x.dtype), jnp.zeros((0, x.size), x.dtype)
    else:
        c, J = found.constraints.values, reduced.flat_jacobian(found.constraints)
    return Here(x, found.value.astype(x.dtype), gradient, c, J, found.y, found.v)


def _size(problem: BilevelProblem, state: State, here: Here) -> Array:
    """|max(G, 0)|_1 + |H|_1, []."""
    if problem.upper_constraints is None:
        return jnp.zeros((), here.x.dtype)
    G, H = reduced.split(problem, state.x, state.y, here.c)
    return jnp.sum(jnp.maximum(G, 0)) + jnp.sum(jnp.abs(H))


def _weight(problem: BilevelProblem, state: State, here: Here, size: Array, way: Way, B: Array) -> Array:
    """nu: above the multipliers, and such that d leads down; size: the violation."""
    if problem.upper_constraints is None:
        return state.weight
    steep = (here.gradient @ way.d + way.d @ B @ way.d / 2) / jnp.where(size > 0, 0.9 * size, 1)
    needed = jnp.maximum(1.1 * jnp.max(jnp.abs(way.multipliers)), jnp.where(size > 0, steep, 0))
    return jnp.where(needed > state.weight, 1.5 * needed, state.weight)


def _updated(B: Array, old: Here, new: Here, multipliers: Array, fresh: Array) -> tuple[Array, Array]:
    """(B after the pair of this step, Powell's damped BFGS; whether there was one)."""
    s = new.x - old.x
    z = (new.gradient + multipliers @ new.J) - (old.gradient + multipliers @ old.J)
    short = float(jnp.finfo(s.dtype).eps) ** (1 / 3) * (1 + norm(new.x))  # below, z would be rounding more and more
    product, enough = s @ z, norm(s) > short
    scale = jnp.where(product > 0, z @ z / jnp.where(product > 0, product, 1), 1)
    B = jnp.where(fresh & enough & (product > 0), scale * jnp.eye(s.size, dtype=s.dtype), B)
    Bs = B @ s
    curved = s @ Bs
    flat = product < DAMPED * curved
    theta = jnp.where(flat, (1 - DAMPED) * curved / jnp.where(flat, curved - product, 1), 1)
    r = theta * z + (1 - theta) * Bs
    safe = enough & (curved > 0) & (s @ r > 0)
    over = lambda a: jnp.where(safe, a, 1)  # noqa: E731
    more = jnp.outer(r, r) / over(s @ r) - jnp.outer(Bs, Bs) / over(curved)
    return jnp.where(safe, B + more, B), safe
