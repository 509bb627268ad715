"""SOBA and AID on quadratics: all errors stay below the comparison of `bilevel.theory`, at each k."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bilevel import AID, SOBA, Box, theory
from bilevel.guarantees import Guarantee, run_path
from problems import strategies
from problems.guarantees.instances import DIM, EPS, REGULAR, Known, Quadratic, quadratic

QUADRATIC = {
    "dim": strategies.dims(DIM),
    "condition_x": strategies.conditions(4),
    "condition_y": strategies.conditions(4),
    "coupling": strategies.sizes(),
    "pull": strategies.sizes(),
    "bend": strategies.sizes(),
    "spread": strategies.sizes(),
    "flip_x": strategies.booleans,
    "flip_y": strategies.booleans,
    "offset": strategies.switches,
    "e": strategies.sizes(),
    "d": strategies.sizes(),
    "u": strategies.sizes(),
}
quadratics = strategies.recipes(quadratic, **QUADRATIC)
HORIZON = (0, 1, 2, 5, 10, 20, 50, 100, 200)


def rounding(known: Known) -> Array:
    """Relative rounding of the numbers, amplified by the condition of the lower level in v(x)."""
    return 1e3 * EPS * known.size / known.base.mu


def _components(instance: Quadratic, solver: Any, state: Any) -> Array:
    """(e, d, u) at a state and the length of the step from it, shape [4]."""
    after = solver.step(instance.problem, state, jax.random.key(0))[0]
    errors = instance.errors(state.x, state.y, state.v)
    return jnp.stack([*errors, jnp.linalg.norm(after.x - state.x)])


def soba(make: Callable[..., Any] = SOBA.from_theory) -> Guarantee:
    """SOBA on all of the data."""

    def measure(instance: Quadratic, horizon: tuple[int, ...]) -> Array:
        known, problem, key = instance.constants, instance.problem, jax.random.key(0)
        solver = make(known.base, known.mu_F, known.L_F)
        state = solver.init(problem, key)._replace(x=instance.x, y=instance.y, v=instance.v)
        path = run_path(problem, solver, state, key, horizon, lambda state: _components(instance, solver, state))
        return path.at[0, :3].set(0)  # equal to the bound

    def bound(known: Known, k: int) -> Array:
        steps = theory.single_loop_steps(known.base, known.mu_F, known.L_F)
        rows = theory.single_loop_matrix(known.base, known.mu_F, known.L_F, steps)
        after = jnp.linalg.matrix_power(rows[:3], k) @ jnp.stack(known.start)
        return jnp.concatenate([after, rows[3:] @ after])

    return Guarantee(
        "soba", "ours, bilevel.theory", REGULAR, quadratics, measure, bound, HORIZON, rounding,
        "|x - x*|, |y - y(x)|, |v - v(x)| and |x+ - x| after k steps <= M^k of the first ones", "geometric",
    )  # fmt: skip


def aid(make: Callable[..., Any] = AID.from_theory, lower_steps: int = 5, products: int = 5) -> Guarantee:
    """AID with a few lower steps and CG iterations, warm-started."""

    def measure(instance: Quadratic, horizon: tuple[int, ...]) -> Array:
        known, problem, key = instance.constants, instance.problem, jax.random.key(0)
        solver = make(known.base, known.mu_F, known.L_F, lower_steps, products)
        state = solver.init(problem, key)._replace(x=instance.x, y=instance.y, v=instance.v)
        root = jnp.linalg.cholesky(instance.g.H[0])

        def look(state: Any) -> Array:
            e, d, _, moved = _components(instance, solver, state)
            energy = jnp.linalg.norm(root.T @ (state.v - instance.adjoint(state.x)))
            return jnp.stack([e, d, energy, moved])

        return run_path(problem, solver, state, key, horizon, look).at[0, :3].set(0)

    def bound(known: Known, k: int) -> Array:
        a, c = theory.aid_steps(known.base, known.mu_F, known.L_F, lower_steps, products)
        rows = theory.aid_matrix(known.base, known.mu_F, known.L_F, a, c, lower_steps, products)
        after = jnp.linalg.matrix_power(rows[:3], k) @ jnp.stack(known.start)  # |.|_H <= |.|, since |H| = 1
        return jnp.concatenate([after, rows[3:] @ after])

    return Guarantee(
        "aid", "ours, bilevel.theory", REGULAR, quadratics, measure, bound, HORIZON, rounding,
        "as SOBA, v in the energy norm, with 5 lower steps and 5 CG iterations", "geometric",
    )  # fmt: skip


class Boxed(NamedTuple):
    """A quadratic with grad^2 F = I over a box, where x* is the projection of the unconstrained minimiser."""

    free: Quadratic
    box: Box
    x_star: Array
    constants: Known


def boxed(key: Array, width: Array, **numbers: Any) -> Boxed:
    """The box reaches from -width to width times (1, …, DIM)/DIM."""
    free = quadratic(key, condition_x=jnp.ones(()), **numbers)
    reach = width * jnp.linspace(1 / DIM, 1.0, DIM)
    box = Box(-reach, reach)
    x_star = box.project(free.x_star)
    start = free.errors(free.x, free.y, free.v)._replace(e=jnp.linalg.norm(free.x - x_star))
    return Boxed(free, box, x_star, free.constants._replace(start=start))


def _of_free(check: Callable[[Quadratic], Array]) -> Callable[[Boxed], Array]:
    def checked(instance: Boxed) -> Array:
        return check(instance.free)

    checked.__name__ = check.__name__
    return checked


def projected(make: Callable[..., Any] = SOBA.from_theory) -> Guarantee:
    """SOBA with x in a box: the solution is a fixed point of the projected step."""

    def measure(instance: Boxed, horizon: tuple[int, ...]) -> Array:
        known, free, key = instance.constants, instance.free, jax.random.key(0)
        problem = dataclasses.replace(free.problem, x_set=instance.box)
        solver = make(known.base, known.mu_F, known.L_F)
        state = solver.init(problem, key)._replace(x=free.x, y=free.y, v=free.v)

        def look(state: Any) -> Array:
            _, d, u = free.errors(state.x, state.y, state.v)
            return jnp.stack([jnp.linalg.norm(state.x - instance.x_star), d, u, problem.x_set.violation(state.x)])

        return run_path(problem, solver, state, key, horizon, look)

    def bound(known: Known, k: int) -> Array:
        steps = theory.single_loop_steps(known.base, known.mu_F, known.L_F)
        rows = theory.single_loop_matrix(known.base, known.mu_F, known.L_F, steps, projected=True)
        after = jnp.linalg.matrix_power(rows[:3], k) @ jnp.stack(known.start)
        return jnp.concatenate([after, jnp.zeros(1)])

    numbers = {name: strategy for name, strategy in QUADRATIC.items() if name != "condition_x"}
    drawn = strategies.recipes(boxed, width=strategies.sizes(), **numbers)
    return Guarantee(
        "soba-projected", "ours, bilevel.theory", tuple(map(_of_free, REGULAR)), drawn, measure, bound,
        (1, 2, 5, 10, 20), rounding, "as SOBA, x in a box and never outside of it",
    )  # fmt: skip


SOBA_RATE = soba()
SOBA_PROJECTED = projected()
AID_RATE = aid()
