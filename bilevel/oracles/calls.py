"""First- and second-order oracles of a problem: the only file that differentiates the user's functions.

With the residual R(x, y) = grad_y g (Minimize) or y - T(x, y) (FixedPoint), everything implicit differentiation needs
is
    R,   R_y' v  (a Hessian-vector product g_yy v),   R_x' v  (a cross product g_xy v),   f_x, f_y.
Every call is counted, as `counts` says.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from bilevel.backend.tracing import reached
from bilevel.oracles import per_sample
from bilevel.oracles.counts import batched, count
from bilevel.problem import BilevelProblem, Minimize

PyTree = Any


def upper_value(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """f(x, y), shape []."""
    count(upper_values=1)
    return problem.upper(x, y, batch)


def upper_gradients(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    """(f_x, f_y), shaped like x and y."""
    return upper_value_and_gradients(problem, x, y, batch)[1]


def upper_value_and_gradients(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree
) -> tuple[Array, tuple[PyTree, PyTree]]:
    """The value f and the gradients (f_x, f_y) in one sweep; counted as one gradient."""
    count(upper_gradients=1)
    return jax.value_and_grad(problem.upper, argnums=(0, 1))(x, y, batch)


def lower_value(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """g(x, y), shape []; only for `Minimize`."""
    assert isinstance(problem.lower, Minimize)
    count(lower_values=1)
    return problem.lower.g(x, y, batch)


def lower_diagonal(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> PyTree | None:
    """The diagonal that the problem gives for g_yy, shaped like y; None where it gives none. Not counted."""
    given = problem.lower.diagonal if isinstance(problem.lower, Minimize) else None
    return None if given is None else given(x, y, batch)


def _residual(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
    if isinstance(problem.lower, Minimize):
        return jax.grad(problem.lower.g, argnums=1)(x, y, batch)
    return optax.tree.sub(y, problem.lower.T(x, y, batch))


def residual(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
    """R(x, y), shaped like y: grad_y g, or y - T(x, y)."""
    count(lower_gradients=1)
    return _residual(problem, x, y, batch)


def lower_value_and_gradient(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
    """(g, grad_y g) in one sweep, counted as one gradient; only for `Minimize`."""
    assert isinstance(problem.lower, Minimize)
    count(lower_gradients=1)
    return jax.value_and_grad(problem.lower.g, argnums=1)(x, y, batch)


def lower_gradient_x(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
    """grad_x g, shaped like x; only for `Minimize`."""
    assert isinstance(problem.lower, Minimize)
    count(lower_gradients=1)
    return jax.grad(problem.lower.g)(x, y, batch)


def lower_gradients(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    """(grad_x g, grad_y g) in one sweep, counted as one gradient; only for `Minimize`."""
    assert isinstance(problem.lower, Minimize)
    count(lower_gradients=1)
    return jax.grad(problem.lower.g, argnums=(0, 1))(x, y, batch)


def value_gap_gradients(
    problem: BilevelProblem, x: PyTree, y: PyTree, z: PyTree, batch: PyTree
) -> tuple[PyTree, PyTree]:
    """Gradients in x and y of g(x, y) - g(x, z), z held constant: two gradients; only for `Minimize`.

    With z a minimiser of g(x, .) the gap is g(x, y) - min g(x, .), and these are its gradients (Danskin).
    """
    gx, gy = lower_gradients(problem, x, y, batch)
    return optax.tree.sub(gx, lower_gradient_x(problem, x, z, batch)), gy


def weighted_value_and_gradient(
    problem: BilevelProblem, x: PyTree, y: PyTree, a: Array | float, b: Array | float, upper: PyTree, lower: PyTree
) -> tuple[Array, PyTree]:
    """The value of a f + b g at (x, y) and its gradient in y, in one sweep; counted as a gradient of each."""
    assert isinstance(problem.lower, Minimize)
    count(upper_gradients=1, lower_gradients=1)
    f, g = problem.upper, problem.lower.g
    return jax.value_and_grad(lambda y: a * f(x, y, upper) + b * g(x, y, lower))(y)


def values_by_sample(problem: BilevelProblem, x: PyTree, ys: PyTree, batch: PyTree) -> Array:
    """g_i(x, y_ki), shape [K, samples], for K candidates ys of `per_sample.view`'s y, stacked; K values are counted."""
    assert isinstance(problem.lower, Minimize)
    g = problem.lower.g

    def one(y: PyTree) -> Array:
        count(lower_values=1)
        return per_sample.single(problem, g, x, y, batch)

    return batched(one)(ys)


