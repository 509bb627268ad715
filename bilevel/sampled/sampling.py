"""Fixed-shape samples of the lower level's set, a smooth minimum over them, and their polish.

Points y_1, …, y_N of Y with covering radius d give, for v(x) = min_{y in Y} g(x, y) and g_i = g(x, y_i),

    v_N = min_i g_i = min { sum_i w_i g_i : w >= 0, sum_i w_i = 1 },        0 <= v_N - v <= L_y d,

with L_y the Lipschitz constant of g in y (and <= (l_yy/2) d^2 at an interior minimiser). `smooth_min` smooths v_N:

    entropic:   v_t = -t log sum_i exp(-g_i/t) in [v_N - t log N, v_N],     w = softmax(-g/t),
    quadratic:  v_t = min_w sum_i w_i g_i + (t/2) |w|^2 in [v_N, v_N + t/2],   w = the simplex's point nearest to -g/t,

both with the gradient sum_i w_i grad_x g_i (Danskin).

Points are arrays [n, m], n blocks of m numbers (`Blocks`): n = 1, unless the problem is separable, and then every
minimum above is taken for each block.

A coupled set Y(x) = {y in Y : c(x, y) <= 0, e(x, y) = 0} has its samples moved into it, by `refine.restore`, and both
objectives get the squared violation that is left where Y(x) is empty, `uncoupled`:

    g + (b/2) |[c]_+, e|^2,        f + (n/2) |[c]_+, e|^2.

Weights on samples never trade a violation at one against slack at another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.scipy.special import erfinv, gammainc

from bilevel import oracles
from bilevel.backend.tree import join, take
from bilevel.oracles import samples as sample_oracles
from bilevel.problem import BilevelProblem, Minimize
from bilevel.sampled.nets import sobol
from bilevel.sets import Ball, Box, Product, Reals, Set, Simplex
from bilevel.struct import struct

PyTree = Any


@struct
class Smoothness:
    """Constants over X x Y, 2-norms, for a step size by theory: L_f, L_g, Lipschitz constants of the gradients of f and
    g in (x, y); D_f, D_g, the largest |grad_x f(x, y) - grad_x f(x, y')| and the same of g.
    """

    L_f: Any
    L_g: Any
    D_f: Any
    D_g: Any


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A problem with y as an array [n, m]: n blocks that neither the objectives nor Y(x) tie together, of m numbers.

    n = 1 unless `problem.separable`. upper, lower: all of the data. pack: a y to its array; unpack: back.
    """

    problem: BilevelProblem
    n: int
    m: int
    pack: Callable[[PyTree], Array]
    unpack: Callable[[Array], PyTree]
    upper: PyTree
    lower: PyTree

    def project(self, y: Array) -> Array:
        """The point of Y nearest to y, shape [n, m]."""
        return self.pack(self.problem.y_set.project(self.unpack(y)))

    def stack(self, ys: Array) -> PyTree:
        """Points [N, n, m] as stacked pytrees."""
        return jax.vmap(self.unpack)(ys)

    def values(self, x: PyTree, ys: Array, chunk: int | None = None) -> tuple[Array, Array]:
        """(f, g) of the blocks of points [N, n, m], shapes [N, n]."""
        return sample_oracles.sample_values(self.problem, x, self.stack(ys), self.upper, self.lower, chunk)

    def gradients(self, x: PyTree, ys: Array, a: Array, b: Array, chunk: int | None = None) -> tuple[PyTree, Array]:
        """Gradients in x and in ys, [N, n, m], of the sum of a f + b g over all samples and blocks."""
        stacked = self.stack(ys)
        by_x, by_y = sample_oracles.sample_gradients(self.problem, x, stacked, a, b, self.upper, self.lower, chunk)
        return by_x, jax.vmap(self.pack)(by_y)

    def violation(self, x: PyTree, y: Array) -> Array:
        """The distance of y to Y plus the norm of the coupling's residual, shape []."""
        point = self.unpack(y)
        rows = oracles.coupling_residual(self.problem, x, point)
        return self.problem.y_set.violation(point) + jnp.sqrt(rows @ rows)


def blocks(problem: BilevelProblem, y: PyTree) -> Blocks:
    """The view of `problem`, for points shaped like y."""
    flat, unravel = ravel_pytree(y)
    leaves, treedef = jax.tree.flatten(y)
    num = leaves[0].shape[0] if problem.separable else 1
    sizes = [leaf.size // num for leaf in leaves]

    def pack(y: PyTree) -> Array:
        if num == 1:
            return ravel_pytree(y)[0][None]
        return jnp.concatenate([leaf.reshape(num, -1) for leaf in jax.tree.leaves(y)], axis=1)

    def unpack(z: Array) -> PyTree:
        if num == 1:
            return unravel(z[0])
        parts = jnp.split(z, np.cumsum(sizes)[:-1], axis=1)
        return treedef.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])

    data = problem.upper_data.full(), problem.lower_data.full()
    return Blocks(problem, num, flat.size // num, pack, unpack, *data)


def pick(ys: Array, index: Array) -> Array:
    """Point index[.., j] for block j: from ys [N, n, …] and index [n] or [K, n], shapes [n, …] or [K, n, …]."""
    return ys[index, jnp.arange(ys.shape[1])]


def _normal(uniform: Array) -> Array:
    """Standard normal numbers from uniform ones in (0, 1)."""
    return erfinv(2 * uniform - 1) * 2**0.5


def fill(set: Set, uniform: Array, key: Array, like: PyTree) -> PyTree:
    """Points of `set` shaped like `like`, stacked, one for each row of `uniform`, shape [num, dim], in (0, 1).

    Boxes, balls and simplices are filled uniformly, as evenly as the rows fill the cube; coordinates of a box without
    two finite ends are exponential, as `Box.sample`'s, or logistic. Other sets use `sample` with `key` instead.
    """
    num = len(uniform)
    flat, unravel = ravel_pytree(like)
    if isinstance(set, Product):
        factors, parts = set.factors(), set.parts(like)
        sizes = np.cumsum([ravel_pytree(part)[0].size for part in parts])[:-1]
        filled = [
            fill(*args)
            for args in zip(
                factors, jnp.split(uniform, sizes, axis=1), jax.random.split(key, len(parts)), parts, strict=True
            )
        ]
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(filled))
    if isinstance(set, Box):
        lo, hi = (ravel_pytree(bound)[0][None] for bound in set.bounds(like))
        low, high = (jnp.where(jnp.isfinite(end), end, 0) for end in (lo, hi))
        far = -jnp.log1p(-uniform)
        both = jnp.log(uniform) + far  # logistic: the program of a normal one is ten times as long
        open_end = jnp.where(jnp.isfinite(lo), low + far, jnp.where(jnp.isfinite(hi), high - far, both))
        points = jnp.where(jnp.isfinite(lo) & jnp.isfinite(hi), low + uniform * (high - low), open_end)
    elif isinstance(set, Simplex):
        far = -jnp.log1p(-uniform)
        points = jnp.asarray(set.scale, flat.dtype) * far / jnp.sum(far, axis=1, keepdims=True)
    elif isinstance(set, Ball):
        normal = _normal(uniform)
        square = jnp.sum(normal**2, axis=1, keepdims=True)
        length = gammainc(flat.size / 2, square / 2) ** (1 / flat.size)  # uniform in the ball, given the direction
        offset = jax.vmap(unravel)(jnp.asarray(set.radius, flat.dtype) * length * normal / jnp.sqrt(square))
        zero = set.center if not isinstance(set.center, int | float) else jax.tree.map(
            lambda leaf: jnp.full_like(leaf, set.center), like
        )  # fmt: skip
        return jax.vmap(lambda o: set.project(jax.tree.map(jnp.add, zero, o)))(offset)
    else:
        return jax.vmap(lambda key: set.sample(key, like))(jax.random.split(key, num))
    return jax.vmap(unravel)(points)


