"""Fixed-shape samples of the lower level's set, a smooth minimum over them, and their polish.

Points y_1, …, y_N of Y with covering radius d give, for v(x) = min_{y in Y} g(x, y) and g_i = g(x, y_i),

    v_N = min_i g_i = min { sum_i w_i g_i : w >= 0, sum_i w_i = 1 },        0 <= v_N - v <= L_y d,

with L_y the Lipschitz constant of g in y (and <= (l_yy/2) d^2 at an interior minimiser). `smooth_min` smooths v_N:

    entropic:   v_t = -t log sum_i exp(-g_i/t) in [v_N - t log N, v_N],     w = softmax(-g/t),
    quadratic:  v_t = min_w sum_i w_i g_i + (t/2) |w|^2 in [v_N, v_N + t/2],   w = the simplex's point nearest to -g/t,

both with the gradient sum_i w_i grad_x g_i (Danskin).

A coupled set Y(x) = {y in Y : c(x, y) = 0}, c >= 0 the positive part of inequalities or an equality's residual, is
replaced by Y and the two objectives with the squared violation, `uncoupled`:

    g + (b/2) |c|^2,        f + (n/2) |c|^2,

because weights on samples must never trade a violation at one against slack at another. Its minimiser violates the
constraints by |multiplier|/b; `restore` and `polish` take it back.
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
from bilevel.problem import BilevelProblem, Minimize
from bilevel.sets import Ball, Box, Product, Reals, Set, Simplex
from bilevel.struct import struct

PyTree = Any
BITS = 30


@struct
class Smoothness:
    """Constants over X x Y, 2-norms, for a step size by theory: L_f, L_g, Lipschitz constants of the gradients of f and
    g in (x, y); D_f, D_g, the largest |grad_x f(x, y) - grad_x f(x, y')| and the same of g.
    """

    L_f: Any
    L_g: Any
    D_f: Any
    D_g: Any


def take(tree: PyTree, index: Any) -> PyTree:
    """Entries `index` of the first axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def join(*trees: PyTree) -> PyTree:
    """Stacked points, one after the other."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def where(mask: Array, a: PyTree, b: PyTree) -> PyTree:
    """Stacked points: those of a where mask, shape [n], is true, else those of b."""
    return jax.tree.map(lambda p, q: jnp.where(mask.reshape(mask.shape + (1,) * (p.ndim - mask.ndim)), p, q), a, b)


def repeat(point: PyTree, num: int) -> PyTree:
    """`num` copies of one point, stacked."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num, *leaf.shape)), point)


def sobol(key: Array, num: int, dim: int, dtype: Any) -> Array:
    """`num` points of a scrambled Sobol sequence in (0, 1)^dim, shape [num, dim].

    A random lower-triangular bit matrix and a random digital shift for each dimension (Matousek's linear scramble): the
    points of a Sobol net stay a net, and each one is uniform. SciPy gives the net itself, when the function is traced.
    """
    from scipy.stats import qmc

    whole = qmc.Sobol(dim, scramble=False, bits=BITS).random_base2(int(np.ceil(np.log2(max(num, 1)))))[:num]
    net = jnp.asarray((whole * 2**BITS).astype(np.uint32))
    random = jax.random.bits(key, (dim, BITS + 1), jnp.uint32) >> jnp.uint32(32 - BITS)
    row = jnp.arange(BITS, dtype=jnp.uint32)  # row k makes bit k, counted from the most significant one
    one = jnp.uint32(1)
    leading = one << (jnp.uint32(BITS - 1) - row)
    above = ~(2 * leading - one) & jnp.uint32(2**BITS - 1)  # the bits before k
    rows = leading[None, :] | (random[:, :BITS] & above[None, :])
    bits = lax.population_count(net[:, :, None] & rows[None]) & one  # [num, dim, BITS]
    mixed = jnp.sum(bits * leading[None, None, :], axis=2, dtype=jnp.uint32)
    return (jnp.asarray(mixed ^ random[None, :, BITS], dtype) + jnp.asarray(0.5, dtype)) / 2**BITS


def kronecker(num: int, dim: int, dtype: Any) -> Array:
    """`num` points of an additive recurrence in (0, 1)^dim, [num, dim]: fixed, evenly spread, and no Sobol points.

    u_i = frac(1/2 + i a), a_j = r^-j with r > 1 the root of r^(dim + 1) = r + 1: the golden ratio for dim = 1.
    """
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (dim + 1))
    steps = root ** -np.arange(1.0, dim + 1)
    return jnp.asarray(np.mod(0.5 + np.arange(1, num + 1)[:, None] * steps, 1.0), dtype)


