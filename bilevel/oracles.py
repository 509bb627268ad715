"""First- and second-order oracles of a problem: the only file that differentiates the user's functions.

With the residual R(x, y) = grad_y g (Minimize) or y - T(x, y) (FixedPoint), everything implicit differentiation needs
is
    R,   R_y' v  (a Hessian-vector product g_yy v),   R_x' v  (a cross product g_xy v),   f_x, f_y.
Every call is counted where it is executed: under `jax.disable_jit()` inside `counting()` the counts are exact, loops
included. Compiled code counts what was traced.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax import Array

from bilevel.problem import BilevelProblem, Minimize
from bilevel.record import OracleCount

PyTree = Any

_counters: list[dict[str, int]] = []


@contextmanager
def counting() -> Iterator[Callable[[], OracleCount]]:
    """Count the oracle calls made inside; the value is a function that returns the count so far."""
    counter: dict[str, int] = {}
    _counters.append(counter)
    try:
        yield lambda: OracleCount(**counter)
    finally:
        _counters.remove(counter)


def _count(**calls: int) -> None:
    for counter in _counters:
        for kind, number in calls.items():
            counter[kind] = counter.get(kind, 0) + number


def upper_value(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """f(x, y), shape []."""
    _count(upper_values=1)
    return problem.upper(x, y, batch)


def upper_gradients(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    """(f_x, f_y), shaped like x and y."""
    return upper_value_and_gradients(problem, x, y, batch)[1]


def upper_value_and_gradients(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree
) -> tuple[Array, tuple[PyTree, PyTree]]:
    """F and (f_x, f_y) in one sweep; counted as one gradient."""
    _count(upper_gradients=1)
    return jax.value_and_grad(problem.upper, argnums=(0, 1))(x, y, batch)


def lower_value(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> Array:
    """g(x, y), shape []; only for `Minimize`."""
    assert isinstance(problem.lower, Minimize)
    _count(lower_values=1)
    return problem.lower.g(x, y, batch)


def _residual(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
    if isinstance(problem.lower, Minimize):
        return jax.grad(problem.lower.g, argnums=1)(x, y, batch)
    return jax.tree.map(operator.sub, y, problem.lower.T(x, y, batch))


def residual(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
    """R(x, y), shaped like y: grad_y g, or y - T(x, y)."""
    _count(lower_gradients=1)
    return _residual(problem, x, y, batch)


def lower_value_and_gradient(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
    """(g, grad_y g) in one sweep, counted as one gradient; only for `Minimize`."""
    assert isinstance(problem.lower, Minimize)
    _count(lower_gradients=1)
    return jax.value_and_grad(problem.lower.g, argnums=1)(x, y, batch)


def lower_gradient_x(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
    """grad_x g, shaped like x; only for `Minimize`."""
    assert isinstance(problem.lower, Minimize)
    _count(lower_gradients=1)
    return jax.grad(problem.lower.g)(x, y, batch)


def lower_gradients(problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    """(grad_x g, grad_y g) in one sweep, counted as one gradient; only for `Minimize`."""
    assert isinstance(problem.lower, Minimize)
    _count(lower_gradients=1)
    return jax.grad(problem.lower.g, argnums=(0, 1))(x, y, batch)


def value_gap_gradients(
    problem: BilevelProblem, x: PyTree, y: PyTree, z: PyTree, batch: PyTree
) -> tuple[PyTree, PyTree]:
    """Gradients in x and y of g(x, y) - g(x, z), z held constant: two gradients; only for `Minimize`.

    With z a minimiser of g(x, .) the gap is g(x, y) - min g(x, .), and these are its gradients (Danskin).
    """
    gx, gy = lower_gradients(problem, x, y, batch)
    return jax.tree.map(operator.sub, gx, lower_gradient_x(problem, x, z, batch)), gy


def residual_square_gradients(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree
) -> tuple[PyTree, tuple[PyTree, PyTree]]:
    """(R, gradients in x and y of |R|^2/2, that is R_x' R and R_y' R), counted as the three products that it is."""
    _count(lower_gradients=1, hvps=1, jvps=1)
    value, pull = jax.vjp(lambda x, y: _residual(problem, x, y, batch), x, y)
    return value, pull(value)


def directions(
    problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, batch: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """(R, R_y' v, R_x' v) at one point in one forward and one reverse sweep: a gradient, an HVP and a cross product."""
    _count(lower_gradients=1, hvps=1, jvps=1)
    value, pull = jax.vjp(lambda x, y: _residual(problem, x, y, batch), x, y)
    by_x, by_y = pull(v)
    return value, by_y, by_x


def hvp(problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, batch: PyTree) -> PyTree:
    """R_y' v, shaped like y: the Hessian-vector product g_yy v."""
    _count(hvps=1)
    if isinstance(problem.lower, Minimize):  # symmetric: forward over reverse is the cheaper order
        return jax.jvp(lambda y: _residual(problem, x, y, batch), (y,), (v,))[1]
    return jax.vjp(lambda y: _residual(problem, x, y, batch), y)[1](v)[0]


def cross(problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, batch: PyTree) -> PyTree:
    """R_x' v, shaped like x: the cross product g_xy v."""
    _count(jvps=1)
    return jax.vjp(lambda x: _residual(problem, x, y, batch), x)[1](v)[0]


def hvp_operator(
    problem: BilevelProblem, x: PyTree, y: PyTree, batch: PyTree, transpose: bool = False
) -> Callable[[PyTree], PyTree]:
    """V -> R_y v (or R_y' v) with the residual's forward sweep done once: for many products at one point."""
    _, forward = jax.linearize(lambda y: _residual(problem, x, y, batch), y)
    if transpose and not isinstance(problem.lower, Minimize):
        pull = jax.linear_transpose(forward, y)

    def product(v: PyTree) -> PyTree:
        _count(hvps=1)
        return pull(v)[0] if transpose and not isinstance(problem.lower, Minimize) else forward(v)

    return product


def adjoint_change(
    problem: BilevelProblem, x: PyTree, y: PyTree, v: PyTree, d: PyTree, upper: PyTree, lower: PyTree
) -> tuple[PyTree, PyTree]:
    """Directional derivatives along d in y, v fixed, of (f_x - R_x' v, f_y - R_y' v): counted as one of each
    product.
    """
    _count(upper_gradients=1, hvps=1, jvps=1)

    def adjoint(y: PyTree) -> tuple[PyTree, PyTree]:
        _, pull = jax.vjp(lambda x, y: _residual(problem, x, y, lower), x, y)
        gradients = jax.grad(problem.upper, argnums=(0, 1))(x, y, upper)
        return jax.tree.map(operator.sub, gradients, pull(v))

    return jax.jvp(adjoint, (y,), (d,))[1]


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
    _count(upper_gradients=1, lower_gradients=num_steps, hvps=num_steps, jvps=num_steps)

    @jax.checkpoint
    def step(y: PyTree, x: PyTree) -> PyTree:
        return jax.tree.map(lambda a, r: a - step_size * r, y, _residual(problem, x, y, lower))

    def objective(x: PyTree) -> tuple[Array, PyTree]:
        last = jax.lax.scan(lambda y, _: (step(y, x), None), y, length=num_steps)[0]
        return problem.upper(x, last, upper), last

    return jax.value_and_grad(objective, has_aux=True)(x)