def edge(set: Set, points: PyTree) -> PyTree:
    """`points` of the set, stacked, moved away from their mean to three times the distance and projected.

    Most land on the boundary: of a box, on its faces, edges and corners.
    """

    def outwards(leaf: Array) -> Array:
        middle = jnp.mean(leaf, axis=0, keepdims=True)
        return middle + 3 * (leaf - middle)

    return jax.vmap(set.project)(jax.tree.map(outwards, points))


def cover(set: Set, key: Array, num: int, like: PyTree, uniform: Array | None = None) -> PyTree:
    """`num` points of `set` on a scrambled Sobol net, shaped like `like` and stacked; the last eighth at its `edge`.

    uniform: [num, dim] in (0, 1), instead of the net.
    """
    flat = ravel_pytree(like)[0]
    uniform = sobol(key, num, flat.size, flat.dtype) if uniform is None else uniform
    points = fill(set, uniform, key, like)
    inside = num - num // 8
    if inside == num or isinstance(set, Reals):
        return points
    return join(take(points, slice(0, inside)), edge(set, take(points, slice(inside, num))))


def cover_blocks(view: Blocks, key: Array, num: int, uniform: Array | None = None) -> Array:
    """`cover` of Y, shape [num, n, m]: each block has its own scramble of one net in m dimensions.

    uniform: [num, n, m], or the same for all blocks [num, 1, m], instead of the net.
    """
    like = view.unpack(jnp.zeros((view.n, view.m), _dtype(view)))
    if uniform is None:
        nets = jax.vmap(lambda key: sobol(key, num, view.m, _dtype(view)), out_axes=1)(jax.random.split(key, view.n))
    else:
        nets = jnp.broadcast_to(uniform, (num, view.n, view.m))
    flat = jax.vmap(lambda z: ravel_pytree(view.unpack(z))[0])(nets)  # each block's row where its numbers are in y
    return jax.vmap(view.pack)(cover(view.problem.y_set, key, num, like, flat))


def _dtype(view: Blocks) -> Any:
    return jax.eval_shape(lambda: view.pack(view.problem.init(jax.random.key(0))[1])).dtype