def _normal(uniform: Array) -> Array:
    """Standard normal numbers from uniform ones in (0, 1)."""
    return erfinv(2 * uniform - 1) * 2**0.5


def fill(set: Set, uniform: Array, key: Array, like: PyTree) -> PyTree:
    """Points of `set` shaped like `like`, stacked, one for each row of `uniform`, shape [num, dim], in (0, 1).

    Boxes, balls and simplices are filled uniformly, as evenly as the rows fill the cube; coordinates of a box without
    two finite ends are exponential or normal, as `Box.sample`'s. Other sets use `sample` with `key` instead.
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
        far, normal = -jnp.log1p(-uniform), _normal(uniform)
        open_end = jnp.where(jnp.isfinite(lo), low + far, jnp.where(jnp.isfinite(hi), high - far, normal))
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


def cover(set: Set, key: Array, num: int, like: PyTree) -> PyTree:
    """`num` points of `set` on a scrambled Sobol net, shaped like `like` and stacked; the last eighth at its `edge`."""
    flat = ravel_pytree(like)[0]
    points = fill(set, sobol(key, num, flat.size, flat.dtype), key, like)
    inside = num - num // 8
    if inside == num or isinstance(set, Reals):
        return points
    return join(take(points, slice(0, inside)), edge(set, take(points, slice(inside, num))))


def near(set: Set, key: Array, num: int, points: PyTree, others: PyTree) -> PyTree:
    """`num` points of `set` in turn near each of `points`: a refinement that adapts to them.

    Three of four are off by up to s times the spread of `others` in every coordinate, s log-uniform in [1e-4, 1]; the
    fourth has about one coordinate of one of `others` instead of its own.
    """
    flat = jax.vmap(lambda y: ravel_pytree(y)[0])
    unravel = ravel_pytree(take(points, 0))[1]
    pool = flat(others)
    parents = flat(points)[jnp.arange(num) % len(flat(points))]
    size = parents.shape[1]
    u = jax.random.uniform(key, (num, 2 * size + 2), parents.dtype)
    spread = jnp.std(pool, axis=0)[None] * 10 ** (-4 * u[:, -2:-1])
    shaken = parents + spread * (2 * u[:, :size] - 1)
    donors = pool[(u[:, -1] * len(pool)).astype(int)]
    crossed = jnp.where(u[:, size:-2] * size < 1, donors, parents)
    mixed = jnp.where((jnp.arange(num) % 4 == 3)[:, None], crossed, shaken)
    return jax.vmap(lambda y: set.project(unravel(y)))(mixed)


def smoothness(problem: BilevelProblem, key: Array, x: PyTree, y: PyTree, num: int = 32) -> tuple[Array, Array]:
    """Estimates, from below, of the Lipschitz constants of grad f and grad g in (x, y), shapes [], on all of the data.

    The largest difference quotients over `num` pairs of points a thousandth of the way between two samples of X x Y.
    """
    keys = jax.random.split(key, 4)
    unravel = ravel_pytree((x, y))[1]

    def points(key_x: Array, key_y: Array) -> Array:
        xs, ys = starts(problem.x_set, key_x, num, x), starts(problem.y_set, key_y, num, y)
        return jax.vmap(lambda x, y: ravel_pytree((x, y))[0])(xs, ys)

    def gradients(z: Array) -> tuple[Array, Array]:
        x, y = unravel(z)
        f = oracles.upper_gradients(problem, x, y, problem.upper_data.full())
        g = oracles.lower_gradients(problem, x, y, problem.lower_data.full())
        return ravel_pytree(f)[0], ravel_pytree(g)[0]

    here, there = points(*keys[:2]), points(*keys[2:])
    near = here + 1e-3 * (there - here)
    distance = jnp.linalg.norm(near - here, axis=1)
    pairs = zip(jax.vmap(gradients)(here), jax.vmap(gradients)(near), strict=True)
    quotients = [jnp.linalg.norm(b - a, axis=1) / jnp.where(distance > 0, distance, jnp.inf) for a, b in pairs]
    L_f, L_g = (jnp.max(jnp.where(jnp.isfinite(q), q, 0)) for q in quotients)
    return L_f, jnp.where(L_g > 0, L_g, 1)


def projected_steps(problem: BilevelProblem, x: PyTree, y: PyTree, stepper: Any, num_steps: int) -> tuple[PyTree, Any]:
    """(y, stepper) after `num_steps` of y <- Proj_Y(y - b g_y(x, y)), on all of the data; stepper: `step.Stepper`."""
    batch = problem.lower_data.full()

    def step(carry: tuple[PyTree, Any], _: None) -> tuple[tuple[PyTree, Any], None]:
        y, stepper = carry
        y, stepper = stepper(y, oracles.residual(problem, x, y, batch))
        return (problem.y_set.project(y), stepper), None

    return lax.scan(step, (y, stepper), length=num_steps)[0]


def unbounded(set: Set) -> bool:
    """Whether the set is known to have an infinite direction; a polyhedron is taken at its word. Not for tracers."""
    if isinstance(set, Product):
        return any(map(unbounded, set.factors()))
    ends = jax.tree.leaves((set.lo, set.hi)) if isinstance(set, Box) else []
    return isinstance(set, Reals) or any(np.isinf(np.asarray(end)).any() for end in ends)


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
    """(smoothed minimum of `values`, weights), shapes [] and [n], at temperature t > 0; see the module's docstring."""
    if entropic:
        least = jnp.min(values)
        scaled = (least - values) / t
        return least - t * jax.nn.logsumexp(scaled), jax.nn.softmax(scaled)
    least = jnp.min(values)
    weights = Simplex().project((least - values) / t)
    finite = jnp.where(weights > 0, values - least, 0)  # infinite values carry no weight
    return least + weights @ finite + t / 2 * weights @ weights, weights


