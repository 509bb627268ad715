"""What `bilevax check-solver FILE` asks of a solver in a file of its own: the contract, and short runs that are judged.

Three tiny instances whose optima are known: a strongly convex quadratic, the same with data in batches, and a quadratic
program under rows that couple y to x. Those that the solver refuses are left out, with its reason.
"""

import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

import bilevel
import problems
from benchmarks.errors import UsageError
from benchmarks.judge import contract
from benchmarks.judge.platform import Check
from bilevel.backend.schema import printable
from problems.instance import Instance

STEPS, SECONDS = 5000, 20.0
NEAR = 0.01  # of 1 + |F*|: what an end may be above F* and still be called near


def load(file: Path) -> type[bilevel.Solver]:
    """The one solver that the file defines, which is a program and runs here.

    Raises:
        UsageError: no file, an error in it, or not one solver.
    """
    name = f"solver_in_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file) if file.is_file() else None
    if spec is None or spec.loader is None:
        raise UsageError(f"{file}: expected a Python file with one subclass of bilevel.Solver.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a stranger's file raises
        raise UsageError(f"{file}: {type(error).__name__}: {error}") from error
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, bilevel.Solver)]
    own = [kind for kind in kinds if kind.__module__ == name and not kind.__name__.startswith("_")]
    if len(own) != 1:
        found = ", ".join(kind.__name__ for kind in own) or "none"
        raise UsageError(f"{file}: got {found}; expected one subclass of bilevel.Solver. A _ in front makes a helper.")
    return own[0]


def instances(seed: int = 0) -> dict[str, Instance]:
    """The three by their names."""
    sizes = {"dim_x": 3, "dim_y": 5, "num_samples": 8}
    return {
        "quadratic": problems.make("quadratic", seed=seed, **sizes),
        "batches": problems.make("quadratic", seed=seed, batch_size=2, **sizes),
        "rows": problems.make("constrained", kind="random", dim=3, rows=2, seed=seed),
    }


def check(kind: type[bilevel.Solver]) -> Iterator[Check]:
    """A line for each thing that is asked, as it is answered."""
    try:
        solver = kind()
    except Exception as error:  # whatever a stranger's class raises
        yield Check("defaults", f"{kind.__name__}() raises {_in_a_line(error)}", "fault", "Give defaults.")
        return
    if jax.tree_util.all_leaves([solver]):
        yield Check("pytree", "no", "fault", "Put @bilevel.struct.struct(kw_only=True) before the class.")
        return
    yield _kept(
        "documented", partial(contract.documented, kind), "its five parts", advice="docs/add-a-solver.md has the parts."
    )
    yield _kept("numbers are leaves", partial(contract.numbers_are_leaves, solver), "yes")
    yield _kept("bad step sizes", partial(contract.refuses_bad_steps, kind), "refused by name")
    others = instances(1)
    for name, instance in instances().items():
        reason = bilevel.solver.refusal(solver, instance.problem)
        if reason is None:
            yield from _on(name, kind, instance, others[name])
        else:
            yield Check(name, f"left out: {reason}", "ok")


def _on(name: str, kind: type[bilevel.Solver], instance: Instance, other: Instance) -> Iterator[Check]:
    """The contract on one instance, and a run."""
    problem, key, sizes = instance.problem, jax.random.key(0), contract.step_sizes(kind)
    make: Callable[[Any], bilevel.Solver] = lambda size: kind(**dict.fromkeys(sizes, size))  # noqa: E731
    solver = make(0.02)
    with tempfile.TemporaryDirectory() as folder:
        asked: dict[str, tuple[Callable[[], Any], str]] = {
            "jit, and cost": (partial(contract.jit_and_cost, problem, solver, key), "as declared"),
            "output": (partial(contract.output_like_init, problem, solver, key), "like init's, finite"),
            "chunks, resume": (
                partial(contract.chunks_and_resume, problem, solver, key, Path(folder)), "the same to the bit",
            ),
            "vmap": (partial(contract.vmap_equals_loop, problem, make, (0.01, 0.02)), "as in a loop"),
            "other data": (
                partial(contract.traced_once, [(problem, solver), (other.problem, make(0.01))], key), "traced once",
            ),
        }  # fmt: skip
        for what, (ask, found) in asked.items():
            yield _kept(f"{name}: {what}", ask, found)
    yield _run(name, kind(), instance)


def _kept(name: str, ask: Callable[[], Any], found: str, advice: str = "") -> Check:
    try:
        ask()
    except contract.Broken as error:
        return Check(name, printable(str(error)), "fault", advice)
    except Exception as error:  # whatever a stranger's step raises
        return Check(name, _in_a_line(error), "fault", advice)
    return Check(name, found, "ok")


def _in_a_line(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}".partition("\n")[0])


def _run(name: str, solver: bilevel.Solver, instance: Instance) -> Check:
    """With its default settings; what the referee says, and how far F is above F*."""
    limits: dict[str, Any] = {"max_steps": STEPS, "every": STEPS // 50, "time_limit": SECONDS}
    try:
        solution = bilevel.solve(instance.problem, solver, key=jax.random.key(0), progress=False, **limits)
    except Exception as error:  # whatever a stranger's step raises
        return Check(f"{name}: a run", _in_a_line(error), "fault")
    assert instance.truth is not None
    value, best = float(solution.record["value"][-1]), float(instance.truth.value)
    steps, excess = solution.stats["steps"], value - best
    found = f"{solution.status!s} after {steps} steps, F - F* = {excess:.1e}"
    near = abs(excess) <= NEAR * (1 + abs(best))
    converged = solution.status == bilevel.Status.CONVERGED
    if converged and not near:
        return Check(
            f"{name}: a run", found, "fault", "CONVERGED away from the optimum: define referee(self, problem)."
        )
    if converged or near:
        return Check(f"{name}: a run", found, "ok")
    return Check(f"{name}: a run", found, "note", solution.status.advice)
