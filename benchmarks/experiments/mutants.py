"""Planted faults: solvers are broken on purpose, and `verify` is asked to notice each of them.

    python -m benchmarks.experiments.mutants
    python -m benchmarks.experiments.mutants projections linear_solvers      # some families only

A guarantee that no fault can break checks nothing. Exit code 1 where a mutant survives.
"""
# pyright: reportCallIssue=false, reportArgumentType=false

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bilevel
import irl
from bilevel import AID, CG, GMRES, MINRES, SABA, SOBA, Neumann, hypergradient
from bilevel.guarantees import Guarantee, search
from problems.guarantees import (
    certified,
    constrained,
    ds_blo,
    ds_blo_runs,
    gradient,
    kkt,
    linear,
    ml_irl,
    rewards,
    sampled,
    sets,
    single_loop,
    soft,
    stochastic,
    stochastic_rates,
)  # fmt: skip


class Mutant(NamedTuple):
    """A fault by name, and the guarantee of the faulty thing, which must break."""

    fault: str
    guarantee: Guarantee


def faulty(solver: type, step: Callable[..., Any]) -> type:
    """A subclass of a solver whose step is step(true step, problem, state, key)."""

    def mutated(self: Any, problem: Any, state: Any, key: Any) -> Any:
        return step(lambda *a: solver.step(self, *a), problem, state, key), None

    return bilevel.struct.struct(type(f"Faulty{solver.__name__}", (solver,), {"step": mutated}))


def longer(make: Callable[..., Any], name: str, factor: float = 3.0) -> Callable[..., Any]:
    """A solver whose step size `name` is too long."""

    def made(*args: Any, **kw: Any) -> Any:
        solver = make(*args, **kw)
        return dataclasses.replace(solver, **{name: factor * getattr(solver, name).value})

    return made


