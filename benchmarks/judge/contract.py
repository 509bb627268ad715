"""The contract of solvers, as checks: tests hold all of the library to it, `bilevax check-solver` a stranger's file.

Each check raises `Broken`, in words: what was done, and what came out. Where it is silent the contract is kept.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import oracles
from bilevel.backend.bounded import Flat
from bilevel.diagnostics import BY_VALUE, IMPLICIT
from bilevel.run import lanes

PyTree = Any


class Broken(AssertionError):
    """The contract is not kept; the message says by what."""


def step_sizes(kind: type[bilevel.Solver]) -> list[str]:
    """The fields that are step sizes."""
    fields: Any = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]  # struct makes a dataclass of it
    return [field.name for field in fields if field.name.endswith("step_size")]


def start(problem: bilevel.BilevelProblem, solver: bilevel.Solver, key: jax.Array) -> PyTree:
    """The first state, as `solve` makes it."""
    return lanes.init(Flat(problem), Flat(solver), key, False)


def advance(
    problem: bilevel.BilevelProblem, solver: bilevel.Solver, state: PyTree, key: jax.Array, num_steps: int
) -> Any:
    """(state, info) by the compiled function of `solve`: one compilation serves most checks of a solver."""
    return lanes.advance_lanes(Flat(problem), Flat(solver), state, key, 0, num_steps, False)[:2]


def solve(problem: bilevel.BilevelProblem, *args: Any, many: bool = False, **kwargs: Any) -> Any:
    """`bilevel.solve`, measured by the true lower gap where the lower level is constrained."""
    measure = BY_VALUE if problem.constrained_lower else IMPLICIT
    return (bilevel.solve_many if many else bilevel.solve)(problem, *args, measure=measure, **kwargs)


def same(what: str, a: PyTree, b: PyTree, rtol: float = 0.0) -> None:
    """Equal leaf by leaf; to the bit where rtol is 0. `what` names the two."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise Broken(f"{what}: {jax.tree.structure(a)} is not {jax.tree.structure(b)}")
    for (path, one), other in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        if not np.allclose(one, other, rtol=rtol, atol=rtol, equal_nan=True):
            worst = np.max(np.abs(np.asarray(one, float) - np.asarray(other, float)))
            raise Broken(f"{what} differ in {jax.tree_util.keystr(path) or 'the value'} by {worst:.3g}")


def documented(kind: type[bilevel.Solver]) -> None:
    """The docstring has its five parts."""
    parts = ("Assumptions:", "Cost per step:", "Args:", "Reference:", "Differs from the paper")
    missing = [part for part in parts if part not in (kind.__doc__ or "")]
    if missing:
        raise Broken(f"the docstring of {kind.__name__} lacks {', '.join(missing)}")


def numbers_are_leaves(solver: bilevel.Solver) -> None:
    """What is not static is a number, so that `vmap` over settings works."""
    wrong = [leaf for leaf in jax.tree.leaves(solver) if not isinstance(leaf, float)]
    if wrong:
        raise Broken(f"its leaves hold {wrong[0]!r}; make loop lengths and choices static(default=…) fields")


def refuses_bad_steps(kind: type[bilevel.Solver]) -> None:
    """No step size is zero, negative or not finite, and the error names the field."""
    for name in step_sizes(kind):
        for bad in (-1.0, 0.0, float("nan"), float("inf")):
            try:
                kind(**{name: bad})
            except bilevel.InvalidInput as error:
                if f"{kind.__name__}.{name}: got" in str(error):
                    continue
                raise Broken(f"{name}={bad} is refused without its name: {error}") from error
            raise Broken(f"{name}={bad} is taken; call step_sizes(self, …) in __post_init__")