def uncoupled(problem: BilevelProblem, upper_weight: Any, lower_weight: Any, shift: Any = None) -> BilevelProblem:
    """The problem with penalties on its coupling instead, f + (n/2) |[c]_+|^2 and g + (b/2) |[c + shift]_+|^2.

    n and b are the weights; shift, shape [rows], is m/b for the method of multipliers, zero where None; equalities are
    taken without the positive part. For use inside jit.
    """
    if problem.coupling is None:
        return problem
    assert isinstance(problem.lower, Minimize)
    f, g = problem.upper, problem.lower.g

    def square(x: PyTree, y: PyTree, shift: Any) -> Array:
        rows = shifted(problem, x, y, shift)
        return rows @ rows / 2

    return dataclasses.replace(
        problem,
        upper=lambda x, y, batch: f(x, y, batch) + upper_weight * square(x, y, None),
        lower=Minimize(lambda x, y, batch: g(x, y, batch) + lower_weight * square(x, y, shift)),
        coupling=None,
    )


def shifted(problem: BilevelProblem, x: PyTree, y: PyTree, shift: Any) -> Array:
    """[c + shift]_+ for the inequalities and e + shift for the equalities of the coupling, shape [rows]."""
    c, e = oracles.coupling_values(problem, x, y)
    rows = jnp.concatenate([c, e]) + (0 if shift is None else shift)
    return jnp.where(jnp.arange(len(rows)) < len(c), jnp.maximum(rows, 0), rows)