def _adjoint(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """The step moves x with a changed adjoint; y and v move rightly."""

    def step(true: Callable, problem: Any, state: Any, key: Any) -> Any:
        wrong = true(problem, state._replace(v=change(state.v)), key)[0]
        return true(problem, state, key)[0]._replace(x=wrong.x)

    return step


def _kept(name: str) -> Callable[..., Any]:
    """A step that does not update the state's field `name`."""
    return lambda true, problem, state, key: true(problem, state, key)[0]._replace(**{name: getattr(state, name)})


def _unprojected(true: Callable, problem: Any, state: Any, key: Any) -> Any:
    return true(dataclasses.replace(problem, x_set=bilevel.Reals()), state, key)[0]


def _cold(true: Callable, problem: Any, state: Any, key: Any) -> Any:
    return true(problem, state._replace(v=jnp.zeros_like(state.v)), key)[0]


def solvers() -> Iterator[Mutant]:
    """Faults of SOBA, AID and SABA."""
    for fault, step in {
        "wrong sign of R_x' v": _adjoint(jnp.negative),
        "dropped R_x' v": _adjoint(jnp.zeros_like),
        "stale y": _kept("y"),
        "stale v": _kept("v"),
    }.items():
        yield Mutant(fault, single_loop.soba(faulty(SOBA, step).from_theory))
    for name in ("lower_step_size", "linear_step_size", "upper_step_size"):
        yield Mutant(f"{name} 3x", single_loop.soba(longer(SOBA.from_theory, name)))
    yield Mutant("projection left out", single_loop.projected(faulty(SOBA, _unprojected).from_theory))
    yield Mutant("upper step 3x", stochastic.soba(longer(SOBA.from_theory, "upper_step_size")))

    yield Mutant("adjoint restarted at 0", single_loop.aid(faulty(AID, _cold).from_theory))
    yield Mutant("stale y", single_loop.aid(faulty(AID, _kept("y")).from_theory))
    for name in ("lower_step_size", "upper_step_size"):
        yield Mutant(f"{name} 3x", single_loop.aid(longer(AID.from_theory, name)))
    yield Mutant("one lower step in place of 5", single_loop.aid(lambda *a: AID.from_theory(*a[:3], 1, a[4])))
    yield Mutant("one CG iteration in place of 5", single_loop.aid(lambda *a: AID.from_theory(*a[:4], 1)))
    fewer = lambda **kw: AID(**(kw | {"num_lower_steps": max(1, kw["num_lower_steps"] // 2)}))  # noqa: E731
    yield Mutant("half of the lower steps", certified.aid_bias(fewer))

    saba = SABA.from_theory
    for name in ("lower_step_size", "linear_step_size", "upper_step_size"):
        yield Mutant(f"{name} 3x", stochastic.saba(longer(saba, name)))
    yield Mutant("table of g without its new mean", stochastic.saba(faulty(SABA, _stale_mean).from_theory))


def batches() -> Iterator[Mutant]:
    """Faults that SOBA and SABA show over many steps on batches."""
    soba, saba = SOBA.from_theory, SABA.from_theory
    for fault, step in {"dropped R_x' v": _adjoint(jnp.zeros_like), "stale v": _kept("v")}.items():
        yield Mutant(fault, stochastic_rates.soba(faulty(SOBA, step).from_theory))
    for name in ("lower_step_size", "upper_step_size"):
        yield Mutant(f"{name} 3x", stochastic_rates.soba(longer(soba, name)))
        yield Mutant(f"{name} 3x", stochastic_rates.saba(longer(saba, name)))
    yield Mutant("table of g without its new mean", stochastic_rates.saba(faulty(SABA, _stale_mean).from_theory))
    yield Mutant("table of g never stored", stochastic_rates.saba(faulty(SABA, _kept("lower_table")).from_theory))


def _stale_mean(true: Callable, problem: Any, state: Any, key: Any) -> Any:
    """The correction by the table's mean is dropped: as if it were zero."""
    zero = jax.tree.map(jnp.zeros_like, state.lower_table.mean)
    return true(problem, state._replace(lower_table=state.lower_table._replace(mean=zero)), key)[0]


def _wrong_gradient(problem: Any, x: Any, y: Any, **kw: Any) -> Any:
    h = hypergradient(problem, x, y, **kw)
    return dataclasses.replace(h, gradient=-h.gradient)


def _without_implicit(problem: Any, x: Any, y: Any, step: Any) -> Any:
    h = hypergradient(problem, x, y, estimate=False).checked()
    fx, _ = bilevel.oracles.upper_gradients(problem, x, h.y, problem.upper_data.full())
    return x - step * fx, h.y


def _with(**changed: float) -> Callable[..., Any]:
    """`hypergradient` with some constants multiplied."""

    def compute(problem: Any, x: Any, y: Any, *, constants: Any, **kw: Any) -> Any:
        wrong = {name: factor * getattr(constants, name) for name, factor in changed.items()}
        return hypergradient(problem, x, y, constants=dataclasses.replace(constants, **wrong), **kw)

    return compute


def hypergradients() -> Iterator[Mutant]:
    """Faults of hypergradients, of their bounds, and of gradient descent."""
    yield Mutant("wrong sign", certified.solved(_wrong_gradient))
    yield Mutant("mu 3x too large in error_bound", certified.unsolved(_with(mu=3.0)))
    yield Mutant("L_fy dropped from error_bound", certified.unsolved(_with(L_fy=0.0)))
    yield Mutant("C_gxy dropped from error_bound", certified.unsolved(_with(C_gxy=0.0)))
    yield Mutant("L_gyy and L_gxy dropped from error_bound", certified.unsolved(_with(L_gyy=0.0, L_gxy=0.0)))
    step = gradient.gradient_step
    yield Mutant("wrong sign", gradient.strongly_convex(lambda p, x, y, s: step(p, x, y, -s)))
    yield Mutant("step 3x", gradient.convex(lambda p, x, y, s: step(p, x, y, 3 * s)))
    yield Mutant("step 3x", gradient.both(lambda p, x, y, s: step(p, x, y, 3 * s)))
    yield Mutant("dropped implicit term", gradient.strongly_convex(_without_implicit))
    yield Mutant("projection left out", gradient.projected(step))
    yield Mutant("step 3x", gradient.projected(lambda p, x, y, s: gradient.projected_step(p, x, y, 3 * s)))
    nesterov = gradient.accelerated_step
    yield Mutant("step 3x", gradient.accelerated(lambda p, x, y, s: nesterov(p, x, y, (3 * s[0], s[1]))))
    yield Mutant("extrapolation dropped", gradient.accelerated(lambda p, x, y, s: nesterov(p, x, y, (s[0], 0 * s[1]))))
    yield Mutant("extrapolation backwards", gradient.accelerated(lambda p, x, y, s: nesterov(p, x, y, (s[0], -s[1]))))


class _SteepestDescent(CG):
    """CG restarted at every iteration: the conjugation is dropped."""

    def iterate(self, matvec: Any, b: Any, v0: Any) -> Any:
        one = CG(tol=0.0, max_iterations=1)
        v = jax.lax.fori_loop(0, self.max_iterations, lambda _, v: one.iterate(matvec, b, v)[0], v0)
        return v, jnp.array(self.max_iterations)


def _fewer(kind: Any) -> Callable[..., Any]:
    return lambda tol, max_iterations: kind(tol=tol, max_iterations=max(1, max_iterations - 1))


def linear_solvers() -> Iterator[Mutant]:
    """Faults of linear solvers."""
    yield Mutant("wrong sign", linear.neumann(lambda step_size, **kw: Neumann(step_size=-step_size, **kw)))
    yield Mutant("step 3x", linear.neumann(lambda step_size, **kw: Neumann(step_size=3 * step_size, **kw)))
    yield Mutant("conjugation dropped", linear.cg(lambda **kw: _SteepestDescent(**kw)))
    yield Mutant("an iteration too few", linear.cg(_fewer(CG)))
    yield Mutant("an iteration too few", linear.residuals("minres", _fewer(MINRES)))
    yield Mutant("an iteration too few", linear.residuals("gmres", _fewer(GMRES)))


def _set(true: Callable[..., Any], project: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Sets whose projection is project(set, z)."""

    def make(*args: Any) -> Any:
        made = true(*args)
        kind = type(made)
        wrong = bilevel.struct.struct(type(f"Faulty{kind.__name__}", (kind,), {"project": project}))
        return wrong(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})

    return make


def _one_row_after_another(polyhedron: Any, z: Any) -> Any:
    for a, b in zip(polyhedron.A, polyhedron.b, strict=True):
        z = z - jnp.maximum(a @ z - b, 0) / (a @ a) * a
    return z


def projections() -> Iterator[Mutant]:
    """Faults of projections."""
    identity = lambda _, z: z  # noqa: E731
    for name, true in (("ball", sets._ball), ("simplex", sets._simplex)):
        yield Mutant("projection left out", sets.projection(_set(true, identity), name))
    yield Mutant("upper bound dropped", sets.projection(_set(sets._box, lambda s, z: jnp.maximum(z, s.lo)), "box"))
    yield Mutant(
        "centre forgotten", sets.projection(_set(sets._ball, lambda s, z: bilevel.Ball(s.radius).project(z)), "ball")
    )
    clipped = lambda s, z: s.scale * jnp.maximum(z, 1e-9) / jnp.sum(jnp.maximum(z, 1e-9))  # noqa: E731
    yield Mutant("clipped and scaled, not projected", sets.projection(_set(sets._simplex, clipped), "simplex"))
    rows = _set(sets._polyhedron, _one_row_after_another)
    yield Mutant("one row after another", sets.projection(rows, "polyhedron"))


def soft_programs() -> Iterator[Mutant]:
    """Soft dynamic programming and the likelihood."""

    def hard(mdp: Any, r: Any, Q: Any) -> Any:
        return r + mdp.discount * mdp.expect(jnp.max(Q, axis=-1))

    def undiscounted(mdp: Any, r: Any, Q: Any) -> Any:
        return r + mdp.expect(irl.soft.value(Q))

    def boastful(*args: Any, **kw: Any) -> Any:
        found = irl.soft.value_iteration(*args, **kw)
        return found._replace(error=found.error * args[0].discount)

    def twice(mdp: Any, r: Any) -> Any:
        return irl.soft.value_iteration(mdp, 2 * r)

    yield Mutant("maximum for log-sum-exp", soft.bellman(hard))
    yield Mutant("discount left out", soft.bellman(undiscounted))
    yield Mutant("error understated by gamma", soft.value_iteration(boastful))
    yield Mutant("reward taken twice", soft.reward_ball(twice))
    yield Mutant("wrong sign", soft.likelihood(lambda *a: -irl.likelihood_gradient(*a)))
    alone = lambda mdp, c, reward, x: irl.likelihood_gradient(mdp, 0 * c, reward, x, mdp.start)  # noqa: E731
    yield Mutant("dropped expert's term", soft.likelihood(alone))


def _through(true: Callable, problem: Any, state: Any, key: Any) -> Any:
    """A step from x to the other side."""
    after = true(problem, state, key)[0]
    return after._replace(x=2 * state.x - after.x)


def _same_noise(true: Callable, problem: Any, state: Any, key: Any) -> Any:
    return true(problem, state, jax.random.key(7))[0]


def _without_noise(**kw: Any) -> Any:
    return bilevel.DSBLO(**(kw | {"sigma": 1e-12 * kw["sigma"]}))


def normalised_momentum() -> Iterator[Mutant]:
    """Faults of DSBLO's momentum."""
    yield Mutant("stale q", ds_blo.lemmas(faulty(bilevel.DSBLO, _same_noise)))
    yield Mutant("q never passed on", ds_blo.lemmas(_without_noise))
    larger = lambda **kw: bilevel.DSBLO(**(kw | {"sigma": 3 * kw["sigma"]}))  # noqa: E731
    yield Mutant("q 3x too large", ds_blo.lemmas(larger))
    yield Mutant("step 3x", ds_blo.lemmas(lambda **kw: bilevel.DSBLO(**(kw | {
        "gamma_1": kw["gamma_1"] / 3, "gamma_2": kw["gamma_2"] / 3}))))  # fmt: skip
    yield Mutant("stale momentum", ds_blo.lemmas(faulty(bilevel.DSBLO, _kept("m"))))
    yield Mutant("wrong sign of the step", ds_blo.lemmas(faulty(bilevel.DSBLO, _through)))

    yield Mutant("stale q", ds_blo_runs.law(faulty(bilevel.DSBLO, _same_noise)))
    yield Mutant("q never passed on", ds_blo_runs.law(_without_noise))
    yield Mutant("q 3x too large", ds_blo_runs.law(larger))
    yield Mutant("wrong sign of the step", ds_blo_runs.law(faulty(bilevel.DSBLO, _through)))
    yield Mutant("step 3x", ds_blo_runs.momentum(lambda **kw: bilevel.DSBLO(**(kw | {
        "gamma_1": kw["gamma_1"] / 3, "gamma_2": kw["gamma_2"] / 3}))))  # fmt: skip
    yield Mutant("gradients added up, not averaged", ds_blo_runs.momentum(faulty(bilevel.DSBLO, _added_up)))
    yield Mutant("wrong sign of the momentum", ds_blo_runs.momentum(faulty(bilevel.DSBLO, _flipped)))
    yield Mutant("wrong sign of the step", ds_blo_runs.goldstein(faulty(bilevel.DSBLO, _through)))
    yield Mutant("stale momentum", ds_blo_runs.goldstein(faulty(bilevel.DSBLO, _kept("m"))))


def _added_up(true: Callable, problem: Any, state: Any, key: Any) -> Any:
    """The momentum becomes m + beta m + (1 - beta) g in place of beta m + (1 - beta) g."""
    after = true(problem, state, key)[0]
    return after._replace(m=after.m + state.m)


def _flipped(true: Callable, problem: Any, state: Any, key: Any) -> Any:
    after = true(problem, state, key)[0]
    return after._replace(m=-after.m)


def _no_rows(instance: Any, x: Any, y: Any, active: Any, q: Any, num_steps: int) -> Any:
    """The gradient as if no row were active."""
    _, y, active = constrained.gradient_at(instance, x, y, active, q, num_steps)
    return constrained.gradient_at(instance, x, y, 0 * active, 0 * q, 0)[0], y, active


def _rows_without_x(instance: Any, x: Any, y: Any, active: Any, q: Any, num_steps: int) -> Any:
    """B' w is dropped: the rows are taken for rows in y alone."""
    found = constrained.gradient_at(instance, x, y, active, q, num_steps)
    without = constrained.gradient_at(instance._replace(B=0 * instance.B, b=instance.b - instance.B @ x), x, y, active,
                                      q, num_steps)  # fmt: skip
    return without[0], *found[1:]


def implicit_gradients() -> Iterator[Mutant]:
    """Faults of gradients through constraints."""
    opposite = lambda *a: (-constrained.gradient_at(*a)[0], *constrained.gradient_at(*a)[1:])  # noqa: E731
    noiseless = lambda i, x, y, a, q, n: constrained.gradient_at(i, x, y, a, 3 * q, n)  # noqa: E731
    for fault, compute in {
        "wrong sign": opposite,
        "active rows ignored": _no_rows,
        "dropped B' w": _rows_without_x,
    }.items():
        yield Mutant(fault, constrained.accuracy(compute))
        yield Mutant(fault, constrained.drawn(compute))
    yield Mutant("q 3x too large", constrained.drawn(noiseless))


def learners() -> Iterator[Mutant]:
    """Faults of MLIRL and SampledPenalty."""
    yield Mutant("step 3x", ml_irl.ml_irl(longer(irl.MLIRL, "upper_step_size")))
    yield Mutant("Q is not updated", ml_irl.ml_irl(faulty(irl.MLIRL, _kept("y"))))
    yield Mutant("wrong sign", ml_irl.ml_irl(faulty(irl.MLIRL, _through)))
    theory = bilevel.SampledPenalty.from_theory
    yield Mutant("step 3x", sampled.descent(longer(theory, "upper_step_size")))
    yield Mutant("wrong sign", sampled.descent(faulty(bilevel.SampledPenalty, _through).from_theory))
    least = lambda values, t, entropic: (jnp.min(values) + t / 2, values)  # noqa: E731
    mean = lambda values, t, entropic: (jnp.mean(values), values)  # noqa: E731
    yield Mutant("minimum plus t/2 for both smoothings", sampled.value(least))
    yield Mutant("mean for minimum", sampled.value(mean))
    yield Mutant("step 3x", kkt.correspondence(longer(theory, "upper_step_size")))
    yield Mutant("wrong sign", kkt.correspondence(faulty(bilevel.SampledPenalty, _through).from_theory))
    yield Mutant("penalty halved", kkt.correspondence(_half_penalty))
    undiscounted = lambda drawn, mdp: drawn.batch(jnp.ones(())).occupancy(mdp)  # noqa: E731
    yield Mutant("demonstrations undiscounted", rewards.finite_sample(undiscounted))
    late = lambda drawn, mdp: mdp.discount * drawn.occupancy(mdp)  # noqa: E731
    yield Mutant("demonstrations a step late", rewards.finite_sample(late))
    yield Mutant("discount left out of the shaping", rewards.shaping(_undiscounted_shaping))
    yield Mutant("reward taken twice", rewards.network_ball(lambda mdp, r: irl.soft.value_iteration(mdp, 2 * r)))


def _half_penalty(*args: Any, **kw: Any) -> Any:
    solver: Any = bilevel.SampledPenalty.from_theory(*args, **kw)
    half = solver.penalty / 2
    return dataclasses.replace(solver, penalty=half, max_penalty=half)


def _undiscounted_shaping(mdp: Any, reward: Any, psi: Any) -> Any:
    return rewards.shaped(dataclasses.replace(mdp, discount=jnp.ones(())), reward, psi)


FAMILIES = (
    solvers, batches, hypergradients, linear_solvers, projections, soft_programs, learners, normalised_momentum,
    implicit_gradients,
)  # fmt: skip


def main(families: list[str], examples: int = 100) -> int:
    """Run the families named, default all; print a line each and the count."""
    found = [mutant for family in FAMILIES if not families or family.__name__ in families for mutant in family()]
    survived = 0
    for mutant in found:
        finding = search(mutant.guarantee, examples=examples, shrink=False)
        caught = finding.verdict == "broken"
        survived += not caught
        ratio = finding.counterexample.path.worst if finding.counterexample else getattr(finding.tightest, "worst", 0.0)
        word = "caught" if caught else "SURVIVED"
        print(
            f"{word:9s} {mutant.guarantee.name:22s} {mutant.fault:42s} {ratio:10.4g}  {finding.draws} draws", flush=True
        )
    print(f"{len(found) - survived} of {len(found)} mutants caught")
    return 1 if survived else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [family.__name__ for family in FAMILIES]
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"Of {', '.join(names)}. Default: all.")
    chosen = parser.parse_args().families
    if unknown := set(chosen) - set(names):
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    with jax.enable_x64(True):
        sys.exit(main(chosen))