def jit_and_cost(problem: bilevel.BilevelProblem, solver: bilevel.Solver, key: jax.Array) -> None:
    """A step gives the same under jit and without, and calls the oracles that it declares."""
    state = start(problem, solver, key)
    compiled, first = advance(problem, solver, state, key, 1), jax.random.fold_in(key, 0)
    with jax.disable_jit(), oracles.counting() as count:
        eager = solver.step(problem, state, first)
    same("a step under jit and one without", compiled, eager, rtol=1e-12)
    counted, declared = count().as_dict(), solver.cost(problem).as_dict()
    kept = all(counted[name] >= least for name, least in declared.items()) if solver.adaptive else counted == declared
    if not kept:
        of = {name: (declared[name], counted[name]) for name in declared if declared[name] != counted[name]}
        raise Broken("cost declares, and a step calls: " + ", ".join(f"{k} {a:g}, {b:g}" for k, (a, b) in of.items()))


def output_like_init(problem: bilevel.BilevelProblem, solver: bilevel.Solver, key: jax.Array) -> None:
    """After three steps `output` is shaped like init's start, and finite."""
    state, _ = advance(problem, solver, start(problem, solver, key), key, 3)
    for name, out, like in zip("xy", solver.output(problem, state), problem.init(key), strict=True):
        shapes = [jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree) for tree in (out, like)]
        if shapes[0] != shapes[1]:
            raise Broken(f"output's {name} is {shapes[0]}; init's is {shapes[1]}")
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out)):
            raise Broken(f"output's {name} is not finite after three steps of {problem.upper.__name__}")


def chunks_and_resume(problem: bilevel.BilevelProblem, solver: bilevel.Solver, key: jax.Array, folder: Path) -> Any:
    """Neither the length of the chunks nor a break and resume changes a path, to the bit; the resumed run."""
    whole = solve(problem, solver, key=key, max_steps=23, every=23, tol=0.0)
    chunked = solve(problem, solver, key=key, max_steps=23, every=4, tol=0.0)
    same("23 steps at once and in chunks of 4", whole.state, chunked.state)
    path = folder / "run.checkpoint"
    solve(problem, solver, key=key, max_steps=9, every=3, tol=0.0, checkpoint=path)
    resumed = solve(problem, solver, key=key, max_steps=23, every=4, tol=0.0, checkpoint=path)
    same("23 steps at once and resumed after 9", whole.state, resumed.state)
    same("F at the end, at once and resumed", whole.record["value"][-1], resumed.record["value"][-1])
    return resumed


def vmap_equals_loop(
    problem: bilevel.BilevelProblem, make: Callable[[Any], bilevel.Solver], sizes: Sequence[float]
) -> None:
    """Twelve steps for several keys and step sizes together are those of a loop. make: a solver from a step size."""
    keys = jax.random.split(jax.random.key(7), len(sizes))

    def final(size: Any, key: jax.Array) -> Any:
        solver = make(size)
        return advance(problem, solver, start(problem, solver, key), key, 12)[0]

    together = jax.vmap(final)(jnp.array(sizes), keys)
    for lane, (size, key) in enumerate(zip(sizes, keys, strict=True)):
        mine = jax.tree.map(lambda leaf, lane=lane: leaf[lane], together)
        same("steps under vmap and in a loop", final(size, key), mine, rtol=1e-10)


def traced_once(instances: Sequence[tuple[bilevel.BilevelProblem, bilevel.Solver]], key: jax.Array) -> None:
    """Other data and other step sizes are not traced again; the state after a step is like that before."""

    def step(problem: Any, solver: Any, state: Any, key: jax.Array) -> Any:
        return solver.step(problem, state, key)

    chex.clear_trace_counter()  # it knows functions by their hash, which a later one may have again
    step = jax.jit(chex.assert_max_traces(step, n=1))
    for problem, solver in instances:
        state = start(problem, solver, key)
        try:
            after, _ = jax.eval_shape(step, problem, solver, state, key)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        except AssertionError as error:
            raise Broken(str(error).strip().partition("\n")[0]) from error


def respects_the_upper_set(problem: bilevel.BilevelProblem, solver: bilevel.Solver, key: jax.Array) -> None:
    """After four steps x is in X."""
    state, _ = advance(problem, solver, start(problem, solver, key), key, 4)
    outside = float(problem.x_set.violation(state.x))
    if outside > 1e-12:
        raise Broken(f"x is {outside:.3g} outside of X after four steps; project it")