def penalty_by_sample(
    problem: BilevelProblem, x: PyTree, ys: PyTree, upper: PyTree, lower: PyTree, penalty: Callable
) -> tuple[Array, PyTree]:
    """(the mean of `penalty` over the samples, its gradient in x), penalty: (f_k, g_k) of one sample, shapes [K] -> [].

    f_k and g_k are the sample's values at K candidates ys of `per_sample.view`'s y, stacked; counted as K gradients of
    each.
    """
    assert isinstance(problem.lower, Minimize)
    g = problem.lower.g
    size = len(jax.tree.leaves(ys)[0])
    count(upper_gradients=size, lower_gradients=size)

    def mean(x: PyTree) -> Array:
        def values(function: Callable, batch: PyTree) -> Array:
            return jax.vmap(lambda y: per_sample.single(problem, function, x, y, batch), out_axes=1)(ys)

        return jnp.mean(jax.vmap(penalty)(values(problem.upper, upper), values(g, lower)))

    return jax.value_and_grad(mean)(x)


def coupling_values(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Array, Array]:
    """(c, e) of the coupling c <= 0, e = 0: A y + B x - b or h(x, y), and the equalities; shapes [rows] each.

    Not counted: a coupling is no objective.
    """
    none = jnp.zeros(0, ravel_pytree(y)[0].dtype)
    found = (None, None) if problem.coupling is None else problem.coupling.values(x, y)
    c, e = (none if part is None else part for part in found)
    return c, e


def coupling_pullback(problem: BilevelProblem, x: PyTree, y: PyTree) -> tuple[Array, Callable]:
    """(h, m -> (h_x' m, h_y' m)): h = (c, e) of `coupling_values` in one vector [rows], m [rows]."""
    return jax.vjp(lambda x, y: jnp.concatenate(coupling_values(problem, x, y)), x, y)