def near(view: Blocks, u: Array, points: Array, others: Array) -> Array:
    """Points of Y, [num, n, m], in turn near each of `points` [K, n, m]: a refinement that adapts to them.

    u: random numbers, uniform in [0, 1), [num, n, 2 m + 2]. Three of four points are off by up to s times the spread of
    `others` in every coordinate, s log-uniform in [1e-4, 1]; the fourth has about one coordinate of one of `others`
    instead of its own.
    """
    turn, m = np.arange(len(u)), view.m
    parents = points[turn % len(points)]
    spread = jnp.std(others, axis=0)[None] * 10 ** (-4 * u[..., -2:-1])
    shaken = parents + spread * (2 * u[..., :m] - 1)
    donors = pick(others, (u[..., -1] * len(others)).astype(int))
    crossed = jnp.where(u[..., m:-2] * m < 1, donors, parents)
    return jax.vmap(view.project)(jnp.where((turn % 4 == 3)[:, None, None], crossed, shaken))


def starts(set: Set, key: Array, num: int, x0: PyTree) -> PyTree:
    """Stack x0 and num - 1 others: points of a set that is bounded, else normal around x0 and projected."""
    first = jax.tree.map(lambda leaf: leaf[None], x0)
    if num == 1:
        return first
    others = cover(set if set.bounded else Reals(), key, num - 1, x0)
    if not set.bounded:
        around = lambda noise: jax.tree.map(lambda p, d: p + (1 + jnp.abs(p)) * d, x0, noise)  # noqa: E731
        others = jax.vmap(lambda noise: set.project(around(noise)))(others)
    return join(first, others)


def smooth_min(values: Array, t: Any, entropic: bool) -> tuple[Array, Array]:
    """(smoothed minimum of `values`, weights), shapes [] and [N], at temperature t > 0; see the module's docstring."""
    if entropic:
        least = lax.stop_gradient(jnp.min(values))  # any number would do
        weights = jnp.exp((least - values) / t)  # the largest is 1
        total = jnp.sum(weights)
        return least - t * jnp.log(total), weights / total
    least = jnp.min(values)
    weights = Simplex().project((least - values) / t)
    finite = jnp.where(weights > 0, values - least, 0)  # infinite values carry no weight
    return least + weights @ finite + t / 2 * weights @ weights, weights


def uncoupled(problem: BilevelProblem, upper_weight: Any, lower_weight: Any) -> BilevelProblem:
    """The problem with penalties on its coupling added, f + (n/2) |r|^2 and g + (b/2) |r|^2, r = [c]_+ and e.

    n and b are the weights. For use inside jit.
    """
    if problem.coupling is None:
        return problem
    assert isinstance(problem.lower, Minimize)
    f, g = problem.upper, problem.lower.g

    def square(x: PyTree, y: PyTree) -> Array:
        rows = oracles.coupling_residual(problem, x, y)
        return rows @ rows / 2

    return dataclasses.replace(
        problem,
        upper=lambda x, y, batch: f(x, y, batch) + upper_weight * square(x, y),
        lower=Minimize(lambda x, y, batch: g(x, y, batch) + lower_weight * square(x, y)),
    )


def descend(set: Set, look: Callable, y: PyTree, num_steps: int, size: Any = 0.0) -> tuple[PyTree, Array]:
    """(y, its value) after `num_steps` projected gradient steps of Barzilai and Borwein's length on look: y -> (value,
    gradient), from y in the set, each kept only where the value does not rise. `size`: the first one's, 0 for a guess.
    """
    flat, unravel = ravel_pytree(y)

    rounding = 10 * float(jnp.finfo(flat.dtype).eps)

    def at(flat: Array) -> tuple[Array, Array]:
        value, gradient = look(unravel(flat))
        return value, ravel_pytree(gradient)[0]

    def step(carry: tuple[Array, Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array, Array], None]:
        y, g, gradient, size = carry
        trial = ravel_pytree(set.project(unravel(y - size * gradient)))[0]
        value, slope = at(trial)
        kept = value <= g + rounding * jnp.abs(g)  # where rounding hides the fall, the gradient still shows the way
        moved = trial - y
        bend, length = moved @ (slope - gradient), moved @ moved
        long = jnp.where(bend > 0, length / jnp.where(bend > 0, bend, 1), 4 * size)
        shorter = jnp.where((bend > 0) & (long < size), long, size / 5)
        size = jnp.where(kept & (length > 0), jnp.clip(long, 1e-8 * size, 1e8 * size), shorter)
        here = jnp.where(kept, trial, y), jnp.where(kept, value, g), jnp.where(kept, slope, gradient)
        return (*here, size), None

    value, gradient = at(flat)
    steep = jnp.linalg.norm(gradient)
    guess = 0.05 * (1 + jnp.linalg.norm(flat)) / jnp.where(steep > 0, steep, 1)
    start = flat, value, gradient, jnp.where(size > 0, size, guess)
    flat, value, _, _ = lax.scan(step, start, length=num_steps)[0]
    return unravel(flat), value
