"""TrustRegion: truncated Newton steps along exact second derivatives of F, within bounds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bilevel import lower, oracles
from bilevel.backend.once import in_turn
from bilevel.backend.tree import norm
from bilevel.lower.method import spoilt
from bilevel.parts.domain import project_upper
from bilevel.parts.evaluation import refuse_unsolvable
from bilevel.problem import BilevelProblem
from bilevel.record import OracleCount, solved
from bilevel.solver import About, Solver
from bilevel.step import require_counts
from bilevel.struct import static, struct

PyTree = Any
START = 0.1  # the first radius, in units of 1 + |x|
ENOUGH, GOOD = 1e-4, 0.75  # parts of the model's fall from which a step is taken, and from which the radius grows
FALL = 0.01  # part of the fall along a slope that m must fall
SHORTEST = 1e-3  # of a search, in parts of its first length


class State(NamedTuple):
    """What a step of TrustRegion needs."""

    x: PyTree
    """The upper iterate."""
    y: PyTree
    """y(x); before the first step the start."""
    radius: Array
    """Delta, the longest step that is tried, shape []."""


class Info(NamedTuple):
    """What a step of TrustRegion shows."""

    direction: Array
    """The norm of x - Proj_X(x - grad F) before the step, shape []."""
    objective: Array
    """F after the step, shape []; NaN where the lower level was not solved."""
    agreement: Array
    """The fall of F over that of its model, shape []."""
    products: Array
    """Products with the Hessian of F, shape []."""
    lower_solved: Array
    """Whether y(x) was found where the step began, shape []. Where it was not, x stays."""


class Model(NamedTuple):
    """F to second order around x, and the bounds; all shapes [n], raveled."""

    x: Array
    gradient: Array
    product: Callable[[Array], Array]
    """d -> the Hessian of F times d."""
    lo: Array
    hi: Array

    def within(self, d: Array) -> Array:
        """The step to the point of X next to x + d."""
        return jnp.clip(self.x + d, self.lo, self.hi) - self.x

    def fall(self, d: Array, Hd: Array) -> Array:
        """grad F'd + d'Hd/2, shape []."""
        return self.gradient @ d + d @ Hd / 2


@struct(kw_only=True)
class TrustRegion(Solver):
    """Newton's method on F(x) = f(x, y(x)) with steps up to a radius, on all of the data: x <- x + d, where

        d about minimises  m(d) = grad F'd + d'Hd/2,    x + d in X,   |d| <= Delta,

    H the Hessian of F, of which only products are taken. A projected gradient step, the Cauchy step, says which
    entries stay at their bounds; conjugate gradients lower m over the others, until |grad m| is small, the radius is
    met, or H curves down, along which they go to the radius; a projected search keeps x + d within the bounds. The
    step is taken where F falls by 1e-4 of what m falls; Delta shrinks where less than a quarter of it is met, and
    grows where three quarters are. Where F is not convex it uses the curvature that it finds, as no quasi-Newton method
    does; still it ends where grad F = 0, which may be a saddle.

    Assumptions: g(x, .) strongly convex, or as the lower level's method needs it (`bilevel.lower`); F twice
        differentiable; X the whole space, or bounds.
    Cost per step: two lower levels, the second from a start near by, a gradient, and for each product with H two linear
        systems of the lower level, which share its factor.

    Args:
        max_products: >= 1, of conjugate gradients in a step. Default: 50.

    Reference: Steihaug. The conjugate gradient method and trust regions in large scale optimization. SIAM Journal on
        Numerical Analysis 20, 1983. Bounds: Lin, More. Newton's method for large bound-constrained optimization
        problems. SIAM Journal on Optimization 9, 1999.
    Differs from the papers: conjugate gradients look at one set of free entries a step, where Lin and More go on from
        face to face, and they have no preconditioner; what rounding hides does not count as a rise of F.
    """

    max_products: int = static(default=50)
    full_batch = adaptive = True
    about = About(
        idea="truncated Newton steps by exact second derivatives",
        reference="Steihaug 1983; Lin and More 1999",
        calls="as many as the lower level needs",
        memory="a few copies of x",
        lower="as `LBFGS`, three times differentiable",
        stops="grad F = 0",
    )

    def __post_init__(self) -> None:
        """Check the count."""
        require_counts(self, max_products=1)

    def init(self, problem: BilevelProblem, key: Array) -> State:
        x, y = problem.init(key)
        x = project_upper(problem, x, y)
        flat = ravel_pytree(x)[0]
        return State(x, y, (START * (1 + norm(flat))).astype(flat.dtype))

    def step(self, problem: BilevelProblem, state: State, key: Array) -> tuple[State, Info]:
        problem = problem.on_full_data()
        flat, unravel = ravel_pytree(state.x)
        F = _objective(problem, unravel)

        def slope(x: Array) -> tuple[Array, tuple[Array, PyTree, Array]]:
            (value, (y, good)), gradient = jax.value_and_grad(F, has_aux=True)(x, state.y)
            return gradient, (value, y, good)

        gradient, product, (value, y, good) = jax.linearize(slope, flat, has_aux=True)
        good = good & jnp.isfinite(value) & jnp.isfinite(gradient).all()
        gradient = jnp.where(good, gradient, 0)
        lo, hi = (
            ravel_pytree(problem.x_set.project(unravel(jnp.full_like(flat, end))))[0] for end in (-jnp.inf, jnp.inf)
        )
        model = Model(flat, gradient, product, lo, hi)
        found = _lower(model, state.radius, self.max_products)

        there, (y_there, solved_there) = F(flat + found.d, y)
        fall, foreseen = there - value, model.fall(found.d, found.Hd)
        rounding = 10 * float(jnp.finfo(flat.dtype).eps) * jnp.abs(value)
        hidden = (-foreseen <= rounding) & (fall <= rounding)
        ratio = jnp.where(hidden, 1, fall / jnp.where(foreseen < 0, foreseen, 1))
        usable = good & solved_there & jnp.isfinite(there)
        taken = usable & (ratio >= ENOUGH) & ((foreseen < 0) | hidden)
        size = norm(found.d)
        shorter = jnp.where(usable, jnp.minimum(state.radius, size), state.radius) / 4
        longer = jnp.maximum(state.radius, 2.5 * size)
        radius = jnp.where(ratio > GOOD, longer, jnp.where(ratio < 0.25, shorter, state.radius))
        radius = jnp.where(usable, radius, shorter)
        new = State(unravel(jnp.where(taken, flat + found.d, flat)),
                    optax.tree.where(taken, y_there, optax.tree.where(good, y, state.y)), radius)  # fmt: skip
        objective = jnp.where(taken, there, jnp.where(good, value, jnp.nan))
        mapped = norm(model.within(-gradient))
        return new, Info(mapped, objective, jnp.where(usable, ratio, 0), found.count, good)

    def cost(self, problem: BilevelProblem) -> OracleCount:
        return OracleCount(upper_values=2, lower_gradients=2)  # calls inside of derivatives of F are not seen

    def unsupported(self, problem: BilevelProblem) -> str | None:
        if not problem.x_set.intervals:
            kind = type(problem.x_set).__name__
            return f"TrustRegion moves x within bounds or freely; got x_set = {kind}. Use LBFGS."
        return refuse_unsolvable(self, problem)


def _objective(problem: BilevelProblem, unravel: Callable) -> Callable:
    """(raveled x, warm start) -> (F, (y(x), whether it was found)), twice differentiable in x."""
    batch = problem.upper_data.full()

    def F(x: Array, y: PyTree) -> tuple[Array, tuple[PyTree, Array]]:
        point = unravel(x)
        found = lower.choose(problem, y, None, "TrustRegion").solved(problem, point, lax.stop_gradient(y), None)
        value = spoilt(oracles.upper_value(problem, point, found.y, batch), found.status)
        good = solved(found.status)
        kept = optax.tree.where(good, lax.stop_gradient(found.y), y)
        return value, (kept, good)

    return F


class _Way(NamedTuple):
    """Carry of the search for a step; [n] each, but for t and the last three, which are []."""

    d: Array
    """The step that is tried, or taken at the end."""
    Hd: Array
    """H times it, once it is known."""
    t: Array
    """The length of the search at hand."""
    cauchy: Array
    """The Cauchy step,"""
    H_cauchy: Array
    """and H times it."""
    w: Array
    """What conjugate gradients add to it, on the free entries."""
    r: Array
    """-grad m at cauchy + w, there."""
    p: Array
    """The direction that comes next."""
    free: Array
    """Which entries the Cauchy step leaves free."""
    small: Array
    """|r| that is small enough."""
    most: Array
    """Products after which conjugate gradients end."""
    count: Array
    """Products so far."""


def _lower(model: Model, radius: Array, most: int) -> _Way:
    """A step with about the least m; `most` products of conjugate gradients."""
    g, n = model.gradient, jnp.zeros_like(model.x)
    size = norm(g)
    nought, none = jnp.zeros_like(size), jnp.zeros((), int)

    def cauchy(Hd: Array, c: _Way) -> tuple[Array, _Way, Array]:
        """Shorten the projected gradient step until |d| <= radius and m falls enough; then set out from there."""
        count = c.count + 1
        enough = (model.fall(c.d, Hd) <= FALL * (g @ c.d)) & (norm(c.d) <= 1.001 * radius)
        done = enough | (c.t <= SHORTEST * radius * _inverse(size)) | (size == 0)
        t = c.t * jnp.clip(-(g @ c.d) * _inverse(c.d @ Hd), 0.1, 0.5)
        d = jnp.where(enough, c.d, n)
        free = (model.x + d > model.lo) & (model.x + d < model.hi)
        H_cauchy = jnp.where(enough, Hd, n)
        r = jnp.where(free, -(g + H_cauchy), 0)
        small = jnp.minimum(0.1, jnp.sqrt(norm(r))) * norm(r)
        begun = c._replace(
            cauchy=d, H_cauchy=H_cauchy, r=r, p=r, free=free, small=small, most=count + most, count=count
        )
        shorter = c._replace(d=model.within(-t * g), t=t, count=count)
        new = optax.tree.where(done, begun, shorter)
        return jnp.where(done, r, new.d), new, done

    def conjugate(Hp: Array, c: _Way) -> tuple[Array, _Way, Array]:
        """A step of conjugate gradients on the free entries, up to the radius."""
        curve, square = c.p @ Hp, c.r @ c.r
        t, far = square * _inverse(curve), _to_radius(c.cauchy + c.w, c.p, radius)
        edge = (curve <= 0) | (t >= far)
        w = c.w + jnp.where(edge, far, t) * c.p
        r = c.r - jnp.where(edge, far, t) * jnp.where(c.free, Hp, 0)
        p = r + (r @ r) * _inverse(square) * c.p
        count = c.count + 1
        done = edge | (norm(r) <= c.small) | (count >= c.most)
        d = model.within(c.cauchy + w)
        new = c._replace(w=w, r=r, p=p, count=count, d=d, t=jnp.ones_like(c.t))
        return jnp.where(done, d, p), new, done

    def search(Hd: Array, c: _Way) -> tuple[Array, _Way, Array]:
        """Halve w until m is lower than at the Cauchy step, with what the bounds leave of it."""
        slope = (g + c.H_cauchy) @ (c.d - c.cauchy)
        enough = model.fall(c.d, Hd) <= model.fall(c.cauchy, c.H_cauchy) + FALL * jnp.minimum(slope, 0)
        done = enough | (c.t <= SHORTEST)
        d = model.within(c.cauchy + c.t / 2 * c.w)
        shorter = c._replace(d=d, t=c.t / 2, count=c.count + 1)
        end = c._replace(d=jnp.where(enough, c.d, c.cauchy), Hd=jnp.where(enough, Hd, c.H_cauchy), count=c.count + 1)
        return d, optax.tree.where(done, end, shorter), done

    first = model.within(-radius * _inverse(size) * g)
    begin = _Way(first, n, radius * _inverse(size), n, n, n, n, n, n == 0, nought, none, none)
    return in_turn(lambda _, d: model.product(d), n, first, begin, (cauchy, conjugate, search))


def _inverse(a: Array) -> Array:
    """1/a where a > 0, else 0."""
    return jnp.where(a > 0, 1 / jnp.where(a > 0, a, 1), 0)


def _to_radius(d: Array, p: Array, radius: Array) -> Array:
    """The t >= 0 with |d + t p| = radius, []; 0 where d is beyond it."""
    a, b, c = p @ p, d @ p, radius**2 - d @ d
    root = jnp.sqrt(jnp.maximum(b * b + a * jnp.maximum(c, 0), 0))
    t = jnp.where(b > 0, jnp.maximum(c, 0) / jnp.where(b + root > 0, b + root, 1), (root - b) / jnp.where(a > 0, a, 1))
    return jnp.maximum(t, 0)