def coupling_derivative(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
    """The derivative of h = (c, e) in the raveled (x, y), shape [rows, dim x + dim y]."""
    flat, unravel = ravel_pytree((x, y))
    return jax.jacobian(lambda flat: jnp.concatenate(coupling_values(problem, *unravel(flat))))(flat)


def coupling_residual(problem: BilevelProblem, x: PyTree, y: PyTree) -> Array:
    """max(c, 0) and e of `coupling_values` in one vector: zero exactly where the coupling holds."""
    c, e = coupling_values(problem, x, y)
    return jnp.concatenate([jnp.maximum(c, 0), e])


def residual_square_gradients(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree
) -> tuple[PyTree, tuple[PyTree, PyTree]]:
    """(R, gradients in x and y of |R|^2/2, that is R_x' R and R_y' R), counted as the three products that it is."""
    count(lower_gradients=1, hvps=1, jvps=1)
    value, pull = jax.vjp(lambda x, y: _residual(problem, x, y, batch), x, y)
    return value, pull(value)


def directions(
    problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, batch: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """(R, R_y' v, R_x' v) at one point in one forward and one reverse sweep: a gradient, an HVP and a cross product."""
    diagonal = lower_diagonal(problem, x, y, batch)
    count(lower_gradients=1, hvps=int(diagonal is None), jvps=1)
    if diagonal is not None:
        value, pull_x = jax.vjp(lambda x: _residual(problem, x, y, batch), x)
        return value, optax.tree.mul(diagonal, v), pull_x(v)[0]
    value, pull = jax.vjp(lambda x, y: _residual(problem, x, y, batch), x, y)
    by_x, by_y = pull(v)
    return value, by_y, by_x


def hvp(problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, batch: PyTree) -> PyTree:
    """R_y' v, shaped like y: the Hessian-vector product g_yy v; without a call where the problem gives its diagonal."""
    diagonal = lower_diagonal(problem, x, y, batch)
    if diagonal is not None:
        return optax.tree.mul(diagonal, v)
    count(hvps=1)
    if isinstance(problem.lower, Minimize):  # symmetric: forward over reverse is the cheaper order
        return jax.jvp(lambda y: _residual(problem, x, y, batch), (y,), (v,))[1]
    return jax.vjp(lambda y: _residual(problem, x, y, batch), y)[1](v)[0]


def cross(problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, batch: PyTree) -> PyTree:
    """R_x' v, shaped like x: the cross product g_xy v."""
    count(jvps=1)
    return jax.vjp(lambda x: _residual(problem, x, y, batch), x)[1](v)[0]


def cross_forward(problem: BilevelProblem, x: PyTree, y: PyTree, d: PyTree, batch: PyTree) -> PyTree:
    """R_x d, shaped like y, for d shaped like x: counted as a cross product."""
    count(jvps=1)
    return jax.jvp(lambda x: _residual(problem, x, y, batch), (x,), (d,))[1]


def hvp_operator(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, transpose: bool = False
) -> Callable[[PyTree], PyTree]:
    """The map v -> R_y v (or R_y' v), the residual's forward sweep done once: for many products at one point."""
    diagonal = lower_diagonal(problem, x, y, batch)
    if diagonal is not None:
        return lambda v: optax.tree.mul(diagonal, v)
    _, forward = jax.linearize(lambda y: _residual(problem, x, y, batch), y)
    if transpose and not isinstance(problem.lower, Minimize):
        pull = jax.linear_transpose(forward, y)

    def product(v: PyTree) -> PyTree:
        count(hvps=1)
        return pull(v)[0] if transpose and not isinstance(problem.lower, Minimize) else forward(v)

    return product


def flat_operator(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, transpose: bool = False
) -> Callable[[Array], Array]:
    """`hvp_operator` on raveled vectors, [dim y] -> [dim y]: what the linear solvers take."""
    unravel = ravel_pytree(y)[1]
    product = hvp_operator(problem, x, y, batch, transpose)
    return lambda v: ravel_pytree(product(unravel(v)))[0]


def lower_hessian(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """g_yy [n, n] on the raveled y, by n products counted as such; only for `Minimize`."""
    flat, unravel = ravel_pytree(y)
    diagonal = lower_diagonal(problem, x, y, batch)
    if diagonal is not None:
        return jnp.diag(ravel_pytree(diagonal)[0])
    count(hvps=flat.size)
    _, forward = jax.linearize(lambda y: ravel_pytree(_residual(problem, x, unravel(y), batch))[0], flat)
    return jax.vmap(forward, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))


def constant_hessian(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> bool:
    """Whether g_yy v is seen, from the traced program, not to depend on y. Nothing is computed."""

    def product(y: PyTree, v: PyTree) -> PyTree:
        diagonal = lower_diagonal(problem, x, y, batch)
        if diagonal is not None:
            return optax.tree.mul(diagonal, v)
        return jax.jvp(lambda y: _residual(problem, x, y, batch), (y,), (v,))[1]

    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), y)
    traced = jax.make_jaxpr(product)(like, like).jaxpr
    num_y = len(jax.tree.leaves(y))
    return not any(reached(traced, [True] * num_y + [False] * (len(traced.invars) - num_y)))


def constant_residual(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> bool:
    """Whether R is seen, from the traced program, not to depend on y, as where g is linear in it."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), y)
    traced = jax.make_jaxpr(lambda y: _residual(problem, x, y, batch))(like).jaxpr
    return not any(reached(traced, [True] * len(traced.invars)))


def unrolled_objective(
    problem: BilevelProblem,
    x: PyTree,
    y: PyTree,
    num_steps: int,
    step_size: Array | float,
    upper: PyTree,
    lower: PyTree,
) -> tuple[tuple[Array, PyTree], PyTree]:
    """((f(x, y_T), y_T), d/dx f(x, y_T(x))) for y_{t+1} = y_t - step_size R(x, y_t), t < T = num_steps, y_0 = y fixed.

    Reverse mode through the loop; each step is under `jax.checkpoint`, so that memory holds the y_t and not the
    residual's intermediate values. Counted as T gradients forward, and T HVPs and T cross products backward.
    """
    count(upper_gradients=1, lower_gradients=num_steps, hvps=num_steps, jvps=num_steps)

    @jax.checkpoint
    def step(y: PyTree, x: PyTree) -> PyTree:
        return jax.tree.map(lambda a, r: a - step_size * r, y, _residual(problem, x, y, lower))

    def objective(x: PyTree) -> tuple[Array, PyTree]:
        last = jax.lax.scan(lambda y, _: (step(y, x), None), y, length=num_steps)[0]
        return problem.upper(x, last, upper), last

    return jax.value_and_grad(objective, has_aux=True)(x)