def violation(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
    """The distance of y to Y plus the norm of the coupling's residual, shape []."""
    rows = oracles.coupling_residual(problem, x, y)
    return problem.y_set.violation(y) + jnp.sqrt(rows @ rows)


def restore(problem: BilevelProblem, x: PyTree, y: PyTree, num_steps: int = 8) -> PyTree:
    """Move y into Y(x) by projected Gauss-Newton steps on the coupling's violated rows; onto Y where there is none."""
    if problem.coupling is None:
        return problem.y_set.project(y)

    def step(y: PyTree, _: None) -> tuple[PyTree, None]:
        flat, unravel = ravel_pytree(y)
        c, J = oracles.coupling_residual(problem, x, y), oracles.coupling_jacobian(problem, x, y)
        K = J @ J.T
        size = jnp.max(jnp.abs(jnp.diag(K)), initial=0)
        rounding = 10 * len(c) * jnp.finfo(flat.dtype).eps * jnp.where(size > 0, size, 1)
        K = K + rounding * jnp.eye(len(c), dtype=K.dtype)
        return problem.y_set.project(unravel(flat - J.T @ jnp.linalg.solve(K, c))), None

    return lax.scan(step, problem.y_set.project(y), length=num_steps)[0]


def polish(problem: BilevelProblem, x: PyTree, y: PyTree, num_steps: int = 60, rounds: int = 8) -> PyTree:
    """A local minimiser of g(x, .) over Y(x) near y, by projected gradient steps of Barzilai and Borwein's length.

    With a coupling: the method of multipliers, `rounds` times `num_steps` such steps on g + (b/2) |[c + m/b]_+|^2 with
    m <- b [c + m/b]_+ (equalities without the positive part) and b rising threefold, then `restore`. Gradients: one
    for each step.
    """
    batch = problem.lower_data.full()

    def descent(problem: BilevelProblem, y: PyTree) -> PyTree:
        look = lambda y: oracles.lower_value_and_gradient(problem, x, y, batch)  # noqa: E731
        return descend(problem.y_set, look, y, num_steps)[0]

    y = problem.y_set.project(y)
    if problem.coupling is None:
        return _by_coordinates(problem, x, descent(problem, y), batch)
    first = 10 * (1 + jnp.linalg.norm(ravel_pytree(oracles.lower_value_and_gradient(problem, x, y, batch)[1])[0]))

    def multiply(carry: tuple[PyTree, Array], k: Array) -> tuple[tuple[PyTree, Array], None]:
        y, m = carry
        b = first * 3**k
        y = descent(uncoupled(problem, 0, b, m / b), y)
        return (y, b * shifted(problem, x, y, m / b)), None

    y = restore(problem, x, y)
    m = jnp.zeros_like(oracles.coupling_residual(problem, x, y))
    (y, _), _ = lax.scan(multiply, (y, m), jnp.arange(rounds, dtype=first.dtype))
    return restore(problem, x, y)


def _by_coordinates(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, rounds: int = 40) -> PyTree:
    """Move y by +-h in the coordinate that lowers g most, with h halved where none does: for kinks of g."""
    flat, unravel = ravel_pytree(y)
    rounding = 1e3 * float(jnp.finfo(flat.dtype).eps)
    moves = jnp.concatenate([jnp.eye(flat.size, dtype=flat.dtype), -jnp.eye(flat.size, dtype=flat.dtype)])

    def search(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        flat, g, h = carry
        trials = jax.vmap(lambda d: ravel_pytree(problem.y_set.project(unravel(flat + h * d)))[0])(moves)
        values = oracles.batched(lambda flat: oracles.lower_value(problem, x, unravel(flat), batch))(trials)
        k = jnp.argmin(values)
        falls = values[k] < g - rounding * jnp.abs(g)
        return (jnp.where(falls, trials[k], flat), jnp.where(falls, values[k], g), jnp.where(falls, 2 * h, h / 4)), None

    start = flat, oracles.lower_value(problem, x, y, batch), 1e-2 * (1 + jnp.max(jnp.abs(flat)))
    return unravel(lax.scan(search, start, length=rounds)[0][0])


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
